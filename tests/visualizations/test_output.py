"""A figure's ways out: a window where there is one, files that are whole or absent, nothing left with pyplot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure

from lightning_xattn import visualizations
from lightning_xattn.core.errors import SettingError
from lightning_xattn.visualizations import (
    Cell,
    Curve,
    Estimate,
    Panel,
    plot_attention_card,
    plot_attention_heatmap,
    plot_card,
    plot_class_attention,
    plot_class_comparison,
    plot_cross_modal_attention,
    plot_epochs,
    plot_head_contributions,
    plot_head_entropy,
    plot_modality_alignment,
)
from tests.messages import tells
from tests.visualizations import window_backend
from tests.visualizations.conftest import (
    assert_written,
    make_maps,
    make_pair,
    make_spectrograms,
    make_traces,
)


def plot_signals(**save):
    from lightning_xattn.hms.signal_plots import plot_attention_over_signals

    return plot_attention_over_signals(
        make_traces(), make_spectrograms(), make_pair(queries=1, keys=1), axes={}, **save
    )


PAIR = make_pair()
GROUPS = [Estimate(0.3, 0.2, 0.4, 9), Estimate(0.2, 0.1, 0.3, 7)]
PLOTS = {
    "attention_card": lambda **save: plot_attention_card(
        [], {"x_to_y": make_maps(2, 3, 5)}, [4, 5], ["a", "b"], **save
    ),
    "attention_heatmap": lambda **save: plot_attention_heatmap(PAIR["eeg_to_spec"], **save),
    "attention_over_signals": lambda **save: plot_signals(**save),
    "class_attention": lambda **save: plot_class_attention(
        make_maps(2, 3, 5), [4, 5], ["a", "b"], direction="x_to_y", **save
    ),
    "class_comparison": lambda **save: plot_class_comparison({"r": (GROUPS, GROUPS)}, ["a", "b"], **save),
    "cross_modal_attention": lambda **save: plot_cross_modal_attention(PAIR, **save),
    "epochs": lambda **save: plot_epochs([Panel("a", [Curve("correct", [0, 1], [0.1, 0.2])], (0, 1))], **save),
    "head_contributions": lambda **save: plot_head_contributions(PAIR, **save),
    "head_entropy": lambda **save: plot_head_entropy({"x_to_y": [[0.5, 0.7]]}, [4], ["a"], **save),
    "modality_alignment": lambda **save: plot_modality_alignment(PAIR, **save),
    "card": lambda **save: plot_card(["a"], {"a": GROUPS[0]}, "none", [Cell("both", *GROUPS, GROUPS[0])], **save),
}


def test_every_plot_is_here_and_comes_with_a_star() -> None:
    here = {name for name in visualizations.__all__ if name.startswith("plot_")}
    assert {f"plot_{name}" for name in PLOTS} == {"plot_attention_over_signals", *here}  # that of signals is in hms
    names: dict[str, object] = {}
    exec("from lightning_xattn.visualizations import *", names)
    assert set(visualizations.__all__) <= set(names)


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_saves_the_figure_that_it_returns(name: str, tmp_path: Path, monkeypatch) -> None:
    saved = []

    def savefig(figure: Figure, path: Path, **settings: object) -> None:
        saved.append((figure, settings))
        Path(path).touch()

    monkeypatch.setattr(Figure, "savefig", savefig)
    path = tmp_path / f"{name}.svg"
    assert saved == [(PLOTS[name](save_path=path), {"format": "svg"})]
    assert list(tmp_path.iterdir()) == [path]
    assert not pyplot.get_fignums()


def test_a_figure_is_saved_in_folders_that_are_made(tmp_path: Path) -> None:
    figure, path = PLOTS["head_entropy"](), tmp_path / "new" / "folder" / "figure.png"
    PLOTS["head_entropy"](save_path=path)
    assert_written(path, figure)
    assert list(path.parent.iterdir()) == [path], "no part is left"


def test_a_suffix_that_cannot_be_written_is_refused_with_those_that_can(tmp_path: Path) -> None:
    for name in ("figure.docx", "figure"):
        with pytest.raises(SettingError, match=tells("save_path", ".pdf", ".png", ".svg", f"got '{tmp_path / name}'")):
            plot_cross_modal_attention(PAIR, save_path=tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_half_way(self: Figure, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    path = tmp_path / "figure.png"
    path.write_bytes(b"the one before")
    monkeypatch.setattr(Figure, "savefig", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        plot_cross_modal_attention(PAIR, save_path=str(path))
    assert path.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def backend():
    """Take another backend for a while."""
    before = matplotlib.get_backend()
    yield pyplot.switch_backend
    pyplot.switch_backend(before)


def test_show_opens_a_window_without_registering_the_figure(backend) -> None:
    backend("module://tests.visualizations.window_backend")
    figure = PLOTS["head_entropy"]()
    window_backend.shown.clear()
    figure.show()
    assert window_backend.shown == [figure]
    assert not pyplot.get_fignums()
    figure.draw_without_rendering()


@pytest.mark.parametrize("display", ["", ":7"])
def test_show_is_silent_where_there_are_no_windows(backend, display: str, monkeypatch) -> None:
    backend("agg")
    monkeypatch.setenv("DISPLAY", display)
    figure = PLOTS["head_entropy"]()
    figure.show()
    assert not pyplot.get_fignums()
    figure.draw_without_rendering()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TkAgg", ""])
def test_a_plain_script_may_show_on_a_machine_without_a_screen(name: str, tmp_path: Path) -> None:
    code = (
        "import torch; from lightning_xattn.visualizations import plot_attention_heatmap\n"
        "fig = plot_attention_heatmap(torch.full((3, 5), 0.2)); fig.show(); fig.savefig('figure.png')"
    )
    env = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "", "MPLBACKEND": name}
    env = {key: value for key, value in env.items() if value}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert_written(tmp_path / "figure.png", plot_attention_heatmap(torch.full((3, 5), 0.2)))
