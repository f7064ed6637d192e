"""`loras[].path` → a local file whose header has been read.

A relative path is looked for below LORA_DIR; a URL is fetched through the cache in LORA_CACHE_DIR.
Whether the LoRA fits the model is the pipeline's to say.
"""

from __future__ import annotations

import errno
import hashlib
import re
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from difflib import get_close_matches
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlsplit, urlunsplit

from pipelines.errors import LoraInvalid
from pipelines.lora.file import LoraFile, why_unreadable
from worker.errors import Code, Problem, WorkerError
from worker.files import below
from worker.lora_cache import LoraCache, Source
from worker.net.download import Answer, DownloadError, fetch_into
from worker.request import is_hub, is_url
from worker.settings import Settings

_SIGNATURE = re.compile(r"(x-amz-|x-goog-)?signature|sig", re.IGNORECASE)
_OF_A_SIGNATURE = re.compile(
    r"x-(amz|goog)-.*"  # S3 and Google Cloud Storage
    r"|signature|expires|awsaccesskeyid|googleaccessid|key-pair-id|policy"  # their older kind, CloudFront
    r"|sig|s[eprtv]|spr|sk[a-z]+",  # Azure
    re.IGNORECASE,
)
"""Query parameters that are there for a signature, or differ from one to the next."""


def fetch_lora(
    path: str, where: str, hf_token: str | None, settings: Settings, stop: threading.Event, held: ExitStack
) -> LoraFile:
    """The LoRA at `path`, with its header. A downloaded file stays in the cache until `held` is closed.

    `where`: the field that names it, for errors. `hf_token`: the request's; without one, the worker's own is used.
    Raises Stopped, WorkerError: LORA_NOT_FOUND, LORA_DOWNLOAD_FAILED, LORA_INVALID.
    """
    hf_token = hf_token or (settings.hf_token.get_secret_value() if settings.hf_token else None)
    try:
        if is_url(path):
            return _download(path, where, hf_token, settings, stop, held)
        return LoraFile.read(_find(path, where, settings.lora_dir))
    except LoraInvalid as error:
        raise WorkerError.of([Problem(Code.LORA_INVALID, where, str(error))]) from error


def fetch_recovery_adapter(
    name: str, where: str, hf_token: str | None, settings: Settings, stop: threading.Event, held: ExitStack
) -> LoraFile:
    """The accuracy recovery adapter that a training config names: a URL, or `ORG/REPO/FILE` on the Hugging Face Hub.

    Below LORA_DIR and the folders of the weights it is looked for by that path and by the file's name alone, since the config
    has a path of the training's machine; only then on the Hub. Raises as `fetch_lora`.
    """
    file = PurePosixPath(name).name
    roots = [settings.lora_dir, *(place.path for place in settings.checkpoint_places if not place.is_hub_cache)]
    for root in [] if is_url(name) else roots:
        for path in (name.lstrip("/"), file):
            if found := below(root, path):
                try:
                    return LoraFile.read(found)
                except LoraInvalid as error:
                    raise WorkerError.of([Problem(Code.LORA_INVALID, where, str(error))]) from error
    parts = name.split("/")
    if len(parts) == 3 and all(parts):
        name = f"https://huggingface.co/{parts[0]}/{parts[1]}/resolve/main/{parts[2]}"
    if is_url(name):
        return fetch_lora(name, where, hf_token, settings, stop, held)
    text = f"the accuracy recovery adapter `{_shown(file)}` is not in the worker's LoRA folder; put it there, or give its URL"
    raise WorkerError.of([Problem(Code.LORA_NOT_FOUND, where, text)])


def _find(name: str, where: str, folder: Path) -> Path:
    path = below(folder, name)
    if path is None:
        missing = f"the worker's LoRA folder has no `{_shown(name)}`{_nearest(folder.resolve(), name)}"
        text = f"{missing}; check the name, or give an http(s) URL"
        raise WorkerError.of([Problem(Code.LORA_NOT_FOUND, where, text)])
    if path.suffix != ".safetensors":
        text = "its name does not end in .safetensors, the only format that is loaded; export the LoRA as safetensors"
        raise WorkerError.of([Problem(Code.LORA_INVALID, where, text)])
    return path


def _shown(name: str) -> str:
    return name if len(name) <= 200 and name.isprintable() else "such file"


def _nearest(root: Path, name: str) -> str:
    """Names of LoRAs in the same folder, or in the root, that are close to `name`."""
    folder = (root / name).parent
    for place in (folder, root):
        try:
            if place.resolve().is_relative_to(root):
                paths = islice(place.glob("*.safetensors"), 1000)
                there = [path.relative_to(root).as_posix() for path in paths if path.resolve().is_relative_to(root)]
                if close := get_close_matches(name, there, cutoff=0.5):
                    return f" (did you mean {' or '.join(f'`{each}`' for each in close)}?)"
        except (OSError, ValueError, RuntimeError):
            continue
    return ""


def _download(
    url: str, where: str, hf_token: str | None, settings: Settings, stop: threading.Event, held: ExitStack
) -> LoraFile:
    url = download_url(url)
    token = authorization(url, hf_token)

    def download(file: IO[bytes], validators: Mapping[str, str]) -> Answer:
        private = settings.allow_private_downloads
        return fetch_into(
            file, url, settings.max_lora_bytes, stop, private=private, headers=token | dict(validators), look=_check_head
        )

    source = Source(_sum(unsigned(url)), _sum(url, *token.values()), download)
    try:
        return LoraCache(settings.lora_cache_dir, settings.lora_cache_max_bytes, stop).fetch(source, held)
    except DownloadError as error:
        hint = "check the URL"
        if is_hub(urlsplit(url).hostname or "") and error.status in (401, 403, 404):
            hint = "check the URL, and for a private or gated repository give hf_token"
        text = f"the download failed: {error}; {hint}"
        raise WorkerError.of([Problem(Code.LORA_DOWNLOAD_FAILED, where, text)]) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "give it more room, or lower LORA_CACHE_MAX_BYTES" if full else "check that the worker can write there"
        text = f"the file could not be kept in the worker's LORA_CACHE_DIR ({error.strerror}); {remedy}"
        raise WorkerError.of([Problem(Code.LORA_DOWNLOAD_FAILED, where, text)]) from error


def _check_head(head: bytes) -> None:
    """Raises LoraInvalid when the first bytes tell that the rest need not be fetched."""
    if why := why_unreadable(head):
        raise LoraInvalid(why)


def _sum(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def unsigned(url: str) -> str:
    """The URL without its signature, where it has one: presigned URLs of the same file differ in nothing else."""
    parts = urlsplit(url)._replace(fragment="")
    query = parts.query.split("&")
    names = [part.partition("=")[0] for part in query]
    if any(_SIGNATURE.fullmatch(name) for name in names):
        kept = [part for part, name in zip(query, names, strict=True) if not _OF_A_SIGNATURE.fullmatch(name)]
        parts = parts._replace(query="&".join(kept))
    return urlunsplit(parts)


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
    """The token goes to the Hugging Face Hub alone, over https, and a redirect to another host loses it."""
    parts = urlsplit(url)
    if hf_token and parts.scheme == "https" and is_hub(parts.hostname or ""):
        return {"Authorization": f"Bearer {hf_token}"}
    return {}
