"""Thousands of requests, LoRA files and images that are wrong in some way: each gets an answer in words, and in time.

The examples are the same in every run, so that a red test is the change's doing and not the day's.
`FUZZ=20 pytest tests/test_fuzz.py` draws others, twenty times as many: for whoever changes what reads input.
"""

from __future__ import annotations

import asyncio
import faulthandler
import io
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial, reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from safetensors import safe_open
from safetensors.torch import save

from builder.tiny_checkpoints import SIZE_1B, lora_metadata, lora_tensors
from pipelines import WanModel
from pipelines.catalog import MODELS
from pipelines.errors import LoraError
from pipelines.lora.file import Adapter, LoraFile
from pipelines.recipes import documented, era_of
from pipelines.safetensors_header import SafetensorsError, read_header
from worker.decide import shots_of
from worker.errors import Code, WorkerError
from worker.image_decode import MAX_PIXELS, decode
from worker.logs import log
from worker.parse import parse
from worker.service import Service
from worker.settings import Settings
from worker.startup.cold_start import cold_start

TIMES = int(os.environ.get("FUZZ", "0"))


def examples(number: int) -> settings:
    return settings(
        max_examples=number * TIMES or number // 2,
        derandomize=not TIMES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=set(Phase) - {Phase.explain},  # which traces every line
    )


class TookTooLong(BaseException):
    """Beyond what any `except Exception` on the way swallows."""


