"""The HTTP side: the page, its API and the files of its jobs, for a browser on this machine and for nobody else.

Another page in the same browser must not reach it. So it listens on 127.0.0.1, answers only to the names of this machine
(against DNS rebinding), changes something only for its own origin (against forged requests), and says in its headers that
nothing may embed it. The API key is in no answer.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from pipelines.catalog import MODELS
from playground.check import check, recipe_of
from playground.jobs import CONTENT_TYPES, Job, Jobs, NoFile, item_of
from playground.side_by_side import side_by_side
from playground.target import Target, TargetError
from tools.cli import BadInput
from tools.compare import settings_of_result
from tools.frames import read_clip
from worker.errors import MEANING
from worker.request import Request

STATIC = Path(__file__).parent / "static"
_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
_TYPES |= {".svg": "image/svg+xml"} | CONTENT_TYPES

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}

_MAX_JSON = 128 * 1024**2
"""Bytes: a request with several images."""
_MAX_SAMPLE = 1024**3
_LARGEST_SAFE = 2**53 - 1
"""Of the integers in JavaScript; a seed can be larger."""


class Refused(Exception):
    """The request is not answered: `status` and why."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Playground:
    """What the page can ask for. Methods may be called from any thread."""

    def __init__(self, target: Target, folder: Path, example: dict[str, Any] | None = None, loras: Path | None = None) -> None:
        """`example`: the request that the form starts with. `loras`: LORA_DIR, where its files can be suggested."""
        self.target = target
        self.jobs = Jobs(target, folder)
        self._folder = folder
        self._example = example
        self._loras = loras

    def config(self) -> dict[str, Any]:
        key = "RUNPOD_API_KEY" if self.target.endpoint else None
        target = {"label": self.target.label, "base": self.target.base, "endpoint": self.target.endpoint, "key_variable": key}
        models = [
            {
                "id": spec.id,
                "title": spec.title,
                "control_image": spec.control_image,
                "moe": spec.moe,
                "needs_toolkit": spec.needs_toolkit,
                "size_divisor": {match: recipe_of(spec, match).size_divisor for match in ("documented", "preview")},
            }
            for spec in MODELS.values()
        ]
        return {
            "target": target,
            "schema": Request.model_json_schema(),
            "models": models,
            "example": self._example,
            "loras": sorted(str(path.relative_to(self._loras)) for path in self._loras.rglob("*.safetensors"))
            if self._loras
            else [],
            "codes": {str(code): meaning for code, meaning in MEANING.items()},
        }

    def compare(self, a: str, b: str, sample: tuple[str, Path] | None) -> dict[str, Any]:
        """`a`, `b`: `JOB/FILE` as in /files; with `sample`, its name and file, that is A.

        Raises NoFile, BadInput, TargetError.
        """
        name = f"compare-{secrets.token_hex(8)}"
        clip_b, settings_b, title_b = self._output(b)
        if sample:
            title_a, path = sample
            try:
                clip_a = read_clip(path)
            except BadInput as error:
                raise BadInput(str(error).replace(str(path), title_a)) from error
            settings_a = clip_a.settings
        else:
            clip_a, settings_a, title_a = self._output(a)
        found = side_by_side(clip_a, clip_b, (settings_a, settings_b), self._folder / f"{name}.mp4")
        return found | {"url": f"/compare/{name}.mp4", "titles": [title_a, title_b]}

    def _output(self, place: str) -> tuple[Any, Any, str]:
        """(clip, settings, title) of an output."""
        number, _, file = place.partition("/")
        if not (number.isdigit() and file.isdigit()):
            raise NoFile(f"{place[:40]!r} is no output; it has the form JOB/FILE")
        job = self.jobs.get(int(number))
        item = item_of(job, int(file))
        result = self._folder / f"result-{number}.json"
        result.write_text(json.dumps(job.result))
        settings = settings_of_result(result, item["prompt_index"])
        return read_clip(self.jobs.file(job.number, int(file))), settings, f"Run {job.number}, seed {item['seed']}"

    def compared(self, name: str) -> Path:
        return self._folder / name


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "playground"
    sys_version = ""

    def __init__(self, playground: Playground, *arguments: Any) -> None:
        self._playground = playground
        super().__init__(*arguments)

    def handle(self) -> None:
        with suppress(ConnectionError):  # the browser has what it wanted of a video, or was closed
            super().handle()

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet: the page says what happens."""

    def _answer(self, method: str) -> None:
        self._unread = int(self.headers.get("Content-Length") or 0) if self.headers.get("Content-Length", "0").isdigit() else -1
        try:
            self._guard(method)
            path = urlsplit(self.path).path
            for verb, pattern, act in _ROUTES:
                if verb == method and (found := re.fullmatch(pattern, path)):
                    act(self, *found.groups())
                    return
            raise Refused(404, "there is nothing here")
        except Refused as error:
            self._send_json({"error": str(error), "again": False}, error.status)
        except TargetError as error:
            self._send_json({"error": str(error), "again": error.again}, 502)
        except NoFile as error:
            self._send_json({"error": str(error), "again": False}, 404)
        except BadInput as error:
            self._send_json({"error": str(error), "again": False}, 400)

    def _guard(self, method: str) -> None:
        """Only this page, under a name of this machine."""
        port = self.connection.getsockname()[1]
        own = {f"{host}:{port}" for host in ("127.0.0.1", "localhost", "[::1]")}
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host not in own:
            raise Refused(403, "this address is none of the playground's")
        if (origin is None and method == "POST") or origin not in (None, f"http://{host}"):
            raise Refused(403, "only the playground's own page may ask for this")
        # No header: no browser, or an old one. "none": typed by the user. A link from elsewhere may open the page itself.
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none") and self.path != "/":
            raise Refused(403, "only the playground's own page may ask for this")

    # What the routes do

    def _page(self) -> None:
        self._send_file(STATIC / "index.html")

    def _static(self, name: str) -> None:
        known = {path.name: path for path in STATIC.iterdir()}
        if name not in known:
            raise Refused(404, "there is nothing here")
        self._send_file(known[name])

    def _config(self) -> None:
        self._send_json(self._playground.config())

    def _check(self) -> None:
        self._send_json(check(self._json()))

    def _jobs(self) -> None:
        self._send_json({"jobs": [job.public() for job in self._playground.jobs.all()]})

    def _start(self) -> None:
        request = self._json()
        if not isinstance(request, dict):
            raise Refused(400, "a request is an object")
        self._send_job(self._playground.jobs.start(request))

    def _look(self, number: str) -> None:
        self._send_job(self._playground.jobs.look(int(number)))

    def _cancel(self, number: str) -> None:
        self._send_job(self._playground.jobs.cancel(int(number)))

    def _send_job(self, job: Job) -> None:
        self._send_json(job.public())

    def _file(self, number: str, place: str) -> None:
        self._send_file(self._playground.jobs.file(int(number), int(place)))

    def _playable(self, number: str, place: str) -> None:
        self._send_file(self._playground.jobs.playable(int(number), int(place)))

    def _compare(self) -> None:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        sample = self._sample(asked["name"]) if "name" in asked else None
        try:
            self._send_json(self._playground.compare(asked.get("a", ""), asked.get("b", ""), sample))
        finally:
            if sample:
                sample[1].unlink()

    def _compared(self, name: str) -> None:
        path = self._playground.compared(name)
        if not path.is_file():
            raise NoFile("this comparison is gone; make it again")
        self._send_file(path)

    # Bodies

    def _sample(self, name: str) -> tuple[str, Path]:
        """The body as a file, under the name that its user knows."""
        if not 0 < self._unread <= _MAX_SAMPLE:
            raise Refused(413, "a sample has at most 1 GB")
        suffix = Path(name).suffix.lower()
        target = self._playground.compared(f"sample-{secrets.token_hex(8)}{suffix if suffix in CONTENT_TYPES else ''}")
        with target.open("wb") as file:
            while self._unread:
                block = self._read(min(self._unread, 1 << 20))
                file.write(block)
        return Path(name).name[:100], target

    def _json(self) -> Any:
        if not 0 <= self._unread <= _MAX_JSON:
            raise Refused(413, "the request is too large")
        if self.headers.get_content_type() != "application/json":
            raise Refused(415, "a request is JSON")
        try:
            return json.loads(self._read(self._unread))
        except ValueError as error:
            raise Refused(400, "this is no JSON") from error

    def _read(self, count: int) -> bytes:
        block = self.rfile.read(count)
        if len(block) < count:
            raise ConnectionResetError
        self._unread -= len(block)
        return block

    # Answers

    def _send_json(self, answer: Any, status: int = 200) -> None:
        text = json.dumps(_exact(answer), ensure_ascii=False)
        if key := self._playground.target.key:
            text = text.replace(key, "…")  # whatever the other side repeats of it
        body = text.encode("utf-8", "replace")
        if self._unread:
            self.close_connection = True  # what is left of the body would be taken for the next request
        self._head(status, "application/json", len(body))
        self.wfile.write(body)

    def _send_file(self, path: Path) -> None:
        """The file, or the range of it that a video player asks for."""
        size = path.stat().st_size
        first, last = _range(self.headers.get("Range"), size)
        partial_answer = (first, last) != (0, size - 1)
        extra = {"Accept-Ranges": "bytes"}
        if partial_answer:
            extra["Content-Range"] = f"bytes {first}-{last}/{size}"
        if path.suffix == ".zip":
            extra["Content-Disposition"] = f'attachment; filename="{path.name}"'
        self._head(206 if partial_answer else 200, _TYPES[path.suffix.lower()], last - first + 1, extra)
        with path.open("rb") as file:
            file.seek(first)
            left = last - first + 1
            while block := file.read(min(left, 1 << 20)):
                self.wfile.write(block)
                left -= len(block)

    def _head(self, status: int, content_type: str, length: int, extra: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = _HEADERS | {"Content-Type": content_type, "Content-Length": str(length)} | (extra or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _range(header: str | None, size: int) -> tuple[int, int]:
    """First and last byte of the one range that is asked for; the whole file for everything else."""
    found = re.fullmatch(r"bytes=(\d{1,18})-(\d{0,18})", header or "")
    if not found or int(found[1]) >= size:
        return 0, size - 1
    return int(found[1]), min(int(found[2]) if found[2] else size - 1, size - 1)


def _exact(value: Any) -> Any:
    """The same with integers as text that JavaScript would round."""
    if isinstance(value, dict):
        return {name: _exact(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_exact(item) for item in value]
    return str(value) if type(value) is int and abs(value) > _LARGEST_SAFE else value


_Act = Callable[..., None]
_ROUTES: list[tuple[str, str, _Act]] = [
    ("GET", r"/", _Handler._page),
    ("GET", r"/static/([a-z_-]+\.(?:js|css|svg))", _Handler._static),
    ("GET", r"/api/config", _Handler._config),
    ("POST", r"/api/check", _Handler._check),
    ("GET", r"/api/jobs", _Handler._jobs),
    ("POST", r"/api/jobs", _Handler._start),
    ("GET", r"/api/jobs/(\d{1,9})", _Handler._look),
    ("POST", r"/api/jobs/(\d{1,9})/cancel", _Handler._cancel),
    ("POST", r"/api/compare", _Handler._compare),
    ("GET", r"/files/(\d{1,9})/(\d{1,9})", _Handler._file),
    ("GET", r"/files/(\d{1,9})/(\d{1,9})\.mp4", _Handler._playable),
    ("GET", r"/compare/(compare-[0-9a-f]{16}\.mp4)", _Handler._compared),
]


def server(playground: Playground, port: int) -> ThreadingHTTPServer:
    """Ready to `serve_forever`; port 0 takes a free one. Raises OSError where the port is taken."""
    made = ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, playground))
    made.daemon_threads = True
    return made
