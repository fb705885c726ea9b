"""How much is tried: a few examples in the quick round, many in the slow one; the same in each run.

With FUZZ_TIMES=20 the slow round tries twenty times as many, drawn anew.
"""

import os

import pytest
from hypothesis import HealthCheck, given, settings

TIMES = int(os.environ.get("FUZZ_TIMES", "1"))


def fuzz(cases, *, some, many):
    """Run a test of one case with some cases, and with many where slow tests run.

    A case that fails is made small, and printed with a way to run it again.
    """

    def decorate(test):
        def run(count):
            tried = settings(
                max_examples=count,
                derandomize=TIMES == 1,
                print_blob=True,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            tried(given(cases)(test))()

        run.__doc__ = test.__doc__
        counts = [some, pytest.param(many * TIMES, marks=pytest.mark.slow)] if some else [many * TIMES]
        return pytest.mark.parametrize("count", counts, ids=["some", "many"][-len(counts) :])(run)

    return decorate
