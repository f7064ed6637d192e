"""Makes `import runpod` fast: 0.2 s instead of 1.4 s. Import this module first.

The SDK gets the processor's name for its debugger from a package that measures the clock for a second. It also imports its
command line, with SSH, which a worker does not use.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import cpuinfo  # type: ignore[import-untyped]


def _processor() -> dict[str, str]:
    """Return the one entry that the SDK asks for. Without it, the SDK says that the name is unknown."""
    file = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.+)$", file.read_text() if file.is_file() else "", re.MULTILINE)
    return {"brand_raw": name[1]} if name else {}


class _OnFirstUse(ModuleType):
    """Stands for a module until one of its names is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own questions
            raise AttributeError(name)
        if sys.modules[self.__name__] is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


cpuinfo.get_cpu_info = _processor
sys.modules.setdefault("paramiko", _OnFirstUse("paramiko"))
