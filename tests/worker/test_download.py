import gzip
import threading

import pytest

from worker.download import DownloadError, Stopped, fetch_bytes, fetch_file

LIMIT = 1_000_000


@pytest.fixture
def target(tmp_path):
    return tmp_path / "folder" / "file.bin"


def failure(url, stop, limit=LIMIT) -> str:
    with pytest.raises(DownloadError) as caught:
        fetch_bytes(url, limit, stop)
    return str(caught.value)


def left_in(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_the_body_is_fetched(web, stop):
    assert fetch_bytes(web.gives("/a", b"hello"), LIMIT, stop) == b"hello"


def test_a_body_of_many_chunks_is_fetched_whole(web, stop):
    body = bytes(range(256)) * 12_000
    assert fetch_bytes(web.gives("/a", body), len(body), stop) == body


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_server_that_fails_once_is_asked_again(web, stop, status):
    web.gives("/a", b"sorry", status=status)
    assert fetch_bytes(web.gives("/a", b"fine"), LIMIT, stop) == b"fine"
    assert web.hits("/a") == 2


def test_a_server_that_keeps_failing_is_asked_three_times(web, stop):
    assert failure(web.gives("/a", status=503), stop) == "the server answered 503, 3 times"
    assert web.hits("/a") == 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_a_refusal_is_final(web, stop, status):
    assert failure(web.gives("/a", status=status), stop) == f"the server answered {status}"
    assert web.hits("/a") == 1


def test_a_connection_that_breaks_off_is_tried_again_from_the_start(web, stop):
    web.breaks_off("/a", b"x" * (2 << 20), declared=3 << 20)
    assert fetch_bytes(web.gives("/a", b"0123456789"), 3 << 20, stop) == b"0123456789"


def test_a_body_in_pieces_is_fetched_whole(web, stop):
    assert fetch_bytes(web.in_pieces("/a", [b"ab", b"cde", b"f", b""]), LIMIT, stop) == b"abcdef"


def test_pieces_that_break_off_are_tried_again_from_the_start(web, stop):
    web.in_pieces("/a", [b"ab", b"cde"])
    assert fetch_bytes(web.in_pieces("/a", [b"ab", b"cde", b"f", b""]), LIMIT, stop) == b"abcdef"


def test_a_compressed_body_is_fetched_whole_however_small_its_pieces(web, stop):
    packed = gzip.compress(b"hello, hello, hello")
    pieces = [packed[start : start + 3] for start in range(0, len(packed), 3)]
    assert fetch_bytes(web.in_pieces("/a", [*pieces, b""], Content_Encoding="gzip"), LIMIT, stop) == b"hello, hello, hello"


def test_a_compressed_body_counts_with_its_real_size(web, stop):
    packed = gzip.compress(b"x" * 1000)
    assert "larger than" in failure(web.gives("/a", packed, Content_Encoding="gzip"), stop, limit=999)


def test_a_compressed_body_that_breaks_off_is_tried_again(web, stop):
    packed = gzip.compress(bytes(range(256)) * 10)
    web.gives("/a", packed[:-30], declared=False, Content_Encoding="gzip", Content_Length=str(len(packed)))
    assert fetch_bytes(web.gives("/a", packed, Content_Encoding="gzip"), LIMIT, stop) == bytes(range(256)) * 10


def test_a_connection_that_always_breaks_off_fails(web, stop):
    assert failure(web.breaks_off("/a", b"0123", declared=10), stop).endswith(", 3 times")


def test_a_server_that_is_not_there_fails(web, stop):
    assert failure("http://127.0.0.1:1/a", stop) == "the connection failed, 3 times"


def test_a_declared_size_over_the_limit_is_refused_before_the_body(web, stop):
    assert "larger than the 1 MB" in failure(web.breaks_off("/a", b"x", declared=LIMIT + 1), stop)
    assert web.hits("/a") == 1


def test_a_body_that_grows_over_the_limit_is_refused(web, stop):
    assert "larger than" in failure(web.gives("/a", b"x" * 101, declared=False), stop, limit=100)
    assert web.hits("/a") == 1


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_of_exactly_the_limit_is_fetched(web, stop, declared):
    assert len(fetch_bytes(web.gives("/a", b"x" * 100, declared=declared), 100, stop)) == 100


def test_redirects_are_followed(web, stop):
    url = web.gives("/a", status=302, Location="/b")
    web.gives("/b", b"here")
    assert fetch_bytes(url, LIMIT, stop) == b"here"


def test_endless_redirects_are_given_up(web, stop):
    assert failure(web.gives("/a", status=302, Location="/a"), stop) == "more than 5 redirects"
    assert web.hits("/a") == 6


@pytest.mark.parametrize("url", ["http://", "http://[", "ftp://example.com/a", "http://127.0.0.1:99999/", "http://\udce4/"])
def test_what_is_no_http_url_fails_in_words(url, stop):
    assert failure(url, stop) == "it is no URL that can be fetched"


def test_a_redirect_to_a_local_file_is_not_followed(web, stop):
    assert "no URL" in failure(web.gives("/a", status=302, Location="file:///etc/passwd"), stop)


@pytest.mark.parametrize("path", ["/gone?sig=S3cr3t", "/loop?sig=S3cr3t", "/short?sig=S3cr3t", "/large?sig=S3cr3t"])
def test_the_reason_never_repeats_the_url(web, stop, path):
    web.gives("/loop?sig=S3cr3t", status=302, Location="/loop?sig=S3cr3t")
    web.breaks_off("/short?sig=S3cr3t", b"", declared=5)
    web.gives("/large?sig=S3cr3t", b"x" * 200)
    text = failure(web.url(path), stop, limit=100)
    assert "S3cr3t" not in text and "127.0.0.1" not in text


def test_a_stopped_job_downloads_nothing(web, stop):
    stop.set()
    with pytest.raises(Stopped):
        fetch_bytes(web.gives("/a", b"hello"), LIMIT, stop)


def test_a_stop_between_two_chunks_ends_the_download_and_leaves_no_file(web, target):
    stop = threading.Event()
    chunk = b"x" * (1 << 20)

    def serve(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(chunk)
        stop.set()
        for _ in range(100):
            handler.wfile.write(chunk)

    with pytest.raises(Stopped):
        fetch_file(web.runs("/a", serve), target, 200 * len(chunk), stop, {})
    assert left_in(target.parent) == []


@pytest.fixture
def trickle(web):
    """The URL of a server that sends a byte now and then, and an event that is set when it has begun."""
    begun, over = threading.Event(), threading.Event()

    def serve(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        while not over.wait(0.02):
            handler.wfile.write(b"x")
            begun.set()

    yield web.runs("/slow", serve), begun
    over.set()


def test_a_stop_ends_a_download_that_trickles(trickle):
    url, begun = trickle
    stop, ended = threading.Event(), threading.Event()

    def download():
        try:
            fetch_bytes(url, 2_000_000, stop)
        except (Stopped, DownloadError):
            ended.set()

    threading.Thread(target=download, daemon=True).start()
    assert begun.wait(10)
    stop.set()
    assert ended.wait(3)


def test_a_stop_between_two_tries_ends_the_download(web):
    stop = threading.Event()

    def serve(handler):
        stop.set()
        handler.send_error(500)

    with pytest.raises(Stopped):
        fetch_bytes(web.runs("/a", serve), LIMIT, stop)
    assert web.hits("/a") == 1


# Files


def test_a_file_is_written_and_its_etag_returned(web, target, stop):
    assert fetch_file(web.gives("/a", b"new", ETag='"v1"'), target, LIMIT, stop, {}) == '"v1"'
    assert target.read_bytes() == b"new"
    assert left_in(target.parent) == [target.name]


def test_a_server_without_etags_gives_none(web, target, stop):
    assert fetch_file(web.gives("/a", b"new"), target, LIMIT, stop, {}) is None


@pytest.mark.parametrize("failing", ["/missing", "/short", "/large"])
def test_a_failed_download_leaves_the_older_file_and_nothing_else(web, target, stop, failing):
    web.breaks_off("/short", b"0123", declared=10)
    web.gives("/large", b"x" * 200)
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(DownloadError):
        fetch_file(web.url(failing), target, 100, stop, {})
    assert target.read_bytes() == b"old"
    assert left_in(target.parent) == [target.name]


def test_a_file_that_has_not_changed_is_kept(web, target, stop):
    url = web.versions("/a", b"body", '"v1"')
    fetch_file(url, target, LIMIT, stop, {})
    before = target.stat()
    assert fetch_file(url, target, LIMIT, stop, {"If-None-Match": '"v1"'}) == '"v1"'
    assert target.read_bytes() == b"body"
    assert target.stat().st_ino == before.st_ino


def test_a_file_that_has_changed_is_fetched_again(web, target, stop):
    fetch_file(web.versions("/a", b"old", '"v1"'), target, LIMIT, stop, {})
    web.versions("/b", b"new", '"v2"')
    assert fetch_file(web.url("/b"), target, LIMIT, stop, {"If-None-Match": '"v1"'}) == '"v2"'
    assert target.read_bytes() == b"new"


def test_headers_are_sent(web, target, stop):
    fetch_file(web.gives("/a", b"x"), target, LIMIT, stop, {"Authorization": "Bearer t"})
    assert web.headers("/a")["Authorization"] == "Bearer t"


def test_a_written_file_can_be_read_by_everyone(web, target, stop):
    fetch_file(web.gives("/a", b"x"), target, LIMIT, stop, {})
    assert target.stat().st_mode & 0o777 == 0o644
