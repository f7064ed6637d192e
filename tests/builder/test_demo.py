"""The toy world, and the tiny weights that have learned it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file

from builder.demo import captions, install, run, world
from builder.demo.judge import judge
from builder.demo.measure import film, psnr
from client.cli import main as client
from client.training.folder import read_folder
from pipelines.catalog import MODELS
from pipelines.checkpoints import Checkpoints
from pipelines.lora.file import LoraFile
from tests.conftest import REAL_TOOLKIT, STAND_IN
from tests.worker_process import environment, local_api
from tools.compare import as_json, compare
from tools.frames import read_clip
from worker.parse import parse


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    install.install(root)
    return root


@pytest.mark.parametrize("shape", [(64, 96, 9), (128, 96, 5)])
@pytest.mark.parametrize("striped", [False, True])
def test_a_clip_shows_what_it_says(shape: tuple[int, int, int], striped: bool) -> None:
    rng = random.Random(1)
    for kind in world.OBJECTS:
        clip = world.sample(rng, object=kind, striped=striped)
        seen = judge(world.draw(clip, *shape))
        assert (seen.object, seen.colour, seen.direction, seen.ground) == (kind, clip.colour, clip.direction, clip.ground)
        assert seen.striped == (striped and kind == "boat")
        assert not seen.night_falls


@pytest.mark.parametrize("ground", world.GROUNDS)
def test_night_falls_over_everything_but_a_night(ground: world.Ground) -> None:
    clip = world.sample(random.Random(1), ground=ground, night_falls=True)
    film = world.draw(clip, 64, 96, 9)
    seen = judge(film)
    assert (seen.object, seen.colour, seen.direction, seen.ground) == (clip.object, clip.colour, clip.direction, ground)
    assert seen.night_falls == (ground != "night")
    assert torch.equal(film[:, 0], world.draw(replace(clip, night_falls=False), 64, 96, 9)[:, 0])


def test_noise_shows_nothing() -> None:
    noise = torch.rand(3, 9, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert judge(noise).object is None


def test_a_full_phrase_says_every_attribute_in_a_known_word() -> None:
    for seed in range(50):
        rng = random.Random(seed)
        clip = world.sample(rng)
        phrase = captions.phrase(vars(clip), rng)
        assert captions.understood(phrase) == {what: getattr(clip, what) for what in captions.CHOICES}, phrase


@pytest.mark.parametrize("model_id", MODELS)
def test_the_weights_are_checkpoints_of_the_models(demo: Path, model_id: str) -> None:
    assert Checkpoints(MODELS[model_id], demo).missing_parts == []


def test_the_weights_are_small() -> None:
    assert sum(file.stat().st_size for file in install.WEIGHTS.rglob("*") if file.is_file()) < 11e6


@pytest.mark.parametrize("name", ["vae", "vae_5b"])
def test_a_clip_has_one_latent_and_no_noise(name: str) -> None:
    """ai-toolkit trains on a sample of the VAE's latents, not on their mean."""
    vae = AutoencoderKLWan.from_pretrained(install.WEIGHTS / name, torch_dtype=torch.float32)
    clip = world.draw(world.sample(random.Random(1)), 64, 64, 1)
    with torch.no_grad():
        assert vae.encode(clip[None]).latent_dist.std.max() < 1e-6


