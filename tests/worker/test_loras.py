import errno
import json
import os
import pickle
import struct
import threading
import zipfile
from contextlib import ExitStack

import numpy as np
import pytest
from safetensors.numpy import save

from worker.errors import Code, WorkerError
from worker.loras import authorization, download_url, fetch_lora, unsigned
from worker.net.download import DownloadError
from worker.settings import Settings

WEIGHTS = save({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": np.zeros((4, 1536), np.float16)}, {"name": "mine"})
OTHER_WEIGHTS = save({"other": np.ones((2, 2), np.float16)})


@pytest.fixture
def settings(tmp_path):
    (tmp_path / "loras" / "job").mkdir(parents=True)
    return Settings(
        model_id="wan21_1b",
        lora_dir=tmp_path / "loras",
        lora_cache_dir=tmp_path / "cache",
        max_lora_bytes=1_000_000,
        allow_private_downloads=True,
    )


@pytest.fixture
def fetch(settings, stop):
    with ExitStack() as held:

        def fetch(path, hf_token=None):
            return fetch_lora(path, "loras[0].path", hf_token, settings, stop, held)

        yield fetch


def failure(fetch, path, code) -> str:
    with pytest.raises(WorkerError) as caught:
        fetch(path)
    [problem] = caught.value.problems
    assert (problem.code, problem.field) == (code, "loras[0].path")
    return problem.text


# Files


def test_a_relative_path_is_a_file_below_lora_dir(fetch, settings):
    file = settings.lora_dir / "job" / "a.safetensors"
    file.write_bytes(WEIGHTS)
    lora = fetch("job/a.safetensors")
    assert lora.path == file.resolve()
    assert lora.metadata == {"name": "mine"}
    assert list(lora.shapes.values()) == [(4, 1536)]


@pytest.mark.parametrize("path", ["job/none.safetensors", "none/a.safetensors", "job", "job/", "."])
def test_what_is_no_file_is_not_found(fetch, path):
    assert "LoRA folder has no `" in failure(fetch, path, Code.LORA_NOT_FOUND)


def test_without_a_lora_folder_nothing_is_found(fetch, settings):
    (settings.lora_dir / "job").rmdir()
    settings.lora_dir.rmdir()
    failure(fetch, "a.safetensors", Code.LORA_NOT_FOUND)


def test_a_name_that_no_file_system_takes_is_not_found(fetch):
    failure(fetch, "a" * 300, Code.LORA_NOT_FOUND)


@pytest.mark.parametrize(
    "path", ["../outside.safetensors", "job/../../outside.safetensors", "link.safetensors", "folder/outside.safetensors"]
)
def test_a_path_cannot_leave_lora_dir_by_dots_or_links(fetch, settings, path):
    outside = settings.lora_dir.parent / "outside.safetensors"
    outside.write_bytes(WEIGHTS)
    (settings.lora_dir / "link.safetensors").symlink_to(outside)
    (settings.lora_dir / "folder").symlink_to(settings.lora_dir.parent)
    assert "LoRA folder has no `" in failure(fetch, path, Code.LORA_NOT_FOUND)


def test_an_absolute_path_outside_is_not_found(fetch, settings):
    outside = settings.lora_dir.parent / "outside.safetensors"
    outside.write_bytes(WEIGHTS)
    failure(fetch, str(outside), Code.LORA_NOT_FOUND)


def test_a_link_within_lora_dir_is_followed(fetch, settings):
    (settings.lora_dir / "a.safetensors").write_bytes(WEIGHTS)
    (settings.lora_dir / "latest").symlink_to("a.safetensors")
    assert fetch("latest").metadata == {"name": "mine"}


def test_lora_dir_itself_can_be_a_link(settings, stop, tmp_path):
    (settings.lora_dir / "a.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "link").symlink_to(settings.lora_dir)
    linked = settings.model_copy(update={"lora_dir": tmp_path / "link"})
    assert fetch_lora("a.safetensors", "loras[0].path", None, linked, stop, ExitStack()).metadata == {"name": "mine"}


def test_the_error_does_not_tell_where_the_lora_folder_is(fetch, settings):
    assert str(settings.lora_dir) not in failure(fetch, "none.safetensors", Code.LORA_NOT_FOUND)


# What is in the file

HEADER = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
OVERLONG = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 99]}}).encode()


