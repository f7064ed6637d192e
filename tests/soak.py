"""Hundreds of jobs and every fault there is: `python -m tests.soak --jobs 500 --seed 1`, or `make soak`.

The real worker on tiny checkpoints takes jobs from an emulated queue and stores results in a real S3 server. The queue, the
bucket and the web server with the LoRAs fail in every way they know; jobs are stopped and delivered twice; workers are killed
and told to leave. In the first half one worker lives undisturbed, so that its memory can be watched; in the second there are
two, and one of them is always there.

At the end every job must have exactly one outcome, and the right one: the bytes that the same request gave in quiet. Exits
with 1 when anything was lost, made twice, wrong, or left behind.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from builder import tiny_checkpoints
from tests import s3_server
from tests.cloud import Cloud, Kind, Post
from tests.faults import CutShort, Dropped, Fault, Garbage, Slow, Status, Unanswered
from tests.s3_server import Gateway, S3Server
from tests.soak_requests import CACHED, Case, cases_of, lora_server
from tests.worker_process import Endpoint, Worker, environment

_OPEN_JOBS = 5
"""The queue is kept this long."""
_STUCK_SECONDS = 90
"""Nothing has happened for so long: what is open is lost."""
_MEMORY_GROWTH = 0.05
_SECRETS = ("X-Amz-", "Signature=", "Bearer ")
_VIOLATIONS_SHOWN = 40
_WARM_UP_JOBS = 50


# The faults.

_LONG_POLL: list[tuple[Fault, int]] = [
    (Status(500), 3),
    (Status(502), 2),
    (Status(400), 1),
    (Status(429), 1),
    (Garbage(), 2),
    (Dropped(), 3),
    (Unanswered(), 2),
    (CutShort(), 2),
    (Slow(0.5), 1),
]
_QUEUE: dict[Kind, list[tuple[Fault, int]]] = {
    "take": _LONG_POLL,
    "stop": _LONG_POLL,
    "progress": [(Status(500), 3), (Status(404), 1), (Dropped(), 2), (Unanswered(), 2), (CutShort(), 1), (Slow(1), 2)],
    "result": [
        *[(Status(500), 4), (Status(503), 3), (Status(429), 1), (Dropped(), 3), (Unanswered(), 2), (CutShort(), 1)],
        (Slow(1), 2),
    ],
    "ping": [(Status(500), 2), (Garbage(), 1), (Dropped(), 2), (Slow(1), 1)],
}
_READS: list[tuple[Fault, int]] = [(Status(503), 2), (Dropped(), 1), (CutShort(), 1), (Slow(1), 1)]
_BUCKET: dict[str, list[tuple[Fault, int]]] = {
    "PUT": [(Status(500), 3), (Status(503), 4), (Dropped(), 2), (Unanswered(), 2), (Slow(1), 2), (Slow(7), 1)],
    "GET": _READS,
    "HEAD": _READS,
}
_FAULTS = {**_QUEUE, **_BUCKET}
"""By the kind of request, with the most times that each comes in a row."""


# What was found.


@dataclass
class Findings:
    figures: dict[str, Any] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def add(self, other: Findings) -> None:
        self.violations += other.violations
        for name, value in other.figures.items():
            both = self.figures.get(name)
            self.figures[name] = value if both is None else both + value if isinstance(value, int | Counter) else both

    def __str__(self) -> str:
        lines = []
        for name, value in self.figures.items():
            if isinstance(value, Counter):
                lines += [f"  {name}: {kind:<32} {number:>6}" for kind, number in sorted(value.items())]
            else:
                lines.append(f"{name:<40} {value if isinstance(value, str) else round(value, 1):>12}")
        lines += [f"VIOLATION {violation}" for violation in self.violations[:_VIOLATIONS_SHOWN]]
        return "\n".join(lines)


PICTURE = "picture"
"""In the place of a video's format."""

