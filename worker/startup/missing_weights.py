"""Downloads missing weights at start, if ALLOW_DOWNLOAD is set.

builder/fetch_checkpoints.py downloads them, in a separate process: there HF_HUB_OFFLINE has no effect, and the worker need not
import its libraries.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pipelines.checkpoints import Checkpoints, revision_of
from worker.errors import Code, WorkerError
from worker.logs import log
from worker.settings import Settings

_ROOT = Path(__file__).parents[2]


def fetch_missing(settings: Settings, checkpoints: Checkpoints) -> Checkpoints:
    """Download the missing parts, and search again. Raises WorkerError with CHECKPOINT_NOT_FOUND."""
    name, folder = _target(settings)
    parts = checkpoints.missing_parts
    command = [
        sys.executable,
        "-m",
        "builder.fetch_checkpoints",
        "--model-id",
        settings.model_id,
        "--to",
        str(folder.absolute()),
    ]
    command += ["--parts", ",".join(parts)]
    for repo, revision in _revisions_of_the_rest(checkpoints).items():
        command += ["--revision", f"{repo}={revision}"]
    log.info("downloading missing weights to %s: %s", name, ", ".join(parts))
    last_line = ""
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:  # noqa: S603
        assert process.stdout is not None
        for line in process.stdout:
            last_line = line.strip() or last_line
            log.info("%s", last_line)
    if process.returncode:
        reason = last_line.removeprefix("fetch_checkpoints: ").replace("--to", name)
        raise WorkerError(
            Code.CHECKPOINT_NOT_FOUND, f"{', '.join(parts)} of {settings.model_id} cannot be downloaded: {reason}"
        )
    return Checkpoints(checkpoints.spec, settings.checkpoint_places)


def _target(settings: Settings) -> tuple[str, Path]:
    """Return (variable, folder): the network volume if there is one and it is writable, else CHECKPOINT_DIR."""
    volume = settings.volume_checkpoint_dir
    if os.access(volume if volume.is_dir() else volume.parent, os.W_OK):
        return "VOLUME_CHECKPOINT_DIR", volume
    return "CHECKPOINT_DIR", settings.checkpoint_dir


def _revisions_of_the_rest(checkpoints: Checkpoints) -> dict[str, str]:
    """Return the known commits of the parts that exist, by repo: the missing parts must be of the same commits."""
    missing = set(checkpoints.missing_parts)
    repos_of_missing = {checkpoints.spec.sources[part].repo for part in missing}
    folders = {
        source.repo: checkpoints.repo_of(part)
        for part, source in checkpoints.spec.sources.items()
        if part not in missing and source.repo in repos_of_missing
    }
    known = {repo: revision_of(folder) for repo, folder in folders.items()}
    return {repo: revision for repo, revision in known.items() if revision}
