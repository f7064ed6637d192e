"""Tiny checkpoints, written once per run, a worker that serves one, and the toolkit checkouts that the tests can use."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from builder import tiny_checkpoints
from tests.worker_process import LocalApi, environment, local_api

# The tensors are tiny: a second thread only waits, and on a busy machine waits long. Worker subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# A shell starts what runs in the background with SIGINT ignored, and the subprocesses of the tests would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says more about the machine than about the code.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.load_profile("here")

STAND_IN = Path(__file__).parent / "ai_toolkit_stand_in"
REAL_TOOLKIT = Path(os.environ["AI_TOOLKIT_PATH"]) if os.environ.get("AI_TOOLKIT_PATH") else None


gc.disable()  # until the tests are found


def pytest_collection_finish() -> None:
    """Leave the libraries and the tests themselves out of garbage collection: it took half of the time of tests with models."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("toolkit") and REAL_TOOLKIT is None:
            item.add_marker(pytest.mark.skip(reason="AI_TOOLKIT_PATH points to no ai-toolkit checkout"))
        if item.get_closest_marker("image") and not os.environ.get("IMAGE_TEST"):
            item.add_marker(pytest.mark.skip(reason="`make image-test` builds the image and runs these"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `builder/tiny_checkpoints.py` writes: `ORG/NAME` for every repo, and `loras`."""
    root = tmp_path_factory.mktemp("tiny")
    tiny_checkpoints.write_checkpoints(root)
    tiny_checkpoints.write_loras(root / "loras")
    return root


@pytest.fixture(scope="session")
def worker(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalApi]:
    """A worker of wan22_14b_t2v with its local API."""
    folder = tmp_path_factory.mktemp("worker")
    with local_api(environment(tiny, "wan22_14b_t2v", OUTPUT_DIR=folder / "out"), folder) as api:
        yield api


@pytest.fixture(
    scope="session", params=[STAND_IN, pytest.param(REAL_TOOLKIT, marks=pytest.mark.toolkit)], ids=["stand-in", "real"]
)
def toolkit_path(request: pytest.FixtureRequest) -> Path:
    """An ai-toolkit checkout: the stand-in, and a real one when there is one."""
    return request.param
