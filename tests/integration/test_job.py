"""Service in this process: what a job keeps when a part of it fails, and what it leaves behind."""

from __future__ import annotations

import asyncio
import errno
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import WanModel, device
from pipelines.errors import LoraInvalid, OutOfMemory
from tests.conftest import STAND_IN
from tests.integration.test_local_api import as_base64, file_of, frames_of, request_for
from worker import frame_queue, logs, service
from worker.files import scratch
from worker.recovery import Recovery
from worker.run import in_thread, left_behind
from worker.service import Service
from worker.settings import Settings
from worker.shot import ShotFiles
from worker.startup.cold_start import cold_start
from worker.storage.base import Limit, NotStored, Stored
from worker.storage.local_folder import LocalFolder
from worker.video import encode

Runner = Callable[..., Service]


@pytest.fixture(scope="module")
def loaded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("worker")
    return cold_start(
        Settings(
            model_id="wan21_1b",
            checkpoint_dir=tiny,
            lora_dir=tiny / "loras",
            device="cpu",
            output_dir=folder / "output",
            recovery_dir=folder / "recovery",
            upload_timeout=0.1,
        )
    )


@pytest.fixture
def runner(loaded: Service) -> Runner:
    """The loaded model with other settings, or another place for its files."""

    def make(storage: Any = None, **settings: Any) -> Service:
        return Service(loaded._settings.model_copy(update=settings), loaded._gpu.model, storage or loaded._storage)

    return make


KEPT = "; the file is kept, and the next worker that starts uploads it"


class FussyStorage:
    """Takes only some of the files."""

    def __init__(self, refused: set[int]) -> None:
        self.refused = refused

    def put(self, file: Path, key: str, content_type: str, made_from: str, limit: Limit) -> Stored:
        if file.name.partition(".")[0] in {str(index) for index in self.refused}:
            raise NotStored("the bucket is away", refused=False)
        return Stored(f"https://example.com/{key}", key, None, file.stat().st_size)

    def find(self, key: str, made_from: str, limit: Limit) -> None:
        return None

    def read(self, key: str, made_from: str, limit: Limit) -> None:
        return None


class NoPictures(LocalFolder):
    """Takes videos and no JPEG."""

    def put(self, file: Path, key: str, content_type: str, made_from: str, limit: Limit) -> Stored:
        if content_type == "image/jpeg":
            raise NotStored(f"no place for `{key}`", refused=True)
        return super().put(file, key, content_type, made_from, limit)


def job(tiny: Path, *prompts: dict[str, Any]) -> dict[str, Any]:
    request = request_for("wan21_1b", tiny)
    return {"id": uuid.uuid4().hex, "input": request | {"prompts": [request["prompts"][0] | prompt for prompt in prompts]}}


def run(runner: Service, job: dict[str, Any]) -> dict[str, Any]:
    return asyncio.run(runner.run(job))


def test_a_prompt_that_fails_takes_no_finished_one_with_it(runner: Runner, tiny: Path) -> None:
    result = run(runner(FussyStorage({1})), job(tiny, {}, {}, {}))
    assert [video["prompt_index"] for video in result["outputs"]["videos"]] == [0, 2]
    assert result["errors"] == [{"prompt_index": 1, "code": "UPLOAD_FAILED", "message": f"the bucket is away{KEPT}"}]


def test_a_job_of_which_nothing_was_made_fails(runner: Runner, tiny: Path) -> None:
    assert run(runner(FussyStorage({0, 1})), job(tiny, {}, {})) == {"error": f"UPLOAD_FAILED: the bucket is away{KEPT}"}


