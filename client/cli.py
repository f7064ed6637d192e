"""`python -m client`: run, from-training, sweep, resume, status, cancel, models.

stdout has the paths of the files, one per line, or one JSON object with --json. Everything else is on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from client.client import LOCAL_PATIENCE, LOCAL_URL, PATIENCE, Client
from client.display import Display, line_of, printable
from client.errors import (
    BadInput,
    ClientError,
    DownloadFailed,
    InvalidRequest,
    JobFailed,
    JobNotFound,
    JobStopped,
    NotAuthorized,
    Refused,
    SubmissionUnknown,
    Unreachable,
)
from client.models import fields_table, models_table
from client.options import (
    SWEEP_EPILOG,
    TRAINING_EPILOG,
    add_request_options,
    add_sweep_options,
    add_training_options,
    in_terms_of_options,
    request_of,
)
from client.result import File, Result

DONE, FAILED, INVALID, NO_CONNECTION, STOPPED, INCOMPLETE, UNKNOWN, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130
"""Exit statuses; docs/client.md has the table."""

_FOLDER = Path("output")

_STATUS_OF: dict[type[ClientError], int] = {
    JobFailed: FAILED,
    InvalidRequest: INVALID,
    Unreachable: NO_CONNECTION,
    NotAuthorized: NO_CONNECTION,
    JobNotFound: NO_CONNECTION,
    Refused: NO_CONNECTION,
    JobStopped: STOPPED,
    DownloadFailed: INCOMPLETE,
    SubmissionUnknown: UNKNOWN,
}


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if options.command == "models":
        print(f"{models_table()}\n\n{fields_table()}")
        return DONE
    with Display() as display:
        try:
            command: Callable[[argparse.Namespace, Client, Display], int] = options.run_command
            return command(options, _client(options, display), display)
        except KeyboardInterrupt:
            return INTERRUPTED
        except ClientError as error:
            return _report(error, options, display)


def _report(error: ClientError, options: argparse.Namespace, display: Display) -> int:
    display.say(f"{error.code}: {error}" if not str(error).startswith(f"{error.code}: ") else str(error))
    if error.job_id and not isinstance(error, JobFailed | JobStopped | JobNotFound):
        display.say(_next_commands(options, error.job_id))
    if options.json:
        print(json.dumps({"job_id": error.job_id, "error": {"code": error.code, "message": str(error)}}))
    return _STATUS_OF[type(error)]


def _client(options: argparse.Namespace, display: Display) -> Client:
    given = {} if options.patience is None else {"patience": options.patience}
    if options.endpoint is None:
        return Client.local(options.url, say=display.say, **given)
    return Client.endpoint(options.endpoint, os.environ.get("RUNPOD_API_KEY", ""), say=display.say, **given)


def _run(options: argparse.Namespace, client: Client, display: Display) -> int:
    request, folder = request_of(options, sys.stdin)
    try:
        job_id = client.submit(request, folder)
    except InvalidRequest as error:
        raise in_terms_of_options(error, options) from None
    except KeyboardInterrupt:
        display.say("interrupted while the request was sent: the job may run")
        return INTERRUPTED
    display.say(f"job {job_id}")
    return _finish(job_id, options, client, display)


def _from_training(options: argparse.Namespace, client: Client, display: Display) -> int:
    from client.from_training import plan  # it needs PyYAML, which no other command does

    lines, jobs = plan(options)
    for line in lines:
        display.say(line)
    if options.dry_run:
        print(json.dumps([{"input": job.request} for job in jobs], indent=2, ensure_ascii=False))
        return DONE
    ids: list[str] = []
    try:
        ids += (client.submit(job.request, folder=None) for job in jobs)
    finally:  # the jobs that were sent are paid for, whatever happened to the others
        for job_id in ids:
            display.say(f"job {job_id}")
    statuses = []
    for job, job_id in zip(jobs, ids, strict=True):
        try:
            statuses.append(_finish(job_id, options, client, display, job.sample))
        except (JobFailed, JobStopped) as error:  # the other samples are made all the same
            statuses.append(_report(error, options, display))
        if statuses[-1] == INTERRUPTED:
            break
    return next((status for status in statuses if status != DONE), DONE)


def _sweep(options: argparse.Namespace, client: Client, display: Display) -> int:
    from client.sweep.command import sweep  # it needs PyAV, Pillow and NumPy, which no other command does

    try:
        errors = sweep(options, client, display, sys.stdin)
    except BadInput as error:
        display.say(str(error))
        return INVALID
    except OSError as error:
        display.say(f"{error.filename or options.output_dir}: {error.strerror}")
        return INVALID
    return next((_STATUS_OF[type(error)] for error in errors), DONE)


def _resume(options: argparse.Namespace, client: Client, display: Display) -> int:
    return _finish(options.job, options, client, display)


def _finish(job_id: str, options: argparse.Namespace, client: Client, display: Display, sample: Path | None = None) -> int:
    """Wait for the job and download its files. `sample`: the trainer's own video of it."""
    try:
        return _download(client.wait(job_id, display.show), options, client, display, sample)
    except KeyboardInterrupt:
        display.say(f"interrupted. {_next_commands(options, job_id)}")
        return INTERRUPTED


