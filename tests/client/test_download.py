"""Downloads: complete or not at all, named after the prompt, and never over another file."""

from __future__ import annotations

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from client import Client, DownloadFailed, Result
from client import download as downloading
from tests.client.conftest import BODY, picture, result
from tests.client.endpoint import KEY
from tests.worker.web_server import Web
from tests.worker_process import free_port

Fetch = Callable[..., list[Path]]

NEAR = "http://127.0.0.1:1"
"""The address of an API on this computer, which may name files on a server of this computer. Nothing listens there."""


@pytest.fixture
def fetch(folder: Path, said: list[str]) -> Fetch:
    """Download the URLs. `changes` are made to the files of the result."""
    client = Client.endpoint("endpoint", KEY, NEAR, patience=0.5, say=said.append)

    def fetch(*urls: str, **changes: Any) -> list[Path]:
        return client.download(Result.of("job-1", result(*urls, **changes)["output"]), folder)

    return fetch


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_has_the_prompt_and_the_seed_in_its_name(fetch: Fetch, web: Web, folder: Path) -> None:
    (path,) = fetch(web.gives("/0.mp4", BODY))
    assert path == folder / "a-sailing-boat-at-sunset-7.mp4"
    assert path.read_bytes() == BODY
    assert names(folder) == [path.name]
    (folder / "other").touch()
    assert path.stat().st_mode == (folder / "other").stat().st_mode


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("../../etc/passwd", "etc-passwd-7.mp4"),
        ("…", "video-7.mp4"),
        ("Ein Boot auf dem Fluß, 日没", "ein-boot-auf-dem-fluß-日没-7.mp4"),
        ("日" * 500, "日" * 33 + "-7.mp4"),
        (".hidden\n\0", "hidden-7.mp4"),
        ("a_b -- c", "a-b-c-7.mp4"),
    ],
)
def test_any_prompt_makes_a_file_name(web: Web, folder: Path, prompt: str, name: str) -> None:
    answer = result(web.gives("/0.mp4", BODY))["output"]
    answer["settings"]["prompts"][0]["prompt"] = prompt
    (path,) = Client.endpoint("endpoint", KEY, NEAR).download(Result.of("job-1", answer), folder)
    assert path == folder / name


def test_lossless_frames_are_a_zip(fetch: Fetch, web: Web) -> None:
    assert fetch(web.gives("/0.zip", BODY), format="png")[0].suffix == ".zip"


def test_a_contact_sheet_is_saved_beside_its_video_and_a_poster_on_request(web: Web, folder: Path) -> None:
    for path in ("/0.mp4", "/0.poster.jpg", "/0.sheet.jpg"):
        web.gives(path, path.encode() + BODY[len(path) :])
    pictures = {"poster": picture(web.url("/0.poster.jpg")), "contact_sheet": picture(web.url("/0.sheet.jpg"))}
    done = Result.of("job-1", result(web.url("/0.mp4"), **pictures)["output"])
    client = Client.endpoint("endpoint", KEY, NEAR)
    folder.mkdir()
    (folder / "a-sailing-boat-at-sunset-7.mp4").write_bytes(b"another")
    wanted = [folder / f"a-sailing-boat-at-sunset-7-2{end}" for end in (".mp4", ".sheet.jpg", ".poster.jpg")]
    assert client.download(done, folder) == wanted[:2]
    assert client.download(done, folder, posters=True) == wanted
    assert [path.read_bytes()[:6] for path in wanted] == [b"/0.mp4", b"/0.she", b"/0.pos"]


@pytest.mark.parametrize("format", ["../x", "mp4/../../x", "exe", None])
def test_an_unknown_format_is_an_error(format: Any) -> None:
    with pytest.raises(ValueError):
        Result.of("job-1", result("https://example.com/0", format=format)["output"])


def test_another_file_of_the_same_name_is_kept(fetch: Fetch, web: Web, folder: Path) -> None:
    folder.mkdir()
    (folder / "a-sailing-boat-at-sunset-7.mp4").write_bytes(b"mine")
    (folder / "a-sailing-boat-at-sunset-7-2.mp4").write_bytes(b"mine too")
    (path,) = fetch(web.gives("/0.mp4", BODY))
    assert path.name == "a-sailing-boat-at-sunset-7-3.mp4"
    assert (folder / "a-sailing-boat-at-sunset-7.mp4").read_bytes() == b"mine"


