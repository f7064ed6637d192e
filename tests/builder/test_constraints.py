"""An image that is built again has the packages that the worker was tested with."""

from __future__ import annotations

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from builder import constraints


def versions_in(name: str) -> dict[str, str]:
    lines = (constraints.HERE / name).read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def test_everything_that_is_pulled_in_is_pinned_at_the_version_that_is_tested() -> None:
    pinned = {name: versions_in(name) for name in ("constraints.txt", "requirements.txt", "requirements-torch.txt")}
    together = {package: version for versions in pinned.values() for package, version in versions.items()}
    assert constraints.dependencies().items() <= together.items()


def test_what_fetches_the_checkpoints_is_what_the_worker_has() -> None:
    assert (
        versions_in("requirements-fetch.txt").items()
        <= (versions_in("constraints.txt") | versions_in("requirements.txt")).items()
    )
