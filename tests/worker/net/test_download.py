"""Downloads from a server on this machine, so all with `private=True`; test_addresses.py has those without."""

import gzip
import io
import socket
import threading
import time
import tracemalloc
import zlib

import pytest

from tests.worker import web_server
from worker.errors import Stopped
from worker.net import download
from worker.net import web as worker_web
from worker.net.download import DownloadError, ServerDown, fetch_bytes, fetch_into

LIMIT = 1_000_000
BODY = bytes(range(256)) * 40
DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


def fetch(url, stop, limit=LIMIT) -> bytes:
    return fetch_bytes(url, limit, stop, private=True)


def failure(url, stop, limit=LIMIT) -> str:
    with pytest.raises(DownloadError) as caught:
        fetch(url, stop, limit)
    return str(caught.value)


@pytest.fixture(autouse=True)
def quick():
    """No test waits for long, whatever the server does."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 6


def test_the_body_is_fetched(web, stop):
    assert fetch(web.gives("/a", b"hello"), stop) == b"hello"


def test_a_body_of_many_chunks_is_fetched_whole(web, stop):
    body = bytes(range(256)) * 12_000
    assert fetch(web.gives("/a", body), stop, len(body)) == body


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_server_that_fails_once_is_asked_again(web, stop, status):
    web.gives("/a", b"sorry", status=status)
    assert fetch(web.gives("/a", b"fine"), stop) == b"fine"
    assert web.hits("/a") == 2


def test_a_server_that_keeps_failing_is_asked_three_times(web, stop):
    assert failure(web.gives("/a", status=503), stop) == "the server answered 503, 3 times"
    assert web.hits("/a") == 3


@pytest.mark.parametrize("status", [204, 206, 300, 304, 400, 401, 403, 404, 410, 416])
def test_any_other_answer_is_final(web, stop, status):
    assert failure(web.gives("/a", status=status), stop) == f"the server answered {status}"
    assert web.hits("/a") == 1


def test_the_status_of_a_refusal_is_told(web, stop):
    with pytest.raises(DownloadError) as caught:
        fetch(web.gives("/a", status=403), stop)
    assert caught.value.status == 403


def test_a_body_in_pieces_is_fetched_whole(web, stop):
    assert fetch(web.in_pieces("/a", [b"ab", b"cde", b"f", b""]), stop) == b"abcdef"


def test_a_body_without_a_length_is_fetched_whole(web, stop):
    assert fetch(web.gives("/a", BODY, declared=False), stop) == BODY


def test_an_address_that_is_not_public_is_refused_unless_private_ones_are_allowed(web, stop):
    with pytest.raises(DownloadError, match=r"the address is not public; .*ALLOW_PRIVATE_DOWNLOADS=1"):
        fetch_bytes(web.gives("/a", b"hello"), LIMIT, stop)
    assert web.hits("/a") == 0


def test_the_body_is_asked_for_as_it_is(web, stop):
    fetch(web.gives("/a", b"hello"), stop)
    assert web.headers("/a")["Accept-Encoding"] == "identity"


# Compressed all the same


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZip", "deflate", "identity", "Identity", ""])
def test_a_compressed_body_is_unpacked(web, stop, encoding):
    packed = {"g": gzip.compress, "x": gzip.compress, "d": zlib.compress}.get(encoding[:1].lower(), bytes)(BODY)
    assert fetch(web.gives("/a", packed, Content_Encoding=encoding), stop) == BODY


def test_a_compressed_body_is_fetched_whole_however_small_its_pieces(web, stop):
    packed = gzip.compress(b"hello, hello, hello")
    pieces = [packed[start : start + 3] for start in range(0, len(packed), 3)]
    assert fetch(web.in_pieces("/a", [*pieces, b""], Content_Encoding="gzip"), stop) == b"hello, hello, hello"


def test_a_compressed_body_counts_with_its_real_size(web, stop):
    packed = gzip.compress(b"x" * 1000)
    assert "larger than" in failure(web.gives("/a", packed, Content_Encoding="gzip"), stop, limit=999)
    assert fetch(web.gives("/a", packed, Content_Encoding="gzip"), stop, limit=1000) == b"x" * 1000


def test_a_compressed_body_that_breaks_off_is_fetched_from_the_start(web, stop):
    packed = gzip.compress(BODY)
    web.gives("/a", packed[:-30], declared=False, Content_Encoding="gzip", Content_Length=str(len(packed)), ETag='"v"')
    assert fetch(web.gives("/a", packed, Content_Encoding="gzip"), stop) == BODY
    assert "Range" not in web.headers("/a")


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, gzip", "gzip,gzip,gzip", "unknown"])
def test_a_body_packed_in_another_way_is_refused(web, stop, encoding):
    assert "plain file" in failure(web.gives("/a", b"x", Content_Encoding=encoding), stop)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_what_is_not_compressed_as_it_says_is_refused(web, stop, encoding):
    assert failure(web.gives("/a", b"hello, this is no such thing", Content_Encoding=encoding), stop).endswith("decompressed")


# Connections that break off


def test_a_connection_that_breaks_off_is_tried_again_from_the_start(web, stop):
    web.breaks_off("/a", b"x" * (2 << 20), declared=3 << 20)
    assert fetch(web.gives("/a", b"0123456789"), stop, 3 << 20) == b"0123456789"


def test_pieces_that_break_off_are_tried_again_from_the_start(web, stop):
    web.in_pieces("/a", [b"ab", b"cde"])
    assert fetch(web.in_pieces("/a", [b"ab", b"cde", b"f", b""]), stop) == b"abcdef"


def test_a_connection_that_always_breaks_off_fails(web, stop):
    assert failure(web.breaks_off("/a", b"0123", declared=10), stop) == "the connection broke off before the end, 3 times"


def test_a_server_that_is_not_there_fails(stop):
    assert failure("http://127.0.0.1:1/a", stop) == "the connection failed, 3 times"


def test_a_server_that_is_down_is_told_from_one_that_cannot_send_the_file_and_from_one_that_refuses(web, stop):
    def kind(url: str) -> type:
        with pytest.raises(DownloadError) as caught:
            fetch(url, stop)
        return caught.type

    assert kind("http://127.0.0.1:1/a") is kind(web.gives("/down", status=503)) is ServerDown
    assert kind(web.breaks_off("/breaks", b"0123", declared=10)) is kind(web.gives("/gone", status=404)) is DownloadError


@pytest.mark.parametrize("validators", [{"ETag": '"v1"'}, {"Last_Modified": DATE}, {"ETag": '"v1"', "Last_Modified": DATE}])
def test_a_connection_that_breaks_off_is_continued_there(web, stop, validators):
    assert fetch(web.continues("/a", BODY, [3000, 7000], **validators), stop) == BODY
    asked = [(headers.get("Range"), headers.get("If-Range")) for _, headers in web.requests]
    version = validators.get("ETag", DATE)
    assert asked == [(None, None), ("bytes=3000-", version), ("bytes=7000-", version)]


def test_a_redirect_is_followed_anew_to_continue(web, stop):
    web.gives("/a", status=302, Location="/b?signed=1")
    web.gives("/a", status=302, Location="/b?signed=2")
    web.continues("/b?signed=1", BODY, [5000], ETag='"v"')
    web.continues("/b?signed=2", BODY, ETag='"v"')
    assert fetch(web.url("/a"), stop) == BODY
    assert web.headers("/b?signed=2")["Range"] == "bytes=5000-"


@pytest.mark.parametrize(
    "validators",
    [{}, {"ETag": 'W/"v1"'}, {"ETag": "v1"}, {"ETag": 'W/"v1"', "Last_Modified": DATE}, {"Last_Modified": None}],
    ids=["none", "weak", "unquoted", "weak with date", "modified this very second"],
)
def test_what_may_be_another_version_is_fetched_from_the_start(web, stop, validators):
    def breaks(handler):
        handler.send_response_only(200)
        now = handler.date_time_string()
        for name, value in validators.items():
            handler.send_header(name.replace("_", "-"), value or now)
        handler.send_header("Date", now)
        handler.send_header("Content-Length", str(len(BODY)))
        handler.end_headers()
        handler.wfile.write(BODY[:3000])

    web.runs("/a", breaks)
    assert fetch(web.gives("/a", BODY), stop) == BODY
    assert "Range" not in web.headers("/a")


def test_a_file_that_changes_while_it_is_fetched_is_fetched_from_the_start(web, stop):
    web.continues("/a", BODY, [3000], ETag='"v1"')
    web.continues("/a", b"new" * 3000, ETag='"v2"')
    assert fetch(web.url("/a"), stop) == b"new" * 3000
    assert web.headers("/a")["Range"] == "bytes=3000-"


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (206, {"Content_Range": f"bytes 2999-{len(BODY) - 1}/{len(BODY)}"}),
        (206, {"Content_Range": f"bytes 3001-{len(BODY) - 1}/{len(BODY)}"}),
        (206, {"Content_Range": f"bytes 0-{len(BODY) - 1}/{len(BODY)}"}),
        (206, {"Content_Range": f"bytes 3000-{len(BODY)}/{len(BODY) + 1}"}),
        (206, {"Content_Range": f"bytes 3000-{len(BODY) - 1}/*"}),
        (206, {"Content_Range": f"3000-{len(BODY) - 1}/{len(BODY)}"}),
        (206, {"Content_Range": "bytes ٣000-9/9"}),
        (206, {"Content_Range": f"bytes 3000-{len(BODY) - 1}/{'9' * 5000}"}),
        (206, {"Content_Range": f"bytes 3000-{len(BODY) - 1}/{len(BODY)}", "ETag": '"v2"'}),
        (206, {"Content_Range": f"bytes 3000-{len(BODY) - 1}/{len(BODY)}", "Content_Encoding": "gzip"}),
        (206, {"Content_Type": "multipart/byteranges; boundary=x"}),
        (416, {"Content_Range": f"bytes */{len(BODY)}"}),
        (416, {"Content_Range": f"bytes 3000-{len(BODY) - 1}/{len(BODY)}"}),
    ],
)
def test_a_server_that_does_not_go_on_there_is_asked_for_all_of_it(web, stop, status, headers):
    headers = {name: value.encode().decode("latin-1") for name, value in headers.items()}
    web.continues("/a", BODY, [3000], ETag='"v1"')
    web.gives("/a", b"?" * (len(BODY) - 3000), status=status, **headers)
    web.continues("/a", BODY, ETag='"v1"')
    assert fetch(web.url("/a"), stop) == BODY
    assert "Range" not in web.headers("/a") and web.hits("/a") == 3


def test_a_server_that_gives_less_of_the_rest_than_asked_for_is_asked_again(web, stop):
    web.continues("/a", BODY, [3000], ETag='"v1"')
    web.gives("/a", BODY[3000:5000], status=206, Content_Range=f"bytes 3000-4999/{len(BODY)}", ETag='"v1"')
    web.continues("/a", BODY, ETag='"v1"')
    assert fetch(web.url("/a"), stop) == BODY
    assert web.headers("/a")["Range"] == "bytes=5000-"


def test_a_server_that_gives_more_than_the_rest_is_asked_for_all_of_it(web, stop):
    web.continues("/a", BODY, [3000], ETag='"v1"')
    web.gives("/a", BODY[3000:] + b"?", status=206, Content_Range=f"bytes 3000-{len(BODY) - 1}/{len(BODY)}")
    web.continues("/a", BODY, ETag='"v1"')
    assert fetch(web.url("/a"), stop) == BODY


def test_the_rest_counts_towards_the_limit(web, stop):
    web.in_pieces("/a", [BODY[:900]], ETag='"v1"')
    web.gives("/a", BODY[900:], status=206, Content_Range=f"bytes 900-{len(BODY) - 1}/{len(BODY)}", ETag='"v1"')
    assert "larger than" in failure(web.url("/a"), stop, limit=1000)


def test_tries_that_bring_the_file_further_do_not_count(web, stop):
    assert fetch(web.continues("/a", BODY, range(1000, 10_000, 1000), ETag='"v"'), stop) == BODY
    assert web.hits("/a") == 10


def test_tries_that_bring_nothing_count_from_the_last_that_did(web, stop):
    web.continues("/a", BODY, [1000, 1000, 1000, 2000, 2000, 2000, 2000], ETag='"v"')
    assert failure(web.url("/a"), stop).endswith(", 7 times")


def test_a_server_that_gives_a_byte_at_each_try_is_given_up(web, stop):
    assert failure(web.continues("/a", BODY, range(1, 100), ETag='"v"'), stop).endswith(", 20 times")


def test_a_server_that_starts_over_and_over_is_given_up(web, stop):
    """It says that the file can be continued, and each time it has become another."""
    for number in range(30):
        web.breaks_off("/a", BODY[: number + 1], declared=len(BODY), ETag=f'"v{number}"')
    assert failure(web.url("/a"), stop).endswith(", 20 times")


# Limits


def test_a_declared_size_over_the_limit_is_refused_before_the_body(web, stop):
    assert "larger than the 1 MB" in failure(web.breaks_off("/a", b"x", declared=LIMIT + 1), stop)
    assert web.hits("/a") == 1


def test_a_body_that_grows_over_the_limit_is_refused(web, stop):
    assert "larger than" in failure(web.gives("/a", b"x" * 101, declared=False), stop, limit=100)
    assert web.hits("/a") == 1


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_of_exactly_the_limit_is_fetched(web, stop, declared):
    assert len(fetch(web.gives("/a", b"x" * 100, declared=declared), stop, 100)) == 100


def test_redirects_are_followed(web, stop):
    url = web.gives("/a", status=302, Location="/b")
    web.gives("/b", b"here")
    assert fetch(url, stop) == b"here"


def test_a_redirect_may_have_letters_of_any_alphabet(web, stop):
    web.gives("/%C3%BC%20%C3%A4", b"here")
    assert fetch(web.gives("/a", status=302, Location="/ü ä".encode().decode("latin-1")), stop) == b"here"


def test_a_redirect_to_itself_that_only_wants_its_cookie_back_is_followed(web, stop):
    web.gives("/a", status=302, Location="/a", Set_Cookie="seen=1")
    assert fetch(web.gives("/a", b"here"), stop) == b"here"
    assert web.headers("/a")["Cookie"] == "seen=1"


def test_endless_redirects_are_given_up(web, stop):
    assert failure(web.gives("/a", status=302, Location="/a"), stop) == "more than 5 redirects"
    assert web.hits("/a") == 6


def test_redirects_in_a_circle_are_given_up(web, stop):
    web.gives("/b", status=307, Location="/a")
    assert failure(web.gives("/a", status=301, Location="/b"), stop) == "more than 5 redirects"


@pytest.mark.parametrize("url", ["http://", "http://[", "ftp://example.com/a", "http://127.0.0.1:99999/", "http://\udce4/"])
def test_what_is_no_http_url_fails_in_words(url, stop):
    assert failure(url, stop) == "it is not a URL that can be downloaded"


@pytest.mark.parametrize("url", ["http://me@127.0.0.1/", "http://me:S3cr3t@127.0.0.1/", "http://:S3cr3t@127.0.0.1/"])
def test_a_url_with_user_info_is_refused_in_words(url, stop):
    assert failure(url, stop) == "a URL with a user name or password is not accepted; use one without"


@pytest.mark.parametrize("path", ["/gone?sig=S3cr3t", "/loop?sig=S3cr3t", "/short?sig=S3cr3t", "/large?sig=S3cr3t"])
def test_the_reason_never_repeats_the_url(web, stop, path):
    web.gives("/loop?sig=S3cr3t", status=302, Location="/loop?sig=S3cr3t")
    web.breaks_off("/short?sig=S3cr3t", b"", declared=5)
    web.gives("/large?sig=S3cr3t", b"x" * 200)
    text = failure(web.url(path), stop, limit=100)
    assert "S3cr3t" not in text and "127.0.0.1" not in text


# Servers that mean harm: each is given up in no time, at the memory of a few chunks


OK = b"HTTP/1.1 200 OK\r\n"
REDIRECT = b"HTTP/1.1 302 Found\r\nLocation: /a\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
DEFLATED = OK + b"Content-Encoding: deflate\r\n\r\n"
FILL = b"x" * 100_000
EMPTY_BLOCKS = b"\0\0\0\xff\xff" * 10_000  # of deflate: they unpack to nothing


def bomb(layers: int = 1) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(100)) + packer.flush()
    return packed if layers == 1 else gzip.compress(packed)


@pytest.mark.parametrize(
    ("parts", "then", "says"),
    [
        pytest.param([OK + b"\r\n"], FILL, "larger than", id="endless body"),
        pytest.param([CHUNKED], b"186a0\r\n" + FILL + b"\r\n", "larger than", id="endless chunks"),
        pytest.param([CHUNKED], b"7fffffffffffffff\r\n" + FILL, "larger than", id="huge chunk"),
        pytest.param([CHUNKED], FILL, "3 times", id="endless chunk size"),
        pytest.param([CHUNKED], b"1;" + FILL[:60_000] + b"\r\nx\r\n", "larger than", id="endless chunk extensions"),
        pytest.param([CHUNKED + b"0\r\n"], b"a: b\r\n" * 10_000, "larger than", id="endless trailers"),
        pytest.param([CHUNKED, b"-5\r\nx"], b"", "3 times", id="negative chunk"),
        pytest.param([CHUNKED, b"zz\r\nx"], b"", "3 times", id="chunk size that is no number"),
        pytest.param([b""], FILL, "3 times", id="endless status line"),
        pytest.param([OK], b"a: b\r\n", "3 times", id="endless headers"),
        pytest.param([OK, b"a: "], FILL, "3 times", id="endless header"),
        pytest.param([OK, b"a: b\r\n"], b" c\r\n", "3 times", id="endless folded header"),
        pytest.param([b""], b"HTTP/1.1 100 Continue\r\n\r\n" * 999, "", id="endless 100 Continue"),
        pytest.param([b"\0\1\2\3\r\n\r\n"], b"", "3 times", id="no http"),
        pytest.param([b"SSH-2.0-OpenSSH_9.6\r\n"], FILL, "3 times", id="ssh"),
        pytest.param([b"HTTP/1.1 abc OK\r\n\r\n"], b"", "3 times", id="status that is no number"),
        pytest.param([b"HTTP/1.1 999 OK\r\n\r\n"], b"", "999", id="status that does not exist"),
        pytest.param([OK + b"Content-Length: 9999999999999\r\n\r\n"], FILL, "larger than", id="huge length"),
        pytest.param([OK + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n"], FILL, "larger than", id="length of many digits"),
        pytest.param([OK + b"Content-Length: -1\r\n\r\n"], FILL, "larger than", id="negative length"),
        pytest.param([OK + b"Content-Length: \xb2\r\n\r\n"], FILL, "larger than", id="length that is no number"),
        pytest.param([OK + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n"], FILL, "", id="two lengths"),
        pytest.param([OK + b"Content-Encoding: gzip\r\n\r\n" + bomb()], b"", "larger than", id="gzip bomb"),
        pytest.param([DEFLATED + zlib.compress(bytes(1 << 24))], b"", "larger than", id="deflate bomb"),
        pytest.param([OK + b"Content-Encoding: gzip, gzip\r\n\r\n" + bomb(2)], b"", "plain file", id="bomb in a bomb"),
        pytest.param([DEFLATED], EMPTY_BLOCKS, "larger than", id="endless nothing"),
        pytest.param([OK + b"Content-Encoding: gzip\r\n\r\n"], gzip.compress(b"") * 5000, "larger than", id="endless members"),
        pytest.param([REDIRECT + b"\r\n"], FILL, "5 redirects", id="redirects with endless bodies"),
        pytest.param([REDIRECT + b"Content-Encoding: gzip\r\n\r\n" + bomb()], b"", "5 redirects", id="redirects with bombs"),
        pytest.param([b"HTTP/1.1 302 Found\r\nLocation: "], FILL, "3 times", id="endless location"),
        pytest.param([REDIRECT + (b"Set-Cookie: a=" + FILL[:60_000] + b"\r\n") * 90], b"\r\n", "", id="huge cookies"),
        pytest.param([b"HTTP/1.1 503 Oh\r\n\r\n"], FILL, "503, 3 times", id="errors with endless bodies"),
    ],
)
def test_a_server_that_sends_without_end_is_given_up(web, stop, monkeypatch, parts, then, says):
    monkeypatch.setattr(worker_web, "_ANSWER_SECONDS", 1.5)
    monkeypatch.setattr(worker_web, "_SILENCE_SECONDS", 0.5)
    url = web.writes("/a", *parts, then=then)
    tracemalloc.start()
    try:
        assert says in failure(url, stop)
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()


@pytest.fixture
def impatient(monkeypatch):
    """A worker that waits for half a second only, and tries once."""
    monkeypatch.setattr(worker_web, "_POLL_SECONDS", 0.05)
    for name in ("_ANSWER_SECONDS", "_SILENCE_SECONDS", "_WINDOW_SECONDS", "_CONNECT_SECONDS"):
        monkeypatch.setattr(worker_web, name, 0.5)
    monkeypatch.setattr(download, "_TRIES", 1)


@pytest.mark.parametrize(
    ("parts", "then", "says"),
    [
        pytest.param([], b"", "did not answer in time", id="silence"),
        pytest.param([OK + b"a: b"], b"", "did not answer in time", id="half the headers"),
        pytest.param([OK + b"Content-Length: 5\r\n\r\nab"], b"", "fell silent", id="half the body"),
        pytest.param([CHUNKED + b"5\r\nab"], b"", "fell silent", id="half a chunk"),
        pytest.param([CHUNKED + b"2\r\nab\r\n0\r\n"], b"", "fell silent", id="no last line"),
        pytest.param([OK + b"a: "], b"x", "did not answer in time", id="headers byte by byte"),
        pytest.param([b""], b"HTTP/1.1 100 Continue\r\n\r\n", "did not answer in time", id="100 Continue now and then"),
        pytest.param([REDIRECT + b"a: "], b"x", "did not answer in time", id="a redirect byte by byte"),
        pytest.param([OK + b"\r\n"], b"x", "less than 120 kB per second", id="body byte by byte"),
        pytest.param([CHUNKED], b"1\r\nx\r\n", "less than 120 kB per second", id="chunks byte by byte"),
        pytest.param([CHUNKED], b"0", "less than 120 kB per second", id="a chunk size byte by byte"),
        pytest.param([CHUNKED + b"0\r\na: "], b"x", "less than 120 kB per second", id="a trailer byte by byte"),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_a_server_that_keeps_the_worker_waiting_is_given_up(web, stop, parts, then, says):
    assert says in failure(web.writes("/a", *parts, then=then, pause=0.02), stop)


@pytest.mark.usefixtures("impatient")
def test_a_chain_of_slow_redirects_is_given_up(web, stop):
    def slow(handler):
        time.sleep(0.2)
        handler.send_response(302)
        handler.send_header("Location", "/a")
        handler.end_headers()

    assert failure(web.runs("/a", slow), stop) == "the server did not answer in time, 1 times"


def test_all_tries_together_have_an_end(web, stop, monkeypatch):
    monkeypatch.setattr(worker_web, "_TOTAL_SECONDS", 0.6)
    url = web.writes("/a", OK + b"Content-Length: 10000000\r\n\r\n", then=b"x" * 1000, pause=0.01)
    assert failure(url, stop, limit=1 << 30) == "it took longer than 0.01 minutes"
    assert web.left.wait(10)


@pytest.fixture
def mute():
    """The port of a server that takes connections and says nothing, not even its part of a TLS handshake."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.mark.usefixtures("impatient")
