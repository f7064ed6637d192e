"""Every way to make the worker reach what only the worker can reach, tried through `fetch_bytes` and refused."""

import contextlib
import datetime
import socket
import ssl
import time

import boto3
import pytest
import requests.adapters
from botocore.config import Config
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.worker import web_server
from worker.net import addresses
from worker.net.addresses import NotPublic, is_public
from worker.net.download import DownloadError, fetch_bytes
from worker.net.privates import guard_store

LIMIT = 1_000_000
REFUSED = "the address is not public; use a public one (ALLOW_PRIVATE_DOWNLOADS=1 allows others, for a local machine only)"
INNER = "127.0.0.2"
"""Where the tests let 127.0.0.1 pass for public, this address is the forbidden one."""

lookup = socket.getaddrinfo


# Which addresses are public


@pytest.mark.parametrize(
    "address",
    [
        *["0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.255.254"],
        *["10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "192.168.255.255"],
        *["100.64.0.1", "100.100.100.200", "100.127.255.255", "169.254.0.1", "169.254.169.254", "169.254.170.2"],
        *["192.0.0.1", "192.0.0.192", "192.0.2.1", "198.51.100.1", "203.0.113.1", "198.18.0.1", "198.19.255.255"],
        *["192.88.99.1", "168.63.129.16"],
        *["224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"],
        *["::", "::1", "::2", "fe80::1", "fe80::1%lo", "febf::1", "fec0::1", "feff::1", "fc00::1", "fd00:ec2::254", "ff02::1"],
        *["::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:0:8.8.8.8"],
        *["64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b:1::8.8.8.8", "64:ff9b:1:2::1"],
        *["2002:7f00:1::", "2002:a9fe:a9fe::1", "2002:808:808::1", "2001::1", "2001:0:808:808::", "2001::f7f7:f7f7"],
        *["2001:2::1", "2001:10::1", "2001:20::1", "2001:1ff::1", "2001:db8::1", "3fff::1", "3ffe::1", "5f00::1", "100::1"],
        *["4000::1", "8000::1", "2606:4700::1111%1"],
    ],
)
def test_an_address_of_a_special_network_is_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *["1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.1", "100.63.255.255", "100.128.0.1", "126.255.255.255", "128.0.0.1"],
        *["169.253.255.255", "169.255.0.1", "172.15.255.255", "172.32.0.1", "192.0.1.1", "192.167.0.1", "192.169.0.1"],
        *["198.17.255.255", "198.20.0.1", "223.255.255.255"],
        *["2606:4700:4700::1111", "2001:4860:4860::8888", "2001:200::1", "2a00::1", "2003::1"],
        *["::ffff:8.8.8.8", "64:ff9b::8.8.8.8"],
    ],
)
def test_an_address_beside_the_special_networks_is_public(address):
    assert is_public(address)


@given(st.ip_addresses())
def test_what_python_calls_private_or_multicast_is_not_public(address):
    """Only in this direction: its table is shorter, and not the same in every version."""
    assume(not (address.version == 6 and address.ipv4_mapped))
    assert not is_public(str(address)) or (address.is_global and not address.is_multicast)


# What a client can write


@pytest.fixture
def names(monkeypatch):
    """The DNS: name → the addresses of each look-up, the last ones for good. Other names are looked up as ever."""
    known: dict[str, list[list[str]]] = {}
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answer(*args, **kwargs))
    known_lookups: list[str] = []

    def answer(host, port, *args, **kwargs):
        known_lookups.append(host)
        if host not in known:
            return lookup(host, port, *args, **kwargs)
        answers = known[host].pop(0) if len(known[host]) > 1 else known[host][0]
        return [found for address in answers for found in lookup(address, port, *args, **kwargs)]

    known["asked"] = known_lookups  # type: ignore[assignment]
    return known


class Listener:
    """A port of this machine, at 127.0.0.1, 127.0.0.2 and ::1, where no connection may arrive."""

    def __init__(self, held: contextlib.ExitStack) -> None:
        first = held.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.port = first.getsockname()[1]
        self._sockets = [first, held.enter_context(socket.create_server((INNER, self.port)))]
        if socket.has_ipv6:
            with contextlib.suppress(OSError):
                self._sockets.append(held.enter_context(socket.create_server(("::1", self.port), family=socket.AF_INET6)))
        for listening in self._sockets:
            listening.settimeout(0)

    def connections(self) -> int:
        count = 0
        for listening in self._sockets:
            with contextlib.suppress(BlockingIOError):
                listening.accept()[0].close()
                count += 1
        return count


