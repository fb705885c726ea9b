"""The table of ``python -m benchmarks``: its rows, their text, and the page that it is put into. Nothing is timed."""

import math
import re

import pytest

from benchmarks import batch_statistics, memory
from benchmarks.__main__ import BENCHMARKS
from benchmarks.alternatives import HandWrittenHook, captum_contributions
from benchmarks.memory import CASES, SETTINGS
from benchmarks.table import BEGIN, COSTS, END, HEADER, NOT_RUN, Benchmark, Measured, Row, make_table, plan, write_table
from benchmarks.timing import quartiles, times_within
from lightning_xattn import AttentionExplainabilityCallback
from tests.toy import AUDIO, CLASSES, TEXT, ToyModule, count_hooks, quiet_trainer, toy_loader, validate

ROWS = [row for one in BENCHMARKS for row in one.rows]


def table_in(text):
    """The rows of the table between the markers of a page, as cells."""
    lines = text.partition(BEGIN)[2].partition(END)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")][2:]


def test_each_row_says_what_is_compared_and_under_which_conditions():
    assert len({(row.model, row.what, row.over, row.conditions) for row in ROWS}) == len(ROWS)
    assert {row.model for row in ROWS} >= {"small", "middle", "long", "many classes", "GPU"}
    for row in ROWS:
        assert all((row.model, row.what, row.over, row.conditions))
        assert row.problem == NOT_RUN
        assert not any("|" in cell for cell in row.cells)


def test_the_whole_table_is_planned_to_take_less_than_ten_minutes():
    assert sum(one.seconds for one in BENCHMARKS) < 450  # and what is prepared


@pytest.mark.parametrize(
    ("found", "unit", "expected"),
    [
        ((1.204, 1.256, 1.31), "", "1.26 (1.20 to 1.31)"),
        ((9.99, 12.34, 1234.5), "", "12.3 (9.99 to 1,234)"),
        ((0.001, 0.5, 1.0), "s", "0.50 s (0.00 to 1.00)"),
    ],
)
def test_a_ratio_is_its_median_and_its_quartiles(found, unit, expected):
    assert Row("small", "a", "b", "c", found, 5, unit).cells == ("small", "a", "b", expected, "c; 5 turns")


def test_a_row_that_is_not_run_says_why():
    row = Benchmark((plan("GPU", "a", "b", "c"),), lambda _: "no GPU", 1).run()[0]
    assert row.cells == ("GPU", "a", "b", "not run: no GPU", "c")
    with pytest.raises(ValueError, match="either numbers or the reason"):
        Row("GPU", "a", "b", "c")


def test_a_benchmark_gives_each_of_its_rows():
    rows = (plan("small", "a", "b", "c"), plan("small", "d", "b", "c", "s"))
    measured = [Measured((1.0, 2.0, 3.0), 4), Measured((1.0, 2.0, 3.0), 5, "more")]
    asked = []
    found = Benchmark(rows, lambda seconds: asked.append(seconds) or measured, 7).run()
    assert [row.cells[3:] for row in found] == [
        ("2.00 (1.00 to 3.00)", "c; 4 turns"),
        ("2.00 s (1.00 to 3.00)", "c; more; 5 turns"),
    ]
    assert asked == [7]
    with pytest.raises(ValueError, match="shorter"):
        Benchmark(rows, lambda _: measured[:1], 7).run()


