"""Watch how a multi-modal model's modalities attend to each other."""

__version__ = "0.1.0"
