import json
import os
import threading
import time

import pytest
import requests

from worker import delivery
from worker.delivery import Delivery, Identity
from worker.errors import Code, Stopped, WorkerError
from worker.recovery import Kept, Recovery
from worker.settings import Settings
from worker.storage.base import Limit, NotStored
from worker.storage.choice import storage_of
from worker.storage.local_folder import LocalFolder

JOB = Identity.of("job", {"prompts": ["a"]})
STOP = threading.Event()
LIMIT = Limit(STOP)


class Fussy(LocalFolder):
    """A place that takes nothing for so many times."""

    def __init__(self, folder, failures, refused=False):
        super().__init__(folder)
        self.failures, self.refused, self.asked = failures, refused, 0

    def put(self, file, key, content_type, made_from, limit):
        self.asked += 1
        if self.asked <= self.failures:
            raise NotStored(f"no place for `{key}`", self.refused)
        return super().put(file, key, content_type, made_from, limit)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(delivery, "_FIRST_PAUSE", 0.001)


@pytest.fixture
def recovery(tmp_path):
    return Recovery(tmp_path / "recovery", 10**9)


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "0.mp4"
    file.write_bytes(b"a finished video")
    return file


def soon() -> float:
    return time.monotonic() + 5


def put(delivery, file, give_up_at=None):
    return delivery.put(file, "video/mp4", give_up_at or soon(), LIMIT)


def find(delivery, name="0.mp4"):
    if delivery.is_kept(name) and not delivery.find(name, STOP):
        return delivery.store_kept(name, "video/mp4", time.monotonic(), LIMIT)
    return delivery.find(name, STOP)


def test_a_place_that_comes_back_gets_the_file(tmp_path, recovery, file):
    place = Fussy(tmp_path / "out", failures=5)
    assert put(Delivery(place, True, recovery, "job", JOB), file).key == "job/0.mp4"
    assert (tmp_path / "out/job/0.mp4").read_bytes() == b"a finished video"
    assert list((tmp_path / "recovery").iterdir()) == []


def test_a_place_that_stays_away_leaves_the_file_in_recovery_and_the_next_worker_delivers_it(tmp_path, recovery, file):
    place = Fussy(tmp_path / "out", failures=1000)
    with pytest.raises(WorkerError, match=r"no place for `job/0.mp4`; the file is kept, and the next worker") as caught:
        put(Delivery(place, True, recovery, "job", JOB), file, give_up_at=time.monotonic() + 0.05)
    assert caught.value.code is Code.UPLOAD_FAILED
    file.unlink()
    recovery.upload_all(LocalFolder(tmp_path / "out"))
    assert (tmp_path / "out/job/0.mp4").read_bytes() == b"a finished video"
    assert list((tmp_path / "recovery").iterdir()) == []


def test_a_place_that_refuses_is_asked_four_times_and_not_for_minutes(tmp_path, recovery, file):
    place = Fussy(tmp_path / "out", failures=1000, refused=True)
    with pytest.raises(WorkerError):
        put(Delivery(place, True, recovery, "job", JOB), file)
    assert place.asked == 4


def test_a_stopped_job_stops_trying(tmp_path, recovery, file):
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(Stopped):
        Delivery(Fussy(tmp_path, 9), True, recovery, "job", JOB).put(file, "video/mp4", soon(), Limit(stopped))


def test_a_file_for_a_place_that_the_job_brought_is_not_delivered_anywhere_else(tmp_path, recovery, file):
    with pytest.raises(WorkerError, match="the same job, delivered again, uploads it"):
        put(Delivery(Fussy(tmp_path / "theirs", 1000, refused=True), False, recovery, "job", JOB), file)
    recovery.upload_all(LocalFolder(tmp_path / "ours"))
    assert not (tmp_path / "ours").exists()
    found = find(Delivery(LocalFolder(tmp_path / "theirs"), False, recovery, "job", JOB))
    assert found.bytes == (tmp_path / "theirs/job/0.mp4").stat().st_size == 16
    assert list((tmp_path / "recovery").iterdir()) == []


