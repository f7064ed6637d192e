"""What `python -m builder.fetch_checkpoints` leaves in its folder, whatever the Hub and the network do."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from builder import REPRODUCIBLE_MTIME, fetch_checkpoints, retry
from builder import hub as hub_client
from builder.checkpoint_folder import CheckpointFolder
from builder.convert import KEPT_IN_FLOAT32
from builder.retry import FetchError
from pipelines import WanModel, load_pipeline
from pipelines.catalog import MODELS, Quantize
from pipelines.checkpoints import Checkpoints
from pipelines.errors import CheckpointNotFound
from pipelines.manifest import NAME, Manifest
from pipelines.offload import bytes_by_mode, bytes_of_tensor
from pipelines.weights import CODES, STEM_OF, is_linear
from tests.builder import hub_server as hubs
from tests.builder.hub_server import HubServer
from tests.conftest import STAND_IN
from tests.pipelines.test_models import adapters, make
from tests.worker_process import ROOT

REPO = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TOKEN = "hf_" + "t" * 34

JUNK = {
    "README.md": b"# A model",
    ".gitattributes": b"*.safetensors filter=lfs",
    "assets/picture.png": b"PNG",
    "tokenizer/picture.png": b"PNG",
    "tokenizer/deeper/tokenizer.json": b"{}",
    "text_encoder/pytorch_model.bin": b"pickle",
    "transformer/diffusion_pytorch_model.bin": b"pickle",
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"half",
    "transformer/config.fp16.json": b"{}",
}
"""What no loader reads, though repos on the Hub hold it."""

Fetch = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def repos(tiny: Path) -> dict[str, dict[str, bytes]]:
    """All repos of the seven models, with files beside them that nothing needs."""
    repos: dict[str, dict[str, bytes]] = {}
    for org in ("Wan-AI", "ai-toolkit"):
        for path, body in files_below(tiny / org).items():
            name, _, rest = path.partition("/")
            repos.setdefault(f"{org}/{name}", dict(JUNK))[rest] = body
    return repos


@pytest.fixture
def hub(repos: dict[str, dict[str, bytes]]) -> Iterator[HubServer]:
    with hubs.hub_server() as server:
        for repo, files in repos.items():
            server.put(repo, dict(files))
        yield server


@pytest.fixture
def fetch(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fetch:
    """Runs the command with these arguments, to `out` unless they say otherwise; returns its status and what it said."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)  # what HF_ENDPOINT says when the client is imported
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(hub_client, "_SECONDS_OF_SILENCE", 1)
    monkeypatch.setattr(fetch_checkpoints, "SECRET", tmp_path / "no-secret")
    monkeypatch.delenv("HF_TOKEN", raising=False)

    def run(*arguments: str, model_id: str = "wan21_1b", to: Path = tmp_path / "out") -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fetch_checkpoints", "--model-id", model_id, "--to", str(to), *arguments])
        status = fetch_checkpoints.main()
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wanted(hub: HubServer, repo: str, *parts: str) -> dict[str, bytes]:
    """The repo's files but the junk, of these components, or all."""
    files = hub.repos[repo][hub.main[repo]]
    return {
        f"{repo}/{path}": body
        for path, body in files.items()
        if path not in JUNK and (not parts or path.startswith(tuple(f"{part}/" for part in parts)))
    }


def is_whole(hub: HubServer, out: Path) -> bool:
    """Whether all of the 1.3B model is there, as on the Hub, with its manifest, and nothing else."""
    files = files_below(out)
    manifest = files.pop(f"{REPO}/{NAME}", b"")
    return files == wanted(hub, REPO) and len(json.loads(manifest)["files"]) == len(files)


@pytest.mark.parametrize("model_id", MODELS)
def test_exactly_what_a_model_needs_is_fetched_and_it_loads(
    model_id: str, hub: HubServer, fetch: Fetch, tmp_path: Path
) -> None:
    assert fetch(model_id=model_id)[0] == 0
    spec = MODELS[model_id]
    expected: dict[str, bytes] = {}
    for part, source in spec.sources.items():
        expected |= wanted(hub, source.repo, *([part] if source.subfolder else []))
    if not spec.needs_toolkit:
        base = spec.sources["vae"].repo
        expected[f"{base}/model_index.json"] = hub.repos[base][hub.main[base]]["model_index.json"]
    files = files_below(tmp_path / "out")
    manifests = {path for path in files if path.endswith(NAME)}
    assert {path: body for path, body in files.items() if path not in manifests} == expected
    model = load_pipeline(model_id, tmp_path / "out", "cpu", toolkit_path=STAND_IN)
    assert model.facts["checkpoints"] == {source.repo: hub.main[source.repo] for source in spec.sources.values()}