@contextmanager
def in_time() -> Iterator[None]:
    """Interrupts the block after a time that only a hang takes, however busy the machine is.

    What hangs in a thread cannot be interrupted, and is waited for: that ends the process, which shows where it hung.
    """

    def give_up(*_: Any) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 10)
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def runner(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """A worker of wan21_1b, in whose LoRA folder lies more than LoRAs."""
    folder = tmp_path_factory.mktemp("fuzz")
    loras = folder / "loras"
    shutil.copytree(tiny / "loras", loras)
    (loras / "folder.safetensors").mkdir()
    os.mkfifo(loras / "pipe.safetensors")
    (loras / "device.safetensors").symlink_to("/dev/zero")
    (loras / "page.safetensors").write_bytes(b"<html>")
    (loras / "pickle.safetensors").write_bytes(b"\x80\x04K\x01.")
    return cold_start(
        Settings(
            model_id="wan21_1b",
            checkpoint_dir=tiny,
            lora_dir=loras,
            lora_cache_dir=folder / "cache",
            recovery_dir=folder / "recovery",
            output_dir=folder / "output",
            device="cpu",
        )
    )


# Requests

TOKEN = "hf_S3cr3tS3cr3tS3cr3tS3cr3tS3cr3tS3cr"
DATA_URL = "data:image/png;base64,iVBORw0KGgo="

URLS = [
    "http://127.0.0.1:1/a.safetensors",
    "https://127.0.0.1:1",
    "HTTP://LOCALHOST:1/",
    "http://127.1:1/",
    "http://2130706433:1/",
    "http://0x7f.0.0.1:1/",
    "http://0:1/",
    "http://[::1]:1/",
    "http://[::ffff:127.0.0.1]:1/",
    "http://[::1%25lo]:1/",
    "http://[::1",
    "http://[]/",
    "http://169.254.169.254/latest/meta-data/",
    "http://10.0.0.1:1/",
    f"http://user:{TOKEN}@127.0.0.1:1/?sig={TOKEN}",
    f"http://127.0.0.1:1\\@example.com/{TOKEN}",
    "http://127.0.0.1:99999/",
    "http://127.0.0.1:-1/",
    "http://127.0.0.1:port/",
    "http://",
    "http:///a",
    "http://.:1/",
    "http://..:1/",
    "http://-:1/",
    "http://xn--:1/",
    f"http://{'a' * 64}:1/",
    f"http://{'a.' * 200}:1/",
    "http://ä:1/",
    "http://a\u3002b:1/",
    "http://a b:1/",
    "http://127.0.0.1:1/%",
    "http://127.0.0.1:1/\r\nHost: a",
    "http://127.0.0.1:1/\0",
    f"http://127.0.0.1:1/{'a' * 9000}",
    "https://huggingface.co/me/lora/tree/main",
    "https://huggingface.co/me/lora/blob/main/a.safetensors",
    "ftp://127.0.0.1:1/",
    "file:///etc/passwd",
    "s3://bucket/a.safetensors",
]
PATHS = [
    "wan21_1b/rank4.safetensors",
    "wan21_1b//./rank16.safetensors",
    "wan21_14b/rank8.safetensors",
    "wan21_i2v/rank8.safetensors",
    *(f"{name}.safetensors" for name in ("folder", "pipe", "device", "page", "pickle")),
    "wan21_1b",
    "wan21_1b/",
    ".",
    "../loras/wan21_1b/rank4.safetensors",
    "wan21_1b/../../out",
    "..\\a",
    "/etc/passwd",
    "/dev/zero",
    "~root/a",
    "a\0.safetensors",
    "a\n.safetensors",
    "a/" * 2000,
    "a" * 300 + ".safetensors",
    "%2e%2e/a.safetensors",
    "\u202egnp.a",
]
TEXTS = [
    "",
    " \n\t",
    "\0",
    "\ud800",
    "\udfff and more",
    "🎬" * 3,
    "\u202e\ufeff",
    "[trigger]",
    "[trigger]" * 1000,
    "x" * 20_000,
    "null",
    "1e999",
    "<html>",
    "{{7*7}} ${HOME} %s %n {0}",
    "'; DROP TABLE jobs; --",
    TOKEN,
    DATA_URL,
    "high",
    "preview",
    "gif",
]
NUMBERS = [0, -1, 1, 2, 5, 64, 2**31, 2**63, 2**64, 10**400, -(10**400), 0.5, -0.0, 1e308, float("nan"), float("inf"), 5e-324]
NAMES = [
    *("model", "loras", "path", "transformer", "network_multiplier", "prompts", "prompt", "neg", "seed", "width", "hf_token"),
    *("ctrl_img", "ctrl_img_1", "sampler", "steps", "WIDTH", "width ", "__class__", "__proto__", "", "\ud800", "x" * 10_000),
]

values = st.one_of(
    st.sampled_from([None, True, False, [], {}, [[]], {"": None}]),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.sampled_from(URLS),
    st.sampled_from(PATHS),
    st.integers(),
    st.floats(),
    st.text(st.characters(), max_size=20),
)
junk = st.recursive(
    values,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


def nested(depth: int) -> Any:
    value: Any = "deep"
    for level in range(depth):
        value = {"prompts": value} if level % 2 else [value]
    return value


Place = tuple[Any, Any]
"""A container and the key or index of what lies in it."""


def places(value: Any) -> list[Place]:
    found: list[Place] = []
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found += [(value, key), *places(value[key])]
    return found


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """The document with one to three places changed."""
    whole = {"": deepcopy(document)}
    for _ in range(draw(st.integers(1, 3))):
        if not (there := places(whole)):
            break
        container, key = draw(st.sampled_from(there))
        kind = draw(st.integers(0, 8))
        if kind < 3:
            container[key] = deepcopy(draw(values))
        elif kind == 3:
            container[key] = deepcopy(draw(junk))
        elif kind == 4:
            del container[key]
        elif kind == 5:
            container[key] = draw(st.sampled_from([[container[key]] * 2, {"a": container[key]}, nested(10), nested(400)]))
        elif kind == 6:
            other, its_key = draw(st.sampled_from(there))
            if other.get(its_key) if isinstance(other, dict) else its_key < len(other):
                container[key] = deepcopy(other[its_key])
        elif isinstance(container[key], dict):
            container[key][draw(st.sampled_from(NAMES))] = deepcopy(draw(values))
        elif isinstance(container[key], list) and container[key]:
            container[key] = (container[key] * 200)[: draw(st.sampled_from([2, 3, 200]))]
    return whole.get("")


def a_request(model_id: str, lora: str, num_frames: int = 1, **fields: Any) -> dict[str, Any]:
    """A valid one, and as little work as there can be."""
    spec = MODELS[model_id]
    prompt: dict[str, Any] = {"prompt": "[trigger] a boat", "neg": "", "trigger_word": "sks", "sampler": "unipc", "seed": 1}
    prompt |= {"width": 64, "height": 64, "num_frames": num_frames, "fps": 16, "sample_steps": 1, "guidance_scale": 1.0}
    if spec.control_image == "required":
        prompt["ctrl_img"] = DATA_URL
    loras = [
        {"path": lora, "network_multiplier": 1.0} | ({"transformer": side} if spec.moe else {}) for side in ("high", "low")
    ]
    request = {"model": model_id, "loras": loras if spec.moe else loras[:1], "trigger_word": "sks", "hf_token": TOKEN}
    return request | {"prompts": [prompt], "match": "documented", "output_format": "png"} | fields


@st.composite
def inputs(draw: st.DrawFn) -> Any:
    """Mostly requests whose LoRA is not there: where the rest of them is valid, nothing is generated."""
    kind = draw(st.integers(0, 19))
    if kind == 0:
        return draw(junk)
    if kind == 1:
        return a_request("wan21_1b", draw(st.sampled_from([*URLS, *PATHS])))
    if kind == 2:
        return draw(mutated(a_request(draw(st.sampled_from(list(MODELS))), "away.safetensors")))
    if kind in (3, 4):
        chosen = {"match": draw(st.sampled_from(["documented", "preview"])), "num_frames": draw(st.sampled_from([1, 5]))}
        chosen["output_format"] = draw(st.sampled_from(["mp4", "gif", "webp", "png"]))
        return draw(mutated(a_request("wan21_1b", PATHS[0], **chosen)))
    return draw(mutated(a_request("wan21_1b", "away.safetensors")))


BUCKET = {"accessId": "id", "accessSecret": TOKEN, "bucketName": "bucket", "endpointUrl": "http://127.0.0.1:1"}


@st.composite
def jobs(draw: st.DrawFn) -> dict[str, Any]:
    job = {"id": draw(st.uuids().map(str)), "input": draw(inputs())}
    if draw(st.integers(0, 9)) == 0:
        job["s3Config"] = draw(mutated(BUCKET) | junk)
    if draw(st.integers(0, 9)) == 0:
        job["id"] = draw(junk)
    return cheap(json.loads(json.dumps(job)))


def cheap(job: dict[str, Any]) -> dict[str, Any]:
    """The job with little to do where its numbers are valid."""
    prompts = job["input"].get("prompts") if isinstance(job["input"], dict) else None
    for prompt in prompts if isinstance(prompts, list) else ():
        for name, least, most in (("width", 64, 4096), ("height", 64, 4096), ("num_frames", 1, 1000), ("sample_steps", 1, 150)):
            if isinstance(prompt, dict):
                value = prompt.get(name)
                if value is None or (type(value) is int and least <= value <= most):
                    prompt[name] = 5 if value == 5 else least
    if isinstance(prompts, list):
        del prompts[3:]
    return job


@pytest.fixture
def no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every host name is this machine's: nobody out there is asked for it."""
    look_up = socket.getaddrinfo

    def here(host: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return look_up(host, *arguments, **(options | {"flags": socket.AI_NUMERICHOST}))
        except (OSError, UnicodeError):
            return look_up("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", here)


@pytest.fixture
def quiet() -> Iterator[None]:
    """The log has a line for each refused job: of thousands, only faults of the worker are kept."""
    level = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(level)


CODES = {code.value for code in Code} - {"INTERNAL"}
MACHINE = re.compile(
    rf"Traceback|File \"|\.py\b|site-packages|{re.escape(tempfile.gettempdir())}|{re.escape(str(Path(__file__).parents[1]))}"
)


def check_error(text: str) -> None:
    assert text.partition(":")[0] in CODES, text
    assert len(text) < 50_000
    assert TOKEN not in text and not MACHINE.search(text)


@examples(1500)
@given(job=jobs())
def test_every_job_ends_with_a_result_or_with_a_code(runner: Service, quiet: None, no_names: None, job: dict[str, Any]) -> None:
    with in_time():
        answer = asyncio.run(runner.run(job))
    json.dumps(answer, allow_nan=False, ensure_ascii=False).encode()
    if "error" in answer:
        assert list(answer) == ["error"]
        check_error(answer["error"])
    else:
        assert answer["outputs"]["images"] or answer["outputs"]["videos"]
        for error in answer.get("errors", []):
            check_error(f"{error['code']}: {error['message']}")
        assert TOKEN not in str(answer["warnings"])
        shutil.rmtree(runner._settings.output_dir, ignore_errors=True)


@examples(1000)
@given(data=st.data())
def test_every_request_of_every_model_is_accepted_or_refused_with_a_code(data: st.DataObject) -> None:
    spec = MODELS[data.draw(st.sampled_from(list(MODELS)))]
    request = data.draw(mutated(a_request(spec.id, "a.safetensors")))
    try:
        with in_time():
            shots = shots_of(parse(json.loads(json.dumps(request)), spec), partial(documented, spec), lambda _: 1)
    except WorkerError as error:
        check_error(str(error))
    else:
        assert all(shot.sampling.width >= 64 and shot.sampling.num_frames >= 1 for shot in shots)


# LoRA files

Tensors = dict[str, tuple[str, list[int], bytes]]
"""Name to dtype, shape and bytes."""


def unpacked(tensors: dict[str, torch.Tensor]) -> Tensors:
    content = save(tensors)
    data = content[8 + int.from_bytes(content[:8], "little") :]
    header = json.loads(content[8 : len(content) - len(data)])
    return {name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]) for name, entry in header.items()}


def packed(tensors: Tensors, metadata: Any) -> tuple[list[tuple[str, Any]], bytes]:
    """The header's entries and the data."""
    entries, data = [("__metadata__", metadata)], b""
    for name, (dtype, shape, content) in tensors.items():
        place = [len(data), len(data) + len(content)]
        entries.append((name, {"dtype": dtype, "shape": shape, "data_offsets": place}))
        data += content
    return entries, data


def assembled(entries: list[tuple[str, Any]], data: bytes) -> bytes:
    header = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in entries) + "}"
    return len(header).to_bytes(8, "little") + header.encode() + data


