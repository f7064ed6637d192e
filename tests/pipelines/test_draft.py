"""Drafts: the steps that the authors of the distilled LoRAs take, on weights merged by hand, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipelines import Adapter, Sampling, WanModel, load_pipeline
from pipelines.catalog import MODELS, LoraMode, OffloadMode, Quantize
from pipelines.errors import LoraIncompatible
from pipelines.few_steps import FewStepEuler
from pipelines.lora.file import LoraFile
from pipelines.quantized import CodedLinear
from pipelines.recipes import documented, draft_of
from tests import lora_zoo, reference
from tests.conftest import REAL_TOOLKIT, STAND_IN
from tests.distilled import Tensors, loras_of, write_distilled
from tests.stand_in_device import StandInDevice

TOOLKIT = REAL_TOOLKIT or STAND_IN
PICTURE = Image.fromarray(np.random.default_rng(4).integers(0, 256, (64, 96, 3), dtype=np.uint8))
SMALL = {"width": 32, "height": 32}
DRAFTS = ["wan22_14b_i2v", "wan22_14b_t2v", "wan21_i2v_14b"]
TO_DIFFUSERS = lora_zoo.TO_DIFFUSERS | {f"cross_attn.{short}_img": f"attn2.add_{short}_proj" for short in "kv"}
TIMESTEPS = [1000.0, 937.5, 2500 / 3, 625.0]
"""LightX2V: 1000, 750, 500 and 250 with t' = 5t / (1 + 4t)."""


def test_every_recipe_is_that_of_its_authors() -> None:
    """Typed from LightX2V's configs/distill, not read from the catalog."""
    pair = "{}_{}_noise_lora_rank64_lightx2v_4step_{}"
    files = {
        "wan22_14b_i2v": [pair.format("2.2_i2v_A14b", side, 1022) for side in ("high", "low")],
        "wan22_14b_t2v": [pair.format("2.2_t2v_A14b", side, 1217) for side in ("high", "low")],
        "wan22_5b": None,
        "wan21_i2v_14b": ["2.1_i2v_lora_rank64_lightx2v_4step"],
        "wan21_i2v_14b480p": ["2.1_i2v_lora_rank64_lightx2v_4step"],
        "wan21_14b": ["2.1_t2v_14b_lora_rank64_lightx2v_4step"],
        "wan21_1b": None,
    }
    for model_id, spec in MODELS.items():
        recipe, wanted = spec.draft, files[model_id]
        assert (recipe is None) == (wanted is None)
        if recipe is None or wanted is None:
            continue
        assert [lora.path for lora in recipe.loras] == [f"wan{name}.safetensors" for name in wanted]
        assert {lora.repo for lora in recipe.loras} == {f"lightx2v/Wan{wanted[0][:3]}-Distill-Loras"}
        assert [lora.side for lora in recipe.loras] == (["high", "low"] if spec.moe else [None])
        assert {lora.strength for lora in recipe.loras} == {1.0}
        assert (recipe.timesteps, recipe.shift) == ((1000, 750, 500, 250), 5.0)
        assert recipe.low_noise_from == (2 if spec.moe else None)
        assert all(len(lora.commit) == 40 and len(lora.sha256) == 64 for lora in recipe.loras)


def test_the_scheduler_steps_as_the_authors_does() -> None:
    """Theirs: sigmas of 1000 from 1 to 0, shifted, at 1000 - t; x0 = x - sigma v, then x0 + next sigma v, in float32."""
    sigmas = torch.linspace(1, 0, 1001)[:-1]
    sigmas = (5.0 * sigmas / (1 + 4.0 * sigmas))[[1000 - t for t in (1000, 750, 500, 250)]]
    scheduler = FewStepEuler((1000, 750, 500, 250), 5.0)
    scheduler.set_timesteps(4, device="cpu")
    assert torch.allclose(scheduler.timesteps, sigmas * 1000) and torch.allclose(scheduler.sigmas, torch.tensor([*sigmas, 0]))
    x = theirs = torch.randn(1, 16, 2, 8, 8)
    for number, t in enumerate(scheduler.timesteps):
        v = torch.randn(x.shape).bfloat16()
        theirs = theirs - sigmas[number] * v.float()
        theirs = theirs + (sigmas[number + 1] if number < 3 else 0) * v.float()
        x = scheduler.step(v, t, x, return_dict=False)[0]
        assert x.dtype == torch.float32 and torch.allclose(x, theirs, atol=1e-5)
    with pytest.raises(ValueError, match="same length"):
        scheduler.set_timesteps(25)


# Frames


@pytest.fixture(scope="module", params=DRAFTS)
def model(request: pytest.FixtureRequest, tiny: Path) -> WanModel:
    return load_pipeline(request.param, tiny, "cpu", toolkit_path=TOOLKIT)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("accelerators")


def users(model: WanModel, tiny: Path, scale: float = 0.8) -> list[Adapter]:
    folder = tiny / "loras"
    if model.spec.moe:
        name = model.spec.id
        pair = {side: folder / name / f"{name}_{side}_noise.safetensors" for side in ("high", "low")}
        return [Adapter(LoraFile.read(path), scale, side) for side, path in pair.items()]  # type: ignore[arg-type]
    return [
        Adapter(LoraFile.read(folder / ("wan21_i2v" if "i2v" in model.spec.id else "wan21_14b") / "rank8.safetensors"), scale)
    ]