@pytest.fixture
def listener():
    with contextlib.ExitStack() as held:
        yield Listener(held)


def refused(url: str, stop, **options) -> str:
    start = time.monotonic()
    with pytest.raises(DownloadError) as caught:
        fetch_bytes(url, LIMIT, stop, **options)
    assert time.monotonic() - start < 3
    return str(caught.value)


THIS_MACHINE = [
    *["127.0.0.1", "127.0.0.2", "2130706433", "0x7f000001", "017700000001", "0x7f.1", "0177.0.0.1", "127.1", "127.0.1"],
    *["0x7F.0x0.0x0.0x1", "0", "0.0.0.0", "0x0", "00000177.0.0.1"],
    *["[::1]", "[0:0:0:0:0:0:0:1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:FFFF:7F00:0001]"],
    *["localhost", "LOCALHOST", "LocalHost"],
]
"""Hosts that are this machine, however they are written."""

ELSEWHERE = [
    *["169.254.169.254", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.16689662", "[::ffff:169.254.169.254]"],
    *["[::ffff:a9fe:a9fe]", "[64:ff9b::7f00:2]", "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::7f00:1]", "[2002:7f00:1::]"],
    *["[2002:a9fe:a9fe::]", "[2001:0:7f00:1::]", "[::127.0.0.1]", "[fe80::1]", "[fec0::1]", "[fd00:ec2::254]", "[ff02::1]"],
    *["10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "100.100.100.200", "192.0.0.192", "198.18.0.1", "224.0.0.1"],
    *["255.255.255.255", "240.0.0.1", "168.63.129.16"],
]
"""Hosts of the worker's neighbourhood."""


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", THIS_MACHINE + ELSEWHERE)
def test_a_host_that_is_not_public_is_refused_in_every_spelling(host, scheme, listener, stop):
    assert refused(f"{scheme}://{host}:{listener.port}/latest/meta-data?sig=S3cr3t", stop) == REFUSED
    assert listener.connections() == 0


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "0", "localhost"])
def test_these_spellings_would_arrive_if_they_were_not_refused(host, web, stop):
    web.gives("/a", b"inner")
    assert fetch_bytes(web.url("/a").replace("127.0.0.1", host), LIMIT, stop, private=True) == b"inner"


@pytest.mark.parametrize(
    "url",
    [
        *["http://%31%32%37.0.0.1:PORT/", "http://127%2e0.0.1:PORT/", "http://127.0.0.1%2f@example.com:PORT/"],
        *["http://example.com@127.0.0.1:PORT/", "http://127.0.0.1:PORT@example.com/", "http://user:pass@127.0.0.1:PORT/"],
        *["http://:@127.0.0.1:PORT/", "http://@127.0.0.1:PORT/", "http://example.com:80@127.0.0.1:PORT/"],
        *[
            "http://127.0.0.1:PORT\\@example.com/",
            "http://example.com\\@127.0.0.1:PORT/",
            "http://127.0.0.1:PORT\\.example.com/",
        ],
        *["http://127.0.0.1:PORT\t.example.com/", "http://127.0.0.1\n:PORT/", "http://127.0.0.1 .example.com:PORT/"],
        *["http://127.0.0.1:PORT#@example.com/", "http://127.0.0.1:PORT?@example.com/", "http:\\\\127.0.0.1:PORT/"],
        *["http:/127.0.0.1:PORT/", "http:127.0.0.1:PORT/", "http:///127.0.0.1:PORT/", "http://[::1%25lo]:PORT/"],
        *["http://[fe80::1%25lo]:PORT/", "http://[127.0.0.1]:PORT/", "http://127.0.0.1\0.example.com:PORT/", "http://*:PORT/"],
        *["http://[v1.127.0.0.1]:PORT/", "http://127.0.0.1:PORT:80/", "http://localhost.:PORT/", "http://.127.0.0.1:PORT/"],
        *["http://①②⑦.⓪.⓪.①:PORT/", "http://１２７.0.0.1:PORT/", "http://127。0。0。1:PORT/", "http://127.0.0.1.:PORT/"],
        *["http://\x07127.0.0.1:PORT/", "http://127.0.0.1:0/", "http://①⑥⑨.②⑤④.①⑥⑨.②⑤④/", "http://a@b@127.0.0.1:PORT/"],
    ],
)
def test_a_url_that_shows_one_host_and_means_another_is_refused(url, listener, stop):
    refused(url.replace("PORT", str(listener.port)), stop)
    assert listener.connections() == 0