def test_a_lora_that_is_far_too_strong_is_an_error_of_its_prompt_and_a_flat_video_a_warning(
    runner: Runner, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = runner()
    generate, model = type(service._gpu.model).generate, service._gpu.model
    monkeypatch.setattr(model, "_check_finite", lambda _: (_ for _ in ()).throw(LoraInvalid("too large")))
    assert run(service, job(tiny, {})) == {"error": "LORA_INVALID: too large"}
    monkeypatch.undo()

    def flat(*arguments: Any) -> Iterator[Any]:
        for frames in generate(model, *arguments):
            yield frames * 0 + 7

    monkeypatch.setattr(model, "generate", flat)
    result = run(service, job(tiny, {}))
    assert any("prompts[0]: every pixel of the video has the same colour" in warning for warning in result["warnings"])
    monkeypatch.undo()
    assert not any("same colour" in warning for warning in run(service, job(tiny, {"seed": 9}))["warnings"])


def test_a_result_without_failures_has_no_errors(runner: Runner, tiny: Path) -> None:
    assert "errors" not in run(runner(), job(tiny, {}))


def test_what_was_finished_when_the_time_ran_out_is_kept(runner: Runner, tiny: Path) -> None:
    endless = {"width": 512, "height": 512, "num_frames": 81, "sample_steps": 150}
    result = run(runner(job_timeout=8), job(tiny, {}, endless, {}))
    assert [video["prompt_index"] for video in result["outputs"]["videos"]] == [0]
    assert [(error["prompt_index"], error["code"]) for error in result["errors"]] == [(1, "TIMEOUT"), (2, "TIMEOUT")]


def test_a_job_that_finishes_nothing_in_time_fails_with_timeout_and_the_next_one_is_served(runner: Runner, tiny: Path) -> None:
    slow = runner(job_timeout=1)
    answer = run(slow, job(tiny, {"width": 512, "height": 512, "num_frames": 81, "sample_steps": 150}))
    assert answer["error"].startswith("TIMEOUT: the job took longer than the 1 s of JOB_TIMEOUT")
    assert "outputs" in run(runner(), job(tiny, {}))


def test_a_cancelled_job_has_left_the_gpu_when_its_task_ends(runner: Runner, tiny: Path) -> None:
    async def cancel_and_go_on() -> dict[str, Any]:
        worker = runner()
        task = asyncio.create_task(worker.run(job(tiny, {"width": 256, "height": 256, "num_frames": 33, "sample_steps": 150})))
        while not worker._gpu._lock.locked():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not worker._gpu._lock.locked()
        return await worker.run(job(tiny, {}))

    assert "outputs" in asyncio.run(cancel_and_go_on())


def test_two_jobs_at_once_each_get_their_own_frames(runner: Runner, tiny: Path) -> None:
    async def both() -> list[dict[str, Any]]:
        worker = runner()
        jobs = [job(tiny, {"seed": seed}) | {"id": f"job{seed}"} for seed in (1, 2)]
        return await asyncio.gather(*(worker.run(each) for each in jobs))

    together = [result["outputs"]["videos"][0] for result in asyncio.run(both())]
    alone = [run(runner(), job(tiny, {"seed": seed}) | {"id": f"alone{seed}"})["outputs"]["videos"][0] for seed in (1, 2)]
    contents = [Path(item["url"].removeprefix("file://")).read_bytes() for item in (*together, *alone)]
    assert contents[0] == contents[2] != contents[1] == contents[3]


def test_nothing_is_left_in_the_temp_folder(runner: Runner, tiny: Path) -> None:
    run(runner(), job(tiny, {}))
    run(runner(FussyStorage({0})), job(tiny, {}))
    run(runner(job_timeout=1), job(tiny, {"width": 256, "height": 256, "sample_steps": 150}))
    assert list(Path(scratch().name).iterdir()) == []


def test_a_fault_of_the_worker_is_internal_and_says_nothing_of_it(runner: Runner, tiny: Path) -> None:
    class Broken(FussyStorage):
        def put(self, file: Path, key: str, content_type: str, made_from: str, limit: Limit) -> Stored:
            raise ZeroDivisionError(f"secret {file}")

    answer = run(runner(Broken(set())), job(tiny, {}) | {"id": "test"})
    assert answer["error"] == "INTERNAL: internal error; search the worker's log for job test"


def test_a_job_that_comes_twice_gets_the_same_result_and_the_gpu_is_not_touched(
    runner: Runner, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = job(tiny, {"seed": -1}, {})
    first = run(runner(), twice)
    monkeypatch.delattr(WanModel, "generate")
    assert run(runner(), twice) == first


def test_what_a_job_finished_before_it_failed_is_not_made_again(runner: Runner, tiny: Path) -> None:
    class TakesOnlyTheFirst(LocalFolder):
        def put(self, file: Path, key: str, content_type: str, made_from: str, limit: Limit) -> Stored:
            if file.stem == "1":
                raise NotStored("no place", refused=True)
            return super().put(file, key, content_type, made_from, limit)

    folder = runner()._settings.output_dir
    once_more = job(tiny, {"seed": -1}, {"seed": 7})
    assert len(run(runner(TakesOnlyTheFirst(folder)), once_more)["errors"]) == 1
    made = {path.name: path.stat().st_mtime_ns for path in (folder / once_more["id"]).glob("0.*")}
    result = run(runner(), once_more)
    assert [video["prompt_index"] for video in result["outputs"]["videos"]] == [0, 1]
    assert made == {path.name: path.stat().st_mtime_ns for path in (folder / once_more["id"]).glob("0.*")}


def test_another_job_under_the_same_id_is_made(runner: Runner, tiny: Path) -> None:
    first = job(tiny, {"seed": 1})
    other = job(tiny, {"seed": 2}) | {"id": first["id"]}
    assert [run(runner(), each)["outputs"]["videos"][0]["seed"] for each in (first, other)] == [1, 2]


def test_a_prompt_that_cannot_make_it_is_given_up_after_its_first_steps_and_the_others_are_made(
    runner: Runner, tiny: Path
) -> None:
    too_much = {"width": 384, "height": 384, "num_frames": 49, "sample_steps": 150}
    started = time.monotonic()
    result = run(runner(job_timeout=12), job(tiny, too_much, {}))
    assert [video["prompt_index"] for video in result["outputs"]["videos"]] == [1]
    (error,) = result["errors"]
    assert error["code"] == "TIMEOUT"
    assert re.match(r"prompts\[0\]: at [\d.]+ s a step its 150 steps take .* would fit; ask for that", error["message"])
    assert time.monotonic() - started < 12


def test_out_of_memory_has_its_code_and_the_pipelines_own_words(
    runner: Runner, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = runner()

    def generate(*_: object) -> None:
        raise OutOfMemory("the device ran out of memory; use a larger one")

    monkeypatch.setattr(worker._gpu.model, "generate", generate)
    assert run(worker, job(tiny, {}))["error"] == "OUT_OF_MEMORY: the device ran out of memory; use a larger one"


def test_a_worker_whose_device_is_lost_answers_and_asks_to_be_ended(
    runner: Runner, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, asked = runner(), []

    def denoise(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(worker._gpu.model, "_denoise", denoise)
    monkeypatch.setattr(device, "answers", lambda _: False)
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append("to end"))
    try:
        answer = run(worker, job(tiny, {}, {}))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert answer == {"error": "INTERNAL: the GPU failed and this worker is shutting down; send the job again"}
    assert asked == ["to end"]


class HangingStorage(FussyStorage):
    """A bucket that answers nothing, as behind a firewall: what it is asked ends by its limit alone."""

    def __init__(self) -> None:
        super().__init__(set())

    def put(self, file: Path, key: str, content_type: str, made_from: str, limit: Limit) -> Stored:
        self._hang(limit)
        return super().put(file, key, content_type, made_from, limit)

    def find(self, key: str, made_from: str, limit: Limit) -> None:
        with suppress(NotStored):
            self._hang(limit)

    read = find

    def _hang(self, limit: Limit) -> None:
        while True:
            limit.check()
            time.sleep(0.02)


def test_a_job_ends_in_its_time_though_its_bucket_hangs_from_the_first_look_on(runner: Runner, tiny: Path) -> None:
    started = time.monotonic()
    answer = run(runner(HangingStorage(), job_timeout=1), job(tiny, {}) | {"id": "hangs"})
    assert answer["error"].startswith("TIMEOUT: the job took longer than the 1 s of JOB_TIMEOUT")
    assert time.monotonic() - started < 4


def test_a_job_ends_in_its_time_though_its_bucket_hangs_when_the_video_is_there(
    runner: Runner, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.run._SECONDS_TO_UPLOAD", 1.0)
    started = time.monotonic()
    worker = runner(HangingStorage(), job_timeout=6, upload_timeout=300, recovery_dir=tmp_path / "recovery")
    answer = run(worker, job(tiny, {}) | {"id": None})
    assert answer["error"] == f"UPLOAD_FAILED: the bucket did not answer in time; check its endpoint{KEPT}"
    assert time.monotonic() - started < 10
    assert len(list((tmp_path / "recovery").glob("*.bin"))) >= 1


def test_a_thread_that_does_not_stop_ends_the_worker_after_the_answer(
    runner: Runner, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, asked, release = runner(job_timeout=1), [], threading.Event()
    monkeypatch.setattr("worker.job.load_control_image", lambda *_: release.wait(30))
    monkeypatch.setattr("worker.job.Job._read_training", lambda _: release.wait(30))
    defaults = in_thread.__kwdefaults__ | {"seconds_to_stop": 0.3}
    monkeypatch.setattr("worker.run.in_thread.__kwdefaults__", defaults)
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append("to end"))
    try:
        answer = run(worker, job(tiny, {}))
        assert answer["error"].startswith("TIMEOUT: ")
        assert asked == ["to end"] and worker.must_be_replaced
    finally:
        signal.signal(signal.SIGTERM, before)
        release.set()
        left_behind.clear()


def test_a_full_disk_says_so(runner: Runner, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("worker.shot.encode", full)
    assert run(runner(), job(tiny, {}))["error"].startswith("INTERNAL: the worker's disk is full; give its container more")


def test_the_gpu_makes_the_next_video_while_the_last_one_is_written(
    runner: Runner, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def slow_encode(*arguments: Any) -> None:
        encode(*arguments)
        time.sleep(0.5)
        events.append("written")

    worker = runner()
    monkeypatch.setattr("worker.shot.encode", slow_encode)
    original = worker._gpu.model.generate

    def generate(*arguments: Any) -> Any:
        yield from original(*arguments)
        events.append("made")

    monkeypatch.setattr(worker._gpu.model, "generate", generate)
    result = run(worker, job(tiny, {}, {}))
    assert len(result["outputs"]["videos"]) == 2
    assert events == ["made", "made", "written", "written"]


def test_a_video_that_cannot_be_written_costs_no_other(runner: Runner, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode_some(frames: Any, target: Path, *arguments: Any) -> None:
        if target.stem == "0":
            raise OSError("no space left on device")
        encode(frames, target, *arguments)

    monkeypatch.setattr("worker.shot.encode", encode_some)
    result = run(runner(), job(tiny, {}, {}))
    assert [error["prompt_index"] for error in result["errors"]] == [0]
    assert [video["prompt_index"] for video in result["outputs"]["videos"]] == [1]


def test_the_same_job_twice_at_once_is_made_once(runner: Runner, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, made = runner(), []
    original = worker._gpu.model.generate
    monkeypatch.setattr(worker._gpu.model, "generate", lambda *arguments: made.append(1) or original(*arguments))

    async def twice() -> list[dict[str, Any]]:
        same = job(tiny, {"seed": -1})
        return await asyncio.gather(worker.run(same), worker.run(same))

    first, second = asyncio.run(twice())
    assert first == second and len(made) == 1


def test_a_job_is_wanted_when_none_waits_and_the_gpu_is_nearly_free(
    runner: Runner, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_SECONDS_AHEAD", 0.4)

    async def watch() -> list[bool]:
        worker = runner()
        wanted = [worker.wants_a_job()]
        task = asyncio.create_task(worker.run(job(tiny, {"width": 128, "height": 128, "num_frames": 33, "sample_steps": 40})))
        while not worker._runs or worker._runs[0].progress.latest["step"] < 1:
            await asyncio.sleep(0.01)
        wanted.append(worker.wants_a_job())
        while worker._runs[0].progress.seconds_left > 0.3:
            await asyncio.sleep(0.01)
        wanted.append(worker.wants_a_job())
        await task
        return [*wanted, worker.wants_a_job()]

    assert asyncio.run(watch()) == [True, False, True, True]


def test_a_job_is_wanted_while_a_duplicate_waits_for_its_twin(runner: Runner, tiny: Path) -> None:
    async def watch() -> bool:
        worker = runner()
        twin = job(tiny, {"width": 128, "height": 128, "num_frames": 33, "sample_steps": 20})
        tasks = [asyncio.create_task(worker.run(twin)) for _ in range(2)]
        while not worker._runs or worker._runs[0].progress.seconds_left > 5:
            await asyncio.sleep(0.01)
        wanted = worker.wants_a_job()
        await asyncio.gather(*tasks)
        return wanted

    assert asyncio.run(watch())


def test_a_job_is_wanted_while_another_only_uploads_what_was_kept(runner: Runner, tiny: Path, tmp_path: Path) -> None:
    uploading, go_on = threading.Event(), threading.Event()

    class SlowStorage(LocalFolder):
        def put(self, file: Path, key: str, content_type: str, made_from: str, limit: Limit) -> Stored:
            uploading.set()
            go_on.wait(20)
            return super().put(file, key, content_type, made_from, limit)

    twice = job(tiny, {})
    assert "error" in run(runner(FussyStorage({0}), recovery_dir=tmp_path / "recovery"), twice)

    async def watch() -> tuple[bool, dict[str, Any]]:
        worker = runner(SlowStorage(tmp_path / "out"), recovery_dir=tmp_path / "recovery")
        task = asyncio.create_task(worker.run(twice))
        while not uploading.is_set():
            await asyncio.sleep(0.01)
        wanted = worker.wants_a_job()
        go_on.set()
        return wanted, await task

    wanted, result = asyncio.run(watch())
    assert wanted and len(result["outputs"]["videos"]) == 1


def test_an_encoder_that_never_starts_leaves_the_gpu_to_the_next_job(
    runner: Runner, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = runner()
    monkeypatch.setattr(frame_queue, "MAX_BYTES", 1)
    with monkeypatch.context() as patch:

        async def no_thread(*_: Any) -> None:
            raise RuntimeError("can't start new thread")

        patch.setattr(ShotFiles, "_encode_and_upload", no_thread)
        assert run(worker, job(tiny, {"num_frames": 33}))["error"].startswith("INTERNAL")
    assert "outputs" in run(runner(), job(tiny, {}))


def test_a_job_that_is_cancelled_while_its_encoder_hangs_leaves_the_gpu(
    runner: Runner, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, hanging, go_on = runner(), threading.Event(), threading.Event()
    monkeypatch.setattr(frame_queue, "MAX_BYTES", 1)

    def hang(*_: Any) -> None:
        hanging.set()
        go_on.wait(20)

    monkeypatch.setattr("worker.shot.encode", hang)

    async def cancel() -> None:
        task = asyncio.create_task(worker.run(job(tiny, {"num_frames": 33})))
        while not hanging.is_set():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.5)
        task.cancel()
        for _ in range(100):
            if not worker._gpu._threads[0]._work_queue.qsize() and not is_busy(worker):
                break
            await asyncio.sleep(0.05)
        assert not is_busy(worker)
        go_on.set()
        await asyncio.wait([task])
        assert not worker._gpu._lock.locked()

    asyncio.run(cancel())


def is_busy(worker: Service) -> bool:
    """Whether the GPU's thread is at work."""
    probe = worker._gpu._threads[0].submit(lambda: None)
    return not wait([probe], timeout=0.2).done


def test_a_failed_job_has_one_line_of_its_error_in_the_log(
    runner: Runner, tiny: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(runner(FussyStorage({0})), job(tiny, {}))
    assert [record.message.partition(":")[0] for record in caplog.records if "away" in record.message] == ["UPLOAD_FAILED"]


def test_a_jobs_own_secret_is_hidden_in_the_log_of_its_error(
    runner: Runner, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    redacted: list[str] = []
    monkeypatch.setattr("worker.faults.log.error", lambda *_, exc_info, **__: redacted.append(logs.redact(str(exc_info))))

    class Broken(FussyStorage):
        def find(self, key: str, made_from: str, limit: Limit) -> None:
            raise ZeroDivisionError("with the-very-secret-token")

    asked = job(tiny, {})
    asked["input"]["hf_token"] = "the-very-secret-token"
    assert run(runner(Broken(set())), asked)["error"].startswith("INTERNAL")
    assert redacted == ["with …"]


# Posters and contact sheets.


def with_sheet(tiny: Path, *prompts: dict[str, Any]) -> dict[str, Any]:
    one = job(tiny, *prompts)
    return one | {"input": one["input"] | {"contact_sheet": True}}


def test_every_video_has_a_poster_and_on_request_a_contact_sheet_and_an_image_has_neither(runner: Runner, tiny: Path) -> None:
    asked = with_sheet(tiny, {"width": 96, "num_frames": 9}, {"num_frames": 1})
    outputs = run(runner(), asked)["outputs"]
    (video,), (image,) = outputs["videos"], outputs["images"]
    assert set(image) == set(video) - {"poster", "contact_sheet"}
    for kind, name, size in (("poster", "0.poster.jpg", (96, 64)), ("contact_sheet", "0.sheet.jpg", (296, 200))):
        picture = video[kind]
        assert picture["key"] == f"{asked['id']}/{name}"
        assert (picture["width"], picture["height"]) == size == Image.open(file_of(picture)).size
        assert picture["bytes"] == file_of(picture).stat().st_size
    first_frame = frames_of(video)[0].astype(int)
    shown = np.asarray(Image.open(file_of(video["poster"])))
    assert np.abs(shown - first_frame).mean() < np.abs(shown - frames_of(video)[-1].astype(int)).mean() / 3
    kept = {path.name for path in file_of(video).parent.iterdir() if not path.name.startswith(".")}
    assert kept == {"0.zip", "0.poster.jpg", "0.sheet.jpg", "1.png", "result.json"}
    assert run(runner(), job(tiny, {}))["outputs"]["videos"][0]["contact_sheet"] is None


def test_a_poster_that_no_place_takes_is_a_warning_and_the_next_worker_stores_it(
    runner: Runner, tiny: Path, tmp_path: Path
) -> None:
    worker = runner(NoPictures(tmp_path), recovery_dir=tmp_path / "recovery")
    asked = with_sheet(tiny, {})
    result = run(worker, asked)
    (video,) = result["outputs"]["videos"]
    assert file_of(video).exists() and "errors" not in result
    assert (video["poster"], video["contact_sheet"]) == (None, None)
    for kind, name in (("poster", "0.poster.jpg"), ("contact_sheet", "0.sheet.jpg")):
        assert f"prompts[0]: no {kind}: no place for `{asked['id']}/{name}`{KEPT}" in result["warnings"]
    Recovery(tmp_path / "recovery", 10**9).upload_all(LocalFolder(tmp_path))
    assert Image.open(tmp_path / asked["id"] / "0.sheet.jpg").size == (132, 132)
    assert list((tmp_path / "recovery").iterdir()) == []


def test_a_poster_that_cannot_be_made_is_a_warning(runner: Runner, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("worker.pictures.scaled", scaled)
    result = run(runner(), job(tiny, {}) | {"id": "no-poster"})
    assert frames_of(result["outputs"]["videos"][0]).shape == (5, 64, 64, 3)
    assert result["outputs"]["videos"][0]["poster"] is None
    assert "prompts[0]: no poster: internal error; search the worker's log for job no-poster" in result["warnings"]


def test_a_video_that_no_place_takes_is_kept_with_its_pictures(runner: Runner, tiny: Path, tmp_path: Path) -> None:
    worker = runner(FussyStorage({0}), recovery_dir=tmp_path / "recovery")
    once_more = with_sheet(tiny, {})
    assert run(worker, once_more)["error"].startswith("UPLOAD_FAILED: ")
    back = runner(LocalFolder(tmp_path / "out"), recovery_dir=tmp_path / "recovery")
    (video,) = run(back, once_more)["outputs"]["videos"]
    assert all(file_of(item).exists() for item in (video, video["poster"], video["contact_sheet"]))
    assert list((tmp_path / "recovery").iterdir()) == []


def test_a_job_that_comes_again_has_its_pictures_though_nobody_can_be_asked_for_them(
    runner: Runner, tiny: Path, tmp_path: Path
) -> None:
    class CannotFindPictures(LocalFolder):
        def find(self, key: str, made_from: str, limit: Limit) -> Stored | None:
            return None if key.endswith(".jpg") else super().find(key, made_from, limit)

    twice = with_sheet(tiny, {})
    first = run(runner(LocalFolder(tmp_path)), twice)
    assert run(runner(CannotFindPictures(tmp_path)), twice) == first


@pytest.mark.parametrize("lost", ["nothing", "0.poster.jpg"])
def test_a_job_whose_worker_died_before_the_result_has_the_pictures_that_were_stored(
    runner: Runner, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    twice = with_sheet(tiny, {})
    first = run(runner(LocalFolder(tmp_path)), twice)
    for name in ("result.json", lost):
        (tmp_path / twice["id"] / name).unlink(missing_ok=True)
    monkeypatch.delattr(WanModel, "generate")
    result = run(runner(LocalFolder(tmp_path)), twice)
    (video,), (before,) = result["outputs"]["videos"], first["outputs"]["videos"]
    told = "prompts[0]: no poster: an earlier worker made the video, and the picture was not found beside it"
    assert (told in result["warnings"]) == (lost != "nothing")
    assert video == before | ({} if lost == "nothing" else {"poster": None})


# More LoRAs than one


def with_extra(tiny: Path, *extra: dict[str, Any], **request: Any) -> dict[str, Any]:
    made = job(tiny, {})
    made["input"] |= {"extra_loras": list(extra)} | request
    return made


def test_the_result_says_which_extra_loras_were_applied_and_how(runner: Runner, tiny: Path) -> None:
    plain = run(runner(), with_extra(tiny))
    assert "extra_loras" not in plain["settings"]
    extra = [{"path": "wan21_1b/rank16.safetensors", "network_multiplier": 0.5}, {"path": "wan21_1b/rank64.safetensors"}]
    made = run(runner(), with_extra(tiny, *extra))
    assert [item["applied_by"] for item in made["settings"]["loras"]] == ["adapter"]
    assert [
        (item["extra_lora"], item["network_multiplier"], item["applied_by"]) for item in made["settings"]["extra_loras"]
    ] == [
        (0, 0.5, "adapter"),
        (1, 1.0, "adapter"),
    ]
    (with_them,), (without,) = (output["outputs"]["videos"] for output in (made, plain))
    assert not np.array_equal(frames_of(with_them), frames_of(without))
    assert np.array_equal(frames_of(run(runner(), with_extra(tiny))["outputs"]["videos"][0]), frames_of(without))
    preview = run(runner(), with_extra(tiny, *extra, match="preview"))
    assert any("the trainer made its samples without `extra_loras`" in warning for warning in preview["warnings"])


def test_a_bad_extra_lora_is_named_by_its_field(runner: Runner, tiny: Path) -> None:
    other = {"path": "wan22_5b/rank8.safetensors"}
    answer = run(runner(), with_extra(tiny, {"path": "wan21_1b/rank64.safetensors"}, other, {"path": "none.safetensors"}))
    assert "LORA_INCOMPATIBLE: `extra_loras[1].path`" in answer["error"]
    assert "`extra_loras[2].path`: the worker's LoRA folder has no `none.safetensors`" in answer["error"]


# What a prompt can choose beside the model page


def test_the_settings_say_what_a_prompt_chose(tiny: Path, tmp_path: Path) -> None:
    model = "wan22_14b_i2v"
    places = {"checkpoint_dir": tiny, "lora_dir": tiny / "loras", "output_dir": tmp_path, "ai_toolkit_path": STAND_IN}
    worker = cold_start(Settings(model_id=model, device="cpu", **places))
    plain = request_for(model, tiny)
    (prompt,) = plain["prompts"]
    last = as_base64(Image.new("RGB", (64, 128), "red"))
    choices = {"shift": 7.0, "guidance_scale_2": 2.0, "last_img": last, "image_fit": "pad"}
    request = plain | {"prompts": [prompt, prompt | {"seed": 42} | choices, prompt | {"seed": 42}]}
    result = run(worker, {"id": "choices", "input": request})
    usual, chosen, again = result["settings"]["prompts"]
    assert {name: chosen[name] for name in ("shift", "guidance_scale_2", "image_fit")} == {
        "shift": 7.0,
        "guidance_scale_2": 2.0,
        "image_fit": "pad",
    }
    assert chosen.keys() - usual.keys() == {"guidance_scale_2", "image_fit", "last_image_sha256"}
    assert usual["shift"] == again["shift"] == 3.0
    videos = [frames_of(video) for video in result["outputs"]["videos"]]
    assert not np.array_equal(videos[0], videos[1])
    assert np.array_equal(videos[0], videos[2])
    assert [warning for warning in result["warnings"] if "prompts[1]" in warning and "stretched" in warning] == []
    broken = prompt | {"last_img": "aGk="}
    answer = run(worker, {"id": "broken", "input": plain | {"prompts": [broken]}})
    assert answer["error"].startswith("CONTROL_IMAGE_INVALID: `prompts[0].last_img`")


def test_several_videos_of_a_prompt_are_each_that_of_its_seed(runner: Runner, tiny: Path) -> None:
    apart = run(runner(), job(tiny, {"seed": 5}, {"seed": 6}, {"prompt": "a car"}))
    at_once = run(runner(), job(tiny, {"seed": 5, "num_videos": 2}, {"prompt": "a car", "seed": 44}))
    videos = at_once["outputs"]["videos"]
    assert [(video["prompt_index"], video.get("video_index"), video["seed"]) for video in videos] == [
        (0, 0, 5),
        (0, 1, 6),
        (1, None, 44),
    ]
    assert [row.get("video_index") for row in at_once["settings"]["prompts"]] == [0, 1, None]
    assert len({video["key"] for video in videos}) == 3
    for one, other in zip(videos, apart["outputs"]["videos"], strict=True):
        assert np.array_equal(frames_of(one), frames_of(other))
    failed = run(runner(FussyStorage({1})), job(tiny, {"seed": 5, "num_videos": 2}))
    assert [(error["prompt_index"], error["video_index"]) for error in failed["errors"]] == [(0, 1)]
