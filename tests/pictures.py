"""What is in a picture file."""

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from PIL import Image

VIRIDIS = (np.array(colormaps["viridis"].colors) * 255).round().astype(int)


def read_picture(path):
    """``(height, width, 3)``, of a picture 900 pixels wide, as figures of single samples are."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[1] == 900
    return pixels


def pixels_of(picture, colour):
    """How many pixels have a colour."""
    return int((np.abs(picture - np.array(to_rgb(colour)) * 255).max(-1) < 1.5).sum())


def shades_of(picture):
    """How many shades of the maps' colours there are in areas of a cell or more."""
    found = {tuple(colour) for colour in np.unique(picture[::2, ::2].reshape(-1, 3), axis=0)}
    return sum(tuple(shade) in found for shade in VIRIDIS)
