import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from safetensors.numpy import save

from pipelines.errors import LoraInvalid
from tests.worker_process import ROOT
from worker import lora_cache
from worker.errors import Stopped
from worker.lora_cache import LoraCache, Source
from worker.net.download import Answer, DownloadError, ServerDown

PAUSE = 0.05
LONG_AGO = time.time() - 30 * 24 * 3600


def lora(name: str = "mine", kilobytes: int = 10) -> bytes:
    return save({"x": np.zeros(kilobytes * 512, np.float16)}, {"name": name})


class Shelf:
    """What stands for a server: one file, how to ask whether it is current, and how often it was sent."""

    def __init__(self, body: bytes, etag: str = "") -> None:
        self.body = body
        self.etag = etag
        self.fails: list[Exception] = []
        """Raised instead of the next answers."""
        self.asked: list[dict[str, str]] = []
        self.sent = 0

    def download(self, file: IO[bytes], validators: Mapping[str, str]) -> Answer:
        self.asked.append(dict(validators))
        if self.fails:
            raise self.fails.pop(0)
        given = {"If-None-Match": self.etag} if self.etag else {}
        if given and validators.get("If-None-Match") == self.etag:
            return Answer(304, given)
        self.sent += 1
        file.write(self.body)
        return Answer(200, given)

    def asked_for(self, key: str, request: str = "a client") -> Source:
        return Source(hashlib.sha256(key.encode()).hexdigest(), request, self.download)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(folder: Path) -> LoraCache:
    return LoraCache(folder, 1_000_000, threading.Event())


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as held:
        yield held


def fetch_and_leave(cache: LoraCache, source: Source) -> Path:
    """One job that comes and goes."""
    with ExitStack() as held:
        return cache.fetch(source, held).path


def minutes_later(folder: Path, minutes: float = 5) -> None:
    """As if every answer of a server had been that much earlier."""
    for path in (folder / "urls").iterdir():
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"checked": record["checked"] - minutes * 60}))


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


# Shared by processes

FETCHES = """
import json, os, sys, threading
from contextlib import ExitStack
from worker.loras import fetch_lora
from worker.request import Lora
from worker.settings import Settings

processes, url, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
settings = Settings(model_id="wan21_1b", lora_cache_dir=folder, allow_private_downloads=True)
for _ in range(processes):
    if os.fork() == 0:
        with ExitStack() as held:
            file = fetch_lora(url, "loras[0].path", None, settings, threading.Event(), held)
            os.write(1, (json.dumps([file.sha256, str(file.path)]) + "\\n").encode())
        os._exit(0)
sys.exit(any(os.wait()[1] for _ in range(processes)))
"""


def fetching(url: str, folder: Path, processes: int) -> "subprocess.Popen[str]":
    """Processes that fetch `url` into the same cache, and say what they got."""
    command = [sys.executable, "-c", FETCHES, str(processes), url, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)


def test_eight_processes_that_ask_for_one_file_download_it_once(web, folder):
    body = lora()
    url = web.in_pieces("/a", [body[start : start + 200] for start in range(0, len(body), 200)] + [b""])
    with fetching(url, folder, processes=8) as workers:
        got, _ = workers.communicate(timeout=60)
    assert workers.returncode == 0
    path = folder / "files" / f"{hashlib.sha256(body).hexdigest()}.safetensors"
    assert [json.loads(line) for line in got.splitlines()] == [[path.stem, str(path)]] * 8
    assert web.hits("/a") == 1
    assert path.read_bytes() == body


def test_when_a_process_is_killed_in_a_download_another_takes_over(web, folder):
    body, asked, end = lora(), threading.Event(), threading.Event()

    def half(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2])
        asked.set()
        end.wait(30)

    url = web.runs("/a", half)
    web.gives("/a", body)
    with fetching(url, folder, processes=1) as first:
        assert asked.wait(30)
        with fetching(url, folder, processes=2) as others:
            time.sleep(1)
            assert web.hits("/a") == 1  # they wait
            os.killpg(first.pid, 9)
            got, _ = others.communicate(timeout=60)
        end.set()
    sha256 = hashlib.sha256(body).hexdigest()
    assert [json.loads(line)[0] for line in got.splitlines()] == [sha256] * 2
    assert web.hits("/a") == 2


# Current or not


def test_a_file_that_the_server_calls_current_is_not_sent_again(cache, folder, held):
    shelf = Shelf(lora(), '"v1"')
    first = cache.fetch(shelf.asked_for("url"), held)
    assert cache.fetch(shelf.asked_for("url"), held) == first
    assert shelf.asked == [{}, {"If-None-Match": '"v1"'}]
    assert shelf.sent == 1


