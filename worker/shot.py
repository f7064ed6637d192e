"""One prompt on its way to its files: found where an earlier delivery of the job left them, or encoded and uploaded."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from worker.decide import Shot
from worker.errors import Stopped
from worker.faults import report
from worker.frame_queue import Abandoned, FrameQueue
from worker.logs import stage
from worker.pictures import JPEG, Camera, Picture
from worker.report import Output, PictureItems, picture_item
from worker.run import Run, in_thread
from worker.storage.base import Stored
from worker.video import encode

_SECONDS_FOR_A_PICTURE = 10.0
"""A few tries, after which the result is sent without the picture; a bucket that has just taken the video seldom needs two."""


class ShotFiles:
    """The video (or image) of one prompt, and the pictures that go with it."""

    def __init__(self, run: Run, shot: Shot) -> None:
        self.shot = shot
        self._run = run
        self._encoding = run.encoding(shot)
        self._name = f"{shot.index}{self._encoding.suffix}"
        self._stored: Stored | None = None

    def is_finished(self) -> bool:
        """Whether an earlier delivery of the job stored the video, or kept it in RECOVERY_DIR. Blocking. Raises Stopped."""
        self._stored = self._run.delivery.find(self._name, self._run.stop)
        return self._stored is not None or self._run.delivery.is_kept(self._name)

    async def recover(self) -> Output:
        """Deliver what `is_finished` found. Raises WorkerError with UPLOAD_FAILED."""
        return await in_thread(self._run.stop_delivery, self._recover)

    @asynccontextmanager
    async def receive(self, tasks: dict[int, asyncio.Task[Output]]) -> AsyncIterator[FrameQueue]:
        """Encode and upload, in the background, the frames that the block puts into the queue.

        When the block has put in all frames, or the encoder has failed before that, the prompt's task is in `tasks`.
        """
        frames = FrameQueue()
        task = asyncio.create_task(self._encode_and_upload(frames))
        # However the task ends, even before its first step, a writer that waits for room must learn of it.
        task.add_done_callback(lambda _: frames.abandon())
        try:
            yield frames
            frames.close(complete=True)
        except Abandoned:
            pass
        except BaseException:
            frames.close(complete=False)
            await asyncio.gather(task, return_exceptions=True)
            raise
        tasks[self.shot.index] = task

    def _recover(self) -> Output:
        run = self._run
        stored = self._stored or run.delivery.store_kept(
            self._name, self._encoding.content_type, run.give_up_at(), run.delivery_limit()
        )
        return Output(self.shot, stored, self._recover_pictures())

    def _recover_pictures(self) -> PictureItems:
        """The pictures beside a finished video. One that is missing cannot be made without the frames."""
        run, found = self._run, PictureItems()
        for picture in run.pictures(self.shot):
            name, limit = f"{self.shot.index}{picture.suffix}", run.delivery_limit(_SECONDS_FOR_A_PICTURE)
            try:
                stored = run.delivery.find(name, run.stop_delivery)
                if stored is None and run.delivery.is_kept(name):
                    stored = run.delivery.store_kept(name, JPEG, limit.ends, limit)
            except Stopped:
                raise
            except Exception as error:
                run.warn_of_picture(self.shot, picture, report(error, run.id).message)
            else:
                if stored:
                    found[picture.kind] = picture_item(picture, stored)
                else:
                    text = "an earlier worker made the video, and the picture was not found beside it"
                    run.warn_of_picture(self.shot, picture, text)
        return found

    async def _encode_and_upload(self, frames: FrameQueue) -> Output:
        file, pictures = await in_thread(self._run.stop_delivery, self._encode, frames)
        return await self._upload(file, pictures)

    def _encode(self, frames: FrameQueue) -> tuple[Path, dict[Picture, Path]]:
        """Write the video while its frames come, then its pictures."""
        run, shot = self._run, self.shot
        camera, target = Camera(run.pictures(shot)), run.folder / self._name
        tag = json.dumps(run.settings | run.prompt_settings[shot.index])
        started = time.monotonic()
        try:
            chunks = camera.watch(frames.frames(run.stop_delivery))
            encode(chunks, target, self._encoding, shot.fps, shot.sampling.num_frames, tag)
        finally:
            frames.abandon()
        pictures = self._write_pictures(camera)
        seconds = time.monotonic() - started - frames.seconds_waited
        run.timings["encode"] = round(run.timings.get("encode", 0.0) + seconds, 3)
        return target, pictures

    def _write_pictures(self, camera: Camera) -> dict[Picture, Path]:
        """Write the pictures that can be written: a poster that fails must not cost the video."""
        run, written = self._run, {}
        for picture in run.pictures(self.shot):
            target = run.folder / f"{self.shot.index}{picture.suffix}"
            try:
                camera.save(picture, target)
            except Exception as error:
                run.warn_of_picture(self.shot, picture, report(error, run.id).message)
            else:
                written[picture] = target
        return written

    async def _upload(self, file: Path, pictures: dict[Picture, Path]) -> Output:
        """Upload the video, and its pictures at the same time."""
        run, index = self._run, self.shot.prompt_index
        arguments = (file, self._encoding.content_type, run.give_up_at(), run.delivery_limit())
        with stage("upload", run.timings, job=run.id, prompt_index=index, bytes=file.stat().st_size):
            video = asyncio.create_task(in_thread(run.stop_delivery, run.delivery.put, *arguments))
            uploads = [asyncio.create_task(self._upload_picture(*made, video)) for made in pictures.items()]
            await asyncio.gather(video, *uploads, return_exceptions=True)
        stored, items = video.result(), [upload.result() for upload in uploads]
        with suppress(OSError):  # what is left goes with the job's folder
            for path in (file, *pictures.values()):
                path.unlink()
        return Output(self.shot, stored, {picture.kind: item for picture, item in zip(pictures, items, strict=True) if item})

    async def _upload_picture(self, picture: Picture, path: Path, video: asyncio.Task[Stored]) -> dict[str, Any] | None:
        """The picture's entry in the result; None when it was not stored shortly after the video was."""
        run = self._run
        while True:
            video_is_stored = video.done()
            limit = run.delivery_limit(_SECONDS_FOR_A_PICTURE)
            give_up_at = min(run.give_up_at(), limit.ends)
            try:
                stored = await in_thread(run.stop_delivery, run.delivery.put, path, JPEG, give_up_at, limit)
                return picture_item(picture, stored)
            except Stopped:
                raise
            except Exception as error:
                if video_is_stored:
                    run.warn_of_picture(self.shot, picture, report(error, run.id).message)
                    return None
                await asyncio.wait([video])  # the bucket may have been away; if it takes the video, it may take this
                if video.cancelled() or video.exception():
                    return None