@pytest.mark.parametrize("model_id", ["wan21_i2v_14b", "wan22_5b"])
def test_weights_in_bf16_load_to_the_same_bits_and_no_byte_is_read_in_vain(
    model_id: str, tiny: Path, fetch: Fetch, tmp_path: Path
) -> None:
    assert fetch("--dtype", "bf16", model_id=model_id)[0] == 0
    pipes = [
        load_pipeline(model_id, folder, "cpu", toolkit_path=STAND_IN, dtype=torch.bfloat16)._pipe
        for folder in (tiny, tmp_path / "out")
    ]
    in_use = 0
    for part in MODELS[model_id].sources.keys() & STEM_OF.keys():
        original, converted = (getattr(pipe, part).state_dict() for pipe in pipes)
        assert original.keys() == converted.keys()
        for name, tensor in original.items():
            assert tensor.dtype == converted[name].dtype and torch.equal(tensor, converted[name]), name
        files = (tmp_path / "out" / MODELS[model_id].sources[part].repo / part).glob("*.safetensors")
        stored = {key: value for file in files for key, value in load_file(file).items()}
        in_use += sum(tensor.nbytes for tensor in stored.values())
        assert all(value.nbytes == original[key].nbytes for key, value in stored.items() if part.startswith("transformer"))
    on_hub = sum(file.stat().st_size for part in STEM_OF for file in tiny.glob(f"*/*/{part}/*.safetensors"))
    assert 0 < in_use < on_hub


