"""The HTTP server: the page, its API and the files of its jobs, for a browser on this computer only.

Other pages in the same browser must not reach it. So it listens on 127.0.0.1, accepts only host names of this computer (against
DNS rebinding) and only requests of its own origin (against forged requests), and its headers forbid embedding. No answer
contains the API key.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from client import Client, ClientError, DownloadFailed, Health, InvalidRequest, JobNotFound, Unreachable
from pipelines.catalog import DEFAULT_SEED, MODELS
from playground.check import check, recipe_of
from playground.jobs import CONTENT_TYPES, Job, Jobs, NoFile
from playground.side_by_side import side_by_side
from playground.store import Store
from playground.sweeps import Sweeps
from playground.training import read_dropped
from tools.cli import BadInput
from tools.compare import settings_in
from tools.frames import Clip, read_clip
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

_480P, _720P = [(832, 480), (480, 832), (640, 640)], [(1280, 720), (720, 1280), (960, 960)]
SIZES = {
    "wan22_14b_i2v": _480P + _720P[:2],
    "wan22_14b_t2v": _480P + _720P[:2],
    "wan22_5b": [(1280, 704), (704, 1280), (960, 960)],
    "wan21_i2v_14b": _720P,
    "wan21_i2v_14b480p": _480P,
    "wan21_14b": _480P + _720P[:2],
    "wan21_1b": _480P,
}
"""The form's sizes to choose from, width and height in pixels: those of the models' pages on the Hub, and a square."""

_MAX_JSON = 128 * 1024**2
"""Bytes; a request can have several images."""
_MAX_SAMPLE = 1024**3
"""Bytes."""
_LARGEST_INTEGER = 2**53 - 1
"""The largest that JavaScript represents exactly. A seed can be larger."""


class HttpError(Exception):
    """The browser's request fails with `status`; the text says why."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Playground:
    """The page's operations. Its methods may be called from any thread."""

    def __init__(
        self,
        client: Client,
        folder: Path,
        example: dict[str, Any] | None = None,
        loras: Path | None = None,
        runs: Path | None = None,
    ) -> None:
        """`folder`: for temporary files. `example`: the form's first request. `loras`: LORA_DIR, for suggestions.

        `runs`: a folder where the runs and their files outlive the process; None: they end with it.
        """
        self._client = client
        store = Store(runs) if runs else None
        self.jobs = Jobs(client, runs or folder, store)
        self.sweeps = Sweeps(client, self.jobs, folder, store)
        self._folder = folder
        self._example = example
        self._loras = loras

    @property
    def name(self) -> str:
        """`endpoint ID`, or the host of a worker's local API."""
        url = self._client.url
        return url.partition("://")[2] if self._client.is_local else f"endpoint {url.rpartition('/')[2]}"

    def config(self) -> dict[str, Any]:
        """The page's constants: the API that it uses, the schema and the models."""
        models = [
            {
                "id": spec.id,
                "title": spec.title,
                "control_image": spec.control_image,
                "takes_last_image": spec.takes_last_image,
                "moe": spec.moe,
                "needs_toolkit": spec.needs_toolkit,
                "draft": spec.draft is not None,
                "sizes": SIZES[spec.id],
                "size_divisor": {match: recipe_of(spec, match).size_divisor for match in ("documented", "preview")},
            }
            for spec in MODELS.values()
        ]
        return {
            "target": {"name": self.name, "url": self._client.url, "is_local": self._client.is_local},
            "schema": Request.model_json_schema(),
            "default_seed": DEFAULT_SEED,
            "models": models,
            "example": self._example,
            "loras": sorted(str(path.relative_to(self._loras)) for path in self._loras.rglob("*.safetensors"))
            if self._loras
            else [],
        }

    def worker(self) -> dict[str, Any]:
        """The worker's `state` (ready, busy, cold or gone), the same as `text`, and the `model` that it serves, if known."""
        try:
            health = self._client.health()
        except JobNotFound as error:  # a local API without /health answers, so its worker runs
            state, text = ("ready", "") if self._client.is_local else ("gone", str(error))
            return {"state": state, "text": text, "model": self.jobs.served_model}
        except ClientError as error:
            return {"state": "gone", "text": str(error), "model": self.jobs.served_model}
        state, text = _state_of(health)
        return {"state": state, "text": text, "model": health.model or self.jobs.served_model}

    def training(self, body: Any) -> dict[str, Any]:
        """What a dropped training folder says, for the form. Raises BadInput."""
        return read_dropped(body, self.worker()["model"], self._loras)

    def check(self, request: Any) -> dict[str, Any]:
        return check(request, self._client.is_local)

    def compare(self, a: str, b: str, sample: tuple[str, Path] | None) -> dict[str, Any]:
        """Compare two outputs, given as `JOB/FILE` as in /files. A `sample`, its name and file, takes the place of A.

        Raises NoFile, BadInput, DownloadFailed.
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

    def _output(self, place: str) -> tuple[Clip, dict[str, Any], str]:
        """(clip, settings, title) of an output."""
        number, _, file = place.partition("/")
        if not (number.isdigit() and file.isdigit()):
            raise NoFile(f"{place[:40]!r} is not an output; write JOB/FILE")
        job = self.jobs.get(int(number))
        output = job.output(int(file))
        settings = settings_in(job.result, output.prompt_index, output.seed)
        title = self.sweeps.title(job) or f"Run {job.number}, seed {output.seed}"
        return read_clip(self.jobs.file(job.number, int(file))), settings, title

    def grid(self, number: int) -> dict[str, Any]:
        """The video of a sweep's finished cells. Raises NoFile, BadInput."""
        grid = self.sweeps.grid(number)
        return grid | {"url": f"/sweeps/{grid['file']}"} if grid else {}

    def temporary(self, name: str) -> Path:
        return self._folder / name

    def close(self) -> None:
        self.sweeps.close()