def test_a_kept_file_whose_place_is_still_away_is_not_made_again(tmp_path, recovery, file):
    place = Fussy(tmp_path / "out", failures=1000, refused=True)
    with pytest.raises(WorkerError):
        put(Delivery(place, True, recovery, "job", JOB), file)
    with pytest.raises(WorkerError, match="the file is kept"):
        find(Delivery(place, True, recovery, "job", JOB))


def test_what_the_same_job_made_is_found_and_what_another_made_is_not(tmp_path, recovery, file):
    place = LocalFolder(tmp_path / "out")
    stored = put(Delivery(place, True, recovery, "job", JOB), file)
    assert find(Delivery(place, True, recovery, "job", JOB)) == stored
    assert find(Delivery(place, True, recovery, "job", Identity.of("job", {"prompts": ["b"]}))) is None
    assert find(Delivery(place, True, recovery, "job", JOB), "1.mp4") is None


def test_a_job_without_an_id_is_never_the_same(tmp_path, recovery, file):
    nameless = Delivery(LocalFolder(tmp_path / "out"), True, recovery, "local_test", Identity.of(None, {}))
    put(nameless, file)
    nameless.save_result(RESULT, tmp_path, STOP)
    assert find(nameless) is None and nameless.load_previous_result(STOP) is None
    assert [path.name for path in (tmp_path / "out/local_test").iterdir()] == ["0.mp4"]


RESULT = {
    "outputs": {"images": [], "videos": [{"key": "job/0.mp4", "url": "https://a?signed=S3cr3t", "expires_at": "soon"}]},
    "warnings": ["ü"],
}


def test_a_result_is_recalled_with_new_urls(s3, recovery, file):
    settings = Settings(model_id="wan21_1b", bucket_key_prefix="p/", **{k.lower(): v for k, v in s3.environment().items()})
    mine = Delivery(storage_of(settings), True, recovery, "job", JOB)
    put(mine, file)
    poster = {"key": "p/job/0.poster.jpg", "url": "https://a?signed=S3cr3t", "expires_at": "soon", "bytes": 8}
    outputs = {"images": [], "videos": [RESULT["outputs"]["videos"][0] | {"key": "p/job/0.mp4", "poster": poster}]}
    picture = file.with_name("0.poster.jpg")
    picture.write_bytes(b"a poster")
    put(mine, picture)
    mine.save_result(RESULT | {"outputs": outputs}, file.parent, STOP)
    body = s3.client().get_object(Bucket=s3.bucket, Key="p/job/result.json")["Body"].read().decode()
    assert "S3cr3t" not in body and "X-Amz" not in body
    recalled = Delivery(storage_of(settings), True, recovery, "job", JOB).load_previous_result(STOP)
    (video,) = recalled["outputs"]["videos"]
    assert requests.get(video["url"], timeout=10).content == b"a finished video"
    assert requests.get(video["poster"]["url"], timeout=10).content == b"a poster"
    assert video["poster"]["expires_at"] > "2026"
    assert video["expires_at"] > "2026" and recalled["warnings"] == ["ü"]


def test_a_result_whose_file_is_gone_is_not_recalled(tmp_path, recovery, file):
    mine = Delivery(LocalFolder(tmp_path / "out"), True, recovery, "job", JOB)
    put(mine, file)
    mine.save_result(RESULT, tmp_path, STOP)
    assert mine.load_previous_result(STOP)
    (tmp_path / "out/job/0.mp4").unlink()
    assert mine.load_previous_result(STOP) is None


def test_a_result_that_cannot_be_stored_is_not_missed(tmp_path, recovery):
    Delivery(Fussy(tmp_path, 9), True, recovery, "job", JOB).save_result(RESULT, tmp_path, STOP)


