"""The cold start: checks the storage for results, then loads the one model of this worker."""

from __future__ import annotations

import threading
import time

from pipelines import errors as pipeline_errors
from pipelines.catalog import MODELS
from pipelines.cfg_parallel import PASSES
from pipelines.checkpoints import Checkpoints
from pipelines.clock import timed
from worker.delivery import retry_until
from worker.errors import Code, WorkerError
from worker.faults import worker_error
from worker.logs import log, stage
from worker.net import privates
from worker.ranks import Ranks
from worker.recovery import Recovery
from worker.service import Service
from worker.settings import Settings, SettingsError
from worker.startup.load_model import gpus_of, load_model, meet, ranks_of
from worker.startup.missing_weights import fetch_missing
from worker.storage.base import Limit, Storage
from worker.storage.choice import storage_of

_SECONDS_FOR_THE_BUCKET = 20.0
"""How long the bucket may take to answer at start: a store that is just restarting should not stop the worker."""
_REFUSALS_AT_START = 3


def cold_start(settings: Settings, took: dict[str, float] | None = None, checkpoints: Checkpoints | None = None) -> Service:
    """Check the storage for results, then load the model of `settings`.

    `took`: seconds of earlier steps of the start, for the log. `checkpoints`: the weights in the places of `settings`, if the
    caller has found them before.

    Raises SettingsError, and WorkerError: UPLOAD_FAILED, AI_TOOLKIT_REQUIRED, CHECKPOINT_NOT_FOUND, OUT_OF_MEMORY.
    """
    if settings.in_cloud and settings.allow_private_downloads:
        log.warning("ALLOW_PRIVATE_DOWNLOADS=1 lets every request reach the network of this worker")
    if not settings.allow_private_downloads:
        try:
            privates.check()
        except privates.GuardMissing as error:
            raise SettingsError(str(error)) from error
    if settings.exact and (settings.attention != "native" or settings.compile):
        log.warning("EXACT=1: ATTENTION and COMPILE are ignored")
    took = {} if took is None else took
    checkpoints = checkpoints or Checkpoints(MODELS[settings.model_id], settings.checkpoint_places)
    storage = storage_of(settings)
    with timed(took, "storage"):
        _check_storage(storage)
    if settings.allow_download and checkpoints.missing_parts:
        with timed(took, "download"):
            checkpoints = fetch_missing(settings, checkpoints)
    # Upload what an earlier worker could not. This runs in the background, since loading the model takes longer.
    threading.Thread(
        target=Recovery(settings.recovery_dir, settings.recovery_max_bytes).upload_all, args=(storage,), daemon=True
    ).start()
    try:
        with stage("cold start", model=settings.model_id, device=settings.device, took=took):
            ranks = Ranks(_number_of_ranks(settings) - 1)
            model = load_model(settings, 0, took, checkpoints)
            if ranks.store:
                with timed(took, "other GPUs"):
                    ranks.wait_until_loaded()
                    meet(model, settings, 0, ranks.store)
                    with ranks.doing("check_equal", model.facts):
                        pass
    except pipeline_errors.DeviceUnavailable as error:
        raise SettingsError(str(error)) from error
    except pipeline_errors.PipelineError as error:
        raise worker_error(error) or WorkerError(Code.INTERNAL, str(error)) from error
    return Service(settings, model, storage, ranks)


def _number_of_ranks(settings: Settings) -> int:
    """`ranks_of`, with a line in the log where it may surprise."""
    number, there = ranks_of(settings), gpus_of(settings)
    if number < there and settings.gpus != str(number):
        why = "EXACT=1 allows two at most" if settings.exact else "a video can be shared by 1, 2 or 4"
        log.warning("this worker has %d GPUs and uses %d: %s", there, number, why)
    if number > PASSES:
        log.warning("%d GPUs make each video, so its last bit can differ from that of one; EXACT=1 prevents it", number)
    return number


def _check_storage(storage: Storage) -> None:
    """Raise WorkerError with UPLOAD_FAILED: soon if the storage refuses, after a while if it does not answer."""
    give_up_at = time.monotonic() + _SECONDS_FOR_THE_BUCKET
    limit = Limit(threading.Event(), give_up_at)
    retry_until(lambda: storage.check(limit), give_up_at, threading.Event(), _REFUSALS_AT_START, longest_pause=1)