@pytest.mark.parametrize("host", ["%31%32%37.0.0.1", "a%00.example", "[::1%25lo]", "[fe80::1%lo]", "a'b.example", "$(id)"])
def test_a_host_that_is_no_name_is_not_even_looked_up(host, names, stop):
    assert refused(f"http://{host}/", stop) == "it is not a URL that can be downloaded"
    assert names["asked"] == []


@pytest.mark.parametrize(
    "url",
    [
        *["file:///etc/passwd", "FILE:///etc/passwd", "gopher://127.0.0.1:6379/_INFO", "ftp://127.0.0.1/a", "data:,hello"],
        *["dict://127.0.0.1:11211/stats", "unix:///run/docker.sock", "http+unix://%2Frun%2Fdocker.sock/info", "jar:http://a!/"],
        *["httpx://127.0.0.1/", "javascript:alert(1)", "//127.0.0.1/", "/etc/passwd", "", "http:", "http://", "https://"],
    ],
)
def test_other_schemes_are_refused(url, stop):
    assert refused(url, stop) == "it is not a URL that can be downloaded"


@pytest.mark.parametrize("host", ["127.0.0.1\\.huggingface.co", "127.0.0.1\\@huggingface.co", "127.0.0.1#.huggingface.co"])
def test_no_host_can_be_taken_for_the_one_that_gets_the_token(host, web, stop):
    """`urlsplit` sees a host of the Hub in these, which is how it is decided who gets a token."""
    with contextlib.suppress(DownloadError):
        fetch_bytes(web.gives("/a", b"x").replace("127.0.0.1", host), LIMIT, stop, private=True)
    assert not web.requests


# What a name can lead to


@pytest.mark.parametrize(
    "answers",
    [
        *[["127.0.0.1"], [INNER], ["::1"], ["169.254.169.254"], ["10.1.2.3"], ["::ffff:127.0.0.1"], ["fd00::1"], ["0.0.0.0"]],
        *[["8.8.8.8", "127.0.0.1"], ["127.0.0.1", "8.8.8.8"], ["2606:4700::1111", "::1"], ["8.8.8.8", "64:ff9b::127.0.0.1"]],
        ["8.8.8.8"] * 9 + ["127.0.0.1"],
    ],
    ids=lambda answers: " ".join(dict.fromkeys(answers)),
)
def test_a_name_with_one_address_that_is_not_public_is_refused(answers, names, listener, stop):
    names["inner.example"] = [answers]
    assert refused(f"http://inner.example:{listener.port}/", stop) == REFUSED
    assert listener.connections() == 0


def test_a_refusal_is_not_tried_again(names, stop):
    names["inner.example"] = [["10.0.0.1"]]
    refused("http://inner.example/", stop)
    assert names["asked"].count("inner.example") == 1


@pytest.fixture
def outside(monkeypatch):
    """127.0.0.1, where the web server is, counts as public; 127.0.0.2 and the rest of this machine does not."""
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1" or is_public(address))


@pytest.fixture
def inside():
    """Another web server, at 127.0.0.2."""
    with web_server.serve(INNER) as web:
        web.gives("/a", b"secret")
        yield web


def port_of(web) -> str:
    return web.address.rpartition(":")[2]


@pytest.mark.usefixtures("outside")
def test_a_public_name_is_fetched(names, web, stop):
    names["files.example"] = [["127.0.0.1"]]
    web.gives("/a", b"hello")
    assert fetch_bytes(f"http://Files.example:{port_of(web)}/a", LIMIT, stop) == b"hello"
    assert web.headers("/a")["Host"] == f"files.example:{port_of(web)}"


@pytest.mark.usefixtures("outside")
def test_an_international_name_is_fetched(names, web, stop):
    names["xn--mnchen-3ya.example"] = [["127.0.0.1"]]
    web.gives("/a", b"hello")
    assert fetch_bytes(f"http://M\u00fcnchen.example:{port_of(web)}/a", LIMIT, stop) == b"hello"


@pytest.mark.usefixtures("outside")
def test_a_name_is_looked_up_once_and_the_checked_address_is_the_one_that_is_reached(names, web, inside, stop):
    names["rebinds.example"] = [["127.0.0.1"], [INNER]]
    web.gives("/a", b"outer")
    assert fetch_bytes(f"http://rebinds.example:{port_of(web)}/a", LIMIT, stop) == b"outer"
    assert names["asked"] == ["rebinds.example"]
    assert "not public" in refused(f"http://rebinds.example:{port_of(inside)}/a", stop)
    assert not inside.requests


