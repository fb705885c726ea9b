"""What takes long says so in one line, where somebody looks."""

import logging
import sys
import warnings

import pytest

from lightning_xattn import cli
from lightning_xattn.core.errors import DataError
from lightning_xattn.core.notices import _StandardError, first_line, info
from lightning_xattn.core.progress import Stage, printed_stages


@pytest.fixture
def terminal(monkeypatch):
    """What rich takes for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")


def run(title="Counting [b]sheep[/b]"):
    with Stage(title, total=2) as stage:
        stage.advance()
        stage.title += " and goats"
        stage.advance()


def test_a_library_is_quiet_where_no_terminal_is_and_a_command_prints_a_line(capsys):
    run()
    assert capsys.readouterr() == ("", "")
    with printed_stages():
        run()
        with Stage("Nothing", shown=False):
            pass
    assert capsys.readouterr() == ("Counting [b]sheep[/b] and goats: 0 s\n", "")
    run()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar_that_leaves_one_line(terminal, capsys):
    with printed_stages():
        run()
    out = capsys.readouterr().out
    assert "━" in out
    assert "1/2" in out or "2/2" in out
    # What stands there in the end, as the bar is wiped out before.
    assert out.rpartition("\x1b[2K")[2].endswith("Counting [b]sheep[/b] and goats: 0 s\n")
    assert out.count(": 0 s") == 1


@pytest.mark.parametrize("looks", [True, False])
def test_what_failed_has_not_taken_its_time(looks, request, capsys):
    if looks:
        request.getfixturevalue("terminal")
    with printed_stages(), pytest.raises(DataError), Stage("Counting"):
        raise DataError("no sheep")
    assert ": 0 s" not in capsys.readouterr().out


def test_what_is_told_goes_to_what_is_stderr_then(monkeypatch, capsys):
    ours = logging.getLogger("lightning_xattn")
    monkeypatch.setattr(ours, "handlers", [_StandardError()])
    monkeypatch.setattr(ours, "propagate", False)
    info(["one", "two"])
    assert capsys.readouterr() == ("", "one\ntwo\n")


@pytest.mark.parametrize(("command", "told"), [("demo", []), ("explain", ["ours"])])
def test_commands_keep_lightnings_advice_to_themselves(command, told, caplog, monkeypatch, recwarn):
    monkeypatch.setattr(logging.getLogger("lightning_xattn"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("pytorch_lightning"), "propagate", True)
    caplog.set_level(logging.INFO)

    def run_command(**_):
        logging.getLogger("pytorch_lightning.utilities.rank_zero").info("GPU available")
        info(["ours"])
        for module in (
            "pytorch_lightning.loops",
            "torch.jit",
            "torch_geometric",
            "lightning_xattn.evaluation.checks",
            "theirs",
        ):
            warnings.warn_explicit(f"of {module}", UserWarning, "file.py", 1, module=module)

    monkeypatch.setattr(cli, "_explain", run_command)
    monkeypatch.setitem(sys.modules, "lightning_xattn.hms.demo", type(sys)("demo"))
    sys.modules["lightning_xattn.hms.demo"].run_demo = run_command
    needed = {"demo": [], "explain": ["--checkpoint", "x", "--out", "y"]}[command]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main([command, *needed]) == 0
    assert caplog.messages == told
    assert [str(one.message) for one in recwarn] == ["of lightning_xattn.evaluation.checks", "of theirs"]
    levels = [logging.getLogger(name).level for name in ("lightning_xattn", "pytorch_lightning")]
    assert levels == [logging.INFO, logging.INFO]


def test_of_an_error_that_is_a_page_the_line_that_says_what_is_wrong():
    page = (
        "Weights only load failed. Do this.\nOr that: WeightsUnpickler error: \n\nUnsupported operand 35\n\nSee there."
    )
    assert first_line(RuntimeError(page)) == "Unsupported operand 35"
    assert first_line(RuntimeError("one\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError()"
