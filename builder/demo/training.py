"""The loop that trains a model for some minutes: resumable, with an average of the weights and a loss curve."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from builder.demo.muon import Muon

CHECKPOINT_SECONDS = 300.0
WARM_UP_STEPS = 30


class Training:
    """The rates depend on the share of the minutes that is used, so that a slower machine only makes fewer steps."""

    def __init__(self, folder: Path, name: str, model: nn.Module, optimizer: Muon, minutes: float, decay: float, seed: int):
        self.file = folder / f"{name}.training.pt"
        self.curve_file = folder / f"{name}-loss.csv"
        self.name, self.model, self.optimizer, self.decay = name, model, optimizer, decay
        self.budget = minutes * 60
        self.seconds, self.step = 0.0, 0
        self.curve: list[tuple[int, float, float]] = []
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.average = {key: value.clone() for key, value in model.state_dict().items()}
        if self.file.exists():
            self._load()

    @property
    def progress(self) -> float:
        return min(1.0, self.seconds / self.budget) if self.budget else 1.0

    def run(self, loss_of: Callable[[float, random.Random], Tensor], on_checkpoint: Callable[[], None] | None = None) -> None:
        """Train until the minutes are used, then load the averaged weights. `loss_of(progress, rng)` draws its own batch."""
        losses: list[float] = []
        saved = self.seconds
        self.model.train()
        while self.progress < 1:
            started = time.monotonic()
            loss = loss_of(self.progress, self.rng)
            self.model.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step(self._rate())
            self._update_average()
            losses.append(loss.item())
            self.step += 1
            self.seconds += time.monotonic() - started
            if len(losses) == 50:
                self._record(sum(losses) / 50)
                losses.clear()
            if self.seconds - saved > CHECKPOINT_SECONDS or self.progress == 1:
                saved = self.seconds
                self._save()
                if on_checkpoint:
                    on_checkpoint()
        self.model.load_state_dict(self.average)
        self.model.eval()

    def _rate(self) -> float:
        """Warm up, stay for a third of the time, then fall to nothing."""
        falling = 1.0 if self.progress < 0.35 else 0.01 + 0.99 * (1 - self.progress) / 0.65
        return min(1.0, (self.step + 1) / WARM_UP_STEPS) * falling

    @torch.no_grad()
    def _update_average(self) -> None:
        share = 1 - min(self.decay, self.step / (self.step + 20))
        current = self.model.state_dict()
        torch._foreach_lerp_(list(self.average.values()), [current[key] for key in self.average], share)

    def _record(self, loss: float) -> None:
        self.curve.append((self.step, round(self.seconds, 1), round(loss, 5)))
        rows = ["step,seconds,loss", *(",".join(map(str, row)) for row in self.curve)]
        self.curve_file.write_text("\n".join(rows) + "\n")
        print(f"step {self.step}, {self.seconds:.0f} s of {self.budget:.0f}: loss {loss:.4f}", flush=True)

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "seconds": self.seconds,
            "step": self.step,
            "curve": self.curve,
            "rng": self.rng.getstate(),
            "torch_rng": torch.get_rng_state(),
        }
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.file)

    def _load(self) -> None:
        state = torch.load(self.file, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.curve = state["average"], state["curve"]
        self.seconds, self.step = state["seconds"], state["step"]
        version, internal, gauss = state["rng"]
        self.rng.setstate((version, tuple(internal), gauss))
        torch.set_rng_state(state["torch_rng"])