@pytest.mark.usefixtures("outside")
def test_a_name_that_turns_private_between_two_tries_is_refused(names, web, inside, stop):
    names["rebinds.example"] = [["127.0.0.1"], [INNER]]
    web.gives("/a", status=503)
    assert refused(f"http://rebinds.example:{port_of(web)}/a", stop) == REFUSED
    assert (web.hits("/a"), inside.requests) == (1, [])


@pytest.mark.usefixtures("outside")
def test_a_name_that_turns_private_at_a_redirect_to_itself_is_refused(names, web, inside, stop):
    names["rebinds.example"] = [["127.0.0.1"], [INNER]]
    web.gives("/a", status=302, Location="/a")
    assert refused(f"http://rebinds.example:{port_of(web)}/a", stop) == REFUSED
    assert (web.hits("/a"), inside.requests) == (1, [])


def test_an_address_that_does_not_answer_is_passed_over_for_the_next(monkeypatch, names, web, stop):
    monkeypatch.setattr(addresses, "is_public", lambda address: True)
    names["files.example"] = [["127.0.0.3", "::1", "127.0.0.1"]]
    web.gives("/a", b"hello")
    assert fetch_bytes(f"http://files.example:{port_of(web)}/a", LIMIT, stop) == b"hello"


def test_many_dead_addresses_of_ipv6_do_not_hide_those_of_ipv4(monkeypatch, names, web, stop):
    monkeypatch.setattr(addresses, "is_public", lambda address: True)
    names["files.example"] = [["::1"] * 9 + ["127.0.0.1"]]
    web.gives("/a", b"hello")
    assert fetch_bytes(f"http://files.example:{port_of(web)}/a", LIMIT, stop) == b"hello"


def test_a_name_with_many_dead_addresses_is_given_up(monkeypatch, names, web, stop):
    monkeypatch.setattr(addresses, "is_public", lambda address: True)
    names["files.example"] = [["127.0.0.3"] * 9 + ["127.0.0.1"]]
    assert refused(f"http://files.example:{port_of(web)}/a", stop) == "the connection failed, 3 times"


@pytest.mark.parametrize("error", [socket.gaierror(socket.EAI_NONAME, "no"), UnicodeError("label too long"), OSError("no")])
def test_a_name_without_an_address_fails_in_words(error, monkeypatch, stop):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    assert refused("http://nowhere.example/", stop) == "the connection failed, 3 times"


# What a redirect can lead to


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.usefixtures("outside")
def test_a_redirect_to_an_address_that_is_not_public_is_refused(status, web, inside, stop):
    url = web.gives("/a", status=status, Location=inside.url("/a"))
    assert refused(url, stop) == REFUSED
    assert (web.hits("/a"), inside.requests) == (1, [])


@pytest.mark.parametrize(
    "host",
    [
        *[INNER, "2130706434", "0x7f.2", "0177.0.0.2", "127.2", "[::1]", "[::ffff:127.0.0.2]", "[::ffff:7f00:2]", "[::]", "0"],
        *["inner.example", "mixed.example", "[2002:7f00:2::]", *ELSEWHERE],
    ],
)
@pytest.mark.usefixtures("outside")
def test_a_redirect_is_checked_like_the_first_url(host, names, web, inside, stop):
    names |= {"inner.example": [[INNER]], "mixed.example": [["127.0.0.1", INNER]]}
    web.gives("/first", status=302, Location="/second")
    web.gives("/second", status=302, Location=f"//{host}:{port_of(inside)}/a")
    assert refused(web.url("/first"), stop) == REFUSED
    assert not inside.requests


@pytest.mark.parametrize(
    "target",
    [
        *["file:///etc/passwd", "FILE:/etc/passwd", "gopher://127.0.0.2:70/", "ftp://127.0.0.2/", "data:text/plain,hello"],
        *["javascript:1", "https://:80/", "http://user:pass@127.0.0.2/", "http://user@127.0.0.1/a", "http://[", "http://\xff"],
        *["http://127.0.0.2\\@127.0.0.1/", "http://127.0.0.1\\.127.0.0.2/", "http://127.0.0.1:99999/", "http://127.0.0.%31/"],
    ],
)
@pytest.mark.usefixtures("outside")
def test_a_redirect_to_no_plain_url_is_refused(target, web, stop):
    refused(web.gives("/a", status=302, Location=target), stop)
    assert len(web.requests) == 1


