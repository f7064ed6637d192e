"""The entry point that RunPod starts, and `python handler.py` on your own machine.

It reads the settings, loads the one model of this worker, and gives every job to `worker.service.Service.run`. A job's `input`
is the request of docs/api.md. The job returns its result, or `{"error": "CODE: what, where, what to do"}`.

    python handler.py                      runs test_input.json once
    python handler.py --test_input '{…}'   runs this job once
    python handler.py --rp_serve_api       serves the local RunPod API on port 8000; --rp_api_port names another
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, NoReturn

from pipelines.catalog import MODELS
from pipelines.checkpoints import Checkpoints
from pipelines.clock import timed
from worker import logs
from worker.errors import WorkerError
from worker.settings import Settings, SettingsError, is_in_cloud, load_settings
from worker.startup import lean_imports, prefetch

if TYPE_CHECKING:
    from worker.service import Service

_SECONDS_TO_END = 10.0
"""The interpreter waits for its threads. A thread that does not stop, as in a call of the GPU's driver, must not block it."""


def main() -> None:
    if {"-h", "--help"} & set(sys.argv):  # before the settings, which a first look does not have
        print(
            f"usage: python handler.py [OPTION]\n\n{__doc__}\nIts settings are environment variables: see docs/environment.md."
        )
        return
    logs.configure()
    in_cloud = is_in_cloud()
    one_local_run = not in_cloud and "--rp_serve_api" not in sys.argv
    # The SDK's default level logs whole results, presigned URLs included. A single local run prints its result, as it should.
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO" if one_local_run else "WARN")
    # torch reads this when it is imported. It stops rounding pinned memory up to powers of two, and fragments memory less.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True,pinned_max_round_threshold_mb:1")
    try:
        settings = load_settings()
        logs.hide(settings.secrets)
        service = start(settings)
        from worker.runpod import queue

        if not one_local_run:
            queue.redact_the_log()
    except (SettingsError, WorkerError) as error:
        fail(str(error), in_cloud)
    except Exception as error:
        logs.log.exception("the start failed")
        fail(f"{type(error).__name__}; the log line above has the traceback", in_cloud)

    def shut_down(*_: object) -> NoReturn:
        status = int(service.must_be_replaced)
        end_soon(status)
        sys.exit(status)

    if not one_local_run:
        signal.signal(
            signal.SIGTERM, shut_down
        )  # the queue's loop replaces this; the local API raises the signal again when done
    try:
        queue.serve(service.run, service.wants_a_job, settings.model_id)
    finally:
        end_soon(int(service.must_be_replaced))  # the SDK ends a single local run by itself, with another status
    shut_down()


def start(settings: Settings) -> Service:
    """Import the libraries and load the model, while threads prefetch the weights. Raises what `cold_start` raises."""
    took = {"settings": round(time.process_time(), 3)}
    checkpoints = Checkpoints(MODELS[settings.model_id], settings.checkpoint_places)
    prefetch.read_weights(checkpoints.spec, checkpoints)
    if reason := lean_imports.install():
        logs.log.warning("slow start: all modules of the libraries are imported, since %s", reason)
    gc.disable()  # garbage collection during the imports takes a second and finds hardly anything
    with timed(took, "sdk"):
        import worker.runpod.queue  # noqa: F401 for `main`
    with timed(took, "libraries"):
        from worker.startup.cold_start import cold_start
    gc.freeze()
    gc.enable()
    return cold_start(settings, took, checkpoints)


def fail(reason: str, in_cloud: bool) -> NoReturn:
    """Print one line on stderr, report it to RunPod in the cloud, and exit with status 1."""
    print(f"worker-wan-lora cannot start: {reason}", file=sys.stderr)
    try:
        if in_cloud:
            from worker.runpod import queue

            queue.report_unhealthy(reason)
    finally:
        end_soon(1)
    sys.exit(1)


def end_soon(status: int) -> None:
    """Have the process end with `status`, should a thread keep it from ending by itself."""
    end = threading.Timer(_SECONDS_TO_END, os._exit, (status,))
    end.daemon = True
    end.start()


if __name__ == "__main__":
    main()
