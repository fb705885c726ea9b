"""Every number of a figure is the summary's: of its class and outcome, direction and head, with both ends."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import BboxImage

from lightning_xattn.core.attention import TokenAxis
from lightning_xattn.evaluation.curves import epoch_curves, epoch_record, fusion_curves, fusion_record
from lightning_xattn.evaluation.results import REST
from lightning_xattn.evaluation.statistics import ALIGNMENT, Column
from lightning_xattn.functional.outcomes import CORRECT, INCORRECT, UNKNOWN
from lightning_xattn.report.estimates import estimate_mean
from lightning_xattn.report.figures import (
    attention_figure,
    card_figure,
    dataset_figures,
    epoch_figures,
    fusion_figures,
    limit_classes,
    limit_layers,
    save_dataset_figures,
)
from lightning_xattn.report.headline import describe_headline
from tests.explained import NAMES, dataset, summary
from tests.report.conftest import CLASSES, SUBSETS
from tests.visualizations.conftest import drawn, drawn_groups, panels, row_names, texts


@pytest.fixture(scope="module")
def figures(result):
    """By tag without "xattn_" and stage."""
    one, said = result.headline, {"classes_by": "target", "context": "epoch 4"}
    axes = {"left": TokenAxis("second", names=list("stuvw")), "right": TokenAxis("region", names=["too", "few"])}
    found = [
        *epoch_figures(one, "val", CLASSES, axes=axes, **said),
        *fusion_figures(result.fusion, "val", CLASSES, **said),
    ]
    return {tag.removeprefix("xattn_").replace("/val", ""): figure for tag, figure in found}


def test_each_figure_has_its_tag_and_says_where_it_is_from(figures):
    assert list(figures) == [
        *("map/left_to_right", "map/right_to_left", "entropy/by_head", "outcome/class_comparison"),
        "contribution/shares",
    ]
    for name, figure in figures.items():
        assert "epoch 4" in texts(figure)
        assert "per true class" in texts(figure).replace("\n", " "), name


def test_the_page_of_maps_has_those_of_each_class(result, members):
    axes = {"left": TokenAxis("second", names=list("stuvw")), "right": TokenAxis("region", names=["too", "few"])}
    figure = attention_figure(result.headline, CLASSES, classes_by="target", axes=axes, context="epoch 4")
    found = {one.get_gid(): one.get_array() for one in figure.findobj(BboxImage)}
    for direction, maps in result.headline.maps.items():
        for class_id, weights in enumerate(maps.numpy()):
            lifts = weights * weights.shape[1]
            # The 7 right tokens lie horizontally.
            expected = lifts if lifts.shape == (5, 7) else lifts.T
            np.testing.assert_allclose(found.pop(f"{direction}/{class_id}"), expected, rtol=1e-6)
    assert set(found) == {"left_to_right/scale", "right_to_left/scale"}
    said = texts(figure)
    for name in CLASSES:
        assert f"{name} (n={int(members[name].sum())})" in said
    assert "epoch 4" in said
    # An axis of another length is not used.
    assert {"second", "Right token"} <= set(said.splitlines())


def test_the_attention_card_is_drawn_of_the_summary(monkeypatch):
    calls = kept_calls(monkeypatch, "plot_attention_card")
    one = summary([0, 0, 0, 1, 1, -1], [CORRECT, CORRECT, INCORRECT, INCORRECT, UNKNOWN, CORRECT])
    there, back = one.heads
    assert one.tokens == {there: (5, 7), back: (7, 5)}
    one.tokens = {there: (500, 7), back: (7, 500)}
    axes = {"eeg": TokenAxis("region", names=[f"{i}" for i in range(500)]), "spec": TokenAxis("s", names=list("ab"))}
    said = {"classes_by": "prediction", "axes": axes, "context": "here"}
    attention_figure(one, NAMES, **said)
    attention_figure(one, (), **said)
    (_, (measures, maps, counts, names), settings), (_, (_, _, of_all, no_names), others) = calls
    assert (counts, list(names), settings["map_names"]) == ([3, 2, 0], list(NAMES), list(NAMES))
    assert [*maps] == ["eeg_to_spec", "spec_to_eeg"]
    assert all(maps[str(direction)] is of_one for direction, of_one in one.maps.items())
    tokens = {"eeg_to_spec": (500, 7), "spec_to_eeg": (7, 500)}
    more = {"axes": {"eeg": axes["eeg"]}, "tokens": tokens, "group_noun": None, "map_names": list(NAMES)}
    assert settings == said | more
    assert (of_all, no_names, others["map_names"], others["classes_by"]) == ([6], (), ["all samples"], None)
    columns = {"alignment": ALIGNMENT, "entropy EEG → Spec": Column("entropy", there)}
    columns |= {"entropy Spec → EEG": Column("entropy", back)}
    assert [measure.title for measure in measures] == list(columns)
    for measure, column in zip(measures, columns.values(), strict=True):
        assert repr(measure.classes) == repr([estimate_mean(one, column, i) for i in range(3)])
        expected = [estimate_mean(one, column, None, outcome) for outcome in (CORRECT, INCORRECT)]
        assert repr(measure.outcomes) == repr(expected)
        null = one.alignment_null if column == ALIGNMENT else math.nan
        assert measure.null == pytest.approx(null, nan_ok=True)


@pytest.mark.parametrize("direction", ["left_to_right", "right_to_left"])
def test_each_class_and_outcome_has_its_map_and_its_count(result, members, figures, direction):
    figure = figures[f"map/{direction}"]
    maps, outcome_maps = (
        {str(name): of_one.numpy() for name, of_one in them.items()}[direction]
        for them in (result.headline.maps, result.headline.outcome_maps)
    )
    for panel, (name, (class_id, outcome)) in zip(panels(figure), SUBSETS.items(), strict=True):
        assert panel.get_title() == f"{name} (n={int(members[name].sum())})"
        expected = maps[class_id] if outcome is None else outcome_maps[outcome]
        expected = expected * expected.shape[1]
        # The longer axis lies horizontally: that of the 7 right tokens.
        np.testing.assert_allclose(drawn(panel), expected if expected.shape == (5, 7) else expected.T, rtol=1e-6)
    numbers = {"left_to_right": "5 queries, 7 keys", "right_to_left": "7 queries, 5 keys"}
    assert numbers[direction] in texts(figure).replace("\n", " ")
    # An axis of another length is not used.
    role, other = ("query", "key") if direction == "left_to_right" else ("key", "query")
    assert figure.get_supylabel().replace("\n", " ") == f"{role}: second"
    assert figure.get_supxlabel() == f"{other}: Right token"


def test_each_head_of_each_class_has_its_entropy(result, members, figures):
    shown = panels(figures["entropy/by_head"])
    assert [panel.get_title() for panel in shown] == ["Left → Right", "Right → Left"]
    for panel, direction in zip(shown, result.headline.heads, strict=True):
        expected = [
            [result.headline.mean(Column("entropy", direction, head), i) for head in range(3)]
            for i in range(len(CLASSES))
        ]
        assert len(np.unique(expected)) == 12
        np.testing.assert_allclose(drawn(panel), expected, rtol=1e-6)
        assert row_names(panel) == [f"{name} (n={int(members[name].sum())})" for name in CLASSES]


def sizes_of(result, members, known=None):
    """What stands beside the rows: of how many samples and groups they are, of those that are known."""
    names = []
    for name in SUBSETS:
        chosen = members[name] if known is None else members[name] & known
        names.append(f"{name} (n={int(chosen.sum())} of {len(result.fusion.groups[chosen].unique())})")
    return names


def test_classes_and_outcomes_have_their_means_intervals_and_counts(result, members, figures):
    one, figure = result.headline, figures["outcome/class_comparison"]
    there, back = one.heads
    expected = {
        "probability of the predicted class": Column("confidence"),
        "Pearson r": ALIGNMENT,
        "0: one key, 1: uniform": Column("entropy", there),
        "0: one key, 1: uniform ": Column("entropy", back),
    }
    for panel, column in zip(panels(figure), expected.values(), strict=True):
        means = [(one.mean(column, *subset), *one.interval(column, *subset)) for subset in SUBSETS.values()]
        assert np.isfinite(means).all()
        np.testing.assert_allclose(drawn_groups(panel), means, rtol=1e-5)
        assert row_names(panel) == sizes_of(result, members)
    titles = [text.get_text().replace("\n", " ") for text in figure.texts]
    assert [title for title in titles if title.endswith(")")] == [
        "confidence (probability of the predicted class)",
        "alignment (Pearson r)",
        *("entropy Left → Right (0: one key, 1: uniform)", "entropy Right → Left (0: one key, 1: uniform)"),
    ]
    nulls = [[line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"] for ax in panels(figure)]
    assert nulls == [[], [one.alignment_null], [], []]
    assert "95 % CI by groups" in texts(figure).replace("\n", " ")


def test_each_modality_has_its_share_of_each_class_and_outcome(result, members, figures):
    figure, fusion = figures["contribution/shares"], result.fusion
    for panel, modality in zip(panels(figure), ("left", "right"), strict=True):
        shares = [fusion.share(modality, *subset) for subset in SUBSETS.values()]
        expected = [(100 * one.mean, 100 * one.low, 100 * one.high) for one in shares]
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(drawn_groups(panel), expected, rtol=1e-5)
        assert row_names(panel) == sizes_of(result, members, fusion.numbers["phi/left"].isfinite())
        low, high = panel.get_xlim()
        assert -60 <= low < high <= 160
    titles = [text.get_text() for text in figure.texts if text.get_text().startswith("share")]
    assert titles == [f"share of {name} (% of the contributions)" for name in ("Left", "Right")]
    assert "95 % CI by groups" in texts(figure).replace("\n", " ")


def test_where_shares_are_not_defined_there_is_no_figure_of_them(result):
    def draws(class_names=CLASSES, **changed):
        fusion = result.fusion.merge_classes(range(4))  # a copy
        vars(fusion).update(changed)
        figures = fusion_figures(fusion, "val", class_names, classes_by="target", context="")
        return [tag for tag, _ in figures].count("xattn_contribution/val/shares")

    nothing = result.fusion.outcomes * 0 + UNKNOWN
    assert (draws((), outcomes=nothing), draws((), outcomes=nothing + INCORRECT - UNKNOWN)) == (0, 1)
    assert (draws(contribution_problem="none"), draws(is_regression=True)) == (0, 0)


# Over epochs

OUTCOME_NAMES = "correct", "incorrect"


@pytest.fixture(scope="module")
def records(result):
    """Of three epochs, which differ: the numbers of the data set, and what is a little above and below."""
    curves = epoch_curves(result.headline, "val", CLASSES)
    of_fusion = fusion_curves(result.fusion, "val", CLASSES, has_attention=True)
    whole = epoch_record(result.headline, "val", curves) | fusion_record(result.fusion, "val", of_fusion)

    def moved(epoch):
        numbers = {name: value + 0.01 * epoch for name, value in whole.items() if isinstance(value, float)}
        return whole | numbers | {"stage": "val", "epoch": epoch, "step": 10 * epoch}

    return [moved(0) | {"stage": "test", "epoch": 9}, *map(moved, (0, 2, 3))]


def test_the_cards_numbers_are_the_summarys(result, monkeypatch):
    calls, fusion = kept_calls(monkeypatch, "plot_card"), result.fusion
    card_figure(result, context="test, epoch 3")
    ((_, (modalities, probes, shares, cells), settings),) = calls
    assert modalities == fusion.modalities
    right = {name: fusion.estimate(f"right/{name}") for name in (*modalities, "joint")}
    assert repr(probes) == repr(right | {"the model": fusion.estimate("correct")})
    assert repr(shares) == repr({name: fusion.share(name) for name in modalities})
    known = [(one.name, one.share, one.accuracy, one.confidence) for one in fusion.cells if one.samples]
    assert repr([tuple(one) for one in cells]) == repr(known)
    assert settings == {
        "largest_class": fusion.largest_class,
        "sentence": describe_headline(result).sentence,
        "group_noun": "groups",
        "context": "test, epoch 3; 130 samples, 23 groups",
    }
    fusion = copy(fusion)
    fusion.contribution_problem, fusion.support_problem = "needs 128 samples, this run had 97", "it needs a probe"
    fusion.support_cell = torch.full_like(fusion.support_cell, -1)
    fusion.__dict__.pop("cells", None)
    card_figure(replace(result, fusion=fusion))
    _, (_, _, shares, cells), _ = calls[1]
    assert shares == "Not computed: needs 128 samples, this run had 97."
    assert cells == "Not computed: needs a probe."
    assert card_figure(replace(result, fusion=None)) is None


EPOCHS = {
    "Probe accuracy (%)": {
        "Left": "probe/left",
        "Right": "probe/right",
        "joint": "probe/joint",
        "the model": "accuracy",
    },
    "Contribution (%)": {"Left": "contribution/share/left", "Right": "contribution/share/right"},
    "Support (% of predictions)": {
        **{"both": "support/both", "only Left": "support/only_left", "only Right": "support/only_right"},
        "neither (probes agree)": "support/neither_agree",
        "neither (probes differ)": "support/neither_differ",
    },
    "Accuracy by support (%)": {
        "all predictions": "accuracy",
        "supported by all": "support/accuracy/supported",
        "supported by none": "support/accuracy/unsupported",
    },
}
"""By panel, its curves and their names in the history."""


def test_from_three_validations_on_the_card_shows_the_history(result, records):
    figure, said = card_figure(result, records, "val, epoch 3"), records[1:]
    assert "val, epoch 3" in texts(figure)
    assert describe_headline(result).sentence in texts(figure).replace("\n", " ")
    shown = {plot.title: plot for plot in figure.plots}
    assert list(shown) == list(EPOCHS)
    for title, curves in EPOCHS.items():
        lines = {line.get_label(): line for line in shown[title].lines}
        assert list(lines) == [*curves, *(["largest class"] if title.startswith("Probe") else [])]
        for name, key in curves.items():
            assert lines[name].get_xdata().tolist() == [0, 2, 3]
            expected = [100 * one.get(key, math.nan) for one in said]
            np.testing.assert_allclose(lines[name].get_ydata(), expected)
            if f"{key}_low" not in said[0]:
                continue
            low, high = ([100 * one[f"{key}_{end}"] for one in said] for end in ("low", "high"))
            edge = {tuple(point) for point in shown[title].bands[name].get_path().vertices.round(6)}
            assert edge == {(x, round(y, 6)) for x, y in zip([0, 2, 3] * 2, [*low, *high], strict=True)}
    largest = shown["Probe accuracy (%)"].lines[-1].get_ydata()
    np.testing.assert_allclose(largest, [100 * one["largest_class"] for one in said])


def test_a_test_and_fewer_validations_have_the_card_of_one_evaluation(result, records):
    assert not card_figure(result, records[:3]).plots
    assert not card_figure(result, [*records[1:], records[0]]).plots
    assert card_figure(result, records[1:]).plots


def test_several_validations_of_an_epoch_are_drawn_over_steps(result, records):
    figure = card_figure(result, [one | {"epoch": 0} for one in records[1:]])
    assert {plot.label for plot in figure.plots} == {"step"}
    assert figure.plots[0].lines[0].get_xdata().tolist() == [0, 20, 30]


def test_what_is_no_share_has_its_size(result, records):
    fusion = copy(result.fusion)
    fusion.is_regression = True
    sizes = {f"contribution/size/{name}{end}": 7.0 for name in ("left", "right") for end in ("", "_low", "_high")}
    found = {
        plot.title: plot
        for plot in card_figure(replace(result, fusion=fusion), [one | sizes for one in records[1:]]).plots
    }
    lines = {line.get_label(): line.get_ydata().tolist() for line in found["Contribution (size)"].lines}
    assert lines == {"Left": [7] * 3, "Right": [7] * 3}


def kept_calls(monkeypatch, *names):
    """What the functions of `visualizations` that draw are called with, in the place of drawing."""
    calls = []
    for name in names:
        keep = lambda *args, name=name, **settings: calls.append((name, args, settings))  # noqa: E731
        monkeypatch.setattr(f"lightning_xattn.visualizations.{name}", keep)
    return calls


def test_what_the_figures_of_a_layer_are_drawn_of(monkeypatch):
    calls = kept_calls(monkeypatch, "plot_class_attention", "plot_head_entropy", "plot_class_comparison")
    one = summary([0, 0, 0, 1, 1, -1], [CORRECT, CORRECT, INCORRECT, INCORRECT, UNKNOWN, CORRECT])
    axes = {"eeg": TokenAxis("region", names=list("abcde")), "spec": TokenAxis("second", names=list("tuvwxyz"))}
    tags = [tag for tag, _ in epoch_figures(one, "val", NAMES, classes_by="prediction", axes=axes, context="here")]
    assert tags == [
        *("xattn_map/val/eeg_to_spec", "xattn_map/val/spec_to_eeg"),
        *("xattn_entropy/val/by_head", "xattn_outcome/val/class_comparison"),
    ]
    said, counts = {"classes_by": "prediction", "context": "here"}, [3, 2, 0]
    for (name, (maps, sizes, names), settings), direction in zip(calls[:2], one.heads, strict=True):
        assert (name, sizes, names) == ("plot_class_attention", [*counts, 3, 2], [*NAMES, "correct", "incorrect"])
        queries, keys = (5, 7) if direction.query == "eeg" else (7, 5)
        asked = f"here; {queries} queries, {keys} keys"
        of_axes = {"query_axis": axes[direction.query], "key_axis": axes[direction.key]}
        assert settings == said | of_axes | {
            "direction": str(direction),
            "context": asked,
            "tokens": (queries, keys),
        }
        of_outcomes = one.outcome_maps[direction]
        expected = [*one.maps[direction], of_outcomes[CORRECT], of_outcomes[INCORRECT]]
        np.testing.assert_array_equal(maps, np.stack(expected))
    entropies = {
        str(direction): [[one.mean(Column("entropy", direction, head), i) for head in range(3)] for i in range(3)]
        for direction in one.heads
    }
    assert repr(calls[2]) == repr(("plot_head_entropy", (entropies, counts, list(NAMES)), said))
    name, (numbers, names), settings = calls[3]
    assert (name, names) == ("plot_class_comparison", list(NAMES))
    titles = {"alignment (Pearson r)": ALIGNMENT}
    for direction, way in zip(one.heads, ("EEG → Spec", "Spec → EEG"), strict=True):
        titles[f"entropy {way} (0: one key, 1: uniform)"] = Column("entropy", direction)
    of_subsets = [(i, None) for i in range(3)], [(None, CORRECT), (None, INCORRECT)]
    assert repr(numbers) == repr(
        {
            title: tuple([estimate_mean(one, column, *subset) for subset in subsets] for subsets in of_subsets)
            for title, column in titles.items()
        }
    )
    assert settings == said | {"nulls": {"alignment (Pearson r)": one.alignment_null}, "group_noun": None}


# Of a data set


def test_a_data_sets_figures_are_named_for_files(result, monkeypatch):
    def tell(kind):
        return lambda one, scope, names, context, **_: [(f"xattn_{tag}".format(scope), context) for tag in kind]

    of_layer = ["map/{}/a_to_b", "entropy/{}/by_head", "outcome/{}/class_comparison"]
    monkeypatch.setattr("lightning_xattn.report.figures.epoch_figures", tell(of_layer))
    monkeypatch.setattr("lightning_xattn.report.figures.fusion_figures", tell(["contribution/{}/shares"]))
    monkeypatch.setattr("lightning_xattn.report.figures.card_figure", lambda explained: "the card")
    attention = "lightning_xattn.report.figures.attention_figure"
    monkeypatch.setattr(attention, lambda summary, names, classes_by, axes, context: context)
    layers = {"first": result.headline, "block/2": copy(result.headline)}
    found = dict(dataset_figures(replace(result, summaries=layers)))
    names = ["attention", "map_a_to_b", "entropy_by_head", "class_comparison"]
    size = "130 samples of 23 groups"
    assert found == {
        "card": "the card",
        "contribution_shares": size,
        **dict.fromkeys(names, f"layer first, {size}"),
        **{f"{name}_block/2": f"layer block/2, {size}" for name in names},
    }


def test_they_are_saved_under_their_names(tmp_path, monkeypatch):
    given = [("map_a_to_b", Figure()), ("class_comparison_block/2", Figure())]
    monkeypatch.setattr("lightning_xattn.report.figures.dataset_figures", lambda explained: given)
    save_dataset_figures(None, tmp_path)
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert found == ["class_comparison_block/2.png", "map_a_to_b.png"]


def test_without_classes_all_samples_are_one():
    whole = summary([-1] * 5, [UNKNOWN] * 5, n_classes=0)
    found = dict(epoch_figures(whole, "test", (), classes_by="target", axes={}, context=""))
    assert list(found) == [*(f"xattn_map/test/{one}" for one in whole.heads), "xattn_entropy/test/by_head"]
    (panel,) = panels(found["xattn_map/test/eeg_to_spec"])
    assert panel.get_title() == "all samples (n=5)"
    assert " class" not in texts(found["xattn_map/test/eeg_to_spec"])


def test_of_many_classes_the_largest_have_panels_and_the_others_one():
    """13 classes of 2 to 14 samples, the largest in the middle; four more samples have none."""
    sizes = [2, 4, 6, 8, 10, 12, 14, 13, 11, 9, 7, 5, 3]
    classes = [c for c, size in enumerate(sizes) for _ in range(size)] + [-1] * 4
    names = tuple(f"class {c}" for c in range(13))
    one = dataset(summary(classes, [CORRECT, INCORRECT] * 54, n_classes=13), class_names=names)
    limited = limit_classes(one)
    kept = [c for c, size in enumerate(sizes) if size > 4]
    assert limited.class_names == (*(names[c] for c in kept), REST)
    titles = [panel.get_title() for panel in panels(dict(dataset_figures(one))["map_eeg_to_spec"])]
    assert titles[:-2] == [*(f"class {c} (n={sizes[c]})" for c in kept), f"{REST} (n=9)"]
    assert limited.headline.unclassified == 4
    assert limit_classes(one, kept=[1, 0]).class_names == ("class 1", "class 0", REST)
    assert limit_classes(limited) is limited, "with one more class there is nothing to gain"


def test_of_many_layers_four_are_shown_from_the_first_to_the_last():
    assert limit_layers(list("abcdefghij")) == ["a", "d", "g", "j"]
    assert limit_layers(list("abcd")) == ["a", "b", "c", "d"]


def test_an_undefined_number_is_drawn_nowhere(result, records):
    gone = records[2] | {"probe/left": math.nan}
    probes, *_ = card_figure(result, [records[1], gone, records[3]]).plots
    assert np.isnan(probes.lines[0].get_ydata()).tolist() == [False, True, False]


def test_a_data_set_has_the_figures_of_its_modalities_and_of_its_first_layer(result):
    assert [name for name, _ in dataset_figures(result)] == [
        *("card", "contribution_shares", "attention", "map_left_to_right", "map_right_to_left"),
        *("entropy_by_head", "class_comparison"),
    ]