# What the environment would change


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.usefixtures("outside")
def test_proxies_and_netrc_of_the_environment_are_not_used(private, monkeypatch, tmp_path, web, listener, stop):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password S3cr3t")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("NO_PROXY")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{listener.port}")
    assert fetch_bytes(web.gives("/a", b"hello"), LIMIT, stop, private=private) == b"hello"
    assert "Authorization" not in web.headers("/a")
    assert listener.connections() == 0


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A file with the key and certificate of files.example, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "files.example")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("files.example")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "files.pem"
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none) + made.public_bytes(pem))
    return file


@pytest.fixture
def tls(certificate, monkeypatch):
    """A web server with TLS, whose certificate is trusted; `tls.asked_for` are the names that clients gave it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    asked_for: list[str] = []
    context.sni_callback = lambda _, name, __: asked_for.append(name)
    monkeypatch.setattr(requests.adapters, "DEFAULT_CA_BUNDLE_PATH", str(certificate))
    with web_server.serve(context=context) as web:
        web.asked_for = asked_for
        yield web


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.usefixtures("outside")
def test_over_tls_the_name_stays_with_the_server_and_its_certificate(private, names, tls, stop):
    names |= {"files.example": [["127.0.0.1"]], "other.example": [["127.0.0.1"]]}
    body = bytes(range(256)) * 9000
    tls.gives("/a", body)
    assert fetch_bytes(f"https://files.example:{port_of(tls)}/a", 3 << 20, stop, private=private) == body
    assert tls.headers("/a")["Host"] == f"files.example:{port_of(tls)}"
    assert "no secure connection" in refused(f"https://other.example:{port_of(tls)}/a", stop, private=private)
    assert set(tls.asked_for) == {"files.example", "other.example"}
    assert tls.hits("/a") == 1


# Buckets that a job brings along


@pytest.fixture
def bucket(web):
    """A boto3 client of the web server that reaches public addresses only."""
    client = boto3.client(
        "s3",
        aws_access_key_id="a",
        aws_secret_access_key="b",
        region_name="us-east-1",
        endpoint_url=web.address,
        config=Config(s3={"addressing_style": "path"}, retries={"mode": "standard", "max_attempts": 5}),
    )
    guard_store(client, public=True)
    return client


@pytest.fixture
def video(tmp_path):
    file = tmp_path / "0.mp4"
    file.write_bytes(b"video" * 1000)
    return file


def test_a_bucket_at_an_address_that_is_not_public_is_refused_at_once(bucket, video, web):
    start = time.monotonic()
    with pytest.raises(NotPublic, match="the address is not public"):
        bucket.upload_file(str(video), "videos", "0.mp4")
    assert time.monotonic() - start < 2
    assert not web.requests


@pytest.mark.usefixtures("outside")
def test_a_bucket_at_a_public_address_takes_files_as_ever(bucket, video, web):
    web.gives("/videos/0.mp4")
    bucket.upload_file(str(video), "videos", "0.mp4")
    assert video.read_bytes() in web.uploads["/videos/0.mp4"]
    assert "Expect" not in web.headers("/videos/0.mp4")


@pytest.mark.usefixtures("outside")
def test_a_bucket_that_fails_is_tried_again(bucket, video, web):
    web.gives("/videos/0.mp4", status=503)
    web.gives("/videos/0.mp4")
    bucket.upload_file(str(video), "videos", "0.mp4")
    assert web.hits("/videos/0.mp4") == 2


@pytest.mark.usefixtures("outside")
def test_a_bucket_that_redirects_to_an_address_that_is_not_public_is_not_followed(bucket, video, web, inside):
    web.gives("/videos/0.mp4", status=307, Location=inside.url("/a"))
    with pytest.raises(Exception):  # noqa: B017
        bucket.upload_file(str(video), "videos", "0.mp4")
    assert not inside.requests


def test_a_bucket_is_not_reached_through_a_proxy(monkeypatch, listener, video):
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{listener.port}")
    client = boto3.client(
        "s3",
        aws_access_key_id="a",
        aws_secret_access_key="b",
        region_name="us-east-1",
        endpoint_url="http://10.0.0.1",
    )
    guard_store(client, public=True)
    with pytest.raises(NotPublic):
        client.upload_file(str(video), "videos", "0.mp4")
    assert listener.connections() == 0