def test_what_is_converted_when_a_fetch_breaks_off_is_not_downloaded_again(
    fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(*_: object) -> None:
        raise FetchError("the network is gone")

    with monkeypatch.context() as broken:
        broken.setattr(CheckpointFolder, "finish", break_off)
        assert fetch("--dtype", "bf16")[0] == 1
    assert "0 fetched" in fetch("--dtype", "bf16")[1]


def test_converted_weights_are_known_again_and_replaced_by_the_originals_on_request(
    hub: HubServer, fetch: Fetch, tmp_path: Path
) -> None:
    fetch()
    asked = len(hub.requests)
    assert "0 fetched" in fetch("--dtype", "bf16")[1]  # the files that are there are converted
    out = tmp_path / "out"
    manifest = Manifest.read(out / REPO)
    assert manifest and manifest.files[WEIGHTS].converted_from and not is_whole(hub, out)
    assert manifest.files[WEIGHTS].bytes == (out / REPO / WEIGHTS).stat().st_size
    assert "0 fetched" in fetch("--dtype", "bf16")[1]
    assert not any(WEIGHTS in request for request in map(str, hub.requests[asked:]))
    (out / REPO / WEIGHTS).write_bytes(b"damaged")
    assert "1 fetched" in fetch("--dtype", "bf16")[1]
    assert Manifest.read(out / REPO) == manifest
    fetch()
    assert is_whole(hub, out)


def test_the_manifest_tells_repo_commit_sizes_and_sums(hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    fetch()
    manifest = Manifest.read(tmp_path / "out" / REPO)
    assert manifest is not None
    assert (manifest.repo, manifest.revision) == (REPO, hub.main[REPO])
    assert {f"{REPO}/{path}": (entry.bytes, entry.sha256) for path, entry in manifest.files.items()} == {
        path: (len(body), hashlib.sha256(body).hexdigest()) for path, body in wanted(hub, REPO).items()
    }


def test_parts_are_fetched_one_group_after_another_and_the_manifest_grows(hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    fetch("--parts", "text_encoder,tokenizer")
    some = files_below(tmp_path / "out")
    assert some.keys() == {*wanted(hub, REPO, "text_encoder", "tokenizer"), f"{REPO}/model_index.json", f"{REPO}/{NAME}"}
    before = hub.sent
    status, said = fetch()
    assert (status, is_whole(hub, tmp_path / "out")) == (0, True)
    assert "5 fetched, 5 were there" in said
    assert hub.sent - before == sum(len(body) for path, body in wanted(hub, REPO).items() if path not in some)


def test_a_model_of_two_repos_is_fetched_by_parts_of_either(hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    base, weights = "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "ai-toolkit/Wan2.2-T2V-A14B-Diffusers-bf16"
    fetch("--parts", "transformer_2", model_id="wan22_14b_t2v")
    assert files_below(tmp_path / "out").keys() == {*wanted(hub, weights, "transformer_2"), f"{weights}/{NAME}"}
    fetch(model_id="wan22_14b_t2v")
    assert not (tmp_path / "out" / base / "transformer").exists()


def test_the_distilled_loras_of_drafts_are_fetched_at_the_recipes_commit_and_no_weights(
    hub: HubServer, fetch: Fetch, tmp_path: Path
) -> None:
    recipe = MODELS["wan22_14b_t2v"].draft
    assert recipe is not None
    ((repo, commit),) = {(lora.repo, lora.commit) for lora in recipe.loras}
    newest = hub.put(repo, {lora.path: b"newest" for lora in recipe.loras})
    hub.repos[repo][commit] = {lora.path: lora.path.encode() for lora in recipe.loras} | {"README.md": b"# LoRAs"}
    status, said = fetch("--draft", model_id="wan22_14b_t2v")
    assert (status, f"{repo} at {commit}" in said) == (0, True), said
    wanted = {f"{repo}/{lora.path}": lora.path.encode() for lora in recipe.loras}
    there = files_below(tmp_path / "out")
    assert {path: there[path] for path in wanted} == wanted and there.keys() == {*wanted, f"{repo}/{NAME}"}
    assert "0 fetched, 2 were there" in fetch("--draft", model_id="wan22_14b_t2v")[1]
    assert fetch("--draft", "--revision", f"{repo}={newest}", model_id="wan22_14b_t2v")[0] == 0
    assert files_below(tmp_path / "out")[f"{repo}/{recipe.loras[0].path}"] == b"newest"
    assert fetch("--draft")[1].startswith(
        "fetch_checkpoints: --draft: there is no few-step recipe for wan21_1b, but for wan22_"
    )
    with pytest.raises(SystemExit):
        fetch("--draft", "--parts", "vae", model_id="wan22_14b_t2v")


def test_the_same_files_make_the_same_layer(hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        fetch(to=out)
        time.sleep(0.01)
    one, two = (
        [(str(path.relative_to(out)), path.stat().st_mtime, path.stat().st_mode) for path in sorted(out.rglob("*"))]
        for out in outs
    )
    assert one == two
    assert {mtime for _, mtime, _ in one} == {REPRODUCIBLE_MTIME}
    assert files_below(outs[0]) == files_below(outs[1])


def test_shards_are_those_of_the_index(hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    files = hub.repos[REPO][hub.main[REPO]]
    shards = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors": bytes([n]) * 1000 for n in (1, 2)}
    index = json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()
    del files[WEIGHTS]
    files |= {f"transformer/{name}": body for name, body in shards.items()}
    files |= {"transformer/diffusion_pytorch_model-00003-of-00003.safetensors": b"of another time"}
    files["transformer/diffusion_pytorch_model.safetensors.index.json"] = index
    fetch("--parts", "transformer")
    names = {path.name for path in (tmp_path / "out" / REPO / "transformer").iterdir()}
    assert names == {*shards, "config.json", "diffusion_pytorch_model.safetensors.index.json"}


def test_a_dry_run_tells_files_and_gigabytes_and_leaves_nothing(hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    status, said = fetch("--dry-run", model_id="wan22_14b_t2v")
    assert (status, hub.sent, (tmp_path / "out").exists()) == (0, 0, False)
    assert f"ai-toolkit/Wan2.2-T2V-A14B-Diffusers-bf16/{WEIGHTS}" in said
    assert "Wan-AI/Wan2.2-T2V-A14B-Diffusers/transformer" not in said
    status, said = fetch("--dry-run", "--json")
    plan = json.loads(said)
    expected = wanted(hub, REPO)
    assert {f"{file['repo']}/{file['path']}": file["bytes"] for file in plan["files"]} == {
        p: len(b) for p, b in expected.items()
    }
    assert plan["bytes"] == sum(map(len, expected.values()))


FAULTS = {
    "drops": [hubs.drops] * 3,
    "drops again and again, but goes on": [hubs.drops] * 12,
    "ends early": [hubs.ends_early] * 3,
    "ends at once": [hubs.ends_at_once] * 2,
    "lies": [hubs.lies] * 2,
    "lies after a drop": [hubs.drops, hubs.lies],
    "gives more": [hubs.gives_more],
    "gives a page": [hubs.gives_a_page] * 2,
    "ignores the range": [hubs.drops, hubs.ignores_range],
    "gives another range": [hubs.drops, hubs.gives_another_range],
    "in chunks": [hubs.in_chunks],
    "half in chunks": [hubs.half_in_chunks, hubs.in_chunks],
    "gzipped": [hubs.gzipped],
    "gzipped after a drop": [hubs.drops, hubs.gzipped],
    "badly gzipped": [hubs.badly_gzipped],
    "without a length": [hubs.without_length],
    "hangs up": [hubs.hangs_up] * 4,
    "is busy": [hubs.with_status(429, retry_after="0"), hubs.with_status(503), hubs.with_status(500), hubs.with_status(502)],
    "stalls": [hubs.stalls(1.5)],
    "redirects nowhere": [hubs.redirects_to("http://[bad"), hubs.redirects_to("/nowhere"), hubs.redirects_to("ftp://a/b")],
    "all of it": [hubs.drops, hubs.lies, hubs.with_status(503), hubs.ends_early, hubs.ignores_range_and_drops, hubs.hangs_up],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("path", [WEIGHTS, "tokenizer/tokenizer.json"], ids=["large", "small"])
def test_every_passing_fault_is_survived(
    path: str, faults: list[hubs.Fault], hub: HubServer, fetch: Fetch, tmp_path: Path
) -> None:
    hub.fails(path, *faults)
    status, said = fetch()
    assert (status, hub.faults[path]) == (0, []), said
    assert is_whole(hub, tmp_path / "out")


@pytest.mark.parametrize(
    "fault",
    [hubs.with_status(429, retry_after="0"), hubs.with_status(500), hubs.gives(b'{"sha": '), hubs.gives(b"[]"), hubs.hangs_up],
)
def test_a_listing_is_asked_for_again(fault: hubs.Fault, hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    hub.fails("/revision/main", fault, fault)
    assert fetch()[0] == 0
    assert is_whole(hub, tmp_path / "out")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (hubs.lies, "another size or sum than the Hub lists, 3 times"),
        (hubs.gives_more, "bytes that the Hub lists, 3 times"),
        (hubs.ends_at_once, "it ended after 0 of"),
        (hubs.ignores_range_and_drops, "the connection broke (RemoteProtocolError), 8 times in a row"),
        (hubs.with_status(503), "the Hub answered with status 503, 8 times in a row"),
    ],
)
def test_a_lasting_fault_is_told_and_leaves_no_wrong_file(
    fault: hubs.Fault, says: str, hub: HubServer, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "_LONGEST_PAUSE", 0.01)
    hub.fails(WEIGHTS, hubs.always(fault))
    status, said = fetch()
    assert status == 1
    assert f"{REPO}/{WEIGHTS}: " in said.splitlines()[-1]
    assert says in said.splitlines()[-1]
    assert not (tmp_path / "out" / REPO / WEIGHTS).exists()
    hub.faults.clear()
    assert fetch()[0] == 0
    assert is_whole(hub, tmp_path / "out")


def test_a_signed_url_that_is_over_is_asked_for_anew(hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    hub.fails(WEIGHTS, hubs.drops, hubs.with_status(403))
    assert fetch()[0] == 0
    assert is_whole(hub, tmp_path / "out")
    assert len(hub.asked(f"GET /{REPO}/resolve/{hub.main[REPO]}/{WEIGHTS}")) == 3


def test_no_file_is_asked_for_compressed(hub: HubServer, fetch: Fetch) -> None:
    """The Hub would compress small files, and a half of that cannot be gone on with."""
    fetch()
    assert {headers["accept-encoding"] for headers in hub.asked("/resolve/")} == {"identity"}


@pytest.mark.parametrize(
    "headers", [{"retry_after": "1"}, {"ratelimit": '"resolvers";r=0;t=1'}], ids=["Retry-After", "RateLimit"]
)
def test_a_retry_waits_as_long_as_the_server_asks(headers: dict[str, str], hub: HubServer, fetch: Fetch) -> None:
    hub.fails(WEIGHTS, hubs.with_status(429, **headers))
    begun = time.monotonic()
    assert fetch("--parts", "transformer")[0] == 0
    assert time.monotonic() - begun >= 1


def test_the_wait_may_be_asked_for_by_a_date() -> None:
    soon = datetime.now(UTC) + timedelta(seconds=100)
    assert 95 < hub_client._requested_pause({"Retry-After": format_datetime(soon, usegmt=True)}) <= 100


def test_what_is_damaged_afterwards_is_fetched_again(hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    fetch()
    file = tmp_path / "out" / REPO / WEIGHTS
    file.write_bytes(bytes(file.stat().st_size))
    status, said = fetch()
    assert (status, is_whole(hub, tmp_path / "out")) == (0, True)
    assert "1 fetched, 9 were there" in said


def test_a_file_that_is_a_link_to_right_bytes_stays_one(hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    """As the image's layers have them."""
    fetch()
    file = tmp_path / "out" / REPO / WEIGHTS
    file.rename(tmp_path / "weights")
    file.symlink_to(tmp_path / "weights")
    assert "0 fetched, 10 were there" in fetch()[1]
    assert file.is_symlink()


def size_of(folder: Path) -> int:
    """Bytes of its files, of which each may be moved away meanwhile."""
    sizes = []
    for file in folder.glob("*"):
        with suppress(FileNotFoundError):
            sizes.append(file.stat().st_size)
    return sum(sizes)


def test_a_fetch_that_is_killed_goes_on_from_the_bytes_that_are_there(hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    body = os.urandom(6_000_000)
    hub.repos[REPO][hub.main[REPO]][WEIGHTS] = body
    hub.fails(WEIGHTS, hubs.stalls(60))
    command = [sys.executable, "-m", "builder.fetch_checkpoints", "--model-id", "wan21_1b", "--to", str(tmp_path / "out")]
    environment = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"]}
    process = subprocess.Popen([*command, "--parts", "transformer"], cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    give_up_at = time.monotonic() + 60
    unfinished = tmp_path / "out/.unfinished"
    while size_of(unfinished) < 2_900_000 and time.monotonic() < give_up_at:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out" / REPO / WEIGHTS).exists()
    before = hub.sent
    assert fetch()[0] == 0
    assert hub.sent - before < 4_500_000 < len(body)
    assert is_whole(hub, tmp_path / "out")


def test_what_is_left_of_a_broken_fetch_is_checked_too(hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    hub.fails(WEIGHTS, hubs.drops, hubs.always(hubs.with_status(404)))
    assert fetch("--parts", "transformer")[0] == 1
    (partial,) = (file for file in (tmp_path / "out/.unfinished").iterdir() if file.stat().st_size)
    partial.write_bytes(bytes(partial.stat().st_size))
    hub.faults.clear()
    assert fetch()[0] == 0
    assert is_whole(hub, tmp_path / "out")


def test_a_repo_stays_at_its_commit_until_another_is_named(hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    first = hub.main[REPO]
    fetch("--parts", "vae,scheduler")
    changed = hub.repos[REPO][first] | {"vae/config.json": b"{}", WEIGHTS: b"other weights"}
    second = hub.put(REPO, changed)
    fetch("--parts", "transformer")
    manifest = Manifest.read(tmp_path / "out" / REPO)
    assert manifest is not None
    assert (manifest.revision, {"vae/config.json", WEIGHTS} <= manifest.files.keys()) == (first, True)

    fetch("--parts", "transformer", "--revision", f"{REPO}=main")
    manifest = Manifest.read(tmp_path / "out" / REPO)
    assert manifest is not None
    assert (tmp_path / "out" / REPO / WEIGHTS).read_bytes() == b"other weights"
    assert (manifest.revision, "vae/config.json" in manifest.files) == (second, False)
    assert not (tmp_path / "out" / REPO / "vae/config.json").exists()  # of the first commit, and not asked for at the second
    assert {
        "vae/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    } <= manifest.files.keys()  # the same at both


def test_a_revision_is_pinned_by_its_commit(hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    first = hub.main[REPO]
    hub.put(REPO, {**hub.repos[REPO][first], WEIGHTS: b"newer"})
    fetch("--revision", f"{REPO}={first}")
    assert (tmp_path / "out" / REPO / WEIGHTS).read_bytes() == hub.repos[REPO][first][WEIGHTS]


def test_a_main_that_moves_meanwhile_mixes_nothing(hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    first = hub.main[REPO]

    def moves_on(handler: hubs.Handler, body: bytes) -> None:
        hub.put(REPO, dict.fromkeys(hub.repos[REPO][first], b"of the next commit"))
        hubs.drops(handler, body)

    hub.fails(WEIGHTS, moves_on)
    assert fetch()[0] == 0
    hub.main[REPO] = first
    assert is_whole(hub, tmp_path / "out")


def test_a_hub_that_answers_for_another_commit_is_not_believed(hub: HubServer, fetch: Fetch) -> None:
    hub.fails("/revision/" + "a" * 40, hubs.gives(json.dumps({"id": REPO, "sha": "b" * 40, "siblings": []}).encode()))
    status, said = fetch("--revision", f"{REPO}={'a' * 40}")
    assert (status, f"the Hub returned {'b' * 40} for {REPO} at {'a' * 40}" in said) == (1, True)


@pytest.mark.parametrize(("blobs", "siblings"), [(False, True), (True, False)])
def test_sizes_and_sums_come_from_wherever_the_hub_has_them(
    blobs: bool, siblings: bool, hub: HubServer, fetch: Fetch, tmp_path: Path
) -> None:
    hub.lists_blobs, hub.lists_siblings = blobs, siblings
    hub.fails(WEIGHTS, hubs.lies)
    assert fetch()[0] == 0
    assert is_whole(hub, tmp_path / "out")


def test_redirects_may_be_relative(hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    hub.relative_redirects, hub.lists_blobs = True, False
    hub.fails(WEIGHTS, hubs.lies, hubs.drops)
    assert fetch()[0] == 0
    assert is_whole(hub, tmp_path / "out")


@pytest.mark.parametrize("given", ["environment", "secret file"])
def test_a_gated_repo_is_read_with_the_token_which_goes_to_the_hub_alone(
    given: str, hub: HubServer, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated[REPO] = TOKEN
    if given == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    else:
        (tmp_path / "secret").write_text(TOKEN + "\n")
        monkeypatch.setattr(fetch_checkpoints, "SECRET", tmp_path / "secret")
    status, said = fetch()
    assert (status, TOKEN in said, is_whole(hub, tmp_path / "out")) == (0, False, True)
    assert hub.asked("/cdn/")
    assert not any("authorization" in headers for headers in hub.asked("/cdn/"))


@pytest.mark.parametrize("token", ["", "hf_wrong", "hf_with a space\nand a line"])
def test_a_gated_repo_says_what_to_do_and_never_the_token(
    token: str, hub: HubServer, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated[REPO] = TOKEN
    monkeypatch.setenv("HF_TOKEN", token)
    status, said = fetch()
    assert status == 1
    assert (
        "HF_TOKEN is not a token" if " " in token else f"{REPO} is gated: accept its licence at https://huggingface.co/{REPO}"
    ) in said
    assert not token or token not in said


def test_what_is_not_there_is_named(hub: HubServer, fetch: Fetch) -> None:
    status, said = fetch("--revision", f"{REPO}=v2")
    assert (status, f"{REPO} has no revision v2" in said) == (1, True)
    files = hub.repos[REPO][hub.main[REPO]]
    del files[WEIGHTS], files["model_index.json"]
    status, said = fetch()
    assert f"{REPO} at {hub.main[REPO]} lacks what wan21_1b needs: {WEIGHTS}, model_index.json" in said
    del hub.repos[REPO]
    status, said = fetch()
    assert (status, f"the Hub has no {REPO} at revision main to read (status 401)" in said) == (1, True)


def test_a_full_disk_is_told_before_anything_is_fetched(hub: HubServer, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(len(body) for body in wanted(hub, REPO).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, size - 1_000_000))  # type: ignore[attr-defined]
    status, said = fetch()
    assert (status, hub.sent, "the disk lacks 0.001 GB" in said) == (1, 0, True)


def test_a_folder_that_cannot_be_written_to_is_told(hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    status, said = fetch()
    assert (status, "fetch_checkpoints: --to: " in said, "Traceback" in said) == (1, True, False)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--parts", "text"], "wan21_1b has no 'text', but text_encoder, tokenizer, scheduler, vae, transformer"),
        (["--parts", ""], "wan21_1b has no ''"),
        (["--revision", "main"], "--revision takes ORG/NAME=SHA"),
        (["--revision", "other/repo=main"], f"with ORG/NAME of {REPO}"),
    ],
)
def test_a_wrong_argument_is_told(arguments: list[str], says: str, fetch: Fetch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fetch(*arguments)
    assert says in capsys.readouterr().err


def test_two_at_once_fill_one_folder(hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "builder.fetch_checkpoints", "--model-id", "wan21_1b", "--to", str(tmp_path / "out")]
    environment = {"HF_ENDPOINT": hub.address, "PATH": os.environ["PATH"]}
    hub.fails(WEIGHTS, hubs.stalls(1))
    both = [subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert is_whole(hub, tmp_path / "out")
    assert len([path for path, _ in hub.requests if "/cdn/" in path and path.endswith(WEIGHTS)]) == 2  # the stall, and the rest


def test_a_volume_without_locks_is_filled_too(
    hub: HubServer, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert fetch()[0] == 0
    assert is_whole(hub, tmp_path / "out")


def test_a_hub_library_that_ignores_the_switch_of_its_offline_mode_is_named(
    hub: HubServer, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a newer version would that keeps the switch elsewhere: the image sets it, and every request would fail."""
    monkeypatch.setattr(hub_client, "is_offline_mode", lambda: True)
    status, said = fetch()
    assert (status, hub.requests) == (1, [])
    assert f"no longer reads constants.HF_HUB_OFFLINE: install huggingface_hub {hub_client.TESTED_WITH}" in said


def test_the_hub_library_that_is_installed_is_the_tested_one() -> None:
    assert f"huggingface_hub=={hub_client.TESTED_WITH}\n" in (ROOT / "builder/requirements-fetch.txt").read_text()


def test_fetching_imports_no_torch() -> None:
    heavy = "{'torch', 'diffusers', 'transformers', 'safetensors', 'pydantic'}"
    code = f"import builder.fetch_checkpoints, sys; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("name", ["transformer/../../../../evil.json", "transformer//evil.json"])
def test_a_listing_that_names_a_file_outside_writes_none(hub: HubServer, fetch: Fetch, tmp_path: Path, name: str) -> None:
    """As a hostile mirror in HF_ENDPOINT would."""
    files = hub.repos[REPO][hub.main[REPO]]
    weights = json.dumps({"weight_map": {"a": name.removeprefix("transformer/")}}).encode()
    files |= {"transformer/diffusion_pytorch_model.safetensors.index.json": weights, name: b"{}"}
    status, said = fetch()
    assert (status, "is not downloaded" in said or "index" in said) == (1, True), said
    assert not list(tmp_path.rglob("evil.json"))


# As codes.


def state_of(model: WanModel, part: str) -> dict[str, torch.Tensor]:
    component = getattr(model._pipe, part)
    return dict(itertools.chain(component.named_parameters(), component.named_buffers()))


@pytest.mark.parametrize(("model_id", "format"), [("wan21_1b", "qfloat8"), ("wan22_5b", "uint4"), ("wan22_14b_t2v", "int8")])
def test_a_worker_loads_stored_codes_as_those_that_it_makes_at_its_start(
    model_id: str, format: Quantize, tiny: Path, fetch: Fetch, tmp_path: Path
) -> None:
    assert fetch("--quantize", format, model_id=model_id)[0] == 0
    made, stored = (
        load_pipeline(model_id, folder, "cpu", toolkit_path=STAND_IN, dtype=torch.bfloat16, quantize=format)
        for folder in (tiny, tmp_path / "out")
    )
    spec, quantization = MODELS[model_id], made.loras.quantization
    assert quantization
    for part in ("text_encoder", *spec.transformers):
        theirs, ours = state_of(made, part), state_of(stored, part)
        assert theirs.keys() == ours.keys() and any(name.endswith(".code_0") for name in ours)
        for name, tensor in theirs.items():
            assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name]), name
        folder = Path(spec.sources[part].repo) / part
        shapes = {key: value.shape for file in (tiny / folder).glob("*.safetensors") for key, value in load_file(file).items()}
        wide = {key for key in shapes if part != "text_encoder" and KEPT_IN_FLOAT32 & set(key.split("."))}
        wide -= {key for key in wide if is_linear(key, shapes[key]) and quantization.format_of(part, key)}
        arithmetic = sum(bytes_of_tensor(part, key, shapes[key], 4 if key in wide else 2, quantization) for key in shapes)
        files = [load_file(file) for file in (tmp_path / "out" / folder).glob("*.safetensors")]
        assert sum(tensor.nbytes for file in files for tensor in file.values()) == arithmetic
    places = [Checkpoints.of(spec, folder) for folder in (tiny, tmp_path / "out")]
    in_memory = [bytes_by_mode(place, 2, quantization) for place in places]
    assert in_memory[0] == in_memory[1]
    attention = [model._pipe.text_encoder.config._attn_implementation for model in (made, stored)]
    assert attention[0] == attention[1]
    if model_id != "wan21_1b":
        return  # the same code computes with the same tensors
    frames = []
    for model in (made, stored):
        model.apply_loras(adapters(model_id, tiny), "merge")  # which lies beside codes
        frames.append(make(model, num_frames=1, num_inference_steps=2))
    assert np.array_equal(*frames)


def test_a_worker_refuses_codes_that_it_would_not_make(fetch: Fetch, tmp_path: Path) -> None:
    assert fetch("--quantize", "qfloat8")[0] == 0

    def refusal(quantize: Quantize, dtype: torch.dtype = torch.bfloat16) -> str:
        with pytest.raises(CheckpointNotFound) as caught:
            load_pipeline("wan21_1b", tmp_path / "out", "cpu", dtype=dtype, quantize=quantize)
        return str(caught.value)

    text = f"the text_encoder of {REPO} was stored as qfloat8, by fetch_checkpoints --quantize qfloat8, and "
    wrong = "QUANTIZE is {}: set QUANTIZE=qfloat8, or fetch the weights again without --quantize qfloat8"
    assert refusal("none") == text + wrong.format("none")
    assert refusal("uint4") == text + wrong.format("uint4")
    assert refusal("qfloat8", torch.float32).startswith(text + "the worker runs in float32: set DTYPE=bfloat16, or")
    folder = tmp_path / "out" / REPO / "transformer"
    save_file({"a.weight": torch.zeros(2)}, folder / "plain.safetensors")
    names = {"a.weight": "plain.safetensors", "b.weight": Path(WEIGHTS).name}
    (folder / f"{Path(WEIGHTS).name}.index.json").write_text(json.dumps({"weight_map": names}))
    assert "only some files of the transformer are quantized; run fetch_checkpoints again" in refusal("qfloat8")


def test_codes_are_known_again_and_made_of_what_is_there(hub: HubServer, fetch: Fetch, tmp_path: Path) -> None:
    assert fetch("--dtype", "bf16")[0] == 0
    assert ", 0 fetched" in fetch("--quantize", "uint4")[1], "made of the bf16 weights"
    manifest = Manifest.read(tmp_path / "out" / REPO)
    assert manifest and manifest.files[WEIGHTS].quantized == "uint4" and manifest.files[WEIGHTS].converted_from
    assert ", 0 fetched" in fetch("--quantize", "uint4")[1]
    again = tmp_path / "again"
    assert fetch("--quantize", "uint4", to=again)[0] == 0
    assert (again / REPO / WEIGHTS).read_bytes() == (tmp_path / "out" / REPO / WEIGHTS).read_bytes()
    with safe_open(again / REPO / WEIGHTS, framework="pt") as file:
        note, layers = json.loads(file.metadata()[CODES]), sum(key.endswith(".code_0") for key in file.keys())  # noqa: SIM118
    assert note == {"format": "uint4", "excluded": [], "dtype": "bfloat16", "layers": layers, "torch": torch.__version__}
    assert ", 2 fetched" in fetch("--quantize", "qfloat8")[1], "another format needs the weights again"
    fetch()
    assert is_whole(hub, tmp_path / "out")
