"""A matplotlib backend with windows, as a desktop's, that remembers what it was asked to show."""

from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg

shown = []


class FigureManager(FigureManagerBase):
    def show(self):
        shown.append(self.canvas.figure)


class FigureCanvas(FigureCanvasAgg):
    manager_class = FigureManager
