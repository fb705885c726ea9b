"""Where the guide imports its analyser from."""

from lightning_xattn.guide.attention_analysis import *  # noqa: F403  # all of what it exports, and no more