def test_turns_are_side_by_side_and_each_is_first_in_its_turn():
    order = []
    times = times_within(0, lambda: order.append("a"), lambda: order.append("b"), least=2)
    assert "".join(order) == "ababba"  # the first turn warms up
    assert [len(one) for one in times] == [2, 2]
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_the_table_is_put_between_the_markers(tmp_path):
    page = tmp_path / "costs.md"
    page.write_text(f"# Costs\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    rows = [Row("small", "a", "b", "c", (1.0, 2.0, 3.0), 4), *ROWS[:2]]
    for _ in range(2):
        write_table(rows, page)
        text = page.read_text()
        assert text.startswith(f"# Costs\n\n{BEGIN}\nMeasured on ")
        assert text.endswith(f"\n{END}\n\nAfter.\n")
        assert "old" not in text
        assert table_in(text) == [list(row.cells) for row in rows]
    page.write_text("no markers")
    with pytest.raises(ValueError, match="each once"):
        write_table(rows, page)
    assert page.read_text() == "no markers"


def test_the_page_of_costs_has_every_row():
    text = COSTS.read_text()
    assert re.search(rf"{re.escape(BEGIN)}\nMeasured on \d\d \w+ \d{{4}} with torch .+ cores, .+\n", text)
    found = table_in(text)
    assert [cells[:3] for cells in found] == [[row.model, row.what, row.over] for row in ROWS]
    for cells in found:
        assert len(cells) == len(HEADER)
        assert re.fullmatch(r"not run: .+|[\d.,-]+( \w+)? \([\d.,-]+ to [\d.,-]+\)", cells[3]), cells
    assert make_table(ROWS).splitlines()[0] == f"| {' | '.join(HEADER)} |"


@pytest.mark.parametrize("from_weights", [True, False])
def test_statistics_are_measured(monkeypatch, from_weights):
    monkeypatch.setattr(batch_statistics, "WIDTH", 4)
    (found,) = batch_statistics._compare(0, (3, 2, 4, 5), from_weights)
    assert found.turns >= 3
    assert found.found[0] <= found.found[1] <= found.found[2]


def test_a_hand_written_hook_gives_the_callbacks_entropies():
    hook, module = HandWrittenHook(lambda batch: batch[2]), ToyModule().eval()
    quiet_trainer(callbacks=[hook]).validate(module, toy_loader(), verbose=False)
    logged = validate(module, AttentionExplainabilityCallback(figures_every_n_epochs=0, contribution_samples=0))
    for name, keys in (("audio_to_text", TEXT), ("text_to_audio", AUDIO)):
        of_class = hook.found[f"{name}_attn"]
        assert sorted(of_class) == list(range(CLASSES))
        for c, nats in of_class.items():
            assert nats / math.log(keys) == pytest.approx(logged[f"xattn_entropy/val/{name}/class_{c}"], rel=1e-4)
    assert count_hooks(module) == 0


def test_captums_contributions_add_up():
    pytest.importorskip("captum")
    module = ToyModule().eval()
    audio, text, _ = next(iter(toy_loader(batch_size=9)))
    phi = captum_contributions(module, audio, text, "ShapleyValues")
    p = module(audio, text).softmax(1)
    own = p.argmax(1)
    partners = sum(module(audio.roll(s, 0), text.roll(s, 0)).softmax(1) for s in range(1, 5)) / 4
    expected = (p - partners).gather(1, own[:, None])[:, 0]
    assert phi.sum(1).tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_each_case_of_memory_has_its_samples():
    assert set(SETTINGS) >= {"plain", "alone", "defaults"}
    sizes = {"long": (8, 4096, 2048, 4), "very_long": (2, 16384, 16384, 1), "many_classes": (20_000, 8, 6, 64)}
    for name, make in CASES.items():
        module, samples, batch = make()
        audio, text, target = samples.tensors
        assert (len(audio), audio.shape[1], text.shape[1], batch) == sizes[name]
        assert int(target.max()) < module.head.out_features


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "allowed"),
    [("long", lambda plain: 1.5 * plain), ("very_long", lambda plain: plain + 1024)],
)
def test_long_sequences_take_little_more_memory(monkeypatch, case, allowed):
    """4 x 4,096 x 2,048 tokens and 4 heads, and 16,384 x 16,384 tokens and one head."""
    monkeypatch.setattr(memory, "SECONDS", 600)
    plain, watched = (memory.run(case, settings) for settings in ("plain", "without_figures"))
    assert watched.peak <= allowed(plain.peak), (plain, watched)
