"""The weights of a model come into layers of their own, and what builds the images names all models."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hcl2
import numpy as np
import pytest
import torch
import yaml

from builder import REPRODUCIBLE_MTIME, bake
from pipelines import load_pipeline
from pipelines.catalog import MODELS, TOOLKIT_COMMIT
from pipelines.weights import STEM_OF
from tests.builder.hub_server import hub_server
from tests.pipelines.test_models import adapters, make
from tests.worker_process import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
BUILDX = shutil.which("docker-buildx", path=f"{os.environ['PATH']}:/usr/libexec/docker/cli-plugins")


def plain(value: Any) -> Any:
    """A parsed bake file with the quotes of its strings taken off."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items() if not key.startswith("__")}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.strip('"') if isinstance(value, str) else value


@pytest.fixture(scope="module")
def bake_file() -> dict[str, dict[str, Any]]:
    """Kind of block to its name to what is in it."""
    with (ROOT / "docker-bake.hcl").open() as file:
        content = plain(hcl2.load(file))
    return {kind: {name: body for block in blocks for name, body in block.items()} for kind, blocks in content.items()}


def test_every_model_has_an_image_of_each_flavour(bake_file: dict[str, dict[str, Any]]) -> None:
    for flavour in ("baked", "slim"):
        assert bake_file["target"][flavour]["matrix"] == {"model": "MODELS"}
        assert bake_file["target"][flavour]["args"]["MODEL_ID"] == "model"


def test_the_images_have_the_toolkit_that_the_worker_was_tested_with(bake_file: dict[str, dict[str, Any]]) -> None:
    assert bake_file["variable"]["AI_TOOLKIT_COMMIT"]["default"] == TOOLKIT_COMMIT


def test_what_the_bake_file_sets_the_dockerfile_takes(bake_file: dict[str, dict[str, Any]]) -> None:
    taken = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE)) | {"SOURCE_DATE_EPOCH"}  # the builder's own
    for target in bake_file["target"].values():
        assert set(target["args"]) <= taken
    assert {"baked", "slim"} <= set(re.findall(r"^FROM \S+ AS (\w+)", DOCKERFILE, re.MULTILINE))


