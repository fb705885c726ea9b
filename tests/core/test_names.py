"""Names and ids from data: whatever they hold, nothing ends, nothing is obeyed, and two samples stay two."""

import enum
import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_xattn import AttentionExplainabilityCallback, ExplainabilityCapture, create_explainability_report
from lightning_xattn.core.attention import TokenAxis
from lightning_xattn.core.errors import DataError
from lightning_xattn.core.ids import UNKNOWN_GROUP, group_keys, id_text
from lightning_xattn.core.names import LONGEST, clean, escaped_in_json, shown, shown_tag
from lightning_xattn.core.notices import first_line, info
from lightning_xattn.report import print_report
from lightning_xattn.visualizations import plot_class_attention, plot_cross_modal_attention, render
from lightning_xattn.visualizations.output import svg_picture
from tests.toy import ToyModule, quiet_trainer, run_toy, toy_loader

SURROGATE, TURNED, ESCAPE, FORMULA = "\ud800abc", "inv\u202egpj.exe", "\x1b[31mred\x07", "$\\frac{a$ $x^$"
BROKEN, NUL, LONG, MARKUP = "a\r\n# b", "a\0b", "L" * 100_000, "<script>alert(1)</script>"
HOSTILE = [SURROGATE, TURNED, ESCAPE, FORMULA, BROKEN, NUL, LONG, MARKUP, "\u2067x", "a\u200eb", "../../c", "=1+1"]

OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Kind(enum.Enum):
    ONE = 1


class Refusing:
    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("naïve 漢字 👩‍👩‍👧 \u200c", "naïve 漢字 👩‍👩‍👧 \u200c"),
        (SURROGATE, r"\ud800abc"),
        (TURNED, r"inv\u202egpj.exe"),
        (ESCAPE, r"\x1b[31mred\x07"),
        (BROKEN, "a # b"),
        (NUL, r"a\x00b"),
        (7, "7"),
        (b"by\xff", r"b'by\xff'"),
        (np.str_("s"), "s"),
        (torch.tensor(3), "3"),
        (Kind.ONE, "Kind.ONE"),
        ((1, SURROGATE), r"(1, '\ud800abc')"),
    ],
)
def test_a_name_is_shown_without_what_is_obeyed(name, text):
    assert shown(name) == text
    assert clean(shown(name)) == text


def test_long_names_are_cut_and_stay_two():
    one, other = shown(LONG + "a"), shown(LONG + "b")
    assert len(one) == len(other) == LONGEST
    assert one != other
    assert one.startswith("LLL")
    assert "…" in one
    assert len(shown("\0" * 100)) == LONGEST  # 100 signs that are four each when they are written out
    assert len(shown(10**5000)) == LONGEST
    assert shown("x" * LONGEST) == "x" * LONGEST
    assert clean("x" * 1000) == "x" * 1000
    assert clean(f"see {LONG}, please") == f"see {'L' * 1000}… please"
    assert shown(Refusing()).startswith("<tests.core.test_names.Refusing object at")


@given(st.text(st.characters(codec=None), max_size=300))
def test_whatever_is_shown_can_be_written_in_a_line(name):
    for text in (shown(name), clean(name), id_text(name), shown_tag(name)):
        assert text.encode("utf-8").decode() == text
    assert not OBEYED.search(shown(name))
    assert not OBEYED.search(clean(name))
    assert len(shown(name).splitlines()) <= 1
    assert len(shown(name)) <= LONGEST
    assert json.loads(escaped_in_json(json.dumps([name], ensure_ascii=False))) == [name]


def test_ids_stay_apart_whatever_they_are():
    ids = [*HOSTILE, LONG + "a", b"a", "a", 1.5, 7, np.int64(8), Kind.ONE, (1, 2), (1, 3), 10**5000, 10**5000 + 1]
    ids += [torch.tensor(9), np.float32(0.25), -(2**70), "\udfffabc", np.datetime64("2020-01-01")]
    assert group_keys(ids, "cpu").unique().numel() == len(ids)
    assert len({id_text(one) for one in ids}) == len(ids)
    unknown = [None, math.nan, np.float32("nan"), torch.tensor(math.nan), pd.NA, pd.NaT]
    assert group_keys(unknown, "cpu").tolist() == [UNKNOWN_GROUP] * len(unknown)
    assert [*map(id_text, unknown)] == [None] * len(unknown)


def test_messages_are_not_obeyed(infos, capsys):
    info([f"{ESCAPE} {TURNED}"])
    assert str(DataError(f"no {ESCAPE}\nbut {TURNED}")) == "no \\x1b[31mred\\x07\nbut inv\\u202egpj.exe"
    assert first_line(ValueError(f"no {NUL}")) == "no a\\x00b"
    assert not OBEYED.search(infos.text)


def of_batch(names):
    """For each sample of a batch one of the names, from the first on."""
    return lambda outputs, batch: [names[i % len(names)] for i in range(len(batch[2]))]


