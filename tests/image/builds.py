"""Build the image without an engine, and look at it: buildah builds, and what comes out is read layer by layer."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from builder import REPRODUCIBLE_MTIME
from tests.worker_process import ROOT

BASE_IMAGE = os.environ.get("BASE_IMAGE", "docker.io/library/debian:bookworm-slim")
"""What the images are built on; any that the machine has or can pull."""
OPTIONS = shlex.split(os.environ.get("BUILD_OPTIONS", ""))
"""What a machine's network asks for, such as `--volume /etc/pip.conf:/etc/pip.conf:ro` for an index of its own."""


@dataclass(frozen=True)
class Layer:
    """What one instruction changed."""

    diff_id: str
    created_by: str
    tar: Path

    @property
    def bytes(self) -> int:
        return self.tar.stat().st_size

    def members(self) -> list[tarfile.TarInfo]:
        with tarfile.open(self.tar) as archive:
            return archive.getmembers()

    def holds(self, text: bytes) -> bool:
        """Whether the bytes are anywhere in the layer, in a file or in a name."""
        before = b""
        with self.tar.open("rb") as file:
            while chunk := file.read(16 * 1024**2):
                if text in before + chunk:
                    return True
                before = chunk[-len(text) :]
        return False


@dataclass(frozen=True)
class Image:
    """A built image, and what it consists of as a registry would get it."""

    name: str
    folder: Path

    @cached_property
    def description(self) -> dict[str, Any]:
        """The image's configuration with its history."""
        return json.loads(self._blob(self._manifest["config"]["digest"]).read_text())

    @cached_property
    def layers(self) -> list[Layer]:
        """Beginning with those of the base."""
        history = [step["created_by"] for step in self.description["history"] if not step.get("empty_layer")]
        digests = [layer["digest"] for layer in self._manifest["layers"]]
        diff_ids = self.description["rootfs"]["diff_ids"]
        return [Layer(*parts) for parts in zip(diff_ids, history, map(self._blob, digests), strict=True)]

    @cached_property
    def own_layers(self) -> list[Layer]:
        """Without those of the base."""
        base = json.loads(run("buildah", "inspect", "--type", "image", BASE_IMAGE))["OCIv1"]["rootfs"]["diff_ids"]
        assert [layer.diff_id for layer in self.layers[: len(base)]] == base
        return self.layers[len(base) :]

    @property
    def config(self) -> dict[str, Any]:
        return self.description["config"]

    @property
    def environment(self) -> dict[str, str]:
        return dict(variable.split("=", 1) for variable in self.config["Env"])

    @property
    def _manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / "manifest.json").read_text())

    def _blob(self, digest: str) -> Path:
        return self.folder / digest.removeprefix("sha256:")


def build(folder: Path, *options: str, context: Path = ROOT, **arguments: str) -> Image:
    """Build the Dockerfile of `context` with `arguments`, and put the layers into `folder`."""
    name = f"localhost/worker-wan-lora-test:{folder.name.lower()}"
    given = [part for key, value in arguments.items() for part in ("--build-arg", f"{key}={value}")]
    command = ["buildah", "bud", "--format", "docker", "--layers", "--isolation", "chroot", "--network", "host"]
    command += ["--timestamp", str(REPRODUCIBLE_MTIME), "--build-arg", f"BASE_IMAGE={BASE_IMAGE}", *OPTIONS, *options, *given]
    run(*command, "--tag", name, str(context))
    run("buildah", "push", "--quiet", "--disable-compression", name, f"dir:{folder}")
    return Image(name, folder)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@dataclass(frozen=True)
class Container:
    """A running image: Python is process 1 of its own process namespace, as in every container."""

    process: subprocess.Popen[bytes]
    log: Path
    root: Path

    @property
    def pid(self) -> int | None:
        """Of its process 1, as this machine counts; None before there is one."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else None

    def post(self, port: int, path: str, content: dict[str, Any]) -> dict[str, Any]:
        """POST to a port of the container's own loopback; {} while nobody listens there."""
        url = f"http://127.0.0.1:{port}{path}"
        curl = ["curl", "--silent", "--max-time", "300", "--json", json.dumps(content), url]
        done = subprocess.run(["nsenter", f"--net=/proc/{self.pid}/ns/net", *curl], capture_output=True, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else {}


@contextmanager
def container(
    image: Image, log: Path, env: dict[str, str], volumes: dict[Path, str], *arguments: str, network: bool = False
) -> Iterator[Container]:
    """Run the image's own command, with `arguments` after it. `volumes`: folder here to folder there.

    Without an engine: namespaces and chroot are what an engine uses too. `network`: of this machine, or only a loopback.
    """
    working = run("buildah", "from", "--pull-never", image.name).strip()
    try:
        root = Path(run("buildah", "mount", working).strip())
        (root / "etc/hosts").write_text("127.0.0.1 localhost\n")  # as an engine does
        mounts = [f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
        for here, there in volumes.items():
            mounts += [f"mkdir -p {root}{there}", f"mount --bind {here} {root}{there}"]
        variables = [f"{name}={value}" for name, value in (image.environment | env).items()]
        command = [*(image.config.get("Entrypoint") or []), *image.config["Cmd"], *arguments]
        start = f"cd {shlex.quote(image.config['WorkingDir'])} && exec {shlex.join(command)}"
        inside = ["chroot", str(root), "env", "-i", *variables, "/bin/sh", "-c", start]
        script = " && ".join(["ip link set lo up || true", *mounts, f"exec {shlex.join(inside)}"])
        namespaces = ["--mount", "--pid", "--fork", "--kill-child", *([] if network else ["--net"])]
        with log.open("wb") as output:
            process = subprocess.Popen(["unshare", *namespaces, "sh", "-c", script], stdout=output, stderr=output)
        try:
            yield Container(process, log, root)
        finally:
            process.kill()
            process.wait()
    finally:
        run("buildah", "rm", working)
