"""Tools that make what the worker needs: checkpoints, the ai-toolkit checkout, pinned packages and the layers of the image."""

REPRODUCIBLE_MTIME = 315532800
"""1980-01-01 in Unix time: the modification time of every file in the image, so that the same content makes the same layer."""
