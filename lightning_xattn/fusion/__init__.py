"""Where the modalities enter a model's fusion, and what it says when they are exchanged between samples."""
