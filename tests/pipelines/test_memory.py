"""Running out of memory for real: in a process whose address space is capped after the model is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.worker_process import ROOT

SCRIPT = """
import resource, sys
from pathlib import Path
import numpy as np
import torch
from pipelines import Sampling, load_pipeline
from pipelines.errors import OutOfMemory

torch.set_num_threads(1)
model = load_pipeline("wan21_1b", Path(sys.argv[1]), "cpu")
small = Sampling("a boat", width=64, height=64, num_frames=5, num_inference_steps=2)
before = next(model.generate(small))
in_use = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (in_use + 400_000_000, resource.RLIM_INFINITY))
try:
    next(model.generate(Sampling("a boat", width=2048, height=2048, num_frames=81, num_inference_steps=1)))
except OutOfMemory as error:
    print(error)
print("the next one is right:", np.array_equal(next(model.generate(small)), before))
"""


def test_out_of_memory_is_an_error_after_which_the_model_works_under_the_same_limit(tiny: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tiny)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "ran out of memory" in done.stdout, done.stderr
    assert "the next one is right: True" in done.stdout, done.stderr
