"""The image itself, built for real from tiny checkpoints: what is in it, what is not, and that it serves a job offline.

`make image-test` runs them; they need root, buildah, and some minutes.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import pytest

from pipelines.catalog import MODELS
from tests.builder.hub_server import HubServer, hub_server
from tests.cloud import Cloud
from tests.conftest import STAND_IN
from tests.image.builds import Container, Image, Layer, build, container
from tests.integration.test_local_api import request_for
from tests.s3_server import S3Server, serve
from tests.worker_process import ROOT, free_port

pytestmark = pytest.mark.image

CANARY = "hf_canaryCANARYcanaryCANARYcanary0000"
"""The token that the images are built with; in none of them."""
TOOLKIT_AT = "/opt/ai-toolkit"

FORBIDDEN = {
    "a package manager's cache": r"var/cache/apt/.*\.(deb|bin)|var/lib/apt/lists/.+|(.*/)?\.cache/.*|.*/pip/cache/.*",
    "what only builds": r"opt/venv/.*/site-packages/(pip|builder)(/.*)?|usr/bin/(git|gcc)|build/.+|tools/.+",
    "tests": r"(app|opt/venv)/(.*/)?tests/.*|app/test_.*",
    "what is not code": r"app/(docs|tools|benchmarks|tests|\.git.*|\.runpod.*|Dockerfile|Makefile|README.*)(/.*)?",
    "what only builds, of the code": r"app/builder/(?!(__init__|__pycache__|retry|hub|checkpoint_folder|convert|quantize|"
    r"fetch_checkpoints)).*",
    "temporary files": r"tmp/.+|var/tmp/.+|var/log/.+\.log|root/\.(?!bashrc|profile).+",
    "a stand-in": r".*stand_in.*",
    "a secret": r".*HF_TOKEN.*|.*\.(pem|key)|.*/\.netrc|.*/\.git-credentials",
}
"""What may be in no layer, by the path's pattern. Certificates of public authorities are no secrets."""
PUBLIC = re.compile(
    r".*/(certifi|botocore|pip|grpc)/.*cacert\.pem|.*/roots\.pem|etc/ssl/certs/.*|usr/(share/ca-certificates/.*|lib/ssl/cert\.pem)"
)


@pytest.fixture(scope="session")
def secret(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The option that gives a build the canary as its token."""
    file = tmp_path_factory.mktemp("secret") / "token"
    file.write_text(CANARY)
    return f"--secret=id=HF_TOKEN,src={file}"


@pytest.fixture(scope="session")
def toolkit_remote(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(a git repository with the stand-in, its commit)."""
    remote = tmp_path_factory.mktemp("toolkit") / "remote"
    shutil.copytree(STAND_IN, remote)

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "init.defaultBranch=main"]
        return subprocess.run(["git", *identity, *arguments], cwd=remote, capture_output=True, text=True, check=True).stdout

    git("init")
    git("add", ".")
    git("commit", "--message", "all")
    return remote, git("rev-parse", "HEAD").strip()


def put_gated(hub: HubServer, repo: str, folder: Path) -> None:
    """Put a repo on the Hub that only the canary may read."""
    hub.put(repo, {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()})
    hub.gated[repo] = CANARY


@pytest.fixture(scope="session")
def small(secret: str, tmp_path_factory: pytest.TempPathFactory) -> Image:
    return build(tmp_path_factory.mktemp("wan21-1b-"), secret, CHECKPOINTS="tiny", MODEL_ID="wan21_1b")


@pytest.fixture(scope="session")
def build_from_hub(
    secret: str, tiny: Path, toolkit_remote: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Image]]:
    """Builds an image of wan22_5b as for use: with ai-toolkit, and weights from a Hub that wants the token."""
    remote, commit = toolkit_remote
    with hub_server() as hub:
        for repo in {source.repo for source in MODELS["wan22_5b"].sources.values()}:
            put_gated(hub, repo, tiny / repo)
        arguments = {"HF_ENDPOINT": hub.address, "AI_TOOLKIT_REMOTE": "file:///remote", "AI_TOOLKIT_COMMIT": commit}
        options = [secret, f"--volume={remote}:/remote:ro"]

        def build_it(**more: str) -> Image:
            return build(tmp_path_factory.mktemp("wan22-5b-"), *options, MODEL_ID="wan22_5b", **arguments, **more)

        yield build_it