def test_without_validators_a_file_is_current_for_a_minute(cache, folder, held):
    shelf = Shelf(lora())
    cache.fetch(shelf.asked_for("url"), held)
    cache.fetch(shelf.asked_for("url"), held)
    assert shelf.sent == 1
    minutes_later(folder)
    cache.fetch(shelf.asked_for("url"), held)
    assert shelf.sent == 2


def test_who_waited_for_a_download_shares_it_without_asking(cache, held):
    shelf = Shelf(lora(), '"v1"')
    source, go_on, results = shelf.asked_for("url"), threading.Event(), []

    def slowly(file: IO[bytes], validators: Mapping[str, str]) -> Answer:
        go_on.wait(10)
        return shelf.download(file, validators)

    slow = Source(source.key, source.request, slowly)
    jobs = [threading.Thread(target=lambda: results.append(cache.fetch(slow, held))) for _ in range(4)]
    for job in jobs:
        job.start()
    time.sleep(PAUSE)
    go_on.set()
    for job in jobs:
        job.join()
    assert len({result.path for result in results}) == 1
    assert shelf.asked == [{}]


@pytest.mark.parametrize("etag", ['"v1"', ""])
def test_another_client_gets_nothing_that_the_server_does_not_give_it(cache, held, etag):
    shelf = Shelf(lora(), etag)
    cache.fetch(shelf.asked_for("url", "with a token"), held)
    shelf.fails = [DownloadError("the server answered 401")]
    with pytest.raises(DownloadError, match="401"):
        cache.fetch(shelf.asked_for("url", "without"), held)


def test_while_the_server_is_down_the_copy_serves_those_who_have_had_it(cache, held, caplog):
    shelf = Shelf(lora(), '"v1"')
    first = cache.fetch(shelf.asked_for("url"), held)
    shelf.fails = [ServerDown("the server answered 503, 3 times")] * 2
    assert cache.fetch(shelf.asked_for("url"), held) == first
    assert "does not answer" in caplog.text
    with pytest.raises(ServerDown):
        cache.fetch(shelf.asked_for("url", "another client"), held)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_copy_does_not_stand_in_for_a_file_that_the_server_refuses(cache, held, status):
    shelf = Shelf(lora(), '"v1"')
    cache.fetch(shelf.asked_for("url"), held)
    shelf.fails = [DownloadError(f"the server answered {status}")]
    with pytest.raises(DownloadError, match=str(status)):
        cache.fetch(shelf.asked_for("url"), held)


def test_a_wait_for_another_download_ends_with_the_job(folder, held):
    shelf, stop = Shelf(lora()), threading.Event()
    (folder / "locks").mkdir(parents=True)
    source = shelf.asked_for("url")
    with (folder / "locks" / source.key).open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        threading.Timer(PAUSE, stop.set).start()
        with pytest.raises(Stopped):
            LoraCache(folder, 1_000_000, stop).fetch(source, held)
    assert shelf.asked == []


def test_a_lock_whose_holder_is_lost_does_not_hold_up_jobs_for_ever(cache, folder, held, monkeypatch):
    monkeypatch.setattr(lora_cache, "_LOCK_TIMEOUT_SECONDS", PAUSE)
    (folder / "locks").mkdir(parents=True)
    source = Shelf(lora()).asked_for("url")
    with (folder / "locks" / source.key).open("ab") as lost:
        fcntl.flock(lost, fcntl.LOCK_EX)
        assert cache.fetch(source, held).metadata == {"name": "mine"}


def test_a_lock_file_that_was_removed_while_waited_for_is_no_lock(cache, folder):
    (folder / "locks").mkdir(parents=True)
    path, results = folder / "locks" / "a", []

    def wait() -> None:
        with cache._locked("a"), path.open("ab") as again:
            results.append(lora_cache._try_lock(again, fcntl.LOCK_EX))

    waiting = threading.Thread(target=wait)
    with path.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting.start()
        time.sleep(PAUSE)
        path.unlink()
    waiting.join()
    assert results == [False]  # it holds the lock that others would take


def test_a_file_that_is_evicted_while_it_is_opened_is_fetched_again(cache, held):
    shelf, results = Shelf(lora(), '"v1"'), []
    path = fetch_and_leave(cache, shelf.asked_for("url"))
    job = threading.Thread(target=lambda: results.append(cache.fetch(shelf.asked_for("url"), held)))
    with path.open("rb") as evicted:
        fcntl.flock(evicted, fcntl.LOCK_EX)
        job.start()
        time.sleep(PAUSE)
        path.unlink()
    job.join()
    assert results[0].path == path
    assert shelf.asked == [{}, {}]


