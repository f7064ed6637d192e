"""The process of one more GPU of this worker, started by `worker.ranks`.

    python -m worker.rank RANK FILE_DESCRIPTOR STORE MEMORY

It loads the same model as the worker and calls the model's methods that the worker names, one after another. When it makes a
video by itself, it sends each finished step and the frames. It ends when the worker does.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pipelines.errors import DeviceLost, PipelineError, RankFailed
from pipelines.recipes import Recipe, Sampling
from worker import logs
from worker.ranks import STOP
from worker.settings import load_settings
from worker.startup import lean_imports


def main(rank: int, connection: Connection[Any, Any], store: Path, memory: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # the worker decides when this process ends
    logs.configure(rank)
    commands: SimpleQueue[tuple[str, tuple[Any, ...]]] = SimpleQueue()
    stop = threading.Event()
    threading.Thread(target=_receive, args=(connection, commands, stop), daemon=True).start()
    settings = load_settings()
    logs.hide(settings.secrets)
    lean_imports.install()
    from worker.startup.load_model import load_model, meet

    try:
        model = load_model(settings, memory, rank)
        connection.send(None)
        meet(model, settings, rank, store)
    except Exception as error:
        connection.send(_sendable(error))
        os._exit(1)
    while True:
        method, arguments = commands.get()
        try:
            if method == "generate":
                _generate(model, connection, stop, *arguments)
            else:
                getattr(model, method)(*arguments)
        except Exception as error:
            connection.send(_sendable(error))
            if isinstance(error, DeviceLost):
                os._exit(1)  # another rank may wait for this one, and learns from its end that it waits in vain
        else:
            connection.send(None)


def _generate(model: Any, connection: Connection[Any, Any], stop: threading.Event, sampling: Sampling, recipe: Recipe) -> None:
    """Have the WanModel make a video; send its finished steps and its frames."""

    def go_on(done: Any) -> None:
        if stop.is_set():
            raise RankFailed("the worker stopped the video")
        connection.send(done)

    with closing(model.generate(sampling, recipe, go_on)) as chunks:
        for frames in chunks:
            go_on(frames)


def _receive(
    connection: Connection[Any, Any], commands: SimpleQueue[tuple[str, tuple[Any, ...]]], stop: threading.Event
) -> None:
    """Take commands until the worker ends; then end too, whatever is being computed.

    The command `stop` is for the video that is being made. The worker sends no other before it has got the answer.
    """
    try:
        while True:
            command = connection.recv()
            if command == STOP:
                stop.set()
            else:
                stop.clear()
                commands.put(command)
    except (OSError, EOFError):
        os._exit(0)
    except BaseException as error:  # a command that cannot be read; without this thread, nothing would end the process
        logs.log.error("a command of the worker cannot be read", exc_info=error)
        os._exit(1)


def _sendable(error: Exception) -> Exception:
    """The error as the worker can raise it. The worker knows the pipelines' errors, and of others only that there was one."""
    if isinstance(error, DeviceLost):
        logs.log.error("this GPU is lost", exc_info=error)
    if isinstance(error, PipelineError):
        return error
    logs.log.error("internal error on another GPU", exc_info=error)
    return RuntimeError(f"another GPU's process failed ({type(error).__name__}); its log line has the traceback")


if __name__ == "__main__":
    main(int(sys.argv[1]), Connection(int(sys.argv[2])), Path(sys.argv[3]), int(sys.argv[4]))