def test_plain_diffusers_makes_what_the_prompt_says(demo: Path) -> None:
    pipe = WanPipeline.from_pretrained(demo / MODELS["wan21_1b"].sources["vae"].repo, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    seen = judge(film(pipe, "a red boat sails to the left over the sea", (96, 128, 17), seed=1))
    assert (seen.object, seen.colour, seen.direction, seen.ground) == ("boat", "red", "left", "sea")


def check_that_it_continues_an_image(pipe: WanImageToVideoPipeline, height: int, width: int) -> None:
    """The boat stands in the middle and faces left; the prompt says that it moves right."""
    clip = world.sample(random.Random(1), object="boat", colour="red", ground="sea", start=(0.5, 0.5), faces_left=True)
    picture = world.draw(clip, height, width, 2)[:, 0]
    made = film(pipe, "a red boat moves right over the sea", (height, width, 9), seed=1, steps=6, image=world.to_pil(picture))
    seen = judge(made)
    assert (seen.object, seen.colour, seen.direction, seen.ground) == ("boat", "red", "right", "sea")
    assert psnr(made[:, 0], picture) > 22


def test_plain_diffusers_continues_an_image(demo: Path) -> None:
    repo = demo / MODELS["wan21_i2v_14b480p"].sources["vae"].repo
    pipe = WanImageToVideoPipeline.from_pretrained(repo, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    check_that_it_continues_an_image(pipe, 96, 128)


@pytest.fixture(scope="module")
def pipe_5b(demo: Path) -> WanPipeline:
    pipe = WanPipeline.from_pretrained(demo / MODELS["wan22_5b"].sources["vae"].repo, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_5b_makes_what_the_prompt_says(pipe_5b: WanPipeline) -> None:
    seen = judge(film(pipe_5b, "a red boat sails to the left over the sea", (192, 256, 9), seed=1))
    assert (seen.object, seen.colour, seen.direction, seen.ground) == ("boat", "red", "left", "sea")


def test_5b_continues_an_image(pipe_5b: WanPipeline) -> None:
    pipe = WanImageToVideoPipeline(**pipe_5b.components, expand_timesteps=True)
    pipe.set_progress_bar_config(disable=True)
    check_that_it_continues_an_image(pipe, 192, 256)


def test_image_to_video_of_both_versions_computes_the_same(demo: Path) -> None:
    """2.1 also takes what its image encoder sees, which is random here and adds nothing."""
    sources = [MODELS[model_id].sources["transformer"] for model_id in ("wan21_i2v_14b", "wan22_14b_i2v")]
    first, second = (WanTransformer3DModel.from_pretrained(demo / str(source)) for source in sources)
    latents, text = torch.randn(1, 36, 2, 4, 4), torch.randn(1, 512, 64)
    seen = torch.randn(1, 17, first.config.image_dim)
    with torch.no_grad():
        flow = second(latents, torch.tensor([500]), text).sample
        torch.testing.assert_close(first(latents, torch.tensor([500]), text, encoder_hidden_states_image=seen).sample, flow)


@pytest.mark.parametrize("model_id", MODELS)
def test_make_run_asks_every_model_for_what_it_takes(model_id: str) -> None:
    [prompt] = parse(run.job_of(model_id)["input"], MODELS[model_id]).prompts
    assert (prompt.width, prompt.height) == ((256, 192) if model_id == "wan22_5b" else (128, 96))
    assert bool(prompt.ctrl_img) == (MODELS[model_id].control_image == "required")
    assert ("[trigger]" in prompt.prompt) == (model_id in run.LORAS)


STRIPED_SAIL, NIGHTFALL = install.TRAINED / "striped_sail", install.TRAINED / "nightfall"


@pytest.mark.parametrize(("trained", "steps", "rank"), [(STRIPED_SAIL, (1100, 2200), 8), (NIGHTFALL, (600, 900), 4)])
def test_the_lora_is_as_the_trainer_left_it(trained: Path, steps: tuple[int, int], rank: int) -> None:
    folder = read_folder(trained)
    assert [(one.step, len(one.files)) for one in folder.checkpoints] == [(step, 2) for step in steps]
    assert {step for step, _ in folder.samples} == {0, *steps}
    shapes = load_file(install.WEIGHTS / "transformer/diffusion_pytorch_model.safetensors")
    for name in (name for one in folder.checkpoints for name in one.files):
        file = LoraFile.read(trained / name)
        assert json.loads(file.metadata["software"])["version"] == "0.12.26"
        width = shapes["blocks.0.attn1.to_q.weight"].shape[1]
        assert file.shapes["diffusion_model.blocks.0.self_attn.q.lora_A.weight"] == (rank, width)


@pytest.mark.parametrize(("trained", "model_id"), [(STRIPED_SAIL, "wan22_14b_t2v"), (NIGHTFALL, "wan22_14b_i2v")])
def test_a_worker_makes_the_sample_that_the_trainer_showed_and_then_the_film_of_make_run(
    trained: Path, model_id: str, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trainer's folder → the client's request → a worker → a video that cannot be told from the trainer's own."""
    places = {"LORA_DIR": demo / "loras", "OUTPUT_DIR": tmp_path / "out", "AI_TOOLKIT_PATH": REAL_TOOLKIT or STAND_IN}
    env = environment(demo, model_id, DTYPE="bfloat16", **places)
    with local_api(env, tmp_path) as api:
        options = [
            "--url",
            api.url,
            "--sample",
            "2",
            "--output-format",
            "webp",
            "--json",
            "--output-dir",
            str(tmp_path / "videos"),
        ]
        assert client(["from-training", str(trained), *options]) == 0
        output = api.run(run.job_of(model_id)["input"] | {"draft": trained == STRIPED_SAIL})["output"]
    [made] = json.loads(capsys.readouterr().out)["files"]
    folder = read_folder(trained)
    earlier = trained / folder.samples[folder.checkpoints[0].step or 0, 2]
    video_made = read_clip(Path(made["path"]))
    own, other = (compare(read_clip(Path(sample)), video_made) for sample in (made["sample"], earlier))
    near, far = (as_json(found)["mean_difference"] for found in (own, other))
    assert own.equal or (trained == NIGHTFALL and near < 3), "2.1 of 255 on another kind of CPU than the trainer's"
    assert not other.equal and far > 2 * near, "the sample of another step"
    [video] = output["outputs"]["videos"]
    seen = judge(run.frames_of(Path(urlsplit(video["url"]).path)))
    assert (seen.object, seen.colour, seen.direction, seen.ground) == ("boat", "red", "left", "sea"), "a draft keeps them"
    assert seen.night_falls == (trained == NIGHTFALL)