Content = list[tuple[Any, ...]]
"""What a client can tell of a result: every file's place, format, numbers, and the sum of its bytes."""


def outputs_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [*result["output"]["outputs"]["images"], *result["output"]["outputs"]["videos"]]


def pictures_of(item: dict[str, Any]) -> list[dict[str, Any]]:
    return [item[kind] for kind in ("poster", "contact_sheet") if item.get(kind)]


def content_of(result: dict[str, Any]) -> Content:
    """Fetches the files by their URLs. Raises requests.RequestException."""
    content: Content = []
    for item in outputs_of(result):
        numbers = [item[name] for name in ("prompt_index", "format", "width", "height", "num_frames", "seed")]
        content.append((*numbers, *bytes_of(item)))
        pictures = [(picture["width"], picture["height"], *bytes_of(picture)) for picture in pictures_of(item)]
        content += [(item["prompt_index"], PICTURE, *picture) for picture in pictures]
    return sorted(content)


def bytes_of(item: dict[str, Any]) -> tuple[int, str]:
    """As many as the result says, and their sum."""
    answer = requests.get(item["url"], timeout=30)
    answer.raise_for_status()
    return item["bytes"], hashlib.sha256(answer.content).hexdigest()


def essence_of(post: Post) -> str:
    """A result without what may differ when the same is said again: URLs are signed anew, and time passes."""
    if "error" in post.body:
        return str(post.body["error"])
    without = {"url": None, "expires_at": None, "poster": None, "contact_sheet": None}
    items = [item | without for item in outputs_of(post.body)]
    return json.dumps([items, post.body["output"]["settings"]], sort_keys=True)


# The run.