def zipped(folder) -> bytes:
    with zipfile.ZipFile(folder / "weights.zip", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    return (folder / "weights.zip").read_bytes()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(b"<!DOCTYPE html><html>Sign in</html>", "web page", id="html"),
        pytest.param(b"\n\n  <html>", "web page", id="html after empty lines"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer", id="lfs"),
        pytest.param(pickle.dumps({"a": 1}), "pickle", id="pickle"),
        pytest.param(zipped, "pickle", id="zipped pickle"),
        pytest.param(struct.pack("<Q", len(HEADER)) + HEADER + b"\0" * 15, "cut short", id="a byte short"),
        pytest.param(WEIGHTS[:-1000], "cut short", id="half a file"),
        pytest.param(WEIGHTS[:60], "cut short", id="half a header"),
        pytest.param(b"", "empty", id="empty"),
        pytest.param(b"\0", "not in safetensors format", id="one byte"),
        pytest.param(b"Repository not found", "not in safetensors format", id="text"),
        pytest.param(struct.pack("<Q", 2**60) + b"{}", "not in safetensors format", id="absurd header size"),
        pytest.param(struct.pack("<Q", 5) + b"{no}}" + b"\0" * 16, "not in safetensors format", id="no json"),
        pytest.param(struct.pack("<Q", len(OVERLONG)) + OVERLONG + b"\0" * 99, "not in safetensors format", id="bad offsets"),
        pytest.param(save({}), "holds no tensor", id="no tensor"),
    ],
)
def test_a_file_that_is_no_lora_says_what_it_is(fetch, settings, tmp_path, data, says):
    (settings.lora_dir / "a.safetensors").write_bytes(data(tmp_path) if callable(data) else data)
    text = failure(fetch, "a.safetensors", Code.LORA_INVALID)
    assert says in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.bin", "a"])
def test_a_name_of_another_format_is_refused_unread(fetch, settings, name):
    (settings.lora_dir / name).write_bytes(WEIGHTS)
    assert "does not end in .safetensors" in failure(fetch, name, Code.LORA_INVALID)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        pytest.param(b"<!doctype html><title>Log in</title>", "web page", id="html"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer", id="lfs"),
        pytest.param(b"PK\x03\x04\0\0\x08\x08\0\0\0\0\0\0\0\0", "pickle", id="zipped pickle"),
        pytest.param(b'{"error": "not found"}' + b" " * 64, "not in safetensors format", id="json"),
    ],
)
def test_a_download_ends_at_the_first_bytes_that_no_lora_has(fetch, web, head, says):
    enough = threading.Event()

    def pieces():
        yield head
        enough.wait(30)

    url = web.in_pieces("/a.safetensors", pieces())
    assert says in failure(fetch, url, Code.LORA_INVALID)
    assert web.hits("/a.safetensors") == 1
    enough.set()


def test_an_empty_download_is_no_lora(fetch, web):
    assert "empty" in failure(fetch, web.gives("/a", b""), Code.LORA_INVALID)


# URLs


def test_a_url_is_downloaded_into_the_cache(fetch, web, settings):
    lora = fetch(web.gives("/a.safetensors", WEIGHTS))
    assert lora.metadata == {"name": "mine"}
    assert lora.path.is_relative_to(settings.lora_cache_dir)


def test_an_unchanged_file_is_not_downloaded_twice(fetch, web):
    url = web.versions("/a", WEIGHTS, '"v1"')
    first = fetch(url)
    assert fetch(url) == first
    assert web.headers("/a")["If-None-Match"] == '"v1"'


def test_a_changed_file_is_downloaded_again(fetch, web):
    url = web.versions("/a", WEIGHTS, '"v1"')
    assert fetch(url).metadata == {"name": "mine"}
    web.versions("/a", OTHER_WEIGHTS, '"v2"')
    assert set(fetch(url).shapes) == {"other"}
    fetch(url)
    assert web.headers("/a")["If-None-Match"] == '"v2"'


def test_a_file_that_was_removed_from_the_cache_is_downloaded_again(fetch, web):
    url = web.versions("/a", WEIGHTS, '"v1"')
    fetch(url).path.unlink()
    assert fetch(url).metadata == {"name": "mine"}


