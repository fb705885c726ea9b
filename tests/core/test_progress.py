"""Long work has a bar in a terminal and a line in a command; messages go to stderr."""

import logging
import sys
import warnings

import pytest

from lightning_xattn import cli
from lightning_xattn.core.errors import DataError
from lightning_xattn.core.notices import _StandardError, first_line, info
from lightning_xattn.core.progress import printed_times, timed, track


@pytest.fixture
def terminal(monkeypatch):
    """What rich takes for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")


def test_a_library_is_quiet_without_a_terminal_and_a_command_prints_a_line(capsys):
    def run():
        assert list(track(iter("ab"), "Counting [b]sheep[/b]")) == ["a", "b"]
        with timed("Shearing"):
            pass

    run()
    assert capsys.readouterr() == ("", "")
    with printed_times():
        run()
    assert capsys.readouterr() == ("Counting [b]sheep[/b]: 0 s\nShearing: 0 s\n", "")
    run()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar_and_no_line(terminal, capsys):
    with printed_times():
        assert list(track([1, 2], "Counting [b]sheep[/b]")) == [1, 2]
    out = capsys.readouterr().out
    assert "Counting [b]sheep[/b]" in out
    assert "━" in out
    assert "100%" in out
    assert ": 0 s" not in out


def test_work_that_fails_has_no_line(capsys):
    with printed_times():
        with pytest.raises(DataError), timed("Counting"):
            raise DataError("no sheep")
        with pytest.raises(DataError):
            _count_and_fail()
    assert capsys.readouterr().out == ""


def _count_and_fail():
    for _ in track([1, 2], "Counting"):
        raise DataError("no sheep")


def test_what_is_told_goes_to_what_is_stderr_then(monkeypatch, capsys):
    ours = logging.getLogger("lightning_xattn")
    monkeypatch.setattr(ours, "handlers", [_StandardError()])
    monkeypatch.setattr(ours, "propagate", False)
    info(["one", "two"])
    assert capsys.readouterr() == ("", "one\ntwo\n")


@pytest.mark.parametrize(("command", "told"), [("demo", ["ours"]), ("explain", ["ours"])])
def test_commands_keep_lightnings_advice_to_themselves(command, told, caplog, monkeypatch, recwarn):
    for name in ("lightning_xattn", "pytorch_lightning"):
        # pytest 9.2 captures also loggers that do not propagate.
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
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
