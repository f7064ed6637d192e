"""What the image bakes, and what fills a volume: requirements, checkpoints, the ai-toolkit checkout, tiny weights."""

REPRODUCIBLE_MTIME = 315532800
"""1980-01-01: the mtime of every file that is written here, so that the same bytes make the same layer of an image."""