# By content


def test_two_urls_of_the_same_content_share_a_file(cache, folder, held):
    first = cache.fetch(Shelf(lora()).asked_for("one"), held)
    assert cache.fetch(Shelf(lora()).asked_for("other"), held) == first
    first.check_unchanged()
    assert first.path.name == f"{hashlib.sha256(lora()).hexdigest()}.safetensors"


def test_a_file_that_is_downloaded_again_unchanged_stays_for_the_jobs_that_use_it(cache, folder, held):
    shelf = Shelf(lora())
    first = cache.fetch(shelf.asked_for("url"), held)
    minutes_later(folder)
    cache.fetch(shelf.asked_for("url"), held)
    assert shelf.sent == 2
    first.check_unchanged()


def test_a_new_version_leaves_the_old_one_to_the_jobs_that_use_it(cache, held):
    shelf = Shelf(lora("old"), '"v1"')
    old = cache.fetch(shelf.asked_for("url"), held)
    shelf.body, shelf.etag = lora("new"), '"v2"'
    assert cache.fetch(shelf.asked_for("url"), held).metadata == {"name": "new"}
    old.check_unchanged()


def test_what_is_no_lora_is_not_kept(cache, folder, held):
    shelf = Shelf(lora()[:-1], '"v1"')
    with pytest.raises(LoraInvalid, match="cut short"):
        cache.fetch(shelf.asked_for("url"), held)
    assert {path.parent.name for path in files_in(folder)} == {"locks"}
    shelf.body = lora()
    assert cache.fetch(shelf.asked_for("url"), held).metadata == {"name": "mine"}


def test_a_failed_download_leaves_nothing(cache, folder, held):
    shelf = Shelf(lora())
    shelf.fails = [DownloadError("the server answered 404")]
    with pytest.raises(DownloadError):
        cache.fetch(shelf.asked_for("url"), held)
    assert {path.parent.name for path in files_in(folder)} == {"locks"}


# Damage


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-1], id="cut short"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:-1] + b"\1", id="a byte differs"),
        pytest.param(lambda data: b"\0" * len(data), id="zeros"),
        pytest.param(lambda data: lora("other"), id="another LoRA"),
    ],
)
def test_a_damaged_file_is_noticed_and_fetched_again(cache, held, damage):
    shelf = Shelf(lora(), '"v1"')
    path = fetch_and_leave(cache, shelf.asked_for("url"))
    path.write_bytes(damage(path.read_bytes()))
    whole = cache.fetch(shelf.asked_for("url"), held)
    assert whole.path.read_bytes() == lora()
    assert whole.sha256 == whole.path.stem
    assert shelf.asked[-1] == {}
    assert shelf.sent == 2


def test_a_file_of_another_size_is_fetched_again_without_a_question(cache, held):
    shelf = Shelf(lora(), '"v1"')
    fetch_and_leave(cache, shelf.asked_for("url")).write_bytes(lora()[:-1])
    cache.fetch(shelf.asked_for("url"), held)
    assert shelf.asked == [{}, {}]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sha256": "../../x"}', "\0"])
def test_a_damaged_record_is_none(cache, folder, held, text):
    shelf = Shelf(lora(), '"v1"')
    path = fetch_and_leave(cache, shelf.asked_for("url"))
    [record] = (folder / "urls").iterdir()
    record.write_text(text)
    assert cache.fetch(shelf.asked_for("url"), held).path == path
    assert shelf.asked == [{}, {}]


def test_a_disk_that_loses_what_is_written_is_an_error(cache, held, monkeypatch):
    monkeypatch.setattr(lora_cache, "_read_back", lambda copy: None)
    with pytest.raises(OSError, match="returns other bytes"):
        cache.fetch(Shelf(lora()).asked_for("url"), held)


# Room


def at(path: Path, days: float) -> Path:
    """As if the file had been used that many days after long ago."""
    os.utime(path, ns=(int((LONG_AGO + days * 24 * 3600) * 1e9), path.stat().st_mtime_ns))
    return path


def test_the_longest_unused_files_make_room(folder):
    cache = LoraCache(folder, 35_000, threading.Event())
    first, second, third = (fetch_and_leave(cache, Shelf(lora(name)).asked_for(name)) for name in "abc")
    at(second, 1), at(third, 2), at(first, 3)
    fourth = fetch_and_leave(cache, Shelf(lora("d")).asked_for("d"))
    assert files_in(folder / "files") == {first, third, fourth}
    assert len(files_in(folder / "urls")) == 3