def trained() -> dict[str, Tensors]:
    """One LoRA in every form that is read."""
    toolkit = lora_tensors(SIZE_1B, 4, 1)
    alphas = {name.replace("lora_A.weight", "alpha"): torch.tensor(2.0) for name in toolkit if "lora_A" in name}
    theirs = {
        "diffusion_model": "transformer",
        "self_attn.": "attn1.to_",
        "cross_attn.": "attn2.to_",
        "ffn.0": "ffn.net.0.proj",
    }
    theirs |= {"ffn.2": "ffn.net.2", "to_o.": "to_out.0."}
    diffusers, kohya = {}, {}
    for name, tensor in toolkit.items():
        diffusers[reduce(lambda text, part: text.replace(*part), theirs.items(), name)] = tensor
    for name, tensor in (toolkit | alphas).items():
        layer, part = re.fullmatch(r"diffusion_model\.(.+)\.(lora_[AB]\.weight|alpha)", name).groups()  # type: ignore[union-attr]
        part = part.replace("_A", "_down").replace("_B", "_up")
        kohya[f"lora_unet_{layer.replace('.', '_')}.{part}"] = tensor
    lokr = {}
    for name in alphas:
        layer = name.removesuffix(".alpha")
        outputs, inputs = toolkit[f"{layer}.lora_B.weight"].shape[0], toolkit[f"{layer}.lora_A.weight"].shape[1]
        factors = {"w1": torch.ones(2, 2), "w2_a": torch.ones(outputs // 2, 2), "w2_b": torch.ones(2, inputs // 2)}
        lokr |= {f"{layer}.lokr_{part}": factor for part, factor in factors.items()}
    forms = {"toolkit": toolkit, "alpha": toolkit | alphas, "diffusers": diffusers, "kohya": kohya, "lokr": lokr | alphas}
    return {form: unpacked(tensors) for form, tensors in forms.items()}


FORMS = trained()
METADATA = lora_metadata("lora", "wan_2.1", trigger_word="sks")
PREFIX = r"^(diffusion_model\.|transformer\.|lora_unet_)"
PREFIXES = [
    *("", "diffusion_model", "diffusion_model.diffusion_model.", "diffusion_model.x.", "x" * 16, "unet.", "base_model.model."),
    *("transformer.", "transformer_1.", "transformer_2.", "lora_unet_", "lora_te_"),
]
BLOCKS = [
    *("", " 1", "-1", "+1", "00", "7", "999", "1000", "99999999999", "-9999999999", "9_9", "9_999_999_999"),
    *("0x1", "1e9", "1.5", "\uff11"),
]
PARTS = [
    *("", ".lora_A", ".weight", ".alpha", ".diff", ".diff_b", ".dora_scale", ".hada_w1_a", ".oft_blocks"),
    *(f".lora_{part}.weight" for part in ("A", "B", "C", "down", "up", "A.default")),
    *(".lora_B.bias", ".lora_magnitude_vector", ".lokr_w1", ".lokr_w1_a", ".lokr_w2_a", ".lokr_t2"),
]
LAYERS = [
    *("head.head", "time_projection.1", "text_embedding.0", "time_embedding.2", "img_emb.proj.1", "norm1", "modulation"),
    *("blocks.0.ffn.1", "blocks.0.self_attn", "blocks.0.cross_attn.k_img", "blocks.0.attn1.to_q", "blocks.1.norm3", "."),
]
FLOATS = [0.0, 1.0, -1.0, 1e-45, 1e38, -1e38, 1e300, float("nan"), float("inf")]
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
ENTRIES = [
    *('{"name": "ai-toolkit", "version": "\\ud800"}', '{"1_\\ud800": {"\\ud800": 1}}', '{"1_\\n": {"\\n": 1}}', "[" * 5000),
    *('{"step": 1e999}', '{"step": ' + "9" * 4000 + "}", '{"step": -1}', "x" * 100_000, "\u202e", "null"),
    *('{"name": "ai-toolkit", "version": "' + "1." * 5000 + '"}',),
]


@st.composite
def renamed(draw: st.DrawFn, name: str) -> str:
    kind = draw(st.integers(0, 5))
    if kind == 0:
        number = draw(st.sampled_from(BLOCKS))
        return re.sub(r"(?<=blocks[._])\d+", number, name)
    if kind == 1:
        return re.sub(r"\.(lora_|lokr_|alpha).*", "", name) + draw(st.sampled_from(PARTS))
    if kind == 2:
        return draw(st.sampled_from(PREFIXES)) + re.sub(PREFIX, "", name)
    if kind == 3:
        return re.sub(r"blocks.\d+.*?(?=\.lora_|\.lokr_|\.alpha)", draw(st.sampled_from(LAYERS)), name)
    at = draw(st.integers(0, len(name)))
    return name[:at] + draw(st.text(max_size=3)) + name[at + draw(st.integers(0, 3)) :]


@st.composite
def odd_loras(draw: st.DrawFn) -> bytes:
    """Files that are safetensors to the letter, with other tensors or metadata than a trainer writes."""
    tensors, metadata = dict(FORMS[draw(st.sampled_from(list(FORMS)))]), dict(METADATA)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(list(tensors) or ["a"]))
        dtype, shape, content = tensors.get(name, ("F32", [], b"\0" * 4))
        kind = draw(st.integers(0, 8))
        if kind < 3:
            tensors[draw(renamed(name))] = tensors.pop(name, (dtype, shape, content)) if kind else (dtype, shape, content)
        elif kind == 3:
            tensors.pop(name, None)
        elif kind == 4:
            shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 24, 48]), max_size=4))
            tensors[name] = ("F64", shape, struct.pack("d", draw(st.sampled_from(FLOATS))) * math.prod(shape))
        elif kind == 5:
            tensors[name] = ("F64", shape, struct.pack("d", draw(st.sampled_from(FLOATS))) * math.prod(shape))
        elif kind == 6:
            dtype = draw(st.sampled_from(list(SIZES)))
            tensors[name] = (dtype, shape, bytes([draw(st.integers(0, 255))]) * (SIZES[dtype] * math.prod(shape)))
        elif kind == 7:
            prefix = draw(st.sampled_from(PREFIXES))
            tensors = {prefix + re.sub(PREFIX, "", name): tensor for name, tensor in tensors.items()}
        else:
            tensors |= FORMS[draw(st.sampled_from(list(FORMS)))]
    if draw(st.booleans()):
        field = draw(st.sampled_from(["software", "training_info", "ss_tag_frequency", "ss_base_model_version"]))
        metadata[field] = draw(st.sampled_from(ENTRIES))
    return assembled(*packed(tensors, metadata))