@pytest.mark.skipif(BUILDX is None, reason="no docker buildx here")
def test_buildx_sees_two_targets_per_model_with_their_labels() -> None:
    assert BUILDX
    command = [BUILDX, "bake", "--print", "all"]
    env = {**os.environ, "VERSION": "1.2.3", "COMMIT": "c0ffee", "REGISTRY": "registry.example/me"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    targets = json.loads(done.stdout)["target"]
    assert targets["wan21_1b"]["args"]["QUANTIZE"] == ""
    assert set(targets) == {f"{model_id}{flavour}" for model_id in MODELS for flavour in ("", "-slim")}
    for name, target in targets.items():
        assert target["tags"] == [f"registry.example/me/worker-wan-lora:1.2.3-{name}"]
        assert target["args"]["MODEL_ID"] == target["labels"]["worker-wan-lora.model"] == name.removesuffix("-slim")
        assert target["labels"]["org.opencontainers.image.revision"] == "c0ffee"
        assert "secret" not in target or target["secret"] == ["id=HF_TOKEN,env=HF_TOKEN"]


@pytest.mark.skipif(BUILDX is None, reason="no docker buildx here")
def test_an_image_with_codes_has_a_tag_of_its_own() -> None:
    assert BUILDX
    env = {**os.environ, "VERSION": "1.2.3", "QUANTIZE": "uint4", "REGISTRY": "registry.example/me"}
    command = [BUILDX, "bake", "--print", "wan21_1b", "wan21_1b-slim"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    targets = json.loads(done.stdout)["target"]
    tags = {name: target["tags"] for name, target in targets.items()}
    assert tags["wan21_1b"] == ["registry.example/me/worker-wan-lora:1.2.3-wan21_1b-uint4"]
    assert tags["wan21_1b-slim"] == ["registry.example/me/worker-wan-lora:1.2.3-wan21_1b-slim"]
    assert targets["wan21_1b"]["args"]["QUANTIZE"] == "uint4"


def test_every_component_with_weights_has_a_group_and_every_slot_is_copied() -> None:
    parts = [part for group in bake.GROUPS.values() for part in group.parts]
    assert len(parts) == len(set(parts))
    assert set(STEM_OF) <= set(parts) and {part for spec in MODELS.values() for part in spec.sources} <= set(parts)
    slots = [str(folder) for name, group in bake.GROUPS.items() for folder in group.folders(name)]
    copied = re.findall(r"^COPY --from=checkpoints (/weights/\S+) (\S+)$", DOCKERFILE, re.MULTILINE)
    assert copied == [(slot, slot) for slot in slots]
    assert set(re.findall(r"builder\.bake (\w+)", DOCKERFILE)) == {*bake.GROUPS, "draft", "all"}


STAGES = {
    re.match(r"\S+ AS (\w+)", stage)[1]: stage.replace("\\\n", " ")  # type: ignore[index]
    for stage in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
}


def test_the_code_is_copied_last() -> None:
    for name in ("slim", "baked"):
        assert STAGES[name].rstrip().endswith("COPY --from=code /image /")


@pytest.mark.parametrize(
    ("stage", "module"),
    [
        ("toolkit", "builder.fetch_toolkit"),
        ("tiny", "builder.tiny_checkpoints"),
        ("checkpoints", "builder.fetch_checkpoints"),
        ("checkpoints", "builder.bake"),
        ("fetch_codes checkpoints", "builder.quantize"),
        ("code", "builder.fetch_checkpoints"),
        ("code", "builder.quantize"),
    ],
)
def test_a_stage_copies_every_module_that_its_program_imports(stage: str, module: str, tmp_path: Path) -> None:
    """`stage`: with the one that it begins from, where that copies modules."""
    copied = "".join(STAGES[name] for name in stage.split())
    for line in re.findall(r"^COPY ((?:builder|pipelines|worker).+)$", copied, re.MULTILINE):
        *sources, target = line.split()
        for source in map(Path, sources):
            to = tmp_path / target.removeprefix("/build/").removeprefix("/image/app/")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, to)
            else:
                to.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, to)
    done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_only_a_build_with_codes_fetches_weights_where_torch_is() -> None:
    """Else a new version of a package would download all weights again."""
    begins = dict(re.findall(r"^FROM (\S+) AS (\w+)$", DOCKERFILE, re.MULTILINE))
    assert begins["fetch${QUANTIZE:+_codes}"] == "checkpoints"
    assert "FROM tools AS fetch\n" in DOCKERFILE and "FROM runtime AS fetch_codes\n" in DOCKERFILE
    assert DOCKERFILE.index("\nARG QUANTIZE") < DOCKERFILE.index("\nFROM "), "a FROM knows no other arguments"
    assert all("\nARG QUANTIZE\n" in STAGES[name] for name in ("checkpoints", "baked"))


def test_the_modification_time_is_the_same_everywhere(bake_file: dict[str, dict[str, Any]]) -> None:
    assert f"\nARG REPRODUCIBLE_MTIME={REPRODUCIBLE_MTIME}\n" in DOCKERFILE
    assert bake_file["variable"]["SOURCE_DATE_EPOCH"]["default"] == str(REPRODUCIBLE_MTIME)
    for name, stage in STAGES.items():
        if "$REPRODUCIBLE_MTIME" in stage or "install.sh" in stage:
            assert "\nARG REPRODUCIBLE_MTIME\n" in stage, name