def test_two_urls_are_two_files(fetch, web):
    first = fetch(web.gives("/a.safetensors?version=1", WEIGHTS))
    second = fetch(web.gives("/a.safetensors?version=2", OTHER_WEIGHTS))
    assert first.path != second.path
    assert set(second.shapes) == {"other"}


SIGNED = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=K3y&X-Amz-Date={}&X-Amz-Signature=S3cr3t{}"


def test_a_url_that_is_signed_anew_names_the_same_file(fetch, web):
    first = fetch(web.versions(f"/a?{SIGNED.format(1, 1)}", WEIGHTS, '"v1"'))
    again = f"/a?{SIGNED.format(2, 2)}"
    assert fetch(web.versions(again, WEIGHTS, '"v1"')) == first
    assert web.headers(again)["If-None-Match"] == '"v1"'


@pytest.mark.parametrize("headers", [{}, {"ETag": '"v1"'}])
def test_a_wrong_signature_gets_nothing_from_the_cache(fetch, web, headers):
    fetch(web.gives(f"/a?{SIGNED.format(1, 1)}", WEIGHTS, **headers))
    assert "403" in failure(fetch, web.gives(f"/a?{SIGNED.format(1, 'x')}", status=403), Code.LORA_DOWNLOAD_FAILED)


def test_nothing_of_a_url_is_written_down(fetch, web, settings):
    fetch(web.versions(f"/folder/name.safetensors?{SIGNED.format(1, 1)}", WEIGHTS, '"v1"'))
    for path in settings.lora_cache_dir.rglob("*"):
        text = str(path.relative_to(settings.lora_cache_dir)) + (path.read_bytes().decode("latin-1") if path.is_file() else "")
        assert not any(part in text for part in ("S3cr3t", "K3y", "X-Amz", "127.0.0.1", "name.safetensors", "http"))


@pytest.mark.parametrize(
    ("query", "kept"),
    [
        ("X-Amz-Date=1&versionId=7&X-Amz-Expires=9&X-Amz-Signature=ab", "?versionId=7"),
        ("X-Goog-Date=1&X-Goog-Signature=ab&generation=7", "?generation=7"),
        ("AWSAccessKeyId=K&Signature=a%2B&Expires=1", ""),
        ("Expires=1&Signature=a&Key-Pair-Id=K&v=2", "?v=2"),
        ("sv=2024&se=2026&sr=b&sp=r&sig=a", ""),
        ("token=a&expires=1", "?token=a&expires=1"),
        ("se=1", "?se=1"),
        ("design=a", "?design=a"),
        ("", ""),
    ],
)
def test_what_a_signature_brings_along_names_no_file(query, kept):
    assert unsigned(f"https://example.com/a?{query}#part") == f"https://example.com/a{kept}"


def test_a_server_that_is_down_leaves_us_the_copy(fetch, web):
    url = web.versions("/a", WEIGHTS, '"v1"')
    first = fetch(url)
    web.gives("/a", status=503)
    assert fetch(url) == first


def test_a_new_version_that_breaks_off_is_not_replaced_by_the_old(fetch, web):
    url = web.versions("/a", WEIGHTS, '"v1"')
    fetch(url)
    web.breaks_off("/a", OTHER_WEIGHTS[:-8], len(OTHER_WEIGHTS))
    assert "broke off" in failure(fetch, url, Code.LORA_DOWNLOAD_FAILED)


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "more room, or lower LORA_CACHE_MAX_BYTES"), (errno.EROFS, "can write there")]
)
def test_a_cache_that_cannot_be_written_to_is_told_with_a_remedy(fetch, web, monkeypatch, number, remedy):
    def fails(*arguments, **options):
        raise OSError(number, os.strerror(number), "/secret/folder")

    monkeypatch.setattr("worker.loras.fetch_into", fails)
    text = failure(fetch, web.url("/a"), Code.LORA_DOWNLOAD_FAILED)
    assert remedy in text
    assert os.strerror(number) in text and "/secret" not in text


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_download_that_fails_says_why_and_not_from_where(fetch, web, status):
    text = failure(fetch, web.gives("/a?sig=S3cr3t", status=status), Code.LORA_DOWNLOAD_FAILED)
    assert str(status) in text
    assert "S3cr3t" not in text and "127.0.0.1" not in text