@st.composite
def broken_loras(draw: st.DrawFn) -> bytes:
    """Files whose header does not say what it should, or whose bytes were lost or changed on the way."""
    entries, data = packed(FORMS["toolkit"], METADATA)
    edits = draw(st.integers(0, 2))
    for _ in range(edits):
        number = draw(st.integers(0, len(entries) - 1))
        name, entry = entries[number]
        kind = draw(st.integers(0, 5))
        if kind == 0:
            entries[number] = (draw(st.sampled_from([*NAMES, "__metadata__", entries[1][0]]) | renamed(name)), entry)
        elif kind == 1:
            entries[number] = (name, draw(junk))
        elif kind == 2:
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
            entries[number] = (name, (entry if isinstance(entry, dict) else {}) | {field: draw(junk)})
        elif kind == 3:
            entries[number] = (name, draw(mutated(entry)))
        elif kind == 4:
            entries.insert(draw(st.integers(0, len(entries))), (name, entry))
        else:
            del entries[number]
    content = assembled(entries, data)
    return draw(damaged(content)) if not edits or draw(st.booleans()) else content


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """One to three bytes changed, numbers overwritten, parts lost, doubled or added; most of it near the beginning."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(len(content), 64)) | st.integers(0, len(content)))
        kind = draw(st.integers(0, 6))
        if kind < 2:
            content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1 :]
        elif kind == 2:
            number = draw(st.sampled_from([0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
            number = number.to_bytes(8, draw(st.sampled_from(["little", "big"])))
            size = draw(st.sampled_from([2, 4, 8]))
            content = content[:at] + (number[:size] if number[0] else number[-size:]) + content[at + size :]
        elif kind == 3:
            content = content[:at]
        elif kind == 4:
            content += draw(st.binary(max_size=20))
        elif kind == 5:
            content = content[:at] + content[at + draw(st.integers(1, 100)) :]
        else:
            content = content[:at] + content[at : at + draw(st.integers(1, 100))] * draw(st.integers(2, 50)) + content[at:]
    return content


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return tmp_path / "lora.safetensors"


def use(model: WanModel, path: Path, content: bytes) -> None:
    """Read the file, check it and apply it as a job does. Raises whatever is not a LoraError in a few words."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    for mode in ("adapter", "merge"):
        try:
            with in_time():
                adapter = Adapter(LoraFile.read(path))
                texts = model.loras.check(adapter, mode)
                model.apply_loras([adapter], mode)
        except LoraError as error:
            texts = [str(error)]
        else:
            file = adapter.file
            texts += [file.trainer_version, file.trigger_word, str(file.training_step), era_of([file])[1]]
        for text in texts:
            text.encode()
            assert len(text) < 2000


