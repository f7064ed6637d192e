"""A faster start: skips what torch, transformers, diffusers and peft import and no Wan pipeline uses.

    from worker.startup import lean_imports
    lean_imports.install()      # before the first of them is imported

Until its first frame, a new process spends half of its time on imports that it does not need: the compiler, distributed
tensors, an index of four hundred models. Each patch below defers one module's expensive imports, or caches their result. Code
that uses the compiler still gets it, a second later. Only the support for distributed tensors is switched off, in transformers
and peft: here a GPU holds a whole model. The figures are seconds of CPU time.

This changes imports for all code in the process, so it is only for a process that is a worker and nothing else. The patches
were tested with the versions below; with other versions nothing is patched.
"""

from __future__ import annotations

import ast
import functools
import marshal
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module, metadata
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

TESTED_WITH = {"torch": "2.13.0", "transformers": "5.23.0", "diffusers": "0.42.1", "peft": "0.21.2"}

Execute = Callable[[], None]
"""Runs the body of a module."""
Patch = Callable[[Any, Execute], None]
"""Called with a new module and its body, instead of running the body."""

_PATCHES: dict[str, Patch] = {}


def install() -> str:
    """Patch the modules below when they are imported. Returns why nothing is patched, or ""."""
    there = {name: _version(name) for name in TESTED_WITH}
    reasons = [f"{name} is {there[name]}, not {tested}" for name, tested in TESTED_WITH.items() if there[name] != tested]
    reasons += [f"{name} is imported already" for name in TESTED_WITH if name in sys.modules]
    if not reasons:
        sys.meta_path.insert(0, _Finder)
    return ", ".join(reasons)


def _version(package: str) -> str:
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return "missing"


def _patches(name: str) -> Callable[[Patch], Patch]:
    def register(patch: Patch) -> Patch:
        _PATCHES[name] = patch
        return patch

    return register