def _download(result: Result, options: argparse.Namespace, client: Client, display: Display, sample: Path | None = None) -> int:
    for warning in result.warnings:
        display.say(f"warning: {warning}")
    for failed in result.failed:
        display.say(f"prompts[{failed.prompt_index}] failed: {failed.code}: {failed.message}")
    if result.full_run_seconds is not None:
        display.say(f"a draft: the full run would take about {result.full_run_seconds:.0f} s of the GPU")
    lost: list[DownloadFailed] = []

    def download(file: File, name: str) -> str | None:
        try:
            path = client.download_file(file, options.output_dir, name)
        except DownloadFailed as error:
            display.say(f"{error.code}: {error}")
            lost.append(error)
            return None
        if not options.json:
            print(printable(str(path)), flush=True)
        return str(path)

    files: list[dict[str, Any]] = []
    for output in result.outputs:
        display.say(
            f"prompts[{output.prompt_index}]: {output.width}x{output.height}, {output.num_frames} frames, seed {output.seed}"
        )
        video = download(output, output.name())
        if video is None:
            continue
        pictures = output.pictures(options.posters)
        paths: dict[str, str | None] = {picture.kind: download(picture, picture.name_for(Path(video))) for picture in pictures}
        files.append({"prompt_index": output.prompt_index, "seed": output.seed, "path": video, **paths})
        if sample:
            files[-1]["sample"] = str(sample)
            display.say(f"compare: python -m tools.compare {shlex.join([str(sample), video])}")
    if options.json:
        print(json.dumps({"job_id": result.job_id, "files": files, "result": result.raw}))
    return INCOMPLETE if lost or result.failed else DONE


def _status(options: argparse.Namespace, client: Client, display: Display) -> int:
    progress = client.status(options.job)
    if (line := line_of(progress)) != progress.status:
        display.say(line)
    print(json.dumps(asdict(progress)) if options.json else printable(progress.status))
    return DONE


def _cancel(options: argparse.Namespace, client: Client, display: Display) -> int:
    status = client.cancel(options.job)
    print(json.dumps({"job_id": options.job, "status": status}) if options.json else printable(status))
    return DONE


def _next_commands(options: argparse.Namespace, job_id: str) -> str:
    """The commands that resume and cancel a job which still runs."""
    job = [job_id, *(["--endpoint", options.endpoint] if options.endpoint else ["--url", options.url])]
    folder = ["--output-dir", str(options.output_dir)] if getattr(options, "output_dir", _FOLDER) != _FOLDER else []
    still_runs = "The job still runs" if options.endpoint else "The job runs as long as its worker does"
    resume, cancel = shlex.join(["resume", *job, *folder]), shlex.join(["cancel", *job])
    return f"{still_runs}.\n  get it:  python -m client {resume}\n  stop it: python -m client {cancel}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m client",
        description="Make videos on RunPod, with --endpoint and RUNPOD_API_KEY, or on a worker's local API.",
        epilog="Exit status: 0 done; 1 the job failed; 2 bad usage or request; 3 no connection, or the key, the "
        "endpoint or the job is not valid; 4 cancelled or out of time; 5 some prompts or files are missing; 6 the job may run, "
        "or it may not; 130 interrupted.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run_command: Any, help: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=help, description=help)
        one.set_defaults(run_command=run_command)
        where = one.add_mutually_exclusive_group()
        where.add_argument("--endpoint", metavar="ID", help="a RunPod endpoint; the key comes from RUNPOD_API_KEY")
        where.add_argument("--url", default=LOCAL_URL, help=f"a worker's local API (default: {LOCAL_URL})")
        one.add_argument("--json", action="store_true", help="print one JSON object")
        one.add_argument(
            "--patience",
            type=float,
            metavar="SECONDS",
            help=f"give up after so long without an answer (default: {PATIENCE:.0f}; for a local API {LOCAL_PATIENCE:.0f})",
        )
        return one

    run = command("run", _run, "make videos and download them")
    training = command("from-training", _from_training, "make the samples of a training's folder again")
    training.formatter_class, training.epilog = argparse.RawDescriptionHelpFormatter, TRAINING_EPILOG
    add_training_options(training)
    sweep = command("sweep", _sweep, "make a request with many LoRAs, scales and seeds, as one grid")
    sweep.formatter_class, sweep.epilog = argparse.RawDescriptionHelpFormatter, SWEEP_EPILOG
    add_sweep_options(sweep)
    sweep.add_argument(
        "--output-dir", type=Path, default=_FOLDER / "sweep", metavar="DIR", help="of this sweep alone (default: %(default)s)"
    )
    resume = command("resume", _resume, "wait for a job that was submitted before, and download its files")
    status = command("status", _status, "print the status of a job")
    cancel = command("cancel", _cancel, "cancel a job")
    for one in (run, training, resume):
        one.add_argument("--output-dir", type=Path, default=_FOLDER, metavar="DIR", help="for the files (default: %(default)s)")
        one.add_argument("--posters", action="store_true", help="also download the first frame of each video, as a JPEG")
    for one in (resume, status, cancel):
        one.add_argument("job", metavar="JOB")
    add_request_options(run)
    commands.add_parser("models", help="list the models, and the fields of a request")
    return parser
