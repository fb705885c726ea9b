"""Every number of a figure is the summary's: of its class and outcome, direction and head, with both ends."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
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
    dataset_figures,
    epoch_figures,
    fusion_figures,
    limit_classes,
    limit_layers,
    overview_figure,
    save_dataset_figures,
)
from lightning_xattn.visualizations import Curve, Panel
from lightning_xattn.visualizations.drawing import LOOKS
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
        *("support/cells", "contribution/shares"),
    ]
    for name, figure in figures.items():
        assert "epoch 4" in texts(figure)
        assert name == "support/cells" or "per true class" in texts(figure).replace("\n", " ")


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
    assert {"second", "right token"} <= set(said.splitlines())


def test_the_page_of_maps_takes_the_summarys_numbers_of_tokens(monkeypatch):
    calls = kept_calls(monkeypatch, "plot_attention_by_class")
    one = summary([0, 0, 0, 1, 1, -1], [CORRECT, CORRECT, INCORRECT, INCORRECT, UNKNOWN, CORRECT])
    there, back = one.heads
    assert one.tokens == {there: (5, 7), back: (7, 5)}
    one.tokens = {there: (500, 7), back: (7, 500)}
    axes = {"eeg": TokenAxis("region", names=[f"{i}" for i in range(500)]), "spec": TokenAxis("s", names=list("ab"))}
    said = {"classes_by": "prediction", "axes": axes, "context": "here"}
    attention_figure(one, NAMES, **said)
    attention_figure(one, (), **said)
    (name, (maps, counts, names), settings), (_, (_, of_all, all_names), others) = calls
    assert (name, counts, names) == ("plot_attention_by_class", [3, 2, 0], list(NAMES))
    assert [*maps] == ["eeg_to_spec", "spec_to_eeg"]
    assert all(maps[str(direction)] is of_one for direction, of_one in one.maps.items())
    tokens = {"eeg_to_spec": (500, 7), "spec_to_eeg": (7, 500)}
    assert settings == said | {"axes": {"eeg": axes["eeg"]}, "tokens": tokens}
    assert (of_all, all_names, others["classes_by"]) == ([6], ["all samples"], None)
    one.maps = {}
    assert attention_figure(one, NAMES, **said) is None


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
    numbers = {"left_to_right": "5 left queries ask 7 right keys", "right_to_left": "7 right queries ask 5 left keys"}
    assert numbers[direction] in texts(figure).replace("\n", " ")
    # An axis of another length is not used.
    role, other = ("query", "key") if direction == "left_to_right" else ("key", "query")
    assert figure.get_supylabel().replace("\n", " ") == f"{role}: second"
    assert figure.get_supxlabel() == f"{other}: right token"


def test_each_head_of_each_class_has_its_entropy(result, members, figures):
    shown = panels(figures["entropy/by_head"])
    assert [panel.get_title() for panel in shown] == ["left → right", "right → left"]
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
        *("entropy left → right (0: one key, 1: uniform)", "entropy right → left (0: one key, 1: uniform)"),
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


def test_cells_of_support_have_their_accuracy_and_confidence(result, figures):
    figure = figures["support/cells"]
    (panel,) = panels(figure)
    cells = result.fusion.cells
    accuracy, confidence = [*panel.containers][::2], [*panel.containers][1::2]
    for bars, name in ((accuracy, "accuracy"), (confidence, "confidence")):
        for place, (one, cell) in enumerate(zip(bars, cells, strict=True)):
            expected = getattr(cell, name)
            (x,), (y,) = one.lines[0].get_data()
            assert (x, round(y)) == (pytest.approx(100 * expected.mean), place)
            ends = one.lines[2][0].get_segments()[0][:, 0]
            np.testing.assert_allclose(ends, [100 * expected.low, 100 * expected.high])
    told = texts(figure).replace("\n", " ")
    for cell in cells:
        assert f"{100 * cell.share.mean:.0f} %, n={cell.samples}" in told
    assert "by groups" in told
    legend = [one.get_text() for one in figure.legends[0].get_texts()]
    assert legend == ["accuracy", "mean confidence"]


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


SHOWN = {
    "alignment": ("alignment/", ["correct", "incorrect"]),
    "entropy": ("entropy/", ["correct", "incorrect"]),
    "predictions supported by": ("support/", ["both", "only left", "only right", "neither agree", "neither differ"]),
    "accuracy of each probe": ("probe/", ["left", "right", "joint"]),
    "share of the contribution": ("contribution/share/", ["left", "right"]),
    "detects errors (AUROC)": ("outcome/", ["low confidence", "low support", "low alignment", "high entropy"]),
}
"""By panel: the topic, and its curves."""


def test_each_curve_of_the_overview_is_what_the_records_say(records):
    figure = overview_figure([one | {"support/delta_auroc": 0.1} for one in records], "val, epoch 3")
    assert "val, epoch 3" in texts(figure)
    shown, said = {plot.title: plot for plot in figure.plots}, records[1:]
    assert list(shown) == list(SHOWN)
    references = {
        "alignment": ("null", [one["alignment/null"] for one in said]),
        "accuracy of each probe": ("largest class", [one["largest_class"] for one in said]),
        "detects errors (AUROC)": ("chance", [0.5] * 3),
    }
    for title, (topic, names) in SHOWN.items():
        lines = {line.get_label(): line for line in shown[title].lines}
        name, values = references.get(title, ("", []))
        assert list(lines) == [*names, name][: len(names) + bool(name)]
        assert list(shown[title].bands) == names
        for curve, band in shown[title].bands.items():
            key = f"{topic}{curve.split()[-1]}_auroc" if topic == "outcome/" else topic + curve.replace(" ", "_")
            assert lines[curve].get_xdata().tolist() == [0, 2, 3]
            np.testing.assert_allclose(lines[curve].get_ydata(), [one[key] for one in said])
            # The edge goes along the lower ends and back along the upper ones.
            low, high = ([one[f"{key}_{end}"] for one in said] for end in ("low", "high"))
            assert low[0] < lines[curve].get_ydata()[0] < high[0]
            edge = {tuple(point) for point in band.get_path().vertices.round(9)}
            ends = {(x, round(y, 9)) for x, y in zip([0, 2, 3] * 2, [*low, *high], strict=True)}
            assert edge == ends
            if curve in LOOKS:
                assert lines[curve].get_color() == LOOKS[curve].colour
            np.testing.assert_allclose(band.get_facecolor()[:3], to_rgb(lines[curve].get_color()))
        if name:
            assert lines[name].get_ydata() == pytest.approx(values)


def test_a_single_evaluation_has_points_with_bars(records):
    (test, *_), figure = records, overview_figure(records[:1], "test")
    probes = next(plot for plot in figure.plots if plot.title == "accuracy of each probe")
    for name in ("left", "right", "joint"):
        (line,) = (line for line in probes.lines if line.get_label() == name)
        assert (line.get_xdata().tolist(), line.get_ydata().tolist()) == ([9], [test[f"probe/{name}"]])
        ends = probes.bars[name].get_ydata()
        assert ends == pytest.approx([test[f"probe/{name}_low"], test[f"probe/{name}_high"]])


def test_what_is_no_share_has_its_size(records):
    numbers = {f"contribution/size/{name}{end}": 7.0 for name in ("left", "right") for end in ("", "_low", "_high")}
    regression = {name: value for name, value in records[1].items() if not name.startswith("contribution")} | numbers
    shown = {plot.title: plot for plot in overview_figure([regression], "val").plots}
    assert "share of the contribution" not in shown
    lines = {line.get_label(): line.get_ydata().tolist() for line in shown["size of the contribution"].lines}
    assert (lines["left"], lines["right"]) == ([7], [7])


def kept_calls(monkeypatch, *names):
    """What the functions of `visualizations` that draw are called with, in the place of drawing."""
    calls = []
    for name in names:
        keep = lambda *args, name=name, **settings: calls.append((name, args, settings))  # noqa: E731
        monkeypatch.setattr(f"lightning_xattn.visualizations.{name}", keep)
    return calls


def test_the_panels_of_the_overview(monkeypatch):
    """Of two validations, each number of which is its place in the list, and 100 more in the second."""
    calls = kept_calls(monkeypatch, "plot_epochs")
    ends = ("", "_low", "_high")
    names = [f"{topic}/{name}{end}" for topic in ("alignment", "entropy") for name in OUTCOME_NAMES for end in ends]
    names += [f"support/{name}{end}" for name in ("both", "only_left", "accuracy/unsupported") for end in ends]
    names += [f"{topic}/left{end}" for topic in ("probe", "contribution/share", "contribution/size") for end in ends]
    names += [
        f"outcome/{name}_auroc{end}" for name in ("confidence", "support", "alignment", "entropy") for end in ends
    ]
    names += ["alignment/all", "alignment/null", "entropy/a_to_b/all", "largest_class", "probed_samples"]
    names += ["contribution/share/left/correct"]
    first = {name: float(i) for i, name in enumerate(names)}
    second = {name: value + 100 for name, value in first.items() if name != "probe/left_low"}
    at = [{"stage": "val", "epoch": epoch, "step": 10 * epoch} for epoch in (3, 5)]
    given = [first | at[0], first | at[0] | {"stage": "test"}, second | at[1]]

    def over(name):
        return [one.get(name, math.nan) for one in (first, second)]

    def curve(title, name):
        return Curve(title, [3, 5], *(over(name + end) for end in ends))

    of_topics = {
        topic: [curve(name, f"{topic}/{name}") for name in OUTCOME_NAMES] for topic in ("alignment", "entropy")
    }
    sides = {"confidence": "low", "support": "low", "alignment": "low", "entropy": "high"}
    cells = [curve("both", "support/both"), curve("only left", "support/only_left")]
    of_scores = [curve(f"{side} {name}", f"outcome/{name}_auroc") for name, side in sides.items()]
    start = [
        Panel("alignment", of_topics["alignment"], (-1, 1), ("null", over("alignment/null"))),
        Panel("entropy", of_topics["entropy"], (0, 1)),
        Panel("predictions supported by", cells, (0, 1)),
        Panel(
            "accuracy of each probe", [curve("left", "probe/left")], (0, 1), ("largest class", over("largest_class"))
        ),
    ]
    size = Panel("size of the contribution", [curve("left", "contribution/size/left")], (0, math.inf))
    share = Panel("share of the contribution", [curve("left", "contribution/share/left")], (-1, 2))
    errors = Panel("detects errors (AUROC)", of_scores, (0, 1), ("chance", [0.5, 0.5]))
    overview_figure(given, "here")
    for one in (first, second):
        for end in ends:
            del one[f"contribution/size/left{end}"]
    overview_figure([first | at[0], second | at[1]], "here")
    overview_figure([one | {"epoch": 3} for one in given], "here")
    said = {"unit": "epoch", "context": "here"}
    assert repr(calls[0]) == repr(("plot_epochs", ([*start, size, errors],), said))
    assert repr(calls[1]) == repr(("plot_epochs", ([*start, share, errors],), said))
    _, ((shown, *_),), said = calls[2]
    assert (said["unit"], shown.curves[0].moments) == ("step", [30, 50])
    overview_figure([{"stage": "val", "epoch": 3, "step": 9}], "here")
    assert calls[3] == ("plot_epochs", ([],), said | {"unit": "epoch"})


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
        asked = f"here; {queries} {direction.query} queries ask {keys} {direction.key} keys"
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
    for direction, way in zip(one.heads, ("eeg → spec", "spec → eeg"), strict=True):
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
    layers = {"first": result.headline, "block/2": copy(result.headline)}
    found = dict(dataset_figures(replace(result, summaries=layers)))
    names = ["map_a_to_b", "entropy_by_head", "class_comparison"]
    size = "130 samples of 23 groups"
    assert found == {
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
    titles = [panel.get_title() for panel in panels(next(dataset_figures(one))[1])]
    assert titles[:-2] == [*(f"class {c} (n={sizes[c]})" for c in kept), f"{REST} (n=9)"]
    assert limited.headline.unclassified == 4
    assert limit_classes(one, kept=[1, 0]).class_names == ("class 1", "class 0", REST)
    assert limit_classes(limited) is limited, "with one more class there is nothing to gain"


def test_of_many_layers_four_are_shown_from_the_first_to_the_last():
    assert limit_layers(list("abcdefghij")) == ["a", "d", "g", "j"]
    assert limit_layers(list("abcd")) == ["a", "b", "c", "d"]


def test_an_undefined_number_is_drawn_nowhere(records):
    gone = records[2] | {"probe/left": math.nan}
    figure = overview_figure([records[1], gone, records[3]], "val")
    probes = next(plot for plot in figure.plots if plot.title == "accuracy of each probe")
    assert np.isnan(probes.lines[0].get_ydata()).tolist() == [False, True, False]


def test_a_data_set_has_the_figures_of_its_modalities_and_of_its_first_layer(result):
    assert [name for name, _ in dataset_figures(result)] == [
        *("support_cells", "contribution_shares", "map_left_to_right", "map_right_to_left"),
        *("entropy_by_head", "class_comparison"),
    ]