def distilled_of(model: WanModel, root: Path) -> list[Adapter]:
    return [
        Adapter(LoraFile.read(root / lora.repo / lora.path), lora.strength, lora.side, lora.path, True, lora)
        for lora in loras_of(model.spec.id)
    ]


def sampling(model: WanModel, **changes: Any) -> Sampling:
    image = PICTURE if model.spec.control_image == "required" else None
    return Sampling("a boat", **({"width": 96, "height": 64, "num_frames": 5, "control_image": image} | changes))


def draft(model: WanModel, **changes: Any) -> np.ndarray:
    return np.concatenate(list(model.generate(sampling(model, **changes), draft_of(model.spec))))


def full(model: WanModel) -> np.ndarray:
    return np.concatenate(list(model.generate(sampling(model, num_inference_steps=2, **SMALL), documented(model.spec))))


@contextmanager
def watched(model: WanModel) -> Iterator[list[tuple[str, float, torch.Tensor]]]:
    """(transformer, timestep, latents) of each pass."""
    passes: list[tuple[str, float, torch.Tensor]] = []
    hooks = []
    for name in model.spec.transformers:

        def seen(_: Any, inputs: tuple[Any, ...], named: dict[str, Any], name: str = name) -> None:
            latents = named["hidden_states"] if "hidden_states" in named else inputs[0]
            timestep = named["timestep"] if "timestep" in named else inputs[1]
            passes.append((name, float(timestep.flatten()[0]), latents[:, :16].clone()))

        hooks.append(getattr(model._pipe, name).register_forward_pre_hook(seen, with_kwargs=True))
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def by_hand(
    model_id: str,
    tiny: Path,
    gained: dict[str, Tensors],
    loras: list[Adapter],
    wanted: Sampling,
    prepare: Callable[[Any], None] = lambda _: None,
) -> np.ndarray:
    """A draft without the worker's code: a fresh pipeline, weights added by name, and Euler steps written out.

    `prepare` changes the pipeline before that.
    """
    pipe = reference._load(model_id, tiny, TOOLKIT)
    prepare(pipe)
    cpu, size = torch.device("cpu"), (wanted.height, wanted.width, wanted.num_frames)
    with torch.no_grad():
        for name, added in gained.items():
            parameters = dict(getattr(pipe, name).named_parameters())
            for key, value in added.items():
                if key in parameters:  # the low side of Wan 2.2 I2V has no place for image keys
                    parameters[key] += value
            for lora in [lora for lora in loras if lora.side == {"transformer_2": "low"}.get(name, lora.side and "high")]:
                tensors = load_file(lora.file.path)
                for key, up in tensors.items():
                    if key.endswith(".lora_B.weight"):
                        _, _, number, layer = key.removesuffix(".lora_B.weight").split(".", 3)
                        down = tensors[key.replace("lora_B", "lora_A")]
                        parameters[f"blocks.{number}.{TO_DIFFUSERS[layer]}.weight"] += lora.scale * up.float() @ down.float()
        generator = torch.manual_seed(wanted.seed)
        more, conditioning = {}, torch.zeros(1, 0, 2, 8, 12)
        embeds = pipe.encode_prompt(wanted.prompt, None, False, device=cpu, max_sequence_length=512)[0]
        if model_id == "wan22_14b_i2v":
            about = reference.Wanted(wanted.prompt, wanted.width, wanted.height, wanted.num_frames)
            latents = reference._conditioning(model_id, pipe, TOOLKIT, about, PICTURE, generator)["latents"]
            latents, conditioning = latents[:, :16], latents[:, 16:]
        elif "i2v" in model_id:
            image = pipe.video_processor.preprocess(PICTURE, height=wanted.height, width=wanted.width)
            latents, conditioning = pipe.prepare_latents(image, 1, 16, *size, torch.float32, cpu, generator)
            more["encoder_hidden_states_image"] = pipe.encode_image(PICTURE, cpu)
        else:
            latents = pipe.prepare_latents(1, 16, *size, torch.float32, cpu, generator)
        sigmas = [1.0, 0.9375, 5 / 6, 0.625, 0.0]
        for step in range(4):
            transformer = pipe.transformer_2 if step >= 2 and len(gained) == 2 else pipe.transformer
            inputs, timestep = torch.cat([latents, conditioning], 1), torch.tensor([sigmas[step] * 1000])
            prediction = transformer(inputs, timestep, embeds, return_dict=False, **more)[0]
            latents = latents + (sigmas[step + 1] - sigmas[step]) * prediction
        shape = (1, 16, 1, 1, 1)
        latents = latents * torch.tensor(pipe.vae.config.latents_std).view(shape)
        video = pipe.vae.decode(latents + torch.tensor(pipe.vae.config.latents_mean).view(shape)).sample
    return np.stack([np.asarray(picture) for picture in pipe.video_processor.postprocess_video(video, output_type="pil")[0]])


