import threading
import time

import numpy as np
import pytest

from worker import frame_queue
from worker.errors import Stopped
from worker.frame_queue import Abandoned, FrameQueue


def chunk(value: int = 0) -> np.ndarray:
    return np.full((4, 2, 2, 3), value, np.uint8)


def taken(frames: FrameQueue, stop: threading.Event | None = None) -> list[int]:
    return [int(piece[0, 0, 0, 0]) for piece in frames.frames(stop or threading.Event())]


def test_frames_come_out_in_order_and_then_it_is_over():
    frames = FrameQueue()
    for number in range(3):
        frames.put(chunk(number), threading.Event())
    frames.close(complete=True)
    assert taken(frames) == [0, 1, 2]


def test_the_reader_waits_for_frames_and_knows_for_how_long():
    frames = FrameQueue()

    def write() -> None:
        time.sleep(0.2)
        frames.put(chunk(7), threading.Event())
        frames.close(complete=True)

    writer = threading.Thread(target=write)
    writer.start()
    assert taken(frames) == [7]
    writer.join()
    assert 0.1 < frames.seconds_waited < 5


def test_a_video_that_is_not_whole_is_not_taken_for_one():
    frames = FrameQueue()
    frames.put(chunk(), threading.Event())
    frames.close(complete=False)
    with pytest.raises(Stopped):
        taken(frames)


def test_a_stopped_job_takes_no_more_frames():
    frames, stop = FrameQueue(), threading.Event()
    frames.put(chunk(), threading.Event())
    frames.close(complete=True)
    stop.set()
    with pytest.raises(Stopped):
        taken(frames, stop)


def test_the_gpu_stops_when_nobody_takes_its_frames():
    frames = FrameQueue()
    frames.abandon()
    with pytest.raises(Abandoned):
        frames.put(chunk(), threading.Event())


def test_the_writer_waits_while_too_much_is_waiting(monkeypatch):
    monkeypatch.setattr(frame_queue, "MAX_BYTES", chunk().nbytes)
    frames, put = FrameQueue(), []

    def write() -> None:
        for number in range(4):
            frames.put(chunk(number), threading.Event())
            put.append(number)
        frames.close(complete=True)

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.2)
    assert put == [0, 1]
    assert taken(frames) == [0, 1, 2, 3]
    writer.join()


def test_a_stop_ends_the_wait_for_room(monkeypatch):
    monkeypatch.setattr(frame_queue, "MAX_BYTES", 1)
    frames, stop = FrameQueue(), threading.Event()
    frames.put(chunk(), stop)
    timer = threading.Timer(0.1, stop.set)
    timer.start()
    with pytest.raises(Stopped):
        frames.put(chunk(), stop)
    timer.join()