@pytest.fixture(scope="session")
def from_hub(build_from_hub: Callable[..., Image]) -> Image:
    return build_from_hub()


@pytest.fixture(scope="session")
def with_codes(build_from_hub: Callable[..., Image]) -> Image:
    return build_from_hub(QUANTIZE="qfloat8")


@pytest.fixture(scope="session")
def slim(secret: str, tmp_path_factory: pytest.TempPathFactory) -> Image:
    return build(tmp_path_factory.mktemp("slim-"), secret, "--target=slim", CHECKPOINTS="tiny")


@pytest.fixture(scope="session", params=["small", "from_hub", "with_codes", "slim"])
def image(request: pytest.FixtureRequest) -> Image:
    return request.getfixturevalue(request.param)


def paths_of(layer: Layer) -> list[str]:
    """Of its files and links, without the slash at the front."""
    names = [member.name.removeprefix("./") for member in layer.members() if not member.isdir()]
    return [name for name in names if "/.wh." not in f"/{name}"]


def removed_by(layer: Layer) -> list[str]:
    """The paths that a layer takes away from those below."""
    return [member.name.replace(".wh.", "", 1) for member in layer.members() if "/.wh." in f"/{member.name}"]


def weights_of(image: Image) -> dict[str, str]:
    """Slot to the layer that holds its weights."""
    slots = {}
    for layer in image.own_layers:
        for path in paths_of(layer):
            if path.startswith("weights/"):
                slots[path.rpartition("/")[0]] = layer.diff_id
    return slots


def bytes_of_weights(image: Image) -> dict[str, int]:
    """By slot."""
    sizes = {layer.diff_id: layer.bytes for layer in image.own_layers}
    return {slot: sizes[diff_id] for slot, diff_id in weights_of(image).items()}


def test_no_layer_holds_what_does_not_run(image: Image) -> None:
    found = [
        f"{what}: {path}"
        for layer in image.own_layers
        for path in paths_of(layer)
        for what, pattern in FORBIDDEN.items()
        if re.fullmatch(pattern, path) and not PUBLIC.fullmatch(path)
    ]
    assert not found, "\n".join(found[:50])


def test_no_layer_takes_back_what_another_brought(image: Image) -> None:
    """What is removed in a later layer is still pulled. Of the base some leftovers are removed."""
    brought: set[str] = set()
    for layer in image.own_layers:
        assert brought.isdisjoint(removed_by(layer))
        brought |= set(paths_of(layer))


def test_the_token_of_the_build_is_nowhere(image: Image) -> None:
    assert CANARY not in str(image.description)
    assert not any(layer.holds(CANARY.encode()) for layer in image.own_layers)
    assert "HF_TOKEN" not in image.environment


def test_all_code_is_compiled_and_all_bytecode_has_its_source(small: Image) -> None:
    paths = {path for layer in small.own_layers for path in paths_of(layer)}
    compiled = {path for path in paths if path.startswith(("app/", "opt/venv/")) and path.endswith(".pyc")}
    sources = {re.sub(r"__pycache__/(.+)\.cpython-\d+\.pyc", r"\1.py", path) for path in compiled}
    assert sources <= paths
    code = {path for path in paths if path.startswith("app/") and path.endswith(".py")}
    assert "app/handler.py" in code and code <= sources


def test_the_code_is_the_last_layer_and_small(image: Image) -> None:
    *below, last = image.layers
    assert any(path == "app/handler.py" for path in paths_of(last))
    assert all(re.match(r"app/|opt/venv/.*/transformers/models/__pycache__/index\.", path) for path in paths_of(last))
    assert not any(path.startswith("app/") for layer in below for path in paths_of(layer))
    assert last.bytes < 2_000_000