@pytest.mark.parametrize(("status", "hints"), [(401, True), (403, True), (404, True), (410, False)])
def test_a_refusal_of_the_hub_hints_at_the_token(fetch, monkeypatch, status, hints):
    def refused(*arguments, **options):
        raise DownloadError(f"the server answered {status}", status)

    monkeypatch.setattr("worker.loras.fetch_into", refused)
    text = failure(fetch, "https://huggingface.co/me/lora/resolve/main/a.safetensors", Code.LORA_DOWNLOAD_FAILED)
    assert ("give hf_token" in text) == hints


def test_a_file_over_the_limit_is_not_downloaded(fetch, web):
    assert "larger than" in failure(fetch, web.gives("/a", b"x" * 1_000_001), Code.LORA_DOWNLOAD_FAILED)


def test_a_file_cut_short_on_the_way_is_healed_by_the_next_job(fetch, web):
    web.gives("/a", WEIGHTS[:-8], declared=False, ETag='"v1"')  # HTTP/1.0: the end of the connection is the end
    failure(fetch, web.url("/a"), Code.LORA_INVALID)
    web.versions("/a", WEIGHTS, '"v1"')
    assert fetch(web.url("/a")).metadata == {"name": "mine"}


@pytest.mark.parametrize(
    ("url", "fetched"),
    [
        ("https://huggingface.co/me/lora/blob/main/a.safetensors", "https://huggingface.co/me/lora/resolve/main/a.safetensors"),
        (
            "https://hf.co/me/lora/blob/main/blob/a.safetensors",
            "https://huggingface.co/me/lora/resolve/main/blob/a.safetensors",
        ),
        ("https://HuggingFace.co/me/lora/blob/v1/a?download=true", "https://HuggingFace.co/me/lora/resolve/v1/a?download=true"),
        ("https://huggingface.co/me/lora/resolve/main/a", "https://huggingface.co/me/lora/resolve/main/a"),
        ("https://example.com/blob/main/a", "https://example.com/blob/main/a"),
        ("https://nothuggingface.co/me/blob/main/a", "https://nothuggingface.co/me/blob/main/a"),
    ],
)
def test_a_blob_url_of_the_hub_is_taken_as_resolve(url, fetched):
    assert download_url(url) == fetched


@pytest.mark.parametrize("host", ["huggingface.co", "HuggingFace.co", "hf.co", "cdn-lfs.huggingface.co", "huggingface.co:443"])
def test_the_token_goes_to_the_hub(host):
    assert authorization(f"https://{host}/a", "hf_x") == {"Authorization": "Bearer hf_x"}


@pytest.mark.parametrize(
    "url",
    [
        "http://huggingface.co/a",
        "https://example.com/a",
        "https://huggingface.co.example.com/a",
        "https://evilhuggingface.co/a",
        "https://huggingface.co@example.com/a",
        "https://example.com/huggingface.co",
        "https://example.com#@huggingface.co/",
    ],
)
def test_the_token_goes_nowhere_else(url):
    assert authorization(url, "hf_x") == {}


@pytest.mark.parametrize("token", [None, ""])
def test_without_a_token_nothing_is_sent(token):
    assert authorization("https://huggingface.co/a", token) == {}


def test_a_download_from_elsewhere_comes_without_the_token(fetch, web):
    fetch(web.gives("/a", WEIGHTS), hf_token="hf_x")
    assert "Authorization" not in web.headers("/a")


def test_links_in_a_circle_are_no_lora(fetch, settings):
    (settings.lora_dir / "loop.safetensors").symlink_to("loop.safetensors")
    failure(fetch, "loop.safetensors", Code.LORA_NOT_FOUND)


def test_a_name_that_is_nearly_right_is_answered_with_the_right_one(fetch, settings):
    (settings.lora_dir / "my_job").mkdir(parents=True, exist_ok=True)
    (settings.lora_dir / "my_job/my_lora_high_noise.safetensors").write_bytes(b"")
    text = failure(fetch, "my_job/my_lora_high.safetensors", Code.LORA_NOT_FOUND)
    assert "has no `my_job/my_lora_high.safetensors` (did you mean `my_job/my_lora_high_noise.safetensors`?)" in text
    assert "did you mean" not in failure(fetch, "other/zzz.safetensors", Code.LORA_NOT_FOUND)
