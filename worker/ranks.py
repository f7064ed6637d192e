"""The processes of this worker's other GPUs: starts them, tells them what to do, notices their end, and ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from pipelines.errors import DeviceLost, MemoryLost, RankFailed
from pipelines.recipes import Recipe, Sampling
from worker.files import scratch
from worker.frame_queue import Frames
from worker.logs import log

_MODULE = "worker.rank"
STOP = ("stop", ())
"""A command beside the names of methods: end the video that is being made."""
_ROOT = Path(__file__).parent.parent

_ENDED = "another GPU's process ended"

_SECONDS_TO_NOTICE = 5.0
"""How long this process may go on with what needs a rank that has ended. Over gloo, an exchange fails at once then. Over NCCL,
it waits on, and with it everything that waits for the device."""
_SECONDS_BETWEEN_LOOKS = 0.5


class Ranks:
    """Every rank but 0, which is the worker itself. Without one, nothing happens here."""

    def __init__(self, number: int = 0, memory: int = 0) -> None:
        """Start `number` processes, which load the model beside this one. They inherit the environment.

        `memory`: bytes of main memory for all of them and this one.
        """
        self._connections: list[Connection[Any, Any]] = []
        self.store = Path(scratch().name) / "ranks" if number else None
        """Where the ranks find each other; see `CfgParallel`. None: there is only this one."""
        self._lost_at: float | None = None
        self._are_needed = False
        """Whether this process is doing what it cannot end without the others."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))}
        for rank in range(1, number + 1):
            ours, theirs = Pipe()
            command = [sys.executable, "-m", _MODULE, str(rank), str(theirs.fileno()), str(self.store), str(memory)]
            # A session of its own: Ctrl-C in the terminal must not reach a rank before the worker has finished its job.
            process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], start_new_session=True)  # noqa: S603
            theirs.close()
            self._connections.append(ours)
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()

    @property
    def are_lost(self) -> bool:
        return self._lost_at is not None

    @property
    def number(self) -> int:
        """How many there are, and this process."""
        return len(self._connections) + 1

    def are_waited_for_in_vain(self) -> bool:
        """Whether what this process is doing can no longer end, or at least has not a while after a rank has ended."""
        return self._are_needed and self._lost_at is not None and time.monotonic() > self._lost_at + _SECONDS_TO_NOTICE

    def wait_until_loaded(self) -> None:
        """Raises the PipelineError that kept a rank from loading its model, and DeviceLost when its process ended."""
        self._raise(self._answers())

    def meet(self, meet: Callable[[], None]) -> None:
        """Run `meet`, which waits for every rank. Raises what it raises, and DeviceLost soon after a rank has ended."""
        met: Future[None] = Future()

        def run() -> None:
            try:
                meet()
            except BaseException as error:
                met.set_exception(error)
            else:
                met.set_result(None)

        threading.Thread(target=run, daemon=True).start()  # a daemon: it may wait for minutes, and must not keep the process
        with self._needed():
            while not wait([met], _SECONDS_BETWEEN_LOOKS).done:
                if self.are_waited_for_in_vain():
                    raise self.reason()
        met.result()

    @contextmanager
    def doing(self, method: str, *arguments: Any) -> Iterator[None]:
        """Have every rank call this method of its WanModel while the block does the same here.

        Raises what the block raises; else what a rank raises, or DeviceLost when its process ended.
        """
        for connection in self._connections:
            self._send(connection, (method, arguments))
        with self._needed():
            try:
                yield
            except MemoryLost:
                raise
            except DeviceLost as error:
                raise self.reason() from error  # no answers are awaited: the ranks may wait for this one until it ends
            except RankFailed:
                self._raise(self._answers())
                raise
            except BaseException:
                self._answers()
                raise
            self._raise(self._answers())

    def generate(
        self, rank: int, sampling: Sampling, recipe: Recipe, on_step: Callable[[int], None], check: Callable[[], None]
    ) -> Generator[Frames, None, None]:
        """Have one rank make a video by itself: yields and raises what `WanModel.generate` does there.

        `check`: called again and again; what it raises ends the video, also within a step.
        """
        connection, is_over = self._connections[rank - 1], False
        self._send(connection, ("generate", (sampling, recipe)))
        try:
            while not is_over:
                while not connection.poll(_SECONDS_BETWEEN_LOOKS):
                    check()
                answer = self._answer(connection)
                is_over = _is_last(answer)
                if isinstance(answer, Exception):
                    raise answer
                if isinstance(answer, int):
                    on_step(answer)
                elif answer is not None:
                    yield answer
        finally:
            if not is_over:
                self._send(connection, STOP)
                while not _is_last(self._answer(connection)):
                    pass

    @contextmanager
    def _needed(self) -> Iterator[None]:
        self._are_needed = True
        try:
            yield
        finally:
            self._are_needed = False

    def reason(self) -> DeviceLost:
        """Return why the ranks are lost: the reason that one of them has sent, if one has."""
        for connection in self._connections:
            with suppress(OSError, EOFError):
                while connection.poll():
                    if isinstance(answer := connection.recv(), DeviceLost):
                        return answer
        return DeviceLost(_ENDED)

    def _answers(self) -> list[Exception | None]:
        """Wait until every rank is done. None: it succeeded."""
        return [self._answer(connection) for connection in self._connections]

    def _answer(self, connection: Connection[Any, Any]) -> Any:
        try:
            return connection.recv()
        except (OSError, EOFError):
            self._lost_at = self._lost_at or time.monotonic()
            return DeviceLost(_ENDED)

    @staticmethod
    def _send(connection: Connection[Any, Any], command: tuple[str, tuple[Any, ...]]) -> None:
        with suppress(OSError):  # its process has ended, which shows when the answer is read
            connection.send(command)

    @staticmethod
    def _raise(answers: list[Exception | None]) -> None:
        for error in answers:
            if error is not None and not isinstance(error, RankFailed):
                raise error

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        """An idle worker whose rank has ended must take no job: it could only fail it."""
        status = process.wait()
        log.error("the process of GPU %d ended with status %d; the worker shuts down and must be replaced", rank, status)
        if self.are_lost:
            return  # it was waited for, and what waited ends the worker
        self._lost_at = time.monotonic()
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # a single local run ends by itself
            os.kill(os.getpid(), signal.SIGTERM)


def _is_last(answer: Any) -> bool:
    """Whether the answer ends a command. Before it, a rank that makes a video sends steps and frames."""
    return answer is None or isinstance(answer, Exception)
