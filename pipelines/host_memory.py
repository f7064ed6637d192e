"""How much main memory a process can have. No torch in this file."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

_MACHINE = Path("/proc/meminfo")
_CONTAINER = [Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")]


def available() -> int:
    """Bytes that this process can have: what is free on the machine, or the limit of its container."""
    sizes = []
    with suppress(OSError):
        free = re.findall(r"^MemAvailable:\s*(\d+) kB", _MACHINE.read_text(), re.MULTILINE)
        sizes += [int(kilobytes) * 1024 for kilobytes in free]
    for file in _CONTAINER:
        with suppress(OSError, ValueError):  # "max": no limit
            sizes.append(int(file.read_text()))
    return min(sizes, default=0)
