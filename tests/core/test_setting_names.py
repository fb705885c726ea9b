"""Settings have the same names in every run."""

import os
import subprocess
import sys
from argparse import Namespace
from functools import partial

import pytest

from lightning_xattn.core.notices import named


class Reader:
    """A callable object; its address is another one in each run."""

    def __call__(self, module, *_):
        return module


def test_settings_have_the_same_name_in_every_run():
    def settings():
        return {
            "a": lambda model: model,
            "b": [partial(Reader(), 1, key=Reader()), Reader()],
            "c": ("x", 1, None, Reader),
            "d": Namespace(x=object(), y=[1.5]),
        }

    first, second = str(named(settings())), str(named(settings()))
    assert first == second
    assert " at 0x" not in first
    assert "Reader" in first
    assert "{'x': 'object', 'y': [1.5]}" in first


def test_functions_that_call_themselves_have_a_name():
    def down(number):
        return down(number - 1) if number else later

    assert named(down) == named(down)
    later = 1
    assert named(down).startswith(down.__qualname__)


@pytest.mark.slow
def test_a_lambda_has_the_same_name_whatever_the_order_of_a_set():
    code = "from lightning_xattn.core.notices import named; print(named(lambda x: x in {'a', 'b', 'c', 'd', 'e'}))"
    names = set()
    for seed in "123":
        settings = {"capture_output": True, "text": True, "check": True, "env": os.environ | {"PYTHONHASHSEED": seed}}
        names.add(subprocess.run([sys.executable, "-c", code], **settings).stdout)
    assert len(names) == 1