@_patches("torch._dynamo")
def _compiler(module: Any, execute: Execute) -> None:
    """Defer the compiler, which imports sympy and much of torch.distributed. Saves 0.7 s.

    The libraries import it only to mark functions with decorators. The marks are recorded, and applied when the compiler is
    first used; until then nothing is compiled, so no mark has an effect.
    """
    marks: list[Callable[[], object]] = []

    def allow_in_graph(fn: Any) -> Any:
        marks.append(lambda: module.allow_in_graph(fn))
        return fn

    def assume_constant_result(fn: Any) -> Any:
        marks.append(lambda: module.assume_constant_result(fn))
        return fn

    def disable(fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        if fn is None:
            return functools.partial(disable, recursive=recursive, **options)
        current = fn

        def mark() -> None:
            nonlocal current
            current = module.disable(fn, recursive, **options)

        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            return current(*args, **kwargs)

        marks.append(mark)
        return call

    answers = {
        "allow_in_graph": allow_in_graph,
        "assume_constant_result": assume_constant_result,
        "disable": disable,
        "eval_frame": SimpleNamespace(
            OptimizedModule=type("OptimizedModule", (), {})
        ),  # used to check whether a module is compiled
    }
    _defer(module, answers, execute, marks)


@_patches("torch._dynamo._trace_wrapped_higher_order_op")
def _deferred_vmap_masks(module: Any, execute: Execute) -> None:
    """Defer one class of the compiler, which transformers imports for masks that no model here has."""

    def make() -> Any:
        _run_deferred(module.__name__)
        return module.TransformGetItemToIndex()

    _defer(module, {"TransformGetItemToIndex": make}, execute)


@_patches("transformers.utils.import_utils")
def _cached_index_without_distributed_tensors(module: Any, execute: Execute) -> None:
    """Switch off distributed tensors, as in a torch that was built without them. Saves 0.4 s.

    Also cache the index of all models, for which every import reads two thousand source files. The index is stored beside the
    bytecode, and made again when the source changes, as with bytecode. Saves 0.4 s, and much more if the files are not in the
    page cache.
    """
    execute()
    module.is_torch_distributed_available = lambda: False
    make = module.create_import_structure_from_path

    def create_import_structure_from_path(path: str | Path) -> Any:
        folder = Path(path).parent if Path(path).is_file() else Path(path)
        return _cached_index(folder, make) if folder.name == "models" else make(path)

    module.create_import_structure_from_path = create_import_structure_from_path


def _cached_index(folder: Path, make: Callable[[Path], Any]) -> Any:
    source = (folder / "__init__.py").stat()
    key = (TESTED_WITH["transformers"], source.st_mtime_ns, source.st_size)
    file = folder / "__pycache__" / f"index.{sys.implementation.cache_tag}.marshal"
    try:
        kept_key, index = marshal.loads(file.read_bytes())  # noqa: S302 Python does the same with the bytecode beside it
        if kept_key == key:
            return index
    except (OSError, ValueError, EOFError, TypeError):
        pass
    index = make(folder)
    temporary = file.with_suffix(f".{os.getpid()}")
    try:
        temporary.write_bytes(marshal.dumps((key, index)))
        temporary.replace(file)
    except OSError:  # the installation is not writable
        with suppress(OSError):
            temporary.unlink()
    return index


@_patches("diffusers.models.autoencoders")
@_patches("diffusers.models.transformers")
@_patches("diffusers.models.unets")
def _models_on_demand(package: Any, execute: Execute) -> None:
    """Import each of dozens of models when it is first used: a pipeline uses one. Saves 0.1 s.

    These packages contain nothing but `from .module import Class`, so they are parsed, not run.
    """
    tree = ast.parse(package.__loader__.get_data(package.__file__))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    home = {name.name: f"{package.__name__}.{node.module}" for node in imports for name in node.names}

    def __getattr__(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")
        return getattr(import_module(home[name]), name)

    package.__getattr__ = __getattr__


@_patches("diffusers.utils.import_utils")
def _distributions_on_demand(module: Any, execute: Execute) -> None:
    """Find out when it is first used which distribution each installed file belongs to. Saves 0.1 s."""
    find = metadata.packages_distributions
    metadata.packages_distributions = lambda: _OnDemand(find)
    try:
        execute()
    finally:
        metadata.packages_distributions = find


class _OnDemand(Mapping[str, list[str]]):
    def __init__(self, make: Callable[[], Mapping[str, list[str]]]) -> None:
        self._made = functools.cache(make)

    def __getitem__(self, key: str) -> list[str]:
        return self._made()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made())

    def __len__(self) -> int:
        return len(self._made())


@_patches("peft.tuners.tuners_utils")
def _no_distributed_tensors(module: Any, execute: Execute) -> None:
    """Switch off distributed tensors: peft uses them if torch has them, and expects transformers to have imported them."""
    execute()
    module._torch_supports_distributed = False


@_patches("torch.nn.init")
def _no_random_values_on_meta(module: Any, execute: Execute) -> None:
    """Draw no values for weights on `meta`: torch would import sympy to find out the type of the result. Saves 0.3 s."""
    execute()
    normal = module.normal_

    @functools.wraps(normal)
    def normal_(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor if tensor.is_meta else normal(tensor, *args, **kwargs)

    module.normal_ = normal_


class _Finder:
    """Runs before Python's own finders, and only replaces the loader that they find."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        parent = name.rpartition(".")[0]
        if name not in _PATCHES and parent not in _deferred:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and spec.loader:
            spec.loader = _PatchingLoader(spec.loader) if name in _PATCHES else _SubmoduleLoader(spec.loader, parent)
        return spec


class _PatchingLoader(Loader):
    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._own
        _PATCHES[module.__name__](module, lambda: self._own.exec_module(module))


class _SubmoduleLoader(Loader):
    """Loads a submodule of a deferred module. It runs the parent's body first, which may import the submodule itself."""

    def __init__(self, own: Loader, parent: str) -> None:
        self._own = own
        self._parent = parent
        self._there: ModuleType | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        _run_deferred(self._parent)
        self._there = sys.modules.get(spec.name)
        return self._there or self._own.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = self._own
        if self._there is None:
            module.__loader__ = self._own
            self._own.exec_module(module)


_deferred: dict[str, Execute] = {}
"""The deferred bodies that have not run yet, by module name."""
_run_lock = threading.RLock()


class _DeferredModule(ModuleType):
    """A module with a few ready names, which runs its body when any other name is used."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):  # `__wrapped__` and the like: inspecting a module must not run its body
            _run_deferred(self.__name__)
            if name in vars(self):
                return vars(self)[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def _defer(module: Any, answers: dict[str, Any], execute: Execute, afterwards: Sequence[Callable[[], object]] = ()) -> None:
    def body() -> None:
        for name in answers:
            delattr(module, name)
        execute()
        module.__class__ = ModuleType
        for action in afterwards:
            action()

    _deferred[module.__name__] = body
    vars(module).update(answers)
    module.__class__ = _DeferredModule


def _run_deferred(name: str) -> None:
    """Run the body of a deferred module, once. Other threads wait until it has run, as with any import."""
    with _run_lock:
        if body := _deferred.pop(name, None):
            body()
