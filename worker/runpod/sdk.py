"""Makes `import runpod` quick: 0.2 s instead of 1.4 s. To be imported before it.

The SDK notes the processor's name for its debugger, and has it from a package that watches the clock tick for a second. Its
command line comes along, and brings SSH, of which a worker uses nothing.
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
    """The one entry that the SDK asks for. Where there is none, it says so."""
    file = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*: (.+)$", file.read_text() if file.is_file() else "", re.MULTILINE)
    return {"brand_raw": name[1]} if name else {}


class _OnFirstUse(ModuleType):
    """In the place of a module until something of it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own questions
            raise AttributeError(name)
        if sys.modules[self.__name__] is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)


cpuinfo.get_cpu_info = _processor
sys.modules.setdefault("paramiko", _OnFirstUse("paramiko"))