def test_a_draft_is_what_the_authors_steps_make_of_merged_weights(model: WanModel, tiny: Path, files: Path) -> None:
    """The authors' files have no alpha; one of the models gets files that do."""
    gained = write_distilled(files, model.spec.id, alpha=2.0 if model.spec.id == "wan22_14b_t2v" else None)
    adapters = [*users(model, tiny), *distilled_of(model, files)]
    for adapter in adapters:
        model.loras.check(adapter)
    model.apply_loras(adapters)
    with watched(model) as passes:
        made = draft(model, guidance_scale=4.0, num_inference_steps=25)
    last = "transformer_2" if model.spec.moe else "transformer"
    assert [name for name, *_ in passes] == ["transformer", "transformer", last, last]
    assert [timestep for _, timestep, _ in passes] == pytest.approx(TIMESTEPS)
    theirs = by_hand(model.spec.id, tiny, gained, users(model, tiny), sampling(model))
    assert np.abs(made.astype(int) - theirs).max() <= 1
    assert np.abs(by_hand(model.spec.id, tiny, gained, [], sampling(model)).astype(int) - theirs).mean() > 1
    model.apply_loras([])


def test_a_full_run_after_a_draft_is_that_of_a_fresh_worker_and_starts_with_the_same_noise(
    model: WanModel, tiny: Path, files: Path
) -> None:
    mode: LoraMode = "merge" if model.spec.id == "wan22_14b_i2v" else "adapter"
    write_distilled(files, model.spec.id)
    ordinary = users(model, tiny)
    model.apply_loras(ordinary, mode)
    with watched(model) as passes:
        before = full(model)
    noise = passes[0][2]
    model.apply_loras([*ordinary, *distilled_of(model, files)], mode)
    with watched(model) as passes:
        first = draft(model, **SMALL)
    assert torch.equal(passes[0][2], noise)
    model.apply_loras(ordinary, mode)
    assert np.array_equal(full(model), before)
    model.apply_loras([*ordinary, *distilled_of(model, files)], mode)
    assert np.array_equal(draft(model, **SMALL), first)
    model.apply_loras([])
    fresh = load_pipeline(model.spec.id, tiny, "cpu", toolkit_path=TOOLKIT)
    fresh.apply_loras(ordinary, mode)
    assert np.array_equal(full(fresh), before)


def test_a_draft_on_weights_that_are_kept_as_codes(tiny: Path, files: Path) -> None:
    """The factors lie beside the codes; biases, norms and modulations are merged, and restored to the bit."""
    model = load_pipeline("wan22_14b_t2v", tiny, "cpu", dtype=torch.float32, quantize="qfloat8")
    gained = write_distilled(files, model.spec.id)
    before = full(model)
    adapters = [*users(model, tiny), *distilled_of(model, files)]
    for adapter in adapters:
        assert not model.loras.check(adapter)
    model.apply_loras(adapters)
    assert {how for how, _ in model.loras.plan(adapters, "adapter").values()} == {"beside"}

    def round_weights(pipe: Any) -> None:
        for part in ("text_encoder", "transformer", "transformer_2"):
            for name, module in getattr(model._pipe, part).named_modules():
                if isinstance(module, CodedLinear):
                    getattr(pipe, part).get_submodule(name).weight.data.copy_(module.weight)

    theirs = by_hand(model.spec.id, tiny, gained, users(model, tiny), sampling(model), round_weights)
    assert np.abs(draft(model).astype(int) - theirs).max() <= 1
    model.apply_loras([])
    assert np.array_equal(full(model), before)


@pytest.mark.parametrize(("mode", "quantize"), [("swap", "none"), ("group", "qfloat8")])
def test_offloading_changes_neither_a_draft_nor_the_run_after_it(
    mode: OffloadMode, quantize: Quantize, tiny: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = StandInDevice(monkeypatch)
    write_distilled(files, "wan22_14b_t2v")
    made = []
    for offloads in (False, True):
        model = load_pipeline("wan22_14b_t2v", tiny, "cpu", quantize=quantize)
        if offloads:
            device.place(model, mode)
        model.apply_loras([*users(model, tiny), *distilled_of(model, files)])
        frames = [draft(model, **SMALL)]
        model.apply_loras(users(model, tiny))
        made.append([*frames, full(model)])
    for stays, streamed in zip(*made, strict=True):
        assert np.abs(stays.astype(int) - streamed).max() <= 1  # a CPU rounds a copy otherwise than the mapped file


def test_a_file_with_keys_that_only_another_model_has_is_taken_where_the_recipe_says_so_alone(tiny: Path, files: Path) -> None:
    model = load_pipeline("wan22_14b_i2v", tiny, "cpu", toolkit_path=TOOLKIT)
    write_distilled(files, model.spec.id)
    _, low = distilled_of(model, files)
    assert any("keys of the LoRA have no effect here" in text for text in model.loras.check(low))
    with pytest.raises(LoraIncompatible, match="layers do not fit wan22_14b_i2v"):
        model.loras.check(Adapter(low.file, 1.0, "low", is_extra=True))
