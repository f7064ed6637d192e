"""Wan 2.2 T2V A14B: diffusers' pipeline from the base repo, with the two transformers of the ai-toolkit repo."""

from __future__ import annotations

from pipelines.wan21 import Wan21


class Wan22TextToVideo(Wan21):
    """Scheduler and boundary_ratio are those of the base repo; its own transformers are never read."""