def test_a_tls_handshake_that_does_not_come_is_given_up(mute, stop):
    assert failure(f"https://127.0.0.1:{mute.getsockname()[1]}/", stop).endswith(", 1 times")


# Stopping


def stopped_after(seconds: float, url: str) -> float:
    """How long a download goes on after the job is stopped, in seconds."""
    stop = threading.Event()
    timer = threading.Timer(seconds, stop.set)
    start = time.monotonic()
    timer.start()
    with pytest.raises(Stopped):
        fetch(url, stop)
    return time.monotonic() - start - seconds


def test_a_stopped_job_downloads_nothing(web, stop):
    stop.set()
    with pytest.raises(Stopped):
        fetch(web.gives("/a", b"hello"), stop)
    assert web.hits("/a") == 0


@pytest.mark.parametrize(
    ("parts", "then"),
    [
        pytest.param([], b"", id="before the answer"),
        pytest.param([OK + b"a: "], b"x", id="in the headers"),
        pytest.param([OK + b"Content-Length: 5\r\n\r\nab"], b"", id="in a silent body"),
        pytest.param([OK + b"\r\n"], b"x", id="in a body that trickles"),
        pytest.param([CHUNKED], b"0", id="in a chunk size that trickles"),
    ],
)
def test_a_stop_ends_a_download_and_hangs_up(web, parts, then):
    assert stopped_after(0.1, web.writes("/a", *parts, then=then, pause=0.05)) < 1
    assert web.left.wait(10)