def test_a_change_of_the_code_changes_the_last_layer_alone(
    small: Image, secret: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    changed = tmp_path_factory.mktemp("changed") / "context"
    for name in ("LICENSE", "Dockerfile", ".dockerignore", "handler.py"):
        changed.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, changed / name)
    for name in ("builder", "pipelines", "worker"):
        shutil.copytree(ROOT / name, changed / name)
    (changed / "worker/job.py").write_text((changed / "worker/job.py").read_text() + "\nCHANGED = True\n")
    folder = tmp_path_factory.mktemp("wan21-1b-changed-")
    other = build(folder, secret, context=changed, CHECKPOINTS="tiny", MODEL_ID="wan21_1b", COMMIT="decade")
    same = [ours.diff_id == theirs.diff_id for ours, theirs in zip(small.layers, other.layers, strict=True)]
    assert same == [True] * (len(same) - 1) + [False]
    assert other.config["Labels"]["org.opencontainers.image.revision"] == "decade"


def test_the_weights_of_each_component_are_layers_of_their_own(small: Image, slim: Image) -> None:
    slots = weights_of(small)
    assert {slot.split("/")[1] for slot in slots} == {"text", "vae", "transformer"}
    assert len(set(slots.values())) == len(slots)
    assert not weights_of(slim)