@pytest.fixture
def baked(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder below which `bake` lays out wan21_i2v_14b."""
    monkeypatch.setattr(bake, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(bake, "WEIGHTS", tmp_path / "weights")
    monkeypatch.setattr("sys.argv", ["bake", "all", "--model-id", "wan21_i2v_14b", "--from", str(tiny)])
    assert bake.main() == 0
    return tmp_path


def test_baked_repos_are_the_same_files_with_weights_as_links(baked: Path, tiny: Path) -> None:
    repo = "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"
    originals = sorted(path for path in (tiny / repo).rglob("*") if path.is_file())
    for original in originals:
        copy = baked / "checkpoints" / repo / original.relative_to(tiny / repo)
        assert copy.read_bytes() == original.read_bytes()
        assert copy.is_symlink() == (original.suffix == ".safetensors")
    assert {path.name for path in (baked / "checkpoints").iterdir()} == {"Wan-AI"}
    assert len(list((baked / "checkpoints").glob("*/*"))) == 1


def test_a_layer_of_weights_holds_nothing_but_weights_named_by_their_content(baked: Path) -> None:
    files = [path for path in (baked / "weights").rglob("*") if path.is_file()]
    assert {path.relative_to(baked / "weights").parts[0] for path in files} == {"text", "vae", "image", "transformer"}
    assert all(path.name == bake.sha256_of(path) for path in files)
    assert {path.stat().st_mtime for path in (baked / "weights").rglob("*")} == {float(REPRODUCIBLE_MTIME)}


def test_an_image_with_codes_makes_the_frames_of_a_worker_that_makes_them_at_its_start(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, repo = MODELS["wan21_1b"], MODELS["wan21_1b"].sources["vae"].repo
    monkeypatch.setattr(bake, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(bake, "WEIGHTS", tmp_path / "weights")
    with hub_server() as hub:
        hub.put(repo, {str(path.relative_to(tiny / repo)): path.read_bytes() for path in (tiny / repo).rglob("*.*")})
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        for group in bake.GROUPS:
            monkeypatch.setattr("sys.argv", ["bake", group, "--model-id", spec.id, "--quantize", "qfloat8"])
            assert bake.main() == 0
    model_file = tmp_path / "checkpoints" / repo / "transformer/diffusion_pytorch_model.safetensors"
    assert model_file.resolve().parent.parent == tmp_path / "weights/transformer"
    assert model_file.resolve().name == bake.sha256_of(model_file)
    frames = []
    for folder in (tmp_path / "checkpoints", tiny):
        model = load_pipeline(spec.id, folder, "cpu", dtype=torch.bfloat16, quantize="qfloat8")
        model.apply_loras(adapters(spec.id, tiny), "merge")
        frames.append(make(model, num_frames=1, num_inference_steps=2))
    assert np.array_equal(*frames)


@pytest.mark.parametrize("format", ["none", "auto", "nf4"])
def test_an_unknown_format_is_named_with_those_there_are(
    format: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["bake", "text", "--model-id", "wan21_1b", "--quantize", format])
    with pytest.raises(SystemExit):
        bake.main()
    said = capsys.readouterr().err
    assert f"QUANTIZE {format!r} is not a format; build with one of qfloat8, float8, int8, uint2," in said


def test_distilled_loras_are_fetched_beside_the_weights_for_models_that_have_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(bake, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(bake.subprocess, "run", lambda command, check: commands.append(command))
    revisions = "lightx2v/Wan2.2-Distill-Loras=abc,Wan-AI/Wan2.1-T2V-1.3B-Diffusers=def"
    for model_id in ("wan22_14b_i2v", "wan21_1b"):
        monkeypatch.setattr("sys.argv", ["bake", "draft", "--model-id", model_id, "--revisions", revisions])
        assert bake.main() == 0
    (command,) = commands
    assert command[1:] == [
        *("-m", "builder.fetch_checkpoints", "--model-id", "wan22_14b_i2v", "--to", str(tmp_path), "--draft"),
        *("--revision", "lightx2v/Wan2.2-Distill-Loras=abc"),
    ]


def test_an_unknown_model_is_named_with_those_there_are(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.argv", ["bake", "text", "--model-id", "wan3"])
    with pytest.raises(SystemExit):
        bake.main()
    assert f"MODEL_ID 'wan3' is not a model id; build with one of {', '.join(MODELS)}" in capsys.readouterr().err


def test_files_go_into_the_emptiest_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bake, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(bake, "WEIGHTS", tmp_path / "weights")
    folder = tmp_path / "checkpoints" / str(MODELS["wan21_1b"].sources["text_encoder"])
    folder.mkdir(parents=True)
    for number, size in enumerate((5, 4, 3, 2, 1)):
        (folder / f"model-{number}.safetensors").write_bytes(bytes([number]) * size)
    bake.spread(MODELS["wan21_1b"], "text", bake.GROUPS["text"])
    filled = [sum(file.stat().st_size for file in slot.iterdir()) for slot in bake.GROUPS["text"].folders("text")]
    assert filled == [5, 5, 5]


WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_an_action_of_a_workflow_is_pinned_to_a_commit(workflow: Path) -> None:
    jobs = yaml.safe_load(workflow.read_text())["jobs"].values()
    used = [step["uses"] for job in jobs for step in job["steps"] if "uses" in step]
    assert used and all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) for action in used)