@examples(500)
@given(content=odd_loras())
def test_every_odd_lora_is_applied_or_refused_in_words(runner: Service, quiet: None, lora: Path, content: bytes) -> None:
    use(runner._gpu.model, lora, content)


@examples(800)
@given(content=broken_loras())
def test_every_broken_lora_is_refused_in_words(runner: Service, quiet: None, lora: Path, content: bytes) -> None:
    use(runner._gpu.model, lora, content)
    try:
        with lora.open("rb") as file:
            header = read_header(file)
    except SafetensorsError:
        return
    with safe_open(lora, framework="numpy") as library:
        assert header.shapes == {name: tuple(library.get_slice(name).get_shape()) for name in library.keys()}  # noqa: SIM118
        assert header.metadata == (library.metadata() or {})


# Control images


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pictures() -> list[bytes]:
    """Small images of every format that is read, and of some that are not."""
    noise = Image.frombytes("L", (24, 16), bytes(number**3 % 251 for number in range(24 * 16)))
    color = Image.merge("RGB", [noise, noise.rotate(90), noise.rotate(180)])
    frames = {"save_all": True, "append_images": [color.rotate(90), color.rotate(180)]}
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "camera"
    return [
        *(saved(color, format) for format in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "TGA", "ICO", "MPO")),
        *(saved(color, format, **frames) for format in ("PNG", "GIF", "WEBP", "TIFF", "AVIF", "MPO")),
        *(saved(color, format, exif=exif) for format in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")),
        *(saved(color, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")),
        *(saved(color.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGBA", "I;16")),
        *(saved(color.convert(mode), "TIFF") for mode in ("1", "CMYK", "F", "I", "LAB", "YCbCr")),
        saved(color, "JPEG", progressive=True),
        saved(color, "WEBP", lossless=True),
        saved(color.convert("CMYK"), "JPEG"),
        saved(color, "TGA", compression="tga_rle"),
        b"P3\n2 2\n255\n" + b"1 2 3 " * 4,
    ]


PICTURES = pictures()
PNG_HEAD = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def resealed(png: bytes) -> bytes:
    """The PNG with checksums that fit, so that what was changed is looked at."""
    sealed, at = png[:8], 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        sealed += png[at : at + 4] + chunk(png[at + 4 : at + 8], png[at + 8 : at + 8 + length])[4:]
        at += length + 12
    return sealed


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    """What a test adds to the most memory this process has had so far; 64 million pixels, decoded and converted, are 0.5 GB."""
    before = peak_memory()
    yield
    assert peak_memory() - before < 1e9


def peak_memory() -> float:
    """Of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_image(content: bytes) -> None:
    with in_time(), warnings.catch_warnings(action="ignore"):
        for match in ("documented", "preview"):
            try:
                image = decode(content, match)
            except ValueError as error:
                image, text = None, str(error)
            assert image.mode == "RGB" and image.width * image.height <= MAX_PIXELS if image else " " in text


@examples(1000)
@given(data=st.data())
def test_every_damaged_image_is_read_or_refused_in_words(bounded_memory: None, data: st.DataObject) -> None:
    content = data.draw(damaged(data.draw(st.sampled_from(PICTURES))))
    check_image(resealed(content) if content.startswith(PNG_HEAD) and data.draw(st.booleans()) else content)


def bitmap(width: int, height: int, content: bytes) -> bytes:
    """A BMP with run lengths."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(content), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + head + bytes(1024) + content


def tiff(width: int, height: int, strips: list[int], rows: int, next_frame: int = 0) -> bytes:
    """One bit a pixel, with strips of so many rows at these places in the data."""
    data = bytes(width // 8 * height)
    table = struct.pack(f"<{len(strips)}I", *(8 + strip for strip in strips))
    counts = struct.pack(f"<{len(strips)}I", *[width // 8 * rows] * len(strips))
    after = 8 + len(data)
    values = {256: width, 257: height, 258: 1, 259: 1, 262: 1, 277: 1, 278: rows}
    tags = [(tag, 4, 1, value) for tag, value in values.items()]
    tags += [(273, 4, len(strips), after), (279, 4, len(strips), after + len(table))]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    start = after + len(table) + len(counts)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", next_frame or start)
    return b"II*\0" + struct.pack("<I", start) + data + table + counts + directory


def scans(number: int) -> bytes:
    """A progressive JPEG whose last pass over the picture comes so many times again."""
    jpeg = saved(Image.new("L", (8000, 8000)), "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xc4", 0, jpeg.rindex(b"\xff\xda"))
    return jpeg[:-2] + jpeg[last:-2] * number + jpeg[-2:]


def in_icon(png: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png


def webp(width: int, height: int) -> bytes:
    """The beginning of a lossless one."""
    content = b"VP8L" + struct.pack("<IBI", 32, 0x2F, (width - 1) | (height - 1) << 14) + bytes(27)
    return b"RIFF" + struct.pack("<I", len(content) + 4) + b"WEBP" + content


def flat(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel, all 0."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width // 8 + 1) * height))
    return PNG_HEAD + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: bitmap(64_000_000, 1, b"\1\1\0\0"), id="run lengths of one row"),
        pytest.param(lambda: bitmap(8000, 8000, b"\1\1\0\0" * 8000), id="run lengths of many rows"),
        pytest.param(lambda: bitmap(8000, 8000, b"\0\2\xff\xff" * 32), id="run lengths that jump"),
        pytest.param(lambda: tiff(4000, 4000, list(range(1000)), 2000), id="the same strips again and again"),
        pytest.param(lambda: tiff(16_000_000, 2, [0, 1], 1), id="strips one byte apart"),
        pytest.param(lambda: tiff(64, 64, [0], 64), id="frames in a circle"),
        pytest.param(lambda: tiff(64, 64, [0], 64, next_frame=1), id="a second frame that is none"),
        pytest.param(lambda: scans(1000), id="a thousand scans"),
        pytest.param(lambda: b"P3\n4000 4000\n255\n" + b"1 " * 5_000_000, id="pixels as text"),
        pytest.param(lambda: in_icon(flat(13_000, 13_000)), id="a bomb in an icon"),
        pytest.param(lambda: flat(13_000, 13_000), id="a bomb"),
        pytest.param(lambda: webp(16_383, 16_383), id="a bomb in WebP"),
        pytest.param(lambda: b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\0;", id="a bomb in GIF"),
        pytest.param(
            lambda: resealed(PICTURES[0][:16] + struct.pack(">II", 7000, 9000) + PICTURES[0][24:]), id="far too few pixels"
        ),
    ],
)
def test_a_file_that_would_keep_the_worker_busy_is_refused_in_time(make: Callable[[], bytes], bounded_memory: None) -> None:
    content = make()
    start = time.process_time()
    check_image(content)
    assert time.process_time() - start < 3