def test_a_half_written_file_in_recovery_does_not_count(tmp_path, recovery):
    (tmp_path / "recovery").mkdir()
    (tmp_path / "recovery/x.bin").write_bytes(b"half")
    (tmp_path / "recovery/y.json").write_text('{"key": "job/0.m')
    (tmp_path / "recovery/z.json").write_text(json.dumps({"key": 1}))
    recovery.upload_all(LocalFolder(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_recovery_folder_that_takes_nothing_either_leaves_the_plain_error(tmp_path, file):
    (tmp_path / "recovery").write_bytes(b"a file in the way")
    with pytest.raises(WorkerError, match=r"^UPLOAD_FAILED: no place for `job/0.mp4`$"):
        put(Delivery(Fussy(tmp_path / "out", 9, refused=True), True, Recovery(tmp_path / "recovery", 10**9), "job", JOB), file)
    assert file.exists()


def test_a_result_that_cannot_be_written_to_the_scratch_disk_is_not_missed(tmp_path, recovery, caplog):
    delivery = Delivery(LocalFolder(tmp_path / "out"), True, recovery, "job", JOB)
    delivery.save_result(RESULT, tmp_path / "no such folder", STOP)
    assert "the result was not stored beside its files (FileNotFoundError)" in caplog.text


def test_an_upload_counts_though_the_kept_copy_cannot_be_deleted(tmp_path, recovery, file, monkeypatch):
    delivery = Delivery(Fussy(tmp_path / "out", 1, refused=True), True, recovery, "job", JOB)
    monkeypatch.setattr(recovery, "find", lambda *_: None)
    (tmp_path / "recovery").mkdir()
    recovery._note("job/0.mp4").mkdir()  # a folder where the note would be: it cannot be unlinked
    assert put(delivery, file).key == "job/0.mp4"


def test_kept_files_of_a_jobs_own_bucket_are_deleted_when_the_job_can_no_longer_come(tmp_path, recovery, file):
    theirs = Delivery(Fussy(tmp_path / "theirs", 1000, refused=True), False, recovery, "job", JOB)
    with pytest.raises(WorkerError):
        put(theirs, file)
    recovery.upload_all(LocalFolder(tmp_path / "ours"))
    assert theirs.is_kept("0.mp4")
    eight_days_ago = time.time() - 8 * 24 * 3600
    for kept in (tmp_path / "recovery").iterdir():
        os.utime(kept, (eight_days_ago, eight_days_ago))
    recovery.upload_all(LocalFolder(tmp_path / "ours"))
    assert list((tmp_path / "recovery").iterdir()) == [] and not (tmp_path / "ours").exists()


def test_a_kept_file_that_another_worker_uploads_meanwhile_is_found_there(tmp_path, recovery, file):
    place = Fussy(tmp_path / "out", 1, refused=True)
    with pytest.raises(WorkerError):
        put(Delivery(Fussy(tmp_path / "out", 1000, refused=True), True, recovery, "job", JOB), file)
    delivery = Delivery(place, True, recovery, "job", JOB)
    assert delivery.is_kept("0.mp4")
    recovery.upload_all(LocalFolder(tmp_path / "out"))
    assert delivery.store_kept("0.mp4", "video/mp4", soon(), LIMIT).key == "job/0.mp4"
    (tmp_path / "out/job/0.mp4").unlink()
    with pytest.raises(WorkerError, match="is gone; send the job again"):
        delivery.store_kept("0.mp4", "video/mp4", soon(), LIMIT)


# Kept early


class Hanging(LocalFolder):
    """A place that takes its time."""

    def __init__(self, folder, seconds):
        super().__init__(folder)
        self.seconds = seconds

    def put(self, file, key, content_type, made_from, limit):
        time.sleep(self.seconds)
        return super().put(file, key, content_type, made_from, limit)


def kept_in(folder) -> list[bytes]:
    return [path.read_bytes() for path in folder.glob("*.bin")] if folder.exists() else []


def test_a_file_is_kept_from_the_first_failed_try_on(tmp_path, recovery, file, monkeypatch):
    monkeypatch.setattr(delivery, "_FIRST_PAUSE", 30.0)
    stop = threading.Event()
    place = Delivery(Fussy(tmp_path / "out", 1000), True, recovery, "job", JOB)

    def upload():
        with pytest.raises(Stopped):
            place.put(file, "video/mp4", soon() + 60, Limit(stop))

    thread = threading.Thread(target=upload)
    thread.start()
    end = soon()
    while not list((tmp_path / "recovery").glob("*.json")) and time.monotonic() < end:
        time.sleep(0.01)
    assert kept_in(tmp_path / "recovery") == [b"a finished video"]  # and now the process may be killed
    stop.set()
    thread.join()
    assert kept_in(tmp_path / "recovery") == []  # of a job that was stopped, nobody wants it


def test_a_file_is_kept_while_its_upload_takes_long_and_no_longer(tmp_path, recovery, file, monkeypatch):
    monkeypatch.setattr(delivery, "_SECONDS_UNTIL_KEPT", 0.05)
    place = Delivery(Hanging(tmp_path / "out", 0.6), True, recovery, "job", JOB)
    thread = threading.Thread(target=put, args=(place, file))
    thread.start()
    time.sleep(0.4)
    assert kept_in(tmp_path / "recovery") == [b"a finished video"]
    thread.join()
    assert kept_in(tmp_path / "recovery") == []
    assert (tmp_path / "out/job/0.mp4").read_bytes() == b"a finished video"


def test_an_upload_that_takes_no_time_is_not_kept(tmp_path, recovery, file):
    put(Delivery(LocalFolder(tmp_path / "out"), True, recovery, "job", JOB), file)
    assert not (tmp_path / "recovery").exists()


@pytest.mark.parametrize(
    "body", [b"no json", b"[]", b'{"outputs": 3}', b'{"outputs": {"images": [{}], "videos": []}}', b"[" * 5000]
)
def test_a_stored_result_that_is_damaged_is_none(tmp_path, recovery, file, body):
    mine = Delivery(LocalFolder(tmp_path / "out"), True, recovery, "job", JOB)
    put(mine, file)
    damaged = tmp_path / "result.json"
    damaged.write_bytes(body)
    LocalFolder(tmp_path / "out").put(damaged, "job/result.json", "application/json", JOB.sum, LIMIT)
    assert mine.load_previous_result(STOP) is None


def test_a_stored_result_with_a_lone_surrogate_is_none(tmp_path, recovery, file):
    """The platform would drop it without a word."""
    mine = Delivery(LocalFolder(tmp_path / "out"), True, recovery, "job", JOB)
    put(mine, file)
    damaged = tmp_path / "result.json"
    damaged.write_text(json.dumps(RESULT | {"warnings": ["\ud800"]}))
    LocalFolder(tmp_path / "out").put(damaged, "job/result.json", "application/json", JOB.sum, LIMIT)
    assert mine.load_previous_result(STOP) is None


def test_a_place_that_does_not_answer_holds_a_job_up_once_and_not_for_each_of_its_files(tmp_path, recovery, monkeypatch):
    class Deaf(LocalFolder):
        def find(self, key, made_from, limit):
            while time.monotonic() < limit.ends:
                time.sleep(0.01)

    monkeypatch.setattr(delivery, "_SECONDS_TO_SEARCH", 0.3)
    place, started = Delivery(Deaf(tmp_path), True, recovery, "job", JOB), time.monotonic()
    assert [place.find(f"{number}.mp4", STOP) for number in range(10)] == [None] * 10
    assert time.monotonic() - started < 2.5


# What a stranger can put into RECOVERY_DIR, and how much


def keep(recovery, file, key="job/0.mp4", own=True) -> bool:
    return recovery.keep(file, Kept(key, "video/mp4", "sum", own))


@pytest.mark.parametrize("key", ["../../evil", "/tmp/evil", "a/../../evil", "a//b", "", "a\\b"])
def test_a_planted_note_writes_nothing_outside(tmp_path, recovery, file, key):
    (tmp_path / "recovery").mkdir()
    note = recovery._note(key)
    note.write_text(json.dumps({"key": key, "content_type": "video/mp4", "made_from": "sum", "own": True}))
    note.with_suffix(".bin").write_bytes(b"evil")
    recovery.upload_all(LocalFolder(tmp_path / "a/b/out"))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "recovery" not in path.parts and path != file]


@pytest.mark.parametrize(
    "note",
    [
        {"key": "job/0.mp4", "content_type": "video/mp4", "made_from": "sum", "own": True, "more": 1},
        {"key": "other/0.mp4", "content_type": "video/mp4", "made_from": "sum", "own": True},
        {"key": 5, "content_type": "video/mp4", "made_from": "sum", "own": True},
        [],
    ],
    ids=["a field more", "another key", "a number", "a list"],
)
def test_a_note_that_no_worker_wrote_does_not_count(tmp_path, recovery, file, note):
    assert keep(recovery, file)
    if note != [] and note["key"] == "job/0.mp4":
        assert recovery.find("job/0.mp4", "sum")
    recovery._note("job/0.mp4").write_text(json.dumps(note))
    counts = isinstance(note, dict) and "more" in note  # of a later version
    assert bool(recovery.find("job/0.mp4", "sum")) == counts


def test_a_link_in_the_place_of_a_kept_file_is_not_uploaded(tmp_path, recovery, file):
    assert keep(recovery, file)
    secret = tmp_path / "secret"
    secret.write_text("s3cr3t")
    kept = recovery._note("job/0.mp4").with_suffix(".bin")
    kept.unlink()
    kept.symlink_to(secret)
    recovery.upload_all(LocalFolder(tmp_path / "out"))
    assert not (tmp_path / "out/job").exists()


def test_the_folder_does_not_grow_beyond_its_limit_and_the_workers_own_files_stay(tmp_path, file):
    small = Recovery(tmp_path / "recovery", max_bytes=50)  # three files of 16 bytes
    assert keep(small, file, "own/0.mp4")
    assert keep(small, file, "theirs/0.mp4", own=False) and keep(small, file, "theirs/1.mp4", own=False)
    os.utime(small._note("theirs/0.mp4").with_suffix(".bin"), (1, 1))
    assert keep(small, file, "own/1.mp4")
    assert small.find("theirs/0.mp4", "sum") is None and small.find("theirs/1.mp4", "sum")
    assert keep(small, file, "own/2.mp4")
    assert small.find("theirs/1.mp4", "sum") is None
    assert not keep(small, file, "own/3.mp4") and not keep(small, file, "theirs/2.mp4", own=False)
    assert all(small.find(f"own/{number}.mp4", "sum") for number in range(3))


def test_a_kept_file_on_the_same_file_system_takes_no_more_room(tmp_path, recovery, file):
    assert keep(recovery, file)
    assert recovery.find("job/0.mp4", "sum").samefile(file)


def test_halves_of_a_process_that_was_killed_go(tmp_path, recovery, file):
    assert keep(recovery, file)
    for name in (".a.bin.tmp123", "0" * 32 + ".bin"):
        (tmp_path / "recovery" / name).touch()
        os.utime(tmp_path / "recovery" / name, (1, 1))
    recovery.upload_all(Fussy(tmp_path / "out", 1000))
    assert sorted(path.suffix for path in (tmp_path / "recovery").iterdir()) == [".bin", ".json"]


def test_a_kept_file_that_another_worker_deletes_meanwhile_keeps_no_file_out(tmp_path, recovery, file):
    (tmp_path / "recovery").mkdir()
    (tmp_path / "recovery" / "gone.bin").symlink_to(tmp_path / "deleted after it was listed")
    assert keep(recovery, file)
