"""Run a function in its own process, which is killed, interrupted, or out of disk space, at a given point.

A point is a number of lines, counted in the modules of the package that write files or decide when to.
"""

import logging
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from contextlib import contextmanager

import lightning_xattn.evaluation.table
import lightning_xattn.explainer.explainability_capture
import lightning_xattn.explainer.table
from lightning_xattn.core.errors import XAttnError

WRITING = {
    module.__file__
    for module in (
        lightning_xattn.callback.callback,
        lightning_xattn.core.files,
        lightning_xattn.evaluation.table,
        lightning_xattn.explainer.explainability_capture,
        lightning_xattn.explainer.table,
    )
}
ENDED_BY_MISHAP = 3

# Imports what the functions need once, and forks: a process costs a moment.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.fuzz.test_interrupted"])


@contextmanager
def at_line(number, act):
    """Act before the line of this number runs; yields the lines that ran."""
    ran, before = [], sys.gettrace()

    def trace(frame, event, _):
        if event == "line":
            ran.append(frame.f_lineno)
            if len(ran) == number:
                act()
        return trace if frame.f_code.co_filename in WRITING else None

    sys.settrace(trace)
    try:
        yield ran
    finally:
        sys.settrace(before)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    raise KeyboardInterrupt


def _meet(mishap, at, function, *args):
    """Run the function in the process; an error that the mishap does not cause ends it with 1."""
    logging.disable(logging.ERROR)
    if mishap == "full":  # no file may grow beyond a limit, which needs no rights
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, at))
    try:
        with at_line(at if mishap != "full" else 0, kill if mishap == "killed" else interrupt):
            function(*args)
    except KeyboardInterrupt:
        pass
    except (XAttnError, OSError) as error:
        if mishap != "full" or "File too large" not in "".join(traceback.format_exception(error)):
            raise
    else:
        return
    os._exit(ENDED_BY_MISHAP)


def run_into(mishap, at, function, *args):
    """Run a function until it is "killed", "interrupted" or "full" at this point, unless it ends before."""
    process = PROCESSES.Process(target=_meet, args=(mishap, at, function, *args), daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL if mishap == "killed" else ENDED_BY_MISHAP)
