"""Turns `loras[].path` into a local file, and reads its header.

A relative path is a file below LORA_DIR. A URL is downloaded through the cache in LORA_CACHE_DIR. The pipelines check whether
the LoRA fits the model.
"""

from __future__ import annotations

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

from pipelines.catalog import DistilledLora
from pipelines.errors import DISK_FULL, LoraInvalid
from pipelines.lora.file import LoraFile, why_unreadable
from worker.errors import Code, Problem, WorkerError
from worker.files import below
from worker.logs import log
from worker.lora_cache import LoraCache, Source
from worker.net.download import Answer, DownloadError, fetch_into
from worker.request import is_hub, is_url
from worker.settings import Settings

_SIGNATURE = re.compile(r"(x-amz-|x-goog-)?signature|sig", re.IGNORECASE)
_SIGNATURE_PARAMETER = re.compile(
    r"x-(amz|goog)-.*"  # S3 and Google Cloud Storage
    r"|signature|expires|awsaccesskeyid|googleaccessid|key-pair-id|policy"  # their older kind, CloudFront
    r"|sig|s[eprtv]|spr|sk[a-z]+",  # Azure
    re.IGNORECASE,
)
"""Query parameters that belong to a signature and differ between two signed URLs of one file."""


def fetch_lora(
    path: str, where: str, hf_token: str | None, settings: Settings, stop: threading.Event, held: ExitStack
) -> LoraFile:
    """Return the LoRA at `path`, with its header. A downloaded file stays in the cache until `held` is closed.

    `where`: the field that names it, for errors. `hf_token`: the request's; if it is None, the worker's own is used.
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
    """Return the accuracy recovery adapter that a training config names: a URL, or `ORG/REPO/FILE` on the Hugging Face Hub.

    First search LORA_DIR and the folders of the weights, by the whole path and by the file's name alone, since the config has a
    path of the training machine. Then try the Hub. Raises the same errors as `fetch_lora`.
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


def fetch_distilled_lora(
    lora: DistilledLora, model_id: str, settings: Settings, stop: threading.Event, held: ExitStack
) -> LoraFile:
    """Return a LoRA that a draft needs, from the first place that has it. With ALLOW_DOWNLOAD it is downloaded otherwise.

    Raises the same errors as `fetch_lora`, at the field `draft`.
    """
    for place in settings.accelerator_places:
        folders = [*place.folders_of(lora.repo), *([] if place.is_hub_cache else [place.path])]
        if found := next((file for folder in folders if _is_there(file := folder / lora.path)), None):
            try:
                return LoraFile.read(found)
            except LoraInvalid as error:
                text = f"the distilled LoRA {lora} in {place.name}: {error}"
                raise WorkerError.of([Problem(Code.LORA_INVALID, "draft", text)]) from error
    if settings.allow_download:
        log.info("downloading the distilled LoRA %s, since ALLOW_DOWNLOAD is set", lora)
        return fetch_lora(lora.url, "draft", None, settings, stop, held)
    places = " or ".join(place.name for place in settings.accelerator_places)
    text = (
        f"the worker does not have the distilled LoRA {lora} in {places}; its operator fetches it with `python -m "
        f"builder.fetch_checkpoints --draft --model-id {model_id} --to DIR`, or sets ALLOW_DOWNLOAD=1"
    )
    raise WorkerError.of([Problem(Code.LORA_NOT_FOUND, "draft", text)])


def _is_there(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a volume that went away; another place may do
        return False


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
    """Return a hint with the names of LoRAs, in the same folder or in the root, that are similar to `name`."""
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
            file, url, settings.max_lora_bytes, stop, private=private, headers=token | dict(validators), check_head=_check_head
        )

    source = Source(_checksum(unsigned(url)), _checksum(url, *token.values()), download)
    try:
        return LoraCache(settings.lora_cache_dir, settings.lora_cache_max_bytes, stop).fetch(source, held)
    except DownloadError as error:
        hint = "check the URL"
        if is_hub(urlsplit(url).hostname or "") and error.status in (401, 403, 404):
            hint = "check the URL, and for a private or gated repository give hf_token"
        text = f"the download failed: {error}; {hint}"
        raise WorkerError.of([Problem(Code.LORA_DOWNLOAD_FAILED, where, text)]) from error
    except OSError as error:
        full = error.errno in DISK_FULL
        remedy = "give it more room, or lower LORA_CACHE_MAX_BYTES" if full else "check that the worker can write there"
        text = f"the file could not be stored in the worker's LORA_CACHE_DIR ({error.strerror}); {remedy}"
        raise WorkerError.of([Problem(Code.LORA_DOWNLOAD_FAILED, where, text)]) from error


def _check_head(head: bytes) -> None:
    """Raise LoraInvalid if the first bytes show that the file is not a LoRA."""
    if why := why_unreadable(head):
        raise LoraInvalid(why)


def _checksum(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def unsigned(url: str) -> str:
    """Return the URL without its signature: presigned URLs of the same file differ in nothing else."""
    parts = urlsplit(url)._replace(fragment="")
    query = parts.query.split("&")
    names = [part.partition("=")[0] for part in query]
    if any(_SIGNATURE.fullmatch(name) for name in names):
        kept = [part for part, name in zip(query, names, strict=True) if not _SIGNATURE_PARAMETER.fullmatch(name)]
        parts = parts._replace(query="&".join(kept))
    return urlunsplit(parts)


def download_url(url: str) -> str:
    """Return the URL of the file itself: on the Hugging Face Hub, `/blob/` is a page and `/resolve/` is the file.

    `hf.co` becomes the Hub's own name, because the redirect would drop the token.
    """
    parts = urlsplit(url)
    if is_hub(parts.hostname or ""):
        host = "huggingface.co" if parts.netloc.lower() == "hf.co" else parts.netloc
        parts = parts._replace(netloc=host, path=parts.path.replace("/blob/", "/resolve/", 1))
    return urlunsplit(parts)


def authorization(url: str, hf_token: str | None) -> dict[str, str]:
    """Return a header with the token, for the Hugging Face Hub over https only. A redirect to another host drops it."""
    parts = urlsplit(url)
    if hf_token and parts.scheme == "https" and is_hub(parts.hostname or ""):
        return {"Authorization": f"Bearer {hf_token}"}
    return {}
