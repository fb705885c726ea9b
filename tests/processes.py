"""Start a module of tests that runs on several processes, and end them all if they hang."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TIME_LIMIT = 240  # seconds; a hang ends here


def run_processes(module, *arguments):
    """Run ``python -m module arguments``, which starts processes of its own; it must end well. Returns its output."""
    # A group of its own, so that a hang is killed with all its processes.
    run = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = run.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        pytest.fail(f"{module} {arguments} hung: {run.communicate()[0][-3000:]}")
    assert run.returncode == 0, output[-3000:]
    return output
