"""What the seven models make, against plain diffusers (tests/reference.py) on the same tiny checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import Adapter, Sampling, WanModel, load_pipeline
from pipelines.catalog import MODELS
from pipelines.lora.file import LoraFile
from pipelines.recipes import Recipe, documented
from tests import reference
from tests.conftest import REAL_TOOLKIT, STAND_IN

LORAS = {
    "wan21_1b": "wan21_1b/rank4",
    "wan21_14b": "wan21_14b/rank8",
    "wan21_i2v_14b": "wan21_i2v/rank8",
    "wan21_i2v_14b480p": "wan21_i2v/rank8",
    "wan22_5b": "wan22_5b/rank8",
}
"""A LoRA for every model with one transformer; the others have `ID/ID_high_noise` and `…_low_noise`."""

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))


def lora_paths(model_id: str, tiny: Path) -> list[tuple[Path, str | None]]:
    if MODELS[model_id].moe:
        folder = tiny / "loras" / model_id
        return [(folder / f"{model_id}_{side}_noise.safetensors", side) for side in ("high", "low")]
    return [(tiny / "loras" / f"{LORAS[model_id]}.safetensors", None)]


def adapters(model_id: str, tiny: Path, scale: float = 1.0) -> list[Adapter]:
    return [Adapter(LoraFile.read(path), scale, side) for path, side in lora_paths(model_id, tiny)]


def make(model: WanModel, recipe: Recipe | None = None, **changes: object) -> np.ndarray:
    image = PICTURE if model.spec.control_image == "required" else None
    sampling = {"width": 64, "height": 32, "num_frames": 5, "num_inference_steps": 3, "control_image": image}
    return np.concatenate(list(model.generate(Sampling("a boat", **(sampling | changes)), recipe)))


TWINS = {"wan21_14b", "wan21_i2v_14b480p"}
"""Models that differ from another one in numbers alone. What does not depend on these is tested on the other one."""
one_of_a_kind = pytest.mark.parametrize(
    "model_id", [name for name in MODELS if name not in TWINS], indirect=True, scope="session"
)


@pytest.fixture(scope="session", params=MODELS)
def model_id(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def toolkit() -> Path:
    """The real checkout when there is one: what passes with it passes with the stand-in, see test_toolkit."""
    return REAL_TOOLKIT or STAND_IN


@pytest.fixture(scope="session")
def loaded(model_id: str, tiny: Path, toolkit: Path) -> WanModel:
    return load_pipeline(model_id, tiny, "cpu", toolkit_path=toolkit)


@pytest.fixture
def model(loaded: WanModel) -> WanModel:
    """A loaded model without LoRAs."""
    loaded.apply_loras([])
    return loaded


CASES = {
    "first load": {"scale": 1.0},
    "flowmatch": {"sampler": "flowmatch"},
    "another scale": {"scale": -0.5},
    "no guidance": {"guidance_scale": 1.0},
    "negative prompt": {"neg": "blurry, dark"},
    "another seed": {"seed": 7},
    "snapped size": {"width": 110, "height": 60},
    "incomplete frames": {"num_frames": 8},
    "one frame": {"num_frames": 1},
}


@pytest.mark.parametrize(
    ("model_id", "case"),
    [
        pytest.param(name, case, id=f"{name}-{title}")
        for name in MODELS
        for title, case in [*CASES.items()][: 2 if name in TWINS else None]
    ],
    indirect=["model_id"],
    scope="session",
)
def test_frames_are_those_of_plain_diffusers(model: WanModel, tiny: Path, toolkit: Path, case: dict) -> None:
    case = {"scale": 1.0, "width": 64, "height": 32, "num_frames": 5, "neg": "", "guidance_scale": 4.0, "seed": 42} | case
    sampler = case.get("sampler", "unipc")
    model.apply_loras(adapters(model.spec.id, tiny, case["scale"]))
    ours = make(
        model,
        width=case["width"],
        height=case["height"],
        num_frames=case["num_frames"],
        negative_prompt=case["neg"],
        guidance_scale=case["guidance_scale"],
        seed=case["seed"],
        recipe=documented(model.spec, sampler),
    )
    step = {"wan22_14b_t2v": 32, "wan22_5b": 32}.get(model.spec.id, 16)
    whole_frames = 8 // 4 * 4 + 1 if model.spec.id not in ("wan22_5b", "wan22_14b_i2v") else 5
    wanted = reference.Wanted(
        prompt="a boat",
        width=case["width"] // step * step,
        height=case["height"] // step * step,
        num_frames=whole_frames if case["num_frames"] == 8 else case["num_frames"],
        neg=case["neg"],
        guidance_scale=case["guidance_scale"],
        seed=case["seed"],
        sampler=sampler,
        image=PICTURE if model.spec.control_image == "required" else None,
        loras=[(path, case["scale"], side) for path, side in lora_paths(model.spec.id, tiny)],
    )
    theirs = reference.frames(model.spec.id, tiny, toolkit, wanted)
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_5b_with_an_image_is_that_of_plain_diffusers(tiny: Path, toolkit: Path) -> None:
    model = load_pipeline("wan22_5b", tiny, "cpu", toolkit_path=toolkit)
    wanted = reference.Wanted("a boat", 64, 32, 5, image=PICTURE)
    theirs = reference.frames("wan22_5b", tiny, toolkit, wanted)
    assert np.abs(make(model, control_image=PICTURE).astype(int) - theirs).max() <= 1


@one_of_a_kind
def test_every_input_leaves_a_mark(model: WanModel, tiny: Path) -> None:
    """Without this, equal frames would prove little."""
    plain = make(model)
    changes = [
        {"seed": 1},
        {"negative_prompt": "dark"},
        {"guidance_scale": 1.0},
        {"recipe": documented(model.spec, "flowmatch")},
    ]
    if model.spec.control_image != "none":
        changes.append({"control_image": PICTURE.rotate(180)})
    others = [make(model, **change) for change in changes]
    model.apply_loras(adapters(model.spec.id, tiny))
    for other in [*others, make(model)]:
        assert np.abs(plain.astype(int) - other).mean() > 0.5


@one_of_a_kind
def test_the_same_request_gives_the_same_frames_whatever_ran_before(model: WanModel, tiny: Path) -> None:
    wanted = adapters(model.spec.id, tiny)
    model.apply_loras(wanted)
    before = make(model)
    torch.rand(17)
    make(model, documented(model.spec, "flowmatch"), seed=3, num_frames=9)
    model.apply_loras([])
    make(model)
    model.apply_loras(wanted)
    assert np.array_equal(make(model), before)


@one_of_a_kind
def test_a_generation_leaves_the_process_wide_generator_alone(model: WanModel) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make(model)
    assert torch.equal(torch.rand(3), expected)


@one_of_a_kind
def test_what_a_step_callback_raises_ends_the_generation_and_the_next_is_right(model: WanModel) -> None:
    before = make(model)

    def stop(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(model.generate(Sampling("x", width=64, height=32, num_frames=5, control_image=_image(model)), on_step=stop))
    assert np.array_equal(make(model), before)


@one_of_a_kind
def test_steps_are_counted_from_one(model: WanModel) -> None:
    steps: list[int] = []
    sampling = Sampling("x", width=64, height=32, num_frames=1, num_inference_steps=3, control_image=_image(model))
    list(model.generate(sampling, on_step=steps.append))
    assert steps == [1, 2, 3]


def _image(model: WanModel) -> Image.Image | None:
    return PICTURE if model.spec.control_image == "required" else None
