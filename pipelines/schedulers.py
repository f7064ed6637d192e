"""The schedulers of one model: what a recipe comes to on it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import diffusers

from pipelines.catalog import ModelSpec
from pipelines.few_steps import FewStepEuler
from pipelines.recipes import Recipe

UNIPC = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "solver_order": 2,
    "solver_type": "bh2",
    "predict_x0": True,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
    "time_shift_type": "exponential",
    "use_dynamic_shifting": False,
}
"""UniPC as the model pages and the trainer's older versions set it by hand; the flow_shift is the model's."""

_MOST_SCHEDULERS = 64
"""A request may ask for any shift, and each has a scheduler of some kB."""


class Schedulers:
    """Makes schedulers, and keeps those that it made."""

    def __init__(self, spec: ModelSpec, pipe: Any) -> None:
        """`pipe` has the checkpoint's own scheduler and boundary_ratio."""
        self._spec = spec
        self._checkpoint_scheduler = pipe.scheduler
        self._checkpoint_boundary_ratio = pipe.config.boundary_ratio
        self._made = lru_cache(_MOST_SCHEDULERS)(self._make)

    def of(self, recipe: Recipe) -> Any:
        """A scheduler that was never run; a video gets a copy, so that no solver state outlives it."""
        return self._made(recipe.solver, recipe.shift, recipe.timesteps)

    def boundary_ratio_of(self, recipe: Recipe) -> float | None:
        """Where `transformer_2` takes over, as a part of the noise schedule."""
        return self._checkpoint_boundary_ratio if recipe.boundary_ratio is None else recipe.boundary_ratio

    def numbers_of(self, recipe: Recipe) -> dict[str, Any]:
        """Scheduler class, its shift, boundary_ratio, and the timesteps of a draft."""
        scheduler = self.of(recipe)
        config = scheduler.config
        return {
            "scheduler": type(scheduler).__name__,
            "shift": config.get("flow_shift", config.get("shift")),
            "boundary_ratio": self.boundary_ratio_of(recipe) if self._spec.moe else None,
            **({"timesteps": scheduler.timesteps.tolist()} if recipe.is_draft else {}),
        }

    def _make(self, solver: str, shift: float | None, timesteps: tuple[int, ...] | None) -> Any:
        if timesteps is not None:
            return FewStepEuler(timesteps, shift)
        if solver == "flowmatch":
            return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
        if solver == "unipc":
            return diffusers.UniPCMultistepScheduler(**UNIPC, flow_shift=shift)
        config = self._checkpoint_scheduler.config
        name = "flow_shift" if "flow_shift" in config else "shift"
        return self._checkpoint_scheduler.from_config(config, **({} if shift is None else {name: shift}))
