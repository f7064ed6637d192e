"""`loras[].path` → a local file whose header has been read.

A relative path is looked for below LORA_DIR; a URL is downloaded into LORA_CACHE_DIR, where it stays for the next job.
Whether the LoRA fits the model is the pipeline's to say.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from pipelines.errors import LoraInvalid
from pipelines.lora_file import LoraFile
from worker.download import DownloadError, fetch_file
from worker.errors import Code, Problem, WorkerError
from worker.request import Lora, is_hub, is_url
from worker.settings import Settings


def fetch_lora(lora: Lora, index: int, hf_token: str | None, settings: Settings, stop: threading.Event) -> LoraFile:
    """The file of `loras[index]`, with its header.

    Raises WorkerError: LORA_NOT_FOUND, LORA_DOWNLOAD_FAILED, LORA_INVALID.
    """
    where = f"loras[{index}].path"
    if is_url(lora.path):
        path = _download(lora.path, where, hf_token, settings, stop)
    else:
        path = _find(lora.path, where, settings.lora_dir)
    try:
        return LoraFile.read(path)
    except LoraInvalid as error:
        if is_url(lora.path):
            _etag_file(path).unlink(missing_ok=True)  # else the server would be asked for news of a broken file for ever
        raise WorkerError.of([Problem(Code.LORA_INVALID, where, str(error))]) from error


def _find(name: str, where: str, folder: Path) -> Path:
    root = folder.resolve()
    try:
        path = (root / name).resolve()
        found = path.is_relative_to(root) and path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        found = False
    if not found:
        text = "no such file in the worker's LoRA folder; check the name, or give an http(s) URL"
        raise WorkerError.of([Problem(Code.LORA_NOT_FOUND, where, text)])
    if path.suffix != ".safetensors":
        text = "its name does not end in .safetensors, the only format that is loaded; export the LoRA as safetensors"
        raise WorkerError.of([Problem(Code.LORA_INVALID, where, text)])
    return path


def _download(url: str, where: str, hf_token: str | None, settings: Settings, stop: threading.Event) -> Path:
    """Fetch the URL, or ask its server whether the copy at hand is still current."""
    url = download_url(url)
    path = settings.lora_cache_dir / f"{hashlib.sha256(url.encode()).hexdigest()}.safetensors"
    etag_file = _etag_file(path)
    headers = authorization(url, hf_token)
    if path.is_file() and etag_file.is_file():
        headers["If-None-Match"] = etag_file.read_text()
    try:
        etag = fetch_file(url, path, settings.max_lora_bytes, stop, headers)
    except DownloadError as error:
        hint = "check the URL"
        if is_hub(urlsplit(url).hostname or "") and any(status in str(error) for status in ("401", "403", "404")):
            hint = "check the URL, and for a private or gated repository give hf_token"
        text = f"the download failed: {error}; {hint}"
        raise WorkerError.of([Problem(Code.LORA_DOWNLOAD_FAILED, where, text)]) from error
    if etag:
        etag_file.write_text(etag)
    else:
        etag_file.unlink(missing_ok=True)
    return path


def _etag_file(path: Path) -> Path:
    return path.with_suffix(".etag")


def download_url(url: str) -> str:
    """The URL of the file itself: on the Hugging Face Hub, `/blob/` shows a page and `/resolve/` gives the file.

    `hf.co` redirects to the Hub's own name, and on the way the token would be dropped.
    """
    parts = urlsplit(url)
    if is_hub(parts.hostname or ""):
        host = "huggingface.co" if parts.netloc.lower() == "hf.co" else parts.netloc
        parts = parts._replace(netloc=host, path=parts.path.replace("/blob/", "/resolve/", 1))
    return urlunsplit(parts)


def authorization(url: str, hf_token: str | None) -> dict[str, str]:
    """The token goes to the Hugging Face Hub alone, over https, and requests drops it on a redirect to another host."""
    parts = urlsplit(url)
    if hf_token and parts.scheme == "https" and is_hub(parts.hostname or ""):
        return {"Authorization": f"Bearer {hf_token}"}
    return {}