PAIRS = [("audio", "text"), (SURROGATE, TURNED), (ESCAPE, FORMULA + "L" * 3000)]


def directions(first, second):
    return {f"{first}_to_{second}": "audio_to_text_attn", f"{second}_to_{first}": "text_to_audio_attn"}


@pytest.mark.parametrize(("first", "second"), [pytest.param(*PAIRS[0], marks=pytest.mark.slow), *PAIRS[1:]])
@pytest.mark.filterwarnings("ignore::lightning_xattn.XAttnWarning")
def test_a_run_ends_as_any_other(first, second, tmp_path):
    names = [one for one in HOSTILE if one != BROKEN][:4] if first == "audio" else None
    callback = AttentionExplainabilityCallback(
        attention=directions(first, second),
        class_names=names,
        sample_ids=of_batch(HOSTILE),
        groups=of_batch([*HOSTILE, None]),
        table=tmp_path / "table",
        curves="all",
        figures_every_n_epochs=int(first == "audio"),
    )
    loggers = [TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "csv")]
    trainer = quiet_trainer(callbacks=[callback], logger=loggers, default_root_dir=tmp_path)
    trainer.validate(ToyModule(), toy_loader(12, 12), verbose=False)
    assert not OBEYED.search("".join(trainer.callback_metrics))
    assert max(map(len, trainer.callback_metrics)) < 500
    events = EventAccumulator(loggers[0].log_dir).Reload()
    curves = [name for name in trainer.callback_metrics if name.startswith("xattn_entropy")]
    assert curves
    assert {*curves} <= {*events.Tags()["scalars"]}
    assert not any(OBEYED.search(str(path.relative_to(tmp_path))) for path in tmp_path.rglob("*"))
    table = pd.read_parquet(tmp_path / "table/attention")
    assert table["sample_id"].tolist() == [*map(id_text, HOSTILE)]


@pytest.mark.parametrize(("first", "second"), PAIRS[1:])
@pytest.mark.filterwarnings("ignore::lightning_xattn.XAttnWarning")
def test_reports_show_names_and_obey_none(first, second, tmp_path, capsys):
    explainer = ExplainabilityCapture(
        ToyModule(),
        attention=directions(first, second),
        predict=run_toy,
        class_names=HOSTILE[:4],
        sample_ids=of_batch(HOSTILE),
        axes={first: TokenAxis(ESCAPE, names=[SURROGATE, TURNED, LONG, FORMULA, NUL])},
    )
    explained = explainer.explain_loader(toy_loader(12, 12), table=tmp_path / "table", progress=False)
    batch = explainer.explain_batch(next(iter(toy_loader(12, 12))), among=explained)
    # That of the data set is drawn, which takes a second.
    reports = [(explained, ("markdown", "json")), (batch, ("markdown", "json", "html"))]
    for results, formats in reports:
        for one in formats:
            report = create_explainability_report(results, tmp_path / "report", format=one)
            assert (tmp_path / "report").read_bytes().decode("utf-8") == report
            assert not OBEYED.search(report)
            assert one == "json" or "L" * 2000 not in report
            assert one != "html" or MARKUP not in report
    facts = json.loads(create_explainability_report(batch, format="json"))
    assert [one["sample_id"] for one in facts["per_sample_explanations"]] == [*map(id_text, HOSTILE)]
    print_report(explained)
    assert not OBEYED.search(capsys.readouterr().out)


@pytest.mark.slow
def test_a_page_of_a_data_set_shows_names_and_obeys_none(tmp_path):
    explainer = ExplainabilityCapture(
        ToyModule(), predict=run_toy, class_names=HOSTILE[:4], sample_ids=of_batch([SURROGATE, LONG, ESCAPE, TURNED])
    )
    explained = explainer.explain_loader(toy_loader(12, 12), table=tmp_path / "table", progress=False)
    page = create_explainability_report(explained, tmp_path / "report.html")
    assert not OBEYED.search(page)
    assert r'data-name="\ud800abc"' in page
    assert "L" * 200 not in page


def test_figures_draw_names_as_they_are():
    weights = {
        name: torch.rand(2, 2, *shape) for name, shape in zip(directions(*PAIRS[1]), ((5, 7), (7, 5)), strict=True)
    }
    weights = {name: values / values.sum(-1, keepdim=True) for name, values in weights.items()}
    axes = {SURROGATE: TokenAxis(FORMULA, names=[SURROGATE, TURNED, LONG, FORMULA, NUL])}
    figure = plot_cross_modal_attention(weights, 0, axes=axes, context=f"{SURROGATE} {FORMULA}")
    assert render(figure).std() > 0
    drawn = svg_picture(figure)
    ElementTree.fromstring(drawn)
    assert not OBEYED.search(drawn.decode("utf-8"))
    assert {r"\ud800abc", FORMULA} <= {label.get_text() for label in figure.axes[0].get_yticklabels()}
    assert render(plot_class_attention(torch.rand(2, 5, 7), [4, 3], [FORMULA, LONG], direction="a_to_b")).std() > 0