class Soak:
    """A run of one model."""

    def __init__(
        self, model_id: str, count: int, seed: int, tiny: Path, bucket: S3Server, web: str, folder: Path, gpus: int = 1
    ) -> None:
        self._count = count
        self._random = random.Random(f"{seed} {model_id}")
        self._bucket = bucket
        self._prefix = f"{model_id}/"
        self._cache = folder / "lora-cache"
        self._recovery = folder / "recovery"
        cases = {case.name: case for case in cases_of(model_id, web)}
        self._cached = cases.pop(CACHED)
        self._cases = [self._cached, *self._random.sample(list(cases.values()), min(len(cases), max(7, count // 5)))]
        self._cloud = Cloud()
        self._gateway = Gateway(bucket)
        env = environment(
            tiny,
            model_id,
            **self._gateway.environment(),
            BUCKET_KEY_PREFIX=self._prefix,
            ALLOW_PRIVATE_DOWNLOADS="1",
            LORA_CACHE_DIR=self._cache,
            LORA_CACHE_MAX_BYTES="1000000",
            RECOVERY_DIR=self._recovery,
            UPLOAD_TIMEOUT="120",
            GPUS=str(gpus),
            TORCHINDUCTOR_CACHE_DIR=folder / "inductor",  # torch makes one in the temporary folder
        )
        self._endpoint = Endpoint(self._cloud, env, folder)
        self._jobs: dict[str, Case] = {}
        self._open: set[str] = set()
        self._stopped: set[str] = set()
        self._gone: set[str] = set()
        self._kinds: list[str] = []
        self._a_worker_ends = False
        self._right: dict[str, Content] = {}
        self._actions: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self._outages: list[tuple[float, float]] = []
        self._watched: Worker | None = None
        self._memory: list[int] = []
        self._counts: Counter[str] = Counter()
        self._violations: list[str] = []

    def run(self) -> Findings:
        started = time.monotonic()
        try:
            with self._endpoint:
                self._watched = self._endpoint.start()
                self._learn()
                for number in range(self._count):
                    self._until(lambda: len(self._open) < _OPEN_JOBS)
                    if number == self._count // 2:
                        self._watched = None
                        self._endpoint.start()
                    if number % 50 == 0:
                        print(f"{self._prefix}{number} after {time.monotonic() - started:.0f} s", file=sys.stderr)
                    self._disturb(number)
                    self._submit(f"job-{number}")
                    self._meddle(number)
                self._until(lambda: not self._open and not self._actions)
                self._end()
                self._gateway.faults.forget()
                self._check()
        finally:
            self._cloud.close()
            self._gateway.close()
        return self._findings(time.monotonic() - started)

    def _learn(self) -> None:
        """What every request gives in quiet."""
        for case in self._cases:
            job_id = "quiet-" + "".join(letter for letter in case.name if letter.isalnum())
            self._cloud.submit(job_id, case.of(job_id), **case.beside)
            result = self._cloud.wait_for(job_id, seconds=120)
            if ("error" in result) != bool(case.error):
                self._violations.append(f"{case.name}: in quiet it gave {result.get('error', 'a result')}")
            self._right[case.name] = [] if "error" in result else content_of(result)

    def _submit(self, job_id: str, case: Case | None = None) -> None:
        case = case or self._random.choices(self._cases, [case.weight for case in self._cases])[0]
        self._jobs[job_id] = case
        self._open.add(job_id)
        self._cloud.submit(job_id, case.of(job_id), **case.beside)

    def _order_a_fault(self) -> None:
        """Of each kind of request in turn, though in no order that repeats."""
        if not self._kinds:
            self._kinds = [*_FAULTS, "result", "PUT"]
            self._random.shuffle(self._kinds)
        kind = self._kinds.pop()
        fault, most = self._random.choice(_FAULTS[kind])
        faults = self._gateway.faults if kind in _BUCKET else self._cloud.faults
        faults.order(kind, fault, self._random.randint(1, most))

    def _meddle(self, number: int) -> None:
        """What shall happen to the job itself: it is stopped or delivered twice, at any moment before or after its end."""
        job_id, delay = f"job-{number}", self._random.uniform(0, 1)
        match number % 24:
            case 3 | 11:
                self._later(delay, lambda: self._deliver_again(job_id))
            case 6 | 18:
                self._when(lambda: self._cloud.is_over(job_id), lambda: self._later(delay, lambda: self._deliver_again(job_id)))
            case 8:
                self._later(delay, lambda: self._stop(job_id))
            case 14 | 21:
                self._when(lambda: self._is_delivered(job_id), lambda: self._later(delay / 2, lambda: self._stop(job_id)))

    def _disturb(self, number: int) -> None:
        """What shall happen meanwhile: faults and outages from the start, in the second half the end of workers."""
        draw = self._random
        if draw.random() < 0.6:
            self._order_a_fault()
        if number % 60 == 10:
            length = draw.uniform(0.5, 4)
            self._later(draw.uniform(0, 2), lambda: self._bucket_away(length))
        if number % 80 == 20:
            self._until(lambda: not self._open and not self._actions)
            self._damage_the_cache()
            self._submit(f"job-{number}-damaged", self._cached)
        if number >= self._count // 2 and number % 15 == 0:
            kill, delay = number // 15 % 3 != 0, draw.uniform(0, 0.45)
            self._when(self._may_end_a_worker, lambda: self._end_a_worker(kill, delay))

    # Things that happen when their time has come.

    def _until(self, ready: Callable[[], bool]) -> None:
        """Let things happen until `ready`. What stays open for too long is lost, and no longer waited for."""
        posts, end = 0, time.monotonic() + _STUCK_SECONDS
        while True:
            self._look_after_workers()
            over = {job_id for job_id in self._open if self._cloud.is_over(job_id)}
            self._open -= over
            if self._watched and over:
                self._memory.append(self._watched.memory())
            for entry in [entry for entry in self._actions if entry[0]()]:
                self._actions.remove(entry)
                entry[1]()
            if ready():
                return
            if len(self._cloud.posts) != posts:
                posts, end = len(self._cloud.posts), time.monotonic() + _STUCK_SECONDS
            if time.monotonic() > end:
                self._violations += [f"{job_id}: still open after {_STUCK_SECONDS} s of nothing" for job_id in self._open]
                self._open.clear()
                self._actions.clear()
            time.sleep(0.02)

    def _look_after_workers(self) -> None:
        """One that ends is replaced. It may not, unless it found no bucket when it started."""
        for worker in self._endpoint.workers:
            if worker.name in self._gone or worker.is_alive():
                continue
            if self._cloud.asked[worker.name] == 0 and "cannot start: UPLOAD_FAILED" in worker.log.read_text():
                self._counts["starts without a bucket"] += 1
            else:
                self._violations.append(f"{worker.name} ended by itself, with {worker.process.returncode}")
                self._watched = None
            self._gone.add(worker.name)
            self._cloud.redeliver(worker.name)
            self._endpoint.start()

    def _when(self, condition: Callable[[], bool], action: Callable[[], None]) -> None:
        self._actions.append((condition, action))

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        at = time.monotonic() + seconds
        self._when(lambda: time.monotonic() >= at, action)

    def _is_delivered(self, job_id: str) -> bool:
        return any(delivery.job_id == job_id for delivery in self._cloud.deliveries) or self._cloud.is_over(job_id)

    def _deliver_again(self, job_id: str) -> None:
        if job_id not in self._stopped:
            self._cloud.deliver_again(job_id)
            self._counts["jobs delivered twice"] += 1

    def _stop(self, job_id: str) -> None:
        if self._cloud.stop(job_id):
            self._stopped.add(job_id)

    def _bucket_away(self, seconds: float) -> None:
        if self._outages and self._outages[-1][1] > time.monotonic():
            return
        self._outages.append((time.monotonic(), time.monotonic() + seconds + 2))
        self._bucket.stop()
        self._later(seconds, self._bucket.start)
        self._counts["times the bucket was away"] += 1

    def _damage_the_cache(self) -> None:
        """Damage every LoRA in the cache, as a disk can; nothing is reading them now."""
        for file in sorted(self._cache.rglob("*.safetensors")):
            body = file.read_bytes()
            at = len(body) * 3 // 4
            flipped = body[:at] + bytes([body[at] ^ 0xFF]) + body[at + 1 :]
            damaged = file.with_name("damaged")
            damaged.write_bytes(self._random.choice([flipped, body[:at], b"", b"<html></html>"]))
            damaged.replace(file)
            self._counts["cached LoRAs damaged"] += 1

    def _may_end_a_worker(self) -> bool:
        staying = [worker for worker in self._endpoint.alive if worker.name not in self._gone]
        return not self._a_worker_ends and len([worker for worker in staying if self._cloud.asked[worker.name]]) == 2

    def _end_a_worker(self, kill: bool, delay: float) -> None:
        """Soon after one of the two has got its next job."""
        before = len(self._cloud.deliveries)
        self._a_worker_ends = True

        def end() -> None:
            name = self._cloud.deliveries[-1].worker
            worker = next(worker for worker in self._endpoint.workers if worker.name == name)
            self._later(delay, lambda: self._kill(worker) if kill else self._ask_to_leave(worker))

        self._when(lambda: len(self._cloud.deliveries) > before or not self._open, end)

    def _kill(self, worker: Worker) -> None:
        """It dies and is started again in its place, with what it has left in its temporary folder."""
        self._gone.add(worker.name)
        self._counts["jobs of killed workers"] += len(self._endpoint.kill(worker))
        self._counts["workers killed"] += 1
        self._endpoint.start(worker.temp)
        self._a_worker_ends = False

    def _ask_to_leave(self, worker: Worker) -> None:
        self._gone.add(worker.name)
        worker.process.terminate()
        self._counts["workers told to leave"] += 1
        end = time.monotonic() + 60
        self._when(lambda: not worker.is_alive() or time.monotonic() > end, lambda: self._left(worker))
        self._endpoint.start()
        self._a_worker_ends = False

    def _left(self, worker: Worker) -> None:
        if worker.is_alive() or worker.process.returncode:
            self._violations.append(f"{worker.name}: told to leave, it gave {worker.process.poll()}")
        begun = {post.job_id for post in self._cloud.posts if post.worker == worker.name}
        for job_id in self._cloud.redeliver(worker.name):
            if job_id in begun:
                self._violations.append(f"{job_id}: {worker.name} left in the middle of it")
        left = sorted(path.name for path in worker.temp.iterdir())
        if left:
            self._violations.append(f"{worker.name} left {', '.join(left)} in its temporary folder")

    def _end(self) -> None:
        for worker in self._endpoint.alive:
            self._gone.add(worker.name)
            self._endpoint.wait_until_ready(worker)
            self._endpoint.leave(worker, 60)
            self._left(worker)

    # The checks.

    def _check(self) -> None:
        renders = self._renders()
        for job_id, case in self._jobs.items():
            self._violations += [f"{job_id} ({case.name}): {text}" for text in self._check_job(job_id, case, renders)]
        named = {
            item["key"]
            for post in self._cloud.posts
            if "outputs" in post.body.get("output", {})
            for output in outputs_of(post.body)
            for item in (output, *pictures_of(output))
        }
        for key in self._bucket.keys(self._prefix):
            job_id = key.removeprefix(self._prefix).split("/")[0]
            beside = key.endswith(".jpg") and key.split(".")[0] in {name.split(".")[0] for name in named}
            if key not in named and not beside and not key.endswith("/result.json") and job_id not in self._stopped:
                self._violations.append(f"the object {key} belongs to no job")
        left = [path.name for folder in (self._recovery, self._cache) for path in folder.glob("*") if path.name.startswith(".")]
        left += [path.name for path in self._recovery.glob("*")]
        if left:
            self._violations.append(f"left behind: {', '.join(left)}")
        for worker in self._endpoint.workers:
            log = worker.log.read_text()
            seen = [secret for secret in (*_SECRETS, self._bucket.secret_access_key) if secret in log]
            self._violations += [f"{worker.name} logged {secret}" for secret in seen]

    def _check_job(self, job_id: str, case: Case, renders: Counter[str]) -> Iterator[str]:
        tries = self._cloud.tries_of(job_id)
        results = [post for post in tries if post.counts]
        if job_id in self._stopped:
            told = [stop.at for stop in self._cloud.stops if stop.job_id == job_id]
            if tries and told and tries[0].at > max(told) + 3:
                yield "it ran on after it was stopped"
            return
        if not results:
            self._counts["lost"] += 1
            yield "it has no result"
            return
        if len({essence_of(post) for post in tries}) > 1:
            self._counts["duplicated"] += 1
            yield f"it has {len(tries)} results, and they differ"
        if not self._is_right(results[0].body, case):
            self._counts["wrong"] += 1
            yield f"it gave {results[0].body.get('error', 'other files than in quiet')}"
        made_again = renders[job_id] - len(case.request["prompts"])
        if made_again > 0:
            self._counts["videos made again"] += made_again
            if self._came_again_in_peace(job_id):
                self._counts["made twice"] += 1
                yield "it was made again though it was finished"

    def _is_right(self, result: dict[str, Any], case: Case) -> bool:
        if "error" in result:
            return bool(case.error) and result["error"].startswith(f"{case.error}: ")
        try:
            content = content_of(result)
        except requests.RequestException:
            return False
        # A picture may be missing where the worker ended between the video and it, or its upload failed; a warning says so.
        missing = [entry for entry in self._right[case.name] if entry not in content]
        told = sum(": no poster: " in text or ": no contact_sheet: " in text for text in result["output"]["warnings"])
        self._counts["pictures missing"] += len(missing)
        return sorted([*content, *missing]) == self._right[case.name] and [entry[1] for entry in missing] == [PICTURE] * told

    def _renders(self) -> Counter[str]:
        """How many videos of each job the GPU has made, from the workers' logs."""
        renders: Counter[str] = Counter()
        for worker in self._endpoint.workers:
            for line in worker.log.read_text(errors="replace").splitlines():
                if '"generate done"' in line:
                    renders[json.loads(line)["job"]] += 1
        return renders

    def _came_again_in_peace(self, job_id: str) -> bool:
        """Whether every later delivery came after the first result was ready, while the bucket could be asked."""
        ready = self._cloud.tries_of(job_id)[0].at
        faults = ((at, at) for at, kind, _ in self._gateway.faults.met_at if kind != "PUT")
        # A worker looks into the bucket within three seconds after the delivery, and meets what begins meanwhile.
        troubles = [(start - 3, end) for start, end in (*self._outages, *faults)]
        times = sorted(delivery.at for delivery in self._cloud.deliveries if delivery.job_id == job_id)[1:]
        return all(at > ready and not any(start < at < end for start, end in troubles) for at in times)

    def _findings(self, seconds: float) -> Findings:
        names = ["workers killed", "jobs of killed workers", "workers told to leave", "jobs delivered twice"]
        names += ["times the bucket was away", "starts without a bucket", "cached LoRAs damaged"]
        names += ["videos made again", "pictures missing"]
        verdicts = ["lost", "duplicated", "wrong", "made twice"]
        faults = self._cloud.faults.met + self._gateway.faults.met
        figures: dict[str, Any] = {"jobs": len(self._jobs), "jobs stopped": len(self._stopped)}
        figures |= {name: self._counts[name] for name in names} | {"fault": faults, "faults": faults.total()}
        figures |= {name: self._counts[name] for name in verdicts} | {"violations": len(self._violations)}
        figures["seconds"] = int(seconds)
        return Findings(figures | self._growth(), self._violations)

    def _growth(self) -> dict[str, Any]:
        """Memory of the first worker, after the jobs that warm it up and at the end of its undisturbed time."""
        if len(self._memory) < 2 * _WARM_UP_JOBS:
            return {}
        early, late = self._memory_after(_WARM_UP_JOBS), self._memory_after(len(self._memory))
        if late / early - 1 >= _MEMORY_GROWTH:
            self._violations.append(f"memory grew by {late / early - 1:.1%}")
        steps = [*range(_WARM_UP_JOBS, len(self._memory), _WARM_UP_JOBS), len(self._memory)]
        figures: dict[str, Any] = {f"MB after {jobs} jobs": self._memory_after(jobs) / 1e6 for jobs in steps}
        return figures | {"growth of memory": f"{late / early - 1:.1%}"}

    def _memory_after(self, jobs: int) -> float:
        """Bytes, as the median of the ten jobs up to this one."""
        return statistics.median(self._memory[jobs - 10 : jobs])


def soak(parts: dict[str, int], seed: int, tiny: Path, folder: Path, gpus: int = 1) -> Findings:
    """Run so many jobs of every model, on workers of so many ranks."""
    findings = Findings()
    with s3_server.serve() as bucket, lora_server(tiny / "loras") as web:
        for model_id, count in parts.items():
            (folder / model_id).mkdir()
            findings.add(Soak(model_id, count, seed, tiny, bucket, web, folder / model_id, gpus).run())
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1, help="how many ranks every worker has")
    parser.add_argument("--folder", type=Path, help="an empty folder to keep the workers' logs in")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # no worker outlives this process
    moe = options.jobs // 5
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        tiny_checkpoints.write_checkpoints(folder / "tiny")
        tiny_checkpoints.write_loras(folder / "tiny/loras")
        parts = {"wan21_1b": options.jobs - moe, "wan22_14b_t2v": moe}
        findings = soak(parts, options.seed, folder / "tiny", folder, options.gpus)
    print(findings)
    return 1 if findings.violations else 0


if __name__ == "__main__":
    sys.exit(main())
