"""A start that leaves out what torch, transformers, diffusers and peft import, and no Wan pipeline uses.

    from worker.startup import lean_imports
    lean_imports.install()      # before the first of them is imported

Half of a fresh process's way to its first frame is imports that serve others: the compiler, tensors spread over machines, an
index of four hundred models. Each treatment below stands before one module and puts off one such thing, or does it once
instead of at every start. Who asks for the compiler gets it, a second later. Only tensors spread over processes are gone from
transformers and peft: a worker is one process. The figures are seconds of CPU time.

It changes how everybody in the process imports these libraries, so it is for a process that is a worker and nothing else.
They were tested together in the versions below; with others nothing is treated.
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
Treatment = Callable[[Any, Execute], None]
"""Called with a new module in place of its body."""

_TREATMENTS: dict[str, Treatment] = {}


def install() -> str:
    """Treat the modules below when they are imported. Returns why none is treated, or ""."""
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


def _treats(name: str) -> Callable[[Treatment], Treatment]:
    def register(treatment: Treatment) -> Treatment:
        _TREATMENTS[name] = treatment
        return treatment

    return register


@_treats("torch._dynamo")
def _compiler(module: Any, execute: Execute) -> None:
    """The compiler, which brings sympy and much of torch.distributed: put off. Saves 0.7 s.

    It is imported for a few marks that decorators leave on functions. They are noted, and made when somebody compiles; until
    then nothing is compiled, and no function has to be kept from it.
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
        "eval_frame": SimpleNamespace(OptimizedModule=type("OptimizedModule", (), {})),  # asked for: is this one compiled?
    }
    _put_off(module, answers, execute, marks)


@_treats("torch._dynamo._trace_wrapped_higher_order_op")
def _masks_by_vmap(module: Any, execute: Execute) -> None:
    """One class of the compiler's, which transformers imports for masks that no model here has: put off with it."""

    def make() -> Any:
        _wake(module.__name__)
        return module.TransformGetItemToIndex()

    _put_off(module, {"TransformGetItemToIndex": make}, execute)


@_treats("transformers.utils.import_utils")
def _one_process_and_a_kept_index(module: Any, execute: Execute) -> None:
    """No tensors that are spread over processes, as with a torch that was built without them. Saves 0.4 s.

    And an index of all models, made by reading two thousand source files at every import: kept beside the bytecode, and made
    again when the source is another, as Python does with bytecode. Saves 0.4 s, and much more where the files are not cached.
    """
    execute()
    module.is_torch_distributed_available = lambda: False
    make = module.create_import_structure_from_path

    def create_import_structure_from_path(path: str | Path) -> Any:
        folder = Path(path).parent if Path(path).is_file() else Path(path)
        return _kept_index(folder, make) if folder.name == "models" else make(path)

    module.create_import_structure_from_path = create_import_structure_from_path


def _kept_index(folder: Path, make: Callable[[Path], Any]) -> Any:
    source = (folder / "__init__.py").stat()
    key = (TESTED_WITH["transformers"], source.st_mtime_ns, source.st_size)
    file = folder / "__pycache__" / f"index.{sys.implementation.cache_tag}.marshal"
    try:
        kept_key, index = marshal.loads(file.read_bytes())  # noqa: S302 as Python does with what lies beside it
        if kept_key == key:
            return index
    except (OSError, ValueError, EOFError, TypeError):
        pass
    index = make(folder)
    temporary = file.with_suffix(f".{os.getpid()}")
    try:
        temporary.write_bytes(marshal.dumps((key, index)))
        temporary.replace(file)
    except OSError:  # an installation that cannot be written to
        with suppress(OSError):
            temporary.unlink()
    return index


@_treats("diffusers.models.autoencoders")
@_treats("diffusers.models.transformers")
@_treats("diffusers.models.unets")
def _models_on_demand(package: Any, execute: Execute) -> None:
    """Dozens of models, of which a pipeline uses one: each is imported when it is asked for. Saves 0.1 s.

    These packages hold nothing but `from .module import Class`, and are read rather than run.
    """
    tree = ast.parse(package.__loader__.get_data(package.__file__))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    home = {name.name: f"{package.__name__}.{node.module}" for node in imports for name in node.names}

    def __getattr__(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package.__name__!r} has no attribute {name!r}")
        return getattr(import_module(home[name]), name)

    package.__getattr__ = __getattr__


@_treats("diffusers.utils.import_utils")
def _distributions_on_demand(module: Any, execute: Execute) -> None:
    """Which distribution every installed file belongs to, for libraries that are not installed: found out when asked. 0.1 s."""
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


@_treats("peft.tuners.tuners_utils")
def _one_process(module: Any, execute: Execute) -> None:
    """peft asks for such tensors wherever torch knows them, and counts on transformers to have imported them."""
    execute()
    module._torch_supports_distributed = False


@_treats("torch.nn.init")
def _no_values_without_storage(module: Any, execute: Execute) -> None:
    """Weights on `meta` are not drawn: torch would import sympy to find out the type of what is never there. Saves 0.3 s."""
    execute()
    normal = module.normal_

    @functools.wraps(normal)
    def normal_(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor if tensor.is_meta else normal(tensor, *args, **kwargs)

    module.normal_ = normal_


class _Finder:
    """Stands before Python's own finders, and does no more than to change the loader they find."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        parent = name.rpartition(".")[0]
        if name not in _TREATMENTS and parent not in _bodies:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec and spec.loader:
            spec.loader = _Treated(spec.loader) if name in _TREATMENTS else _BelowPutOff(spec.loader, parent)
        return spec


class _Treated(Loader):
    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._own
        _TREATMENTS[module.__name__](module, lambda: self._own.exec_module(module))


class _BelowPutOff(Loader):
    """For a submodule of a module that was put off, whose own body comes first, and may import the submodule itself."""

    def __init__(self, own: Loader, parent: str) -> None:
        self._own = own
        self._parent = parent
        self._there: ModuleType | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        _wake(self._parent)
        self._there = sys.modules.get(spec.name)
        return self._there or self._own.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = self._own
        if self._there is None:
            module.__loader__ = self._own
            self._own.exec_module(module)


_bodies: dict[str, Execute] = {}
"""By module name, bodies that were put off and have not run."""
_waking = threading.RLock()


class _PutOff(ModuleType):
    """A module with a few answers, which runs its body when it is asked for anything else."""

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):  # `__wrapped__` and its like: whoever inspects a module wants nothing of it
            _wake(self.__name__)
            if name in vars(self):
                return vars(self)[name]
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def _put_off(module: Any, answers: dict[str, Any], execute: Execute, afterwards: Sequence[Callable[[], object]] = ()) -> None:
    def body() -> None:
        for name in answers:
            delattr(module, name)
        execute()
        module.__class__ = ModuleType
        for action in afterwards:
            action()

    _bodies[module.__name__] = body
    vars(module).update(answers)
    module.__class__ = _PutOff


def _wake(name: str) -> None:
    """Run the body of a module that was put off, once. Another thread waits for the end of it, as with any import."""
    with _waking:
        if body := _bodies.pop(name, None):
            body()
