"""Columns have one name each, and whatever reads the table of statistics reads all of it."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_xattn import AttentionExplainabilityCallback
from lightning_xattn.core.attention import Attention, Direction
from lightning_xattn.core.errors import SettingError
from lightning_xattn.evaluation.statistics import (
    SCORES,
    STATISTICS,
    Column,
    headline,
    sample_statistics,
    shown_columns,
    table_columns,
)
from lightning_xattn.functional import prepare_layer
from tests.toy import ToyModule, toy_data, validate

CURVES = (Path(__file__).parents[2] / "docs/all-curves.md").read_text()

EEG_TO_SPEC = Direction("eeg", "spec")


def numbers(direction=EEG_TO_SPEC, heads=3):
    generator = torch.Generator().manual_seed(0)
    there = torch.randn(2, heads, 5, 7, generator=generator).softmax(-1)
    back = torch.randn(2, heads, 7, 5, generator=generator).softmax(-1)
    pair = Attention(direction, there), Attention(direction.opposite, back)
    return sample_statistics(prepare_layer(*pair))


def test_a_name_is_read_as_it_was_written():
    columns = list(numbers())
    assert [Column.parse(str(column)) for column in columns] == columns
    assert len({str(column) for column in columns}) == len(columns)
    assert Column.parse("a_to_b/entropy/head_12") == Column("entropy", Direction("a", "b"), 12)


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "a_to_b/entropy/head_x", "a_to_b/entropy/head_1/more", "a b", "a/entropy"]
)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(SettingError, match=re.escape(f"'{name or ''}'") if name != "a/entropy" else "'a'"):
        Column.parse(name)


@pytest.mark.parametrize("modality", ["x_head", "head_1", "entropy_head_2"])
def test_a_modality_may_be_called_like_a_head(modality):
    columns = table_columns(numbers(Direction(modality, "y")))
    lists = [name for name, values in columns.items() if values.dim() == 2]
    statistics, directions = ("entropy", "sink", "sink_excess", "broken"), (f"{modality}_to_y", f"y_to_{modality}")
    assert lists == [f"{d}_{s}_heads" for s in statistics for d in directions]
    assert all(columns[name].shape == (2, 3) for name in lists)
    assert f"{modality}_to_y_entropy" in columns


def test_a_column_of_heads_has_each_head_in_its_place():
    found = numbers()
    lists = table_columns(found)["eeg_to_spec_entropy_heads"]
    for head in range(3):
        assert torch.equal(lists[:, head], found[Column("entropy", Direction("eeg", "spec"), head)])


def test_each_level_is_the_mean_of_the_one_below():
    found, direction = numbers(), Direction("eeg", "spec")
    for of in (direction, direction.opposite):
        heads = torch.stack([found[Column("entropy", of, head)] for head in range(3)])
        torch.testing.assert_close(found[Column("entropy", of)], heads.mean(0))
    both = torch.stack([found[Column("entropy", of)] for of in (direction, direction.opposite)])
    torch.testing.assert_close(found[Column("entropy")], both.mean(0))


def test_a_layer_has_the_mean_of_its_defined_directions():
    """Of the second sample a single spectrogram token is real, so EEG's entropy is undefined; of the third, none is."""
    generator = torch.Generator().manual_seed(1)
    real = torch.tensor([[True] * 7, [True] + [False] * 6, [False] * 7])
    there = torch.randn(3, 2, 5, 7, generator=generator).masked_fill(~real[:, None, None], -torch.inf).softmax(-1)
    back = torch.randn(3, 2, 7, 5, generator=generator).softmax(-1)
    pair = Attention(EEG_TO_SPEC, there, key_mask=real), Attention(EEG_TO_SPEC.opposite, back, query_mask=real)
    found = sample_statistics(prepare_layer(*pair))
    of_eeg, of_spec = (found[Column("entropy", one.direction)] for one in pair)
    assert of_eeg.isnan().tolist() == [False, True, True]
    expected = torch.stack([(of_eeg[0] + of_spec[0]) / 2, of_spec[1], torch.tensor(torch.nan)])
    torch.testing.assert_close(found[Column("entropy")], expected, equal_nan=True)


def test_reports_show_directions_where_there_are_any():
    columns = list(numbers())
    assert shown_columns("alignment", columns) == [Column("alignment")]
    assert list(map(str, shown_columns("entropy", columns))) == ["eeg_to_spec/entropy", "spec_to_eeg/entropy"]
    assert shown_columns("cross_modal_mass", columns) == []


def test_a_layer_is_judged_by_its_alignment_or_its_entropy():
    columns = list(numbers())
    assert headline(columns) == headline(columns[::-1]) == Column("alignment")
    assert headline([column for column in columns if column.statistic != "alignment"]) == Column("entropy")


def test_what_is_compared_has_a_number_of_the_layer_and_a_range_for_its_histogram():
    assert list(map(str, SCORES)) == ["confidence", "alignment", "entropy"]
    for score, ends in SCORES.items():
        assert "layer" in STATISTICS[score.statistic].levels
        assert all(map(math.isfinite, ends))


def test_scores_are_binned_from_the_smallest_to_the_largest_value_that_they_can_have():
    """A probability, a correlation, and an entropy over that of uniform attention."""
    assert {str(score): ends for score, ends in SCORES.items()} == {
        "confidence": (0, 1),
        "alignment": (-1, 1),
        "entropy": (0, 1),
    }


def documented(statistic):
    """The row of the page's table that a statistic gives."""
    topic, _, what = statistic.curve.partition("/")
    first = f"`xattn_{topic}/val/" + what.format(which="all", direction="<direction>") + "`"
    more = ["<class>"] if "{which}" in what else []
    more += ["correct", "incorrect", "gap"] if statistic.error_side and "{direction}" not in what else []
    more += ["head_<i>"] if "head" in statistic.levels else []
    low, high = statistic.range
    ends = f"{low:g} to {high:g}" if math.isfinite(high) else f"{low:g} or more"
    words = statistic.words[0].upper() + statistic.words[1:]
    return f"| {', '.join([first, *(f'`/{name}`' for name in more)])} | {words} | {ends} ({statistic.scale}) |"


def test_the_page_of_curves_has_the_table_of_statistics():
    """A statistic with a curve that is not in it, or of which it says something else, fails here."""
    for statistic in STATISTICS.values():
        assert statistic.curve is None or documented(statistic) in CURVES.splitlines()


@pytest.mark.slow
def test_every_curve_that_is_logged_is_on_the_page_of_curves():
    rows = [re.findall("`([^`]*)`", line.split("|")[1]) for line in CURVES.splitlines() if line.startswith("| `xattn_")]
    told = {first.rpartition("/")[0] + "/" + one.rpartition("/")[2] for first, *more in rows for one in (first, *more)}
    audio, text, target = toy_data(160).tensors
    audio, text = (tokens + target[:, None, None] for tokens in (audio, text))
    readable = DataLoader(TensorDataset(audio, text, target), batch_size=32)
    logged = validate(ToyModule(), AttentionExplainabilityCallback(curves="all"), readable)
    topics = {name.partition("/")[0] for name in logged}
    assert {"xattn_probe", "xattn_support", "xattn_contribution", "xattn_faithfulness", "xattn_alignment"} <= topics
    for curve in logged:
        name = re.sub(r"(audio|text)_to_(audio|text)", "<direction>", re.sub(r"/head_\d$", "/head_<i>", curve))
        name = re.sub(r"/(only_)?(audio|text)(/|$)", r"/\1<modality>\3", re.sub(r"/class_\d$", "/<class>", name))
        assert name in told, curve
