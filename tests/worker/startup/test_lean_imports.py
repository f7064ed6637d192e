"""What a start leaves out, and that nobody misses it. In processes of their own, since it is for fresh ones."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers.models import autoencoders, unets

from tests.conftest import STAND_IN
from tests.worker_process import ROOT
from worker.startup import lean_imports

LEFT_OUT = {"sympy", "torch._dynamo.config", "torch.distributed.tensor", "torch.distributed.fsdp"}


def run(script: str, *arguments: object) -> list[str]:
    """What a script prints, line by line, after a lean start."""
    code = "from worker.startup import lean_imports\nassert lean_imports.install() == '', 'not treated'\n" + script
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


EVERY_MODEL = """
import json, sys
from pathlib import Path
from pipelines import load_pipeline
from pipelines.catalog import MODELS
from tests.pipelines.test_models import adapters, make

tiny, toolkit = Path(sys.argv[1]), Path(sys.argv[2])
for with_image_encoder in (False, True):
    for model_id in (name for name, spec in MODELS.items() if ("image_encoder" in spec.sources) == with_image_encoder):
        model = load_pipeline(model_id, tiny, "cpu", toolkit_path=toolkit)
        for mode in ("adapter", "merge"):
            model.apply_loras(adapters(model_id, tiny), mode)
            make(model)
    print(json.dumps([name for name in sys.modules]))
"""


def test_no_model_with_its_loras_imports_what_is_left_out(tiny: Path) -> None:
    before, with_image_encoder = (set(json.loads(line)) for line in run(EVERY_MODEL, tiny, STAND_IN)[-2:])
    assert before & LEFT_OUT == set()
    assert with_image_encoder & LEFT_OUT <= {"sympy"}  # CLIP draws one weight in another way


COMPILED = """
import sys
from pathlib import Path
import numpy as np
from pipelines import load_pipeline
from tests.pipelines.test_models import make

model = load_pipeline("wan21_1b", Path(sys.argv[1]), "cpu")
before = make(model)
import torch
from torch._dynamo.utils import counters
print(torch._dynamo.config is sys.modules["torch._dynamo.config"])

model._pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
print(np.array_equal(make(model), before), counters["stats"]["unique_graphs"])
compiled = torch.compile(model._pipe.transformer, backend="eager")
print(isinstance(compiled, torch._dynamo.eval_frame.OptimizedModule))

def bar():
    model._pipe.progress_bar(total=1)

counters.clear()
torch.compile(bar, backend="eager")()
print(*counters["graph_break"])
"""


def test_who_compiles_gets_the_compiler_with_the_marks_that_were_made_before(tiny: Path) -> None:
    from_config, blocks, is_compiled, kept_out, *_ = run(COMPILED, tiny)
    assert (from_config, blocks, is_compiled) == ("True", "True 1", "True")
    assert "progress_bar" in kept_out or "disable" in kept_out


def test_a_module_below_the_compiler_can_be_asked_for_first_and_by_two_threads() -> None:
    script = """
import sys, threading, torch, transformers.masking_utils
found = []
def ask():
    import torch._dynamo.config as config
    found.append((config, torch._dynamo.optimize))
threads = [threading.Thread(target=ask) for _ in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(found[0] == found[1], found[0][0] is torch._dynamo.config is sys.modules["torch._dynamo.config"])
print(type(transformers.masking_utils.TransformGetItemToIndex()).__module__)
"""
    assert run(script) == ["True True", "torch._dynamo._trace_wrapped_higher_order_op"]


def test_every_name_of_the_libraries_is_still_there() -> None:
    packages = (autoencoders, unets, diffusers.models.transformers)
    names = [f"{p.__name__}:{name}" for p in packages for name, value in vars(p).items() if inspect.isclass(value)]
    script = """
import json, sys, transformers
from importlib import import_module
for name in sys.argv[1:]:
    package, _, attribute = name.partition(":")
    getattr(import_module(package), attribute)
print(hasattr(import_module("diffusers.models.unets"), "NoSuchModel"))
print(json.dumps(sorted(transformers.__all__)))
"""
    no_such_model, models = run(script, *names)
    assert no_such_model == "False"
    assert json.loads(models) == sorted(transformers.__all__)


def test_only_weights_without_storage_are_not_drawn() -> None:
    script = """
import sys, torch
torch.nn.Embedding(2, 3, device="meta")
print("sympy" in sys.modules, torch.nn.init.normal_(torch.empty(2), generator=torch.Generator().manual_seed(1)).tolist())
"""
    drawn = torch.nn.init.normal_(torch.empty(2), generator=torch.Generator().manual_seed(1)).tolist()
    assert run(script) == [f"False {drawn}"]


def test_the_index_of_models_is_kept_until_its_source_changes(tmp_path: Path) -> None:
    def index(number: int) -> dict[str, object]:
        return lean_imports._cached_index(
            tmp_path, lambda _: {"model": {frozenset({"torch"}): {f"modeling_{number}": {"Model"}}}}
        )

    source = tmp_path / "__init__.py"
    source.write_text("")
    (tmp_path / "__pycache__").mkdir()
    first = index(1)
    assert index(2) == first
    (file,) = (tmp_path / "__pycache__").iterdir()
    file.write_bytes(b"half a fi")
    second = index(2)
    assert second != first
    assert index(3) == second
    source.write_text("# another version")
    assert index(3) != second


def test_where_the_index_cannot_be_kept_it_is_made_every_time(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "__pycache__").write_text("no folder")
    assert lean_imports._cached_index(tmp_path, lambda _: {"made": 1}) == {"made": 1}
    assert lean_imports._cached_index(tmp_path, lambda _: {"made": 2}) == {"made": 2}


def test_with_other_versions_and_in_a_process_that_has_begun_nothing_is_treated(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(sys.meta_path)
    assert "torch is imported already" in lean_imports.install()
    monkeypatch.setitem(lean_imports.TESTED_WITH, "peft", "0.1")
    monkeypatch.setitem(lean_imports.TESTED_WITH, "no-such-package", "1.0")
    assert "peft is 0." in lean_imports.install()
    assert "no-such-package is missing, not 1.0" in lean_imports.install()
    assert sys.meta_path == before


def test_the_versions_are_those_that_the_image_has() -> None:
    files = [(ROOT / "builder" / name).read_text() for name in ("requirements.txt", "requirements-torch.txt")]
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", "\n".join(files), re.MULTILINE))
    assert {name: pinned[name] for name in lean_imports.TESTED_WITH} == lean_imports.TESTED_WITH
