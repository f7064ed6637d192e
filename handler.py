"""The entry point that RunPod starts, and `python handler.py` on your own machine.

Reads the settings, loads the one model of this worker, and hands every job to `worker.job.JobRunner.run`: a job's `input`
is the request of docs/api.md, and what comes back is its result, or `{"error": "CODE: what, where, what to do"}`.

    python handler.py                      runs test_input.json once
    python handler.py --test_input '{…}'   runs this job once
    python handler.py --rp_serve_api       serves the local RunPod API on port 8000
"""

import os
import sys

from worker import logs
from worker.errors import WorkerError
from worker.settings import SettingsError, load_settings


def main() -> None:
    logs.configure()
    try:
        settings = load_settings()
        from worker.job import cold_start

        runner = cold_start(settings)
    except (SettingsError, WorkerError) as error:
        sys.exit(f"worker-wan-lora cannot start: {error}")
    except Exception as error:
        logs.log.exception("the start failed")
        sys.exit(f"worker-wan-lora cannot start: {type(error).__name__}; the log line above has the traceback")

    # The SDK's default level logs whole results, presigned URLs included. One local run prints its result: it was asked for.
    one_local_run = not settings.in_cloud and "--rp_serve_api" not in sys.argv
    os.environ.setdefault("RUNPOD_LOG_LEVEL", "INFO" if one_local_run else "WARN")
    import runpod

    runpod.serverless.start({"handler": runner.run})


if __name__ == "__main__":
    main()