def test_the_same_file_is_not_written_twice(fetch: Fetch, web: Web, folder: Path) -> None:
    url = web.gives("/0.mp4", BODY)
    assert fetch(url) == fetch(url)
    assert len(names(folder)) == 1


def test_a_folder_without_hard_links_works(fetch: Fetch, web: Web, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(downloading.os, "link", no_links)
    folder.mkdir()
    (folder / "a-sailing-boat-at-sunset-7.mp4").write_bytes(b"mine")
    (path,) = fetch(web.gives("/0.mp4", BODY))
    assert path.read_bytes() == BODY
    assert names(folder) == ["a-sailing-boat-at-sunset-7-2.mp4", "a-sailing-boat-at-sunset-7.mp4"]


def test_a_download_resumes_where_the_connection_broke(fetch: Fetch, web: Web) -> None:
    (path,) = fetch(web.continues("/0.mp4", BODY, breaks=[1000, 3000], ETag='"v1"'))
    assert path.read_bytes() == BODY
    assert [headers.get("Range") for _, headers in web.requests] == [None, "bytes=1000-", "bytes=3000-"]


def test_a_file_of_unknown_length_that_is_cut_short_is_downloaded_again(fetch: Fetch, web: Web) -> None:
    web.in_pieces("/0.mp4", [BODY[:3000]])
    assert fetch(web.in_pieces("/0.mp4", [BODY[:5000], BODY[5000:], b""]))[0].read_bytes() == BODY


def test_a_server_without_ranges_sends_the_whole_file_again(fetch: Fetch, web: Web) -> None:
    web.breaks_off("/0.mp4", BODY[:500], declared=len(BODY), ETag='"v1"')
    (path,) = fetch(web.gives("/0.mp4", BODY))
    assert path.read_bytes() == BODY


def test_a_part_that_was_not_requested_is_written_to_its_own_place(fetch: Fetch, web: Web) -> None:
    web.breaks_off("/0.mp4", BODY[:500], declared=len(BODY), ETag='"v1"')
    web.gives("/0.mp4", BODY, status=206, Content_Range=f"bytes 0-{len(BODY) - 1}/{len(BODY)}")
    assert fetch(web.url("/0.mp4"))[0].read_bytes() == BODY


def test_parts_of_two_versions_are_not_joined(fetch: Fetch, web: Web) -> None:
    newer = BODY[::-1]

    def serve(handler: BaseHTTPRequestHandler) -> None:
        start = 500 if handler.headers.get("Range") and handler.headers.get("If-Range") in (None, '"v2"') else 0
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(newer) - start))
        handler.send_header("Content-Range", f"bytes {start}-{len(newer) - 1}/{len(newer)}")
        handler.end_headers()
        handler.wfile.write(newer[start:])

    web.breaks_off("/0.mp4", BODY[:500], declared=len(BODY), ETag='"v1"')
    assert fetch(web.runs("/0.mp4", serve))[0].read_bytes() == newer


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_busy_bucket_is_retried(fetch: Fetch, web: Web, status: int, said: list[str]) -> None:
    web.gives("/0.mp4", status=status)
    assert fetch(web.gives("/0.mp4", BODY))[0].read_bytes() == BODY
    assert len(said) == 1


def test_a_download_without_progress_fails(fetch: Fetch, web: Web, folder: Path) -> None:
    with pytest.raises(DownloadFailed, match="the connection broke"):
        fetch(web.breaks_off("/0.mp4", BODY[:500], declared=len(BODY)))
    assert names(folder) == []


@pytest.mark.parametrize("body", [BODY[:-1], BODY + b"x", b""], ids=["short", "long", "empty"])
def test_a_file_of_another_size_is_refused(fetch: Fetch, web: Web, folder: Path, body: bytes) -> None:
    with pytest.raises(DownloadFailed, match=f"instead of {len(BODY)}"):
        fetch(web.gives("/0.mp4", body))
    assert names(folder) == []
    assert web.hits("/0.mp4") == 1


def test_no_more_than_the_expected_size_is_read(fetch: Fetch, web: Web) -> None:
    endless = web.writes("/0.mp4", b"HTTP/1.0 200 OK\r\n\r\n", then=bytes(1 << 16))
    with pytest.raises(DownloadFailed):
        fetch(endless)
    assert web.left.wait(5)


