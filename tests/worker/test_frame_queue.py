import threading
import time

import numpy as np
import pytest

from worker import frame_queue
from worker.frame_queue import Abandoned, Handover
from worker.net.download import Stopped


def chunk(value: int = 0) -> np.ndarray:
    return np.full((4, 2, 2, 3), value, np.uint8)


def taken(frames: Handover, stop: threading.Event | None = None) -> list[int]:
    return [int(piece[0, 0, 0, 0]) for piece in frames.until(stop or threading.Event())]


def test_frames_come_out_in_order_and_then_it_is_over():
    frames = Handover()
    for number in range(3):
        frames.put(chunk(number))
    frames.end(whole=True)
    assert taken(frames) == [0, 1, 2]


def test_the_reader_waits_for_frames_and_knows_for_how_long():
    frames = Handover()

    def write() -> None:
        time.sleep(0.2)
        frames.put(chunk(7))
        frames.end(whole=True)

    writer = threading.Thread(target=write)
    writer.start()
    assert taken(frames) == [7]
    writer.join()
    assert 0.1 < frames.seconds_waited < 5


def test_a_video_that_is_not_whole_is_not_taken_for_one():
    frames = Handover()
    frames.put(chunk())
    frames.end(whole=False)
    with pytest.raises(Stopped):
        taken(frames)


def test_a_stopped_job_takes_no_more_frames():
    frames, stop = Handover(), threading.Event()
    frames.put(chunk())
    frames.end(whole=True)
    stop.set()
    with pytest.raises(Stopped):
        taken(frames, stop)


def test_the_gpu_stops_when_nobody_takes_its_frames():
    frames = Handover()
    frames.leave()
    with pytest.raises(Abandoned):
        frames.put(chunk())


def test_the_writer_waits_while_too_much_is_waiting(monkeypatch):
    monkeypatch.setattr(frame_queue, "MAX_BYTES", chunk().nbytes)
    frames, put = Handover(), []

    def write() -> None:
        for number in range(4):
            frames.put(chunk(number))
            put.append(number)
        frames.end(whole=True)

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.2)
    assert put == [0, 1]
    assert taken(frames) == [0, 1, 2, 3]
    writer.join()