def test_a_stop_ends_a_download_that_waits_for_a_tls_handshake(mute):
    assert stopped_after(0.1, f"https://127.0.0.1:{mute.getsockname()[1]}/") < 1


def test_a_stop_ends_a_download_that_waits_for_the_dns(web, monkeypatch):
    answered, lookup = threading.Event(), socket.getaddrinfo

    def slow(*args, **kwargs):
        answered.wait(10)
        return lookup(*args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    assert stopped_after(0.1, web.gives("/a", b"hello")) < 1
    answered.set()


def test_an_answer_that_comes_after_the_stop_is_hung_up_on(web, monkeypatch):
    """The thread that waited for it has been left behind."""
    monkeypatch.setattr(worker_web.Clock, "check", lambda clock, **_: clock._stop.is_set() and leave())
    main = threading.current_thread()

    def leave():
        if threading.current_thread() is main:
            raise Stopped

    def late(handler):
        time.sleep(1)
        handler.wfile.write(OK + b"\r\n")
        handler.rfile.read(1)
        web.left.set()

    assert stopped_after(0.1, web.runs("/a", late)) < 0.9
    assert web.left.wait(3)


def test_a_stop_between_two_tries_ends_the_download(web):
    stop = threading.Event()

    def serve(handler):
        stop.set()
        handler.send_error(500)

    with pytest.raises(Stopped):
        fetch(web.runs("/a", serve), stop)
    assert web.hits("/a") == 1


# Into a file


@pytest.fixture
def into(stop):
    """Fetches into a file that had something else in it; `into.file` is the file."""

    def into(url, **options):
        return fetch_into(into.file, url, LIMIT, stop, private=True, **options)

    into.file = io.BytesIO(b"old" * 10_000)
    return into


def test_the_file_has_the_body_and_nothing_else(web, into):
    assert into(web.gives("/a", b"new")).status == 200
    assert into.file.getvalue() == b"new"


@pytest.mark.parametrize(
    ("given", "asks"),
    [
        ({"ETag": '"v1"'}, {"If-None-Match": '"v1"'}),
        ({"ETag": 'W/"v1"'}, {"If-None-Match": 'W/"v1"'}),
        ({"Last_Modified": DATE}, {"If-Modified-Since": DATE}),
        ({"ETag": '"v1"', "Last_Modified": DATE}, {"If-None-Match": '"v1"', "If-Modified-Since": DATE}),
        ({}, {}),
    ],
)
def test_the_answer_tells_how_to_ask_whether_the_file_has_changed(web, into, given, asks):
    assert into(web.gives("/a", b"new", **given)).validators == asks


def test_a_file_that_has_not_changed_is_not_sent_again(web, into):
    url = web.versions("/a", b"body", '"v1"')
    first = into(url)
    again = into(url, headers=first.validators)
    assert (again.status, again.validators) == (304, first.validators)
    assert into.file.getvalue() == b""


def test_a_304_that_does_not_repeat_the_validators_leaves_them_as_they_were(web, into):
    asked = {"If-None-Match": '"v1"', "If-Modified-Since": DATE}
    assert into(web.gives("/a", status=304, declared=False), headers=asked).validators == asked


def test_a_file_that_has_changed_is_fetched(web, into):
    answer = into(web.versions("/a", b"new", '"v2"'), headers={"If-None-Match": '"v1"'})
    assert (answer.status, answer.validators, into.file.getvalue()) == (200, {"If-None-Match": '"v2"'}, b"new")


def test_the_rest_of_a_file_is_asked_for_whether_or_not_it_has_changed(web, into):
    url = web.continues("/a", BODY, [3000], ETag='"v2"')
    answer = into(url, headers={"If-None-Match": '"v1"', "if-modified-since": DATE, "X": "y"})
    assert {"If-None-Match", "if-modified-since"}.isdisjoint(web.headers("/a")) and web.headers("/a")["X"] == "y"
    assert (answer.validators, into.file.getvalue()) == ({"If-None-Match": '"v2"'}, BODY)


def test_headers_are_sent(web, into):
    into(web.gives("/a", b"x"), headers={"Authorization": "Bearer t"})
    assert web.headers("/a")["Authorization"] == "Bearer t"


@pytest.mark.parametrize("token", ["t\n", "t\r\nX: y", "hf_…", "\udce4"])
def test_a_token_that_cannot_be_sent_fails_in_words(web, into, token):
    with pytest.raises(DownloadError, match="the token has characters that cannot be sent"):
        into(web.gives("/a", b"x"), headers={"Authorization": f"Bearer {token}"})


def test_a_token_stays_with_its_server(web, into):
    with web_server.serve() as other:
        url = web.gives("/a", status=302, Location="/b")
        web.gives("/b", status=302, Location=other.gives("/c", status=302, Location=web.url("/d")))
        web.gives("/d", b"x")
        into(url, headers={"authorization": "Bearer t"})
    assert [headers.get("authorization") for _, headers in web.requests] == ["Bearer t", "Bearer t", None]
    assert "authorization" not in other.headers("/c")


# A look at the first bytes


def test_the_first_bytes_are_shown_as_soon_as_there_are_sixteen(web, into):
    shown: list[bytes] = []
    into(web.in_pieces("/a", [b"0123456789", b"abcdef", b"rest", b""]), check_head=shown.append)
    assert shown == [b"0123456789abcdef"]


@pytest.mark.parametrize("body", [b"", b"x", b"x" * 15])
def test_a_shorter_body_is_shown_whole(web, into, body):
    shown: list[bytes] = []
    into(web.gives("/a", body), check_head=shown.append)
    assert shown == [body]


def test_a_look_can_end_the_download(web, into):
    def look(head):
        raise ValueError(head[:5].decode())

    with pytest.raises(ValueError, match="<html"):
        into(web.writes("/a", OK + b"\r\n<html><body>and so on", then=b""), check_head=look)
    assert web.left.wait(10) and web.hits("/a") == 1


def test_what_is_continued_is_shown_once(web, into):
    shown: list[bytes] = []
    into(web.continues("/a", BODY, [10, 20, 3000], ETag='"v"'), check_head=shown.append)
    assert shown == [BODY[:20]]


def test_what_starts_over_is_shown_again(web, into):
    shown: list[bytes] = []
    web.breaks_off("/a", b"old" * 10, declared=1000)
    into(web.gives("/a", b"new" * 10), check_head=shown.append)
    assert shown == [b"old" * 10, b"new" * 10]


def test_an_unchanged_file_is_not_shown(web, into):
    into(web.gives("/a", status=304, declared=False), headers={"If-None-Match": '"v"'}, check_head=pytest.fail)
