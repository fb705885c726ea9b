"""How much is tried: the same examples in each run, or with FUZZ_TIMES=20 twenty times as many, drawn anew."""

import os

from hypothesis import HealthCheck, settings

TIMES = int(os.environ.get("FUZZ_TIMES", "1"))


def examples(count):
    """So many examples of a test; one that fails is made as small as it gets, and printed with how to run it again."""
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        print_blob=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