def test_a_file_in_use_stays(folder, held):
    cache = LoraCache(folder, 1, threading.Event())
    used = cache.fetch(Shelf(lora("a")).asked_for("a"), held).path
    fetch_and_leave(cache, Shelf(lora("b")).asked_for("b"))
    last = fetch_and_leave(cache, Shelf(lora("c")).asked_for("c"))
    assert files_in(folder / "files") == {used, last}
    held.close()
    assert files_in(folder / "files") == {used, last}
    last = fetch_and_leave(cache, Shelf(lora("d")).asked_for("d"))
    assert files_in(folder / "files") == {last}


def test_a_use_makes_a_file_young_and_does_not_make_it_another(cache, held):
    shelf = Shelf(lora(), '"v1"')
    source = shelf.asked_for("url")
    with ExitStack() as job:
        first = cache.fetch(source, job)
    at(first.path, 0)
    assert cache.fetch(source, held).identity == first.identity
    assert time.time() - first.path.stat().st_atime < 60


def test_what_was_left_lying_about_goes_and_what_is_under_way_stays(cache, folder):
    fetch_and_leave(cache, Shelf(lora("a")).asked_for("a")).unlink()
    files, urls, locks = folder / "files", folder / "urls", folder / "locks"
    [lock] = [path for path in locks.iterdir() if path.name != "cache"]
    left = [files / ".left.part", urls / ".left.json.x", lock]
    under_way = [files / ".used.part", locks / "used"]
    for path in left + under_way:
        path.touch()
        os.utime(path, (LONG_AGO, LONG_AGO))
    young = files / ".young.part"
    young.touch()
    with under_way[0].open() as part, under_way[1].open() as used:
        fcntl.flock(part, fcntl.LOCK_EX)
        fcntl.flock(used, fcntl.LOCK_EX)
        path = fetch_and_leave(cache, Shelf(lora("b")).asked_for("b"))
    source = Shelf(lora()).asked_for("b")
    assert files_in(files) == {path, young, under_way[0]}
    assert files_in(urls) == {urls / f"{source.key}.json"}
    assert files_in(locks) == {locks / "cache", locks / source.key, under_way[1]}


def test_a_download_that_pauses_for_long_is_not_taken_for_abandoned(cache, held):
    shelf, other = Shelf(lora()), Shelf(lora("other"))
    source = shelf.asked_for("url")

    def pausing(file: IO[bytes], validators: Mapping[str, str]) -> Answer:
        os.utime(file.name, (LONG_AGO, LONG_AGO))
        fetch_and_leave(cache, other.asked_for("other"))
        return shelf.download(file, validators)

    assert cache.fetch(Source(source.key, source.request, pausing), held).metadata == {"name": "mine"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_emptied_of_what_no_job_uses(cache, folder, held, number):
    fetch_and_leave(cache, Shelf(lora("unused")).asked_for("unused"))
    used = cache.fetch(Shelf(lora("used")).asked_for("used"), held).path
    shelf = Shelf(lora())
    shelf.fails = [OSError(number, os.strerror(number))]
    new = cache.fetch(shelf.asked_for("url"), held).path
    assert files_in(folder / "files") == {used, new}


def test_a_disk_that_stays_full_is_an_error(cache, folder, held):
    shelf = Shelf(lora())
    shelf.fails = [OSError(errno.ENOSPC, "No space left on device")] * 2
    with pytest.raises(OSError, match="No space"):
        cache.fetch(shelf.asked_for("url"), held)
    assert files_in(folder / "files") == set()


# Without locks


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: Any, kind: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_locks")
def test_a_file_system_without_locks_does_as_well(cache, folder, held):
    shelf = Shelf(lora(), '"v1"')
    path = cache.fetch(shelf.asked_for("url"), held).path
    assert cache.fetch(shelf.asked_for("url"), held).path == path
    assert files_in(folder / "files") == {path}


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_file_that_was_just_used_counts_as_in_use(folder):
    cache = LoraCache(folder, 1, threading.Event())
    old = fetch_and_leave(cache, Shelf(lora("a")).asked_for("a"))
    young = fetch_and_leave(cache, Shelf(lora("b")).asked_for("b"))
    at(old, 0)
    last = fetch_and_leave(cache, Shelf(lora("c")).asked_for("c"))
    assert files_in(folder / "files") == {young, last}