def test_the_error_for_an_expired_url_says_when_and_what_to_do(fetch: Fetch, web: Web) -> None:
    url = web.gives("/0.mp4?X-Amz-Signature=s3cret", status=403)
    with pytest.raises(
        DownloadFailed, match=r"expired at 2020-01-01T00:00:00Z; the file is in the bucket as job-1/0\.mp4"
    ) as caught:
        fetch(url, expires_at="2020-01-01T00:00:00Z")
    assert caught.value.code == "URL_EXPIRED"
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("status", [403, 404, 400])
def test_a_refusal_is_reported_at_once(fetch: Fetch, web: Web, status: int, folder: Path) -> None:
    with pytest.raises(DownloadFailed, match=f"status {status}") as caught:
        fetch(web.gives("/0.mp4", status=status))
    assert caught.value.code == "DOWNLOAD_FAILED"
    assert web.hits("/0.mp4") == 1
    assert names(folder) == []


def test_the_error_for_a_store_that_stays_down_does_not_contain_its_url(fetch: Fetch, said: list[str]) -> None:
    with pytest.raises(DownloadFailed) as caught:
        fetch(f"http://127.0.0.1:{free_port()}/0.mp4?X-Amz-Signature=s3cret")
    assert "s3cret" not in str(caught.value) + "".join(said)


@pytest.mark.parametrize("url", ["", "ftp://example.com/0", "http://", "not a url"])
def test_an_invalid_url_is_reported_at_once(fetch: Fetch, url: str) -> None:
    with pytest.raises(DownloadFailed, match="URL is not valid"):
        fetch(url)


def test_the_file_of_a_local_worker_is_copied(folder: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "a folder" / "0.mp4"
    theirs.parent.mkdir()
    theirs.write_bytes(BODY)
    done = Result.of("job-1", result(theirs.as_uri(), expires_at=None)["output"])
    (path,) = Client.local().download(done, folder)
    assert path.read_bytes() == theirs.read_bytes() == BODY
    theirs.write_bytes(b"another file")
    with pytest.raises(DownloadFailed, match="another job replaced it"):
        Client.local().download(done, folder)


def test_a_file_on_another_computer_is_not_searched_here(fetch: Fetch, tmp_path: Path) -> None:
    (tmp_path / "0.mp4").write_bytes(BODY)
    with pytest.raises(DownloadFailed, match="give the worker a bucket"):
        fetch((tmp_path / "0.mp4").as_uri())


def test_a_folder_that_cannot_be_written_to_is_an_error(fetch: Fetch, web: Web, folder: Path) -> None:
    folder.write_text("a file")
    with pytest.raises(DownloadFailed, match="cannot be written to"):
        fetch(web.gives("/0.mp4", BODY))


def test_a_redirect_is_followed_without_the_key(fetch: Fetch, web: Web) -> None:
    web.gives("/there.mp4", BODY)

    def elsewhere(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", web.url("/there.mp4"))
        handler.end_headers()

    assert fetch(web.runs("/0.mp4", elsewhere))[0].read_bytes() == BODY
    assert all("Authorization" not in headers for _, headers in web.requests)


@pytest.mark.parametrize("url", [f"http://{host}/0.mp4" for host in ("127.0.0.1:1", "169.254.169.254", "[::1]", "10.0.0.1")])
def test_an_endpoint_in_the_public_network_names_no_address_in_this_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    client = Client.endpoint("endpoint", KEY, "https://api.example.com", patience=0)
    monkeypatch.setattr(client, "_addresses", lambda: {"93.184.215.14"})
    with pytest.raises(DownloadFailed, match="its URL leads into a private network, and the endpoint is not in it"):
        client.download(Result.of("job-1", result(url)["output"]), folder)


@pytest.mark.parametrize(
    ("address", "copies"), [("127.0.0.1", True), ("::1", True), ("192.168.1.5", False), ("8.8.8.8", False)]
)
def test_a_local_api_names_a_file_of_this_computer_only_when_it_runs_here(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, address: str, copies: bool
) -> None:
    (tmp_path / "0.mp4").write_bytes(BODY)
    client = Client.local("http://worker:8000", patience=0)
    monkeypatch.setattr(client, "_addresses", lambda: {address})
    job = Result.of("job-1", result((tmp_path / "0.mp4").as_uri())["output"])
    if copies:
        assert client.download(job, folder)[0].read_bytes() == BODY
    else:
        with pytest.raises(DownloadFailed, match="on the worker's own disk"):
            client.download(job, folder)