def _state_of(health: Health) -> tuple[str, str]:
    """(ready, busy or cold; what that means for the next run)."""
    if health.idle:
        return "ready", "a run starts at once"
    if health.running:
        waiting = f", {health.jobs_waiting} waiting" if health.jobs_waiting else ""
        return "busy", f"{health.running} running{waiting}; a run waits for its turn"
    if health.starting:
        return "cold", "a worker is starting; a run waits for it"
    if health.unusable:
        return "gone", "RunPod holds this endpoint's workers back, or found them unhealthy; its console says why"
    return "cold", "no worker is up; a run starts one, which takes its cold start"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "playground"
    sys_version = ""

    def __init__(self, playground: Playground, *arguments: Any) -> None:
        self._playground = playground
        super().__init__(*arguments)

    def handle(self) -> None:
        with suppress(ConnectionError):  # the browser stops reading a video, or was closed
            super().handle()

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing: the page shows what happens."""

    def _answer(self, method: str) -> None:
        self._unread = int(self.headers.get("Content-Length") or 0) if self.headers.get("Content-Length", "0").isdigit() else -1
        try:
            self._guard(method)
            path = urlsplit(self.path).path
            for verb, pattern, act in _ROUTES:
                if verb == method and (found := re.fullmatch(pattern, path)):
                    act(self, *found.groups())
                    return
            raise HttpError(404, "this address does not exist")
        except HttpError as error:
            self._send_json({"error": str(error), "again": False}, error.status)
        except ClientError as error:
            status = 400 if isinstance(error, InvalidRequest) else 404 if isinstance(error, DownloadFailed) else 502
            self._send_json({"error": str(error), "again": isinstance(error, Unreachable)}, status)
        except NoFile as error:
            self._send_json({"error": str(error), "again": False}, 404)
        except BadInput as error:
            self._send_json({"error": str(error), "again": False}, 400)
        except ConnectionError:
            raise
        except Exception as error:  # of an endpoint's answer, or of a file: the page must hear of it
            print(f"playground: {method} {urlsplit(self.path).path}: {type(error).__name__}", file=sys.stderr)
            self._send_json({"error": f"this failed ({type(error).__name__}); the terminal has the line", "again": False}, 500)

    def _guard(self, method: str) -> None:
        """Accept only this page, under a host name of this computer."""
        port = self.connection.getsockname()[1]
        own = {f"{host}:{port}" for host in ("127.0.0.1", "localhost", "[::1]")}
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host not in own:
            raise HttpError(403, "the playground does not have this host name")
        if (origin is None and method == "POST") or origin not in (None, f"http://{host}"):
            raise HttpError(403, "only the playground's own page may do this")
        # The header is missing without a browser, and "none" for a typed address. Other sites may link to the page itself.
        if self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none") and self.path != "/":
            raise HttpError(403, "only the playground's own page may do this")

    # Routes

    def _page(self) -> None:
        self._send_file(STATIC / "index.html")

    def _static(self, name: str) -> None:
        known = {path.name: path for path in STATIC.iterdir()}
        if name not in known:
            raise HttpError(404, "this address does not exist")
        self._send_file(known[name])

    def _config(self) -> None:
        self._send_json(self._playground.config())

    def _worker(self) -> None:
        self._send_json(self._playground.worker())

    def _training(self) -> None:
        self._send_json(self._playground.training(self._json()))

    def _check(self) -> None:
        self._send_json(self._playground.check(self._json()))

    def _jobs(self) -> None:
        self._send_json({"jobs": [job.public() for job in self._playground.jobs.all()]})

    def _start(self) -> None:
        request = self._json()
        if not isinstance(request, dict):
            raise HttpError(400, "a request must be an object")
        self._send_job(self._playground.jobs.start(request))

    def _refresh(self, number: str) -> None:
        self._send_job(self._playground.jobs.refresh(int(number)))

    def _progress(self, number: str) -> None:
        """All but the request, which can be large and does not change."""
        job = self._playground.jobs.refresh(int(number)).public()
        self._send_json({name: value for name, value in job.items() if name != "request"})

    def _cancel(self, number: str) -> None:
        self._send_job(self._playground.jobs.cancel(int(number)))

    def _delete(self, number: str) -> None:
        self._playground.jobs.delete(int(number))
        self._send_json({})

    def _plan_sweep(self) -> None:
        self._send_json(self._playground.sweeps.plan(self._json()))

    def _sweeps(self) -> None:
        self._send_json({"sweeps": self._playground.sweeps.all()})

    def _start_sweep(self) -> None:
        self._send_json(self._playground.sweeps.start(self._json()))

    def _sweep(self, number: str) -> None:
        self._send_json(self._playground.sweeps.public(int(number)))

    def _cancel_sweep(self, number: str) -> None:
        self._send_json(self._playground.sweeps.cancel(int(number)))

    def _sweep_again(self, number: str) -> None:
        asked = self._json()
        place, token = (asked.get("place"), asked.get("hf_token")) if isinstance(asked, dict) else (None, None)
        place = place if type(place) is int and place >= 0 else None
        self._send_json(self._playground.sweeps.again(int(number), place, token if isinstance(token, str) else None))

    def _delete_sweep(self, number: str) -> None:
        self._playground.sweeps.delete(int(number))
        self._send_json({})

    def _grid(self, number: str) -> None:
        self._send_json(self._playground.grid(int(number)))

    def _archive(self) -> None:
        target = self._playground.temporary(f"runs-{secrets.token_hex(8)}.zip")
        try:
            self._playground.jobs.archive(target)
            self._send_file(target)
        finally:
            target.unlink(missing_ok=True)

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

    def _temporary(self, name: str) -> None:
        path = self._playground.temporary(name)
        if not path.is_file():
            raise NoFile("this video does not exist any more; make it again")
        self._send_file(path)

    # Bodies

    def _sample(self, name: str) -> tuple[str, Path]:
        """The body as a file, and the name that the user gave it."""
        if not 0 < self._unread <= _MAX_SAMPLE:
            raise HttpError(413, "a sample must not be empty or larger than 1 GB")
        suffix = Path(name).suffix.lower()
        target = self._playground.temporary(f"sample-{secrets.token_hex(8)}{suffix if suffix in CONTENT_TYPES else ''}")
        with target.open("wb") as file:
            while self._unread:
                block = self._read(min(self._unread, 1 << 20))
                file.write(block)
        return Path(name).name[:100], target

    def _json(self) -> Any:
        if not 0 <= self._unread <= _MAX_JSON:
            raise HttpError(413, "the request is too large")
        if self.headers.get_content_type() != "application/json":
            raise HttpError(415, "a request must be JSON")
        try:
            return json.loads(self._read(self._unread))
        except ValueError as error:
            raise HttpError(400, "this is not JSON") from error

    def _read(self, count: int) -> bytes:
        block = self.rfile.read(count)
        if len(block) < count:
            raise ConnectionResetError
        self._unread -= len(block)
        return block

    # Answers

    def _send_json(self, answer: Any, status: int = 200) -> None:
        body = json.dumps(_exact(answer), ensure_ascii=False).encode("utf-8", "replace")
        if self._unread:
            self.close_connection = True  # the rest of the body would be read as the next request
        self._head(status, "application/json", len(body))
        self.wfile.write(body)

    def _send_file(self, path: Path) -> None:
        """Send the file, or the range of it that a video player requests."""
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
    """First and last byte of a request for one range; those of the whole file for any other request."""
    found = re.fullmatch(r"bytes=(\d{1,18})-(\d{0,18})", header or "")
    if not found or int(found[1]) >= size:
        return 0, size - 1
    return int(found[1]), min(int(found[2]) if found[2] else size - 1, size - 1)


def _exact(value: Any) -> Any:
    """The same, with the integers that JavaScript would round as text."""
    if isinstance(value, dict):
        return {name: _exact(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_exact(item) for item in value]
    return str(value) if type(value) is int and abs(value) > _LARGEST_INTEGER else value


_Act = Callable[..., None]
_ROUTES: list[tuple[str, str, _Act]] = [
    ("GET", r"/", _Handler._page),
    ("GET", r"/static/([a-z_-]+\.(?:js|css|svg))", _Handler._static),
    ("GET", r"/api/config", _Handler._config),
    ("GET", r"/api/worker", _Handler._worker),
    ("POST", r"/api/training", _Handler._training),
    ("POST", r"/api/check", _Handler._check),
    ("GET", r"/api/jobs", _Handler._jobs),
    ("POST", r"/api/jobs", _Handler._start),
    ("GET", r"/api/jobs/(\d{1,9})", _Handler._refresh),
    ("GET", r"/api/jobs/(\d{1,9})/progress", _Handler._progress),
    ("POST", r"/api/jobs/(\d{1,9})/cancel", _Handler._cancel),
    ("POST", r"/api/jobs/(\d{1,9})/delete", _Handler._delete),
    ("GET", r"/runs\.zip", _Handler._archive),
    ("GET", r"/api/sweeps", _Handler._sweeps),
    ("POST", r"/api/sweeps", _Handler._start_sweep),
    ("POST", r"/api/sweeps/plan", _Handler._plan_sweep),
    ("GET", r"/api/sweeps/(\d{1,9})", _Handler._sweep),
    ("POST", r"/api/sweeps/(\d{1,9})/cancel", _Handler._cancel_sweep),
    ("POST", r"/api/sweeps/(\d{1,9})/again", _Handler._sweep_again),
    ("POST", r"/api/sweeps/(\d{1,9})/delete", _Handler._delete_sweep),
    ("POST", r"/api/sweeps/(\d{1,9})/grid", _Handler._grid),
    ("GET", r"/sweeps/(sweep-\d{1,9}-[0-9a-f]{16}\.mp4)", _Handler._temporary),
    ("POST", r"/api/compare", _Handler._compare),
    ("GET", r"/files/(\d{1,9})/(\d{1,9})", _Handler._file),
    ("GET", r"/files/(\d{1,9})/(\d{1,9})\.mp4", _Handler._playable),
    ("GET", r"/compare/(compare-[0-9a-f]{16}\.mp4)", _Handler._temporary),
]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, playground: Playground, port: int) -> None:
        self._playground = playground
        super().__init__(("127.0.0.1", port), partial(_Handler, playground))

    def server_close(self) -> None:
        self._playground.close()
        super().server_close()


def server(playground: Playground, port: int) -> ThreadingHTTPServer:
    """A server to `serve_forever`; port 0 chooses a free one. Raises OSError if the port is in use."""
    return _Server(playground, port)
