"""What the README and the pages of docs/ show runs as written."""

import re
import runpy
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

import lightning_xattn
from lightning_xattn.callback.pictures import Drawn
from lightning_xattn.loggers import WRITERS
from tests.toy import ToyModule, labelled_loader, toy_data, toy_loader

ROOT = Path(__file__).parents[1]
PAGES = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]}
BLOCKS = {
    page: re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    for page, path in PAGES.items()
}
LOOKED_INTO = {"docs/index.md", "docs/offline.md", "docs/own-model.md"}
"""Pages that have tests of their own."""


def presupposed():
    """What pages take for granted: a trained model and its data."""
    return {
        "__name__": "__main__",
        "model": ToyModule(),
        "batch": toy_data(5)[:],
        "loader": toy_loader(),
        "labelled_loader": labelled_loader(),
        "train_loader": toy_loader(),
        "val_loader": DataLoader(toy_data(40), batch_size=8),
    }


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a page's blocks one after another, in an empty folder; gives their names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # The page of loggers enters one, which leaves with the test.
    monkeypatch.setitem(WRITERS, "NotesLogger", None)

    def run_page(page):
        names = presupposed()
        for number, block in enumerate(BLOCKS[page], 1):
            exec(compile(block, f"{page}, block {number}", "exec"), names)
        return names

    return run_page


# Warnings that a user would see and act on, as of heads that are uniform still, do not end a block.
pytestmark = pytest.mark.filterwarnings("default")

LEAVES = {
    "README.md": {"lightning_logs/version_0/events*"},
    "docs/getting-started.md": {"lightning_logs/version_0/events*"},
    "docs/acting.md": {
        "lightning_logs/version_0/checkpoints/*.ckpt",
        "table/attention/*.parquet",
        "table/samples/*.parquet",
    },
    "docs/eeg.md": {"lightning_logs/version_0/events*", "lightning_logs/version_0/xattn_about/test/report.html"},
}
"""What the blocks of a page leave in their folder."""


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in BLOCKS if BLOCKS[page] and page not in LOOKED_INTO])
def test_the_blocks_of_a_page_run(page, run, tmp_path, monkeypatch):
    if page not in ("README.md", "docs/eeg.md"):  # most of the time goes into drawing
        for figures in ("main_figures", "other_figures"):
            monkeypatch.setattr(Drawn, figures, lambda self: ())
    run(page)
    for pattern in LEAVES.get(page, ()):
        assert list(tmp_path.glob(pattern)), pattern


def test_blocks_that_stand_in_two_places_are_the_same():
    assert BLOCKS["docs/index.md"] == BLOCKS["README.md"]
    assert BLOCKS["docs/getting-started.md"] == [(ROOT / "examples/own_model.py").read_text()]


@pytest.mark.slow
def test_offline(run, tmp_path):
    names = run("docs/offline.md")
    assert names["results"]["attention_dict"]["audio_to_text"].shape == (5, 3, 5, 7)
    assert "| all" in (tmp_path / "explained/report.md").read_text()
    assert {path.name for path in (tmp_path / "explained/figures").glob("*.png")} == {
        *("map_audio_to_text.png", "map_text_to_audio.png", "entropy_by_head.png"),
        *("class_comparison.png", "contribution_shares.png", "card.png", "attention.png"),
    }


@pytest.mark.slow
def test_the_weights_alone(run):
    assert run("docs/own-model.md")["pair"].forward.weights.shape == (5, 3, 5, 7)


def test_the_readmes_links_lead_to_files():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", PAGES["README.md"].read_text())
    assert len(targets) > 10
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_readme_leads_to_each_page_that_a_user_reads():
    pages = {page for page in PAGES if page.count("/") == 1} - {"docs/index.md", "docs/contributing.md"}
    assert pages <= set(re.findall(r"\]\((docs/[\w-]+\.md)\)", PAGES["README.md"].read_text()))


def test_the_reference_has_every_public_name():
    told = {name for page in PAGES for name in re.findall(r"^::: (\S+)", PAGES[page].read_text(), re.MULTILINE)}
    # The errors are told with their module.
    names = {f"lightning_xattn.{name}" for name in lightning_xattn.__all__ if not name.startswith("XAttn")}
    assert names | {"lightning_xattn.core.errors"} <= told


def test_every_picture_is_there():
    shown = [
        path.parent / picture
        for path in PAGES.values()
        for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", path.read_text())
    ]
    assert len(shown) > 15
    assert [picture for picture in shown if not picture.exists()] == []


def test_each_picture_of_a_number_stands_on_the_page_of_the_curves():
    script = runpy.run_path(str(ROOT / "docs/make_pictures.py"))
    shown = re.findall(r"\(images/(\w+)\.svg\)", PAGES["docs/reading-the-curves.md"].read_text())
    assert sorted(shown) == sorted(script["PICTURES"])
    for name in shown:
        assert (ROOT / f"docs/images/{name}.svg").exists()


@pytest.mark.slow
def test_pictures_are_made(tmp_path):
    script = runpy.run_path(str(ROOT / "docs/make_pictures.py"))
    for name in script["PICTURES"]:
        low, high = script["make_picture"](name, tmp_path)
        assert low < high, name
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()


def test_contributing_names_files_that_are_there():
    named = re.findall(r"`((?:lightning_xattn|tests)/[\w/.]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []
