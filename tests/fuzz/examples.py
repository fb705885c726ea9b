"""How much is tried: the same examples in each run, or with FUZZ_TIMES=20 twenty times as many, drawn anew."""

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("FUZZ_TIMES", "1"))


def examples(count):
    """Set how many examples a test has; a failing one is made small, and printed with a way to run it again."""
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        print_blob=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
