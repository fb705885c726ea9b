"""Few words, so that a case that failed is not buried under what Lightning and the package tell of each Trainer."""

import pytest


@pytest.fixture(autouse=True)
def _few_words(caplog):
    for name in ("pytorch_lightning", "lightning_xattn"):
        caplog.set_level("ERROR", logger=name)
