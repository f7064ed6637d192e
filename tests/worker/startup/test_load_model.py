"""How many processes make a video."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from worker.settings import Settings, SettingsError
from worker.startup.load_model import ranks_of


@pytest.mark.parametrize(
    ("there", "choices", "ranks"),
    [
        (0, {}, 1),
        (1, {}, 1),
        (2, {}, 2),
        (3, {}, 2),
        (4, {}, 4),
        (8, {}, 4),
        (4, {"gpus": "2"}, 2),
        (4, {"exact": True}, 2),
        (4, {"gpus": "4", "exact": True}, 2),
        (4, {"device": "cpu"}, 1),
        (0, {"gpus": "4", "device": "cpu"}, 4),
    ],
)
def test_all_gpus_that_can_share_a_video_do(
    there: int, choices: dict[str, Any], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    assert ranks_of(Settings(model_id="wan21_1b", **choices)) == ranks


def test_gpus_that_are_not_there_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SettingsError, match="GPUS=4, but this machine has 2"):
        ranks_of(Settings(model_id="wan21_1b", gpus="4"))
