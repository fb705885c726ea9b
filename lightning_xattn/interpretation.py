"""Where the guide's patterns and checklists were before they stood in ``guide``."""

from lightning_xattn.guide.interpretation import *  # noqa: F403  # all of what it exports, and no more
