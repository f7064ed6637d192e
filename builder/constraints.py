"""Pin the dependencies of the packages in requirements.txt and requirements-torch.txt to the versions that are installed here.

    python -m builder.constraints      rewrites builder/constraints.txt

With the pins, an image that is built next year has the packages that were tested. torch's nvidia packages are not pinned: a
build for CPUs does not have them, and torch pins them itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
FILE = HERE / "constraints.txt"
HEAD = "# The dependencies of the packages in requirements.txt. Written by `python -m builder.constraints`.\n"


def main() -> int:
    argparse.ArgumentParser(prog="python -m builder.constraints", description=(__doc__ or "").splitlines()[0]).parse_args()
    pinned = {canonicalize_name(requirement.name) for requirement in required()}
    FILE.write_text(
        HEAD + "".join(f"{name}=={version}\n" for name, version in sorted(dependencies().items()) if name not in pinned)
    )
    return 0


def required() -> list[Requirement]:
    """Return the packages that the two files list."""
    lines = [line for name in ("requirements-torch.txt", "requirements.txt") for line in (HERE / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def dependencies() -> dict[str, str]:
    """Return the installed version of every listed package and of its dependencies, direct or not, by name."""
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = required()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) not in seen:
            seen.add((name, extras))
            found[name] = metadata.version(name).partition("+")[0]
            waiting += needed_by(name, extras)
    return found


def needed_by(name: str, extras: frozenset[str]) -> Iterator[Requirement]:
    """Yield the direct dependencies of an installed package."""
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        if not requirement.marker or any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            yield requirement


if __name__ == "__main__":
    sys.exit(main())