def test_models_with_the_same_text_encoder_and_vae_share_these_layers(
    small: Image, secret: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = build(tmp_path_factory.mktemp("wan21-14b-"), secret, CHECKPOINTS="tiny", MODEL_ID="wan21_14b")
    ours, theirs = weights_of(small), weights_of(other)
    assert ours["weights/text/0"] == theirs["weights/text/0"]
    assert ours["weights/vae"] == theirs["weights/vae"]
    assert ours["weights/transformer/0"] != theirs["weights/transformer/0"]


def test_the_image_says_what_it_is_and_starts_python_itself(small: Image) -> None:
    assert small.config["Cmd"] == ["python3", "-u", "/app/handler.py"]
    assert not small.config.get("Entrypoint")
    assert small.environment["MODEL_ID"] == "wan21_1b"
    assert small.environment["HF_HUB_OFFLINE"] == "1"
    assert small.config["Labels"]["org.opencontainers.image.title"] == "worker-wan-lora"


def test_an_image_with_codes_has_less_to_read_and_sets_the_format(from_hub: Image, with_codes: Image) -> None:
    assert (from_hub.environment["QUANTIZE"], with_codes.environment["QUANTIZE"]) == ("", "qfloat8")
    whole, coded = (bytes_of_weights(image) for image in (from_hub, with_codes))
    assert whole.keys() == coded.keys()
    assert all(coded[slot] < whole[slot] for slot in whole if not slot.startswith("weights/vae"))
    assert coded["weights/vae"] == whole["weights/vae"]


def test_sizes(image: Image) -> None:
    """A table for whoever reads the log; run pytest with -s."""
    print(f"\n{image.name}: {sum(layer.bytes for layer in image.layers) / 1e6:.1f} MB")
    for layer in image.layers:
        if layer.bytes > 100_000:
            print(f"{layer.bytes / 1e6:9.2f} MB  {layer.created_by.removeprefix('/bin/sh -c ').removeprefix('#(nop) ')[:90]}")


ON_A_CPU = {"DEVICE": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def wait_until_ready(running: Container, port: int = 8000) -> None:
    deadline = time.monotonic() + 120
    while not running.post(port, "/run", {"input": {}}):
        assert running.process.poll() is None and time.monotonic() < deadline, running.log.read_text()
        time.sleep(0.2)


def play(file: Path) -> list[Any]:
    with av.open(str(file)) as opened:
        return list(opened.decode(video=0))


@pytest.mark.parametrize("which", ["small", "from_hub", "with_codes"])
def test_without_a_network_a_job_becomes_a_video_that_plays(
    which: str, request: pytest.FixtureRequest, tiny: Path, tmp_path: Path
) -> None:
    image: Image = request.getfixturevalue(which)
    out = tmp_path / "out"
    out.mkdir()
    volumes = {tiny / "loras": "/runpod-volume/loras", out: "/out"}
    serving = ["--rp_serve_api"]
    env = ON_A_CPU | {"OUTPUT_DIR": "/out"} | ({"DTYPE": "bfloat16"} if which == "with_codes" else {})
    with container(image, tmp_path / "log", env, volumes, *serving) as running:
        wait_until_ready(running)
        job = request_for(image.environment["MODEL_ID"], tiny) | {"output_format": "mp4"}
        answer = running.post(8000, "/runsync", {"input": job})
        assert answer.get("status") == "COMPLETED", answer or running.log.read_text()
        (video,) = answer["output"]["outputs"]["videos"]
        (file,) = out.rglob("*.mp4")
        revisions = answer["output"]["settings"]["checkpoints"].values()
        assert all(revisions) == (which != "small")  # tiny checkpoints are of no revision
        frames = play(file)
        assert len(frames) == video["num_frames"] == 5
        assert (frames[0].width, frames[0].height) == (video["width"], video["height"])


def test_a_slim_image_takes_its_weights_from_the_volume(slim: Image, tiny: Path, tmp_path: Path) -> None:
    volume = {tiny: "/runpod-volume/checkpoints", tiny / "loras": "/runpod-volume/loras"}
    with container(slim, tmp_path / "log", ON_A_CPU | {"MODEL_ID": "wan21_14b"}, volume, "--rp_serve_api") as running:
        wait_until_ready(running)


def test_a_slim_image_that_may_fetches_its_weights_to_the_volume(slim: Image, tiny: Path, tmp_path: Path) -> None:
    volume, port = tmp_path / "volume", free_port()
    volume.mkdir()
    repo = MODELS["wan21_1b"].sources["vae"].repo
    with hub_server() as hub:
        put_gated(hub, repo, tiny / repo)
        env = ON_A_CPU | {"MODEL_ID": "wan21_1b", "ALLOW_DOWNLOAD": "1", "HF_ENDPOINT": hub.address, "HF_TOKEN": CANARY}
        serving = ["--rp_serve_api", "--rp_api_port", str(port)]
        with container(slim, tmp_path / "log", env, {volume: "/runpod-volume"}, *serving, network=True) as running:
            wait_until_ready(running, port)
    assert (volume / "checkpoints" / repo / "vae/diffusion_pytorch_model.safetensors").is_file()
    assert CANARY not in (tmp_path / "log").read_text()


def test_an_image_for_any_model_asks_for_one(slim: Image, tmp_path: Path) -> None:
    with container(slim, tmp_path / "log", ON_A_CPU, {}) as running:
        assert running.process.wait(60) == 1
    assert f"MODEL_ID is not set; set it to one of {', '.join(MODELS)}" in running.log.read_text()


@pytest.fixture
def bucket() -> Iterator[S3Server]:
    with serve() as server:
        yield server


def test_sigterm_reaches_the_worker_which_finishes_its_job(small: Image, bucket: S3Server, tiny: Path, tmp_path: Path) -> None:
    cloud = Cloud()
    slow = {"width": 128, "height": 128, "num_frames": 33, "sample_steps": 60}
    env = ON_A_CPU | cloud.environment("pod") | bucket.environment()
    try:
        with container(small, tmp_path / "log", env, {tiny / "loras": "/runpod-volume/loras"}, network=True) as running:
            cloud.submit("last", request_for("wan21_1b", tiny, **slow))
            cloud.wait_for("last", "denoise", seconds=120)
            command = Path(f"/proc/{running.pid}/cmdline").read_text()
            assert command.startswith("python3\0-u\0/app/handler.py")
            signalled = subprocess.run(["kill", f"-{signal.SIGTERM.name.removeprefix('SIG')}", str(running.pid)], check=False)
            assert signalled.returncode == 0
            assert len(cloud.wait_for("last", seconds=120)["output"]["outputs"]["videos"]) == 1
            assert running.process.wait(60) == 0
    finally:
        cloud.close()
