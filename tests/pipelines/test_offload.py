"""Which offload mode fits, and that none changes a frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipelines import Adapter, Sampling, WanModel, load_pipeline
from pipelines.catalog import BYTES_OF_THE_PROCESS, MODELS, OffloadMode
from pipelines.checkpoints import Checkpoints
from pipelines.errors import DeviceUnavailable
from pipelines.lora.file import LoraFile
from pipelines.offload import bytes_by_mode, place
from pipelines.offload import mode_for as mode_of_sizes
from pipelines.recipes import preview
from tests.conftest import STAND_IN

SAMPLING = Sampling("a boat", width=64, height=64, num_frames=5, num_inference_steps=2)


def size_of(checkpoints: Checkpoints, part: str) -> int:
    """The component's weights in bf16, in bytes, read and counted one by one."""
    files = checkpoints.folder_of(part).glob("*.safetensors")
    return sum(2 * tensor.numel() for file in files for tensor in load_file(file).values())


@pytest.fixture(scope="module")
def one_billion(tiny: Path) -> Checkpoints:
    return Checkpoints(MODELS["wan21_1b"], tiny)


@pytest.fixture(scope="module")
def sizes(one_billion: Checkpoints) -> dict[str, int]:
    return {part: size_of(one_billion, part) for part in ("text_encoder", "transformer", "vae")}


def test_a_gpu_that_is_too_small_is_told_with_the_mode_that_fits(one_billion: Checkpoints, sizes: dict[str, int]) -> None:
    assert mode_for("none", one_billion, 2, sum(sizes.values())) == "none"
    with pytest.raises(DeviceUnavailable, match=r"OFFLOAD_MODE=none, and the GPU has .*: set OFFLOAD_MODE=text_encoder"):
        mode_for("none", one_billion, 2, sum(sizes.values()) - 1)
    assert mode_for("text_encoder", one_billion, 2, sizes["transformer"] + sizes["vae"]) == "text_encoder"
    with pytest.raises(DeviceUnavailable, match=r"OFFLOAD_MODE=text_encoder"):
        mode_for("text_encoder", one_billion, 2, sizes["transformer"] + sizes["vae"] - 1)
    assert mode_for("model", one_billion, 2, max(sizes.values())) == "model"
    with pytest.raises(DeviceUnavailable, match="OFFLOAD_MODE=model, and the GPU"):
        mode_for("model", one_billion, 2, max(sizes.values()) - 1)
    assert mode_for("sequential", one_billion, 2, 1) == "sequential"


def test_a_gpu_that_is_too_small_for_every_mode_must_be_larger(tiny: Path) -> None:
    checkpoints = Checkpoints(MODELS["wan22_14b_i2v"], tiny)
    for mode in ("auto", "none", "group"):
        with pytest.raises(DeviceUnavailable, match="free: use a larger GPU"):
            mode_for(mode, checkpoints, 2, size_of(checkpoints, "vae") - 1)  # type: ignore[arg-type]


def test_auto_keeps_on_the_gpu_what_leaves_room_for_a_job(one_billion: Checkpoints, sizes: dict[str, int]) -> None:
    job = {mode: one_billion.spec.bytes_of_a_job(mode) for mode in one_billion.spec.offload_modes}
    without_text = sum(sizes.values()) - sizes["text_encoder"]
    for free, mode in {
        sum(sizes.values()) + job["none"]: "none",
        sum(sizes.values()) + job["none"] - 1: "text_encoder",
        without_text + job["text_encoder"]: "text_encoder",
        without_text + job["text_encoder"] - 1: "group",
        job["group"] // 2: "group",
    }.items():
        assert mode_for("auto", one_billion, 2, free) == mode


def test_auto_swaps_two_transformers_where_one_fits(tiny: Path) -> None:
    checkpoints = Checkpoints(MODELS["wan22_14b_t2v"], tiny)
    spec, vae, one = checkpoints.spec, size_of(checkpoints, "vae"), size_of(checkpoints, "transformer")
    both, single = spec.bytes_of_a_job("text_encoder"), spec.bytes_of_a_job("swap")
    assert mode_for("auto", checkpoints, 2, vae + 2 * one + both) == "text_encoder"
    assert mode_for("auto", checkpoints, 2, vae + 2 * one + both - 1) == "swap"
    assert mode_for("auto", checkpoints, 2, vae + one + single) == "swap"
    assert mode_for("auto", checkpoints, 2, vae + one + single - 1) == "group"


def test_two_blocks_and_what_lies_in_no_block_of_a_streamed_transformer_are_on_the_gpu(tiny: Path) -> None:
    checkpoints = Checkpoints(MODELS["wan22_14b_t2v"], tiny)
    spec, folder = checkpoints.spec, checkpoints.folder_of("transformer")
    numbers = {key: value.numel() for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    outside = sum(count for key, count in numbers.items() if not key.startswith("blocks."))
    blocks = (sum(numbers.values()) - outside) * 2 // spec.num_blocks
    there = size_of(checkpoints, "vae") + 2 * (blocks + outside * len(spec.transformers))
    assert bytes_by_mode(checkpoints, 2)["group"].device == there


def test_weights_that_do_not_fit_into_main_memory_end_the_start_with_a_remedy(
    one_billion: Checkpoints, sizes: dict[str, int]
) -> None:
    waiting, job = sizes["text_encoder"], one_billion.spec.bytes_of_a_job("text_encoder")
    free = sum(sizes.values()) - sizes["text_encoder"] + job
    assert mode_for("auto", one_billion, 2, free, BYTES_OF_THE_PROCESS + waiting) == "text_encoder"
    with pytest.raises(
        DeviceUnavailable, match=r"OFFLOAD_MODE=text_encoder keeps .* in main memory.*set OFFLOAD_MODE=none, or"
    ):
        mode_for("auto", one_billion, 2, free, BYTES_OF_THE_PROCESS + waiting - 1)
    with pytest.raises(DeviceUnavailable, match=r"OFFLOAD_MODE=group keeps .*: use a GPU that holds more"):
        mode_for("group", one_billion, 2, bytes_by_mode(one_billion, 2)["group"].device, BYTES_OF_THE_PROCESS)


def test_several_gpus_share_the_main_memory(one_billion: Checkpoints, sizes: dict[str, int]) -> None:
    free = sum(sizes.values()) - sizes["text_encoder"] + one_billion.spec.bytes_of_a_job("text_encoder")
    enough = 4 * (BYTES_OF_THE_PROCESS + sizes["text_encoder"])
    needed = bytes_by_mode(one_billion, 2)
    assert mode_of_sizes("auto", one_billion.spec, needed, free, enough, processes=4) == "text_encoder"
    with pytest.raises(DeviceUnavailable, match=r"has 6.0 GB for each of 4 GPUs: .*set GPUS to fewer"):
        mode_of_sizes("auto", one_billion.spec, needed, free, enough - 1, processes=4)


def test_the_memory_of_a_large_lora_is_the_sum_of_its_factors() -> None:
    """Rank 128 in 16 bits on every linear layer of the blocks, by the shapes of diffusers' own model."""
    from benchmarks import real_size
    from pipelines.catalog import ACTIVATIONS, LORA_RANK, RESERVE

    for model_id, spec in MODELS.items():
        with torch.device("meta"):
            transformer = real_size.transformer(model_id, num_layers=1)
        layers = [module for module in transformer.blocks.modules() if isinstance(module, torch.nn.Linear)]
        factors = sum(2 * LORA_RANK * (layer.in_features + layer.out_features) for layer in layers)
        lora = factors * spec.num_blocks * len(spec.transformers)
        assert spec.bytes_of_a_job("none") == ACTIVATIONS + RESERVE + lora


def test_auto_on_a_cpu_offloads_nothing(tiny: Path) -> None:
    assert load_pipeline("wan21_1b", tiny, "cpu", offload_mode="auto").facts["offload_mode"] == "none"


def mode_for(asked: OffloadMode, checkpoints: Checkpoints, itemsize: int, free: int, host: int | None = None) -> OffloadMode:
    return mode_of_sizes(asked, checkpoints.spec, bytes_by_mode(checkpoints, itemsize), free, host)


def frames_of_a_day(model: WanModel, tiny: Path) -> list[bytes]:
    """No LoRA, one, another rank, merged in the trainer's dtypes, and none again."""
    from PIL import Image

    loras = sorted((tiny / "loras" / model.spec.id).glob("*.safetensors"))[:2]
    side = "high" if model.spec.moe else None
    image = Image.fromarray(np.full((64, 64, 3), 99, np.uint8)) if model.spec.control_image == "required" else None
    sampling = Sampling("a boat", width=64, height=64, num_frames=5, num_inference_steps=2, control_image=image)
    made = []
    for lora, mode in [(None, "adapter"), (loras[0], "adapter"), (loras[1], "adapter"), (loras[0], "merge"), (None, "adapter")]:
        model.apply_loras([Adapter(LoraFile.read(lora), 1.0, side)] if lora else [], mode)  # type: ignore[arg-type]
        recipe = preview(model.spec, "flowmatch", "") if mode == "merge" else None
        made.append(b"".join(frames.tobytes() for frames in model.generate(sampling, recipe)))
    assert made[0] == made[-1] != made[1] != made[3]
    return made


def test_the_one_transformer_in_both_slots_is_streamed_once(tiny: Path) -> None:
    model = load_pipeline("wan22_5b", tiny, "cpu", toolkit_path=STAND_IN)
    place(model._pipe, torch.device("cpu"), "group")
    hooks = model._pipe.transformer.blocks[0]._diffusers_hook.hooks
    assert [name for name in hooks if "group" in name] == ["group_offloading"]


def test_offloading_needs_a_gpu(tiny: Path) -> None:
    with pytest.raises(DeviceUnavailable, match="OFFLOAD_MODE=model on cpu"):
        load_pipeline("wan21_1b", tiny, "cpu", offload_mode="model")


@pytest.mark.gpu
@pytest.mark.parametrize("offload_mode", ["text_encoder", "group", "model", "sequential"])
def test_offloading_changes_no_frame(tiny: Path, offload_mode: OffloadMode) -> None:
    plain = load_pipeline("wan21_1b", tiny, "cuda", offload_mode="none")
    offloaded = load_pipeline("wan21_1b", tiny, "cuda", offload_mode=offload_mode)
    assert (next(offloaded.generate(SAMPLING)) == next(plain.generate(SAMPLING))).all()


@pytest.mark.gpu
@pytest.mark.parametrize("model_id", ["wan21_1b", "wan22_14b_i2v"])
def test_streaming_from_main_memory_changes_no_frame_whatever_loras_come_and_go(tiny: Path, model_id: str) -> None:
    plain = load_pipeline(model_id, tiny, "cuda", "none", toolkit_path=STAND_IN)
    streamed = load_pipeline(model_id, tiny, "cuda", "group", toolkit_path=STAND_IN)
    assert frames_of_a_day(plain, tiny) == frames_of_a_day(streamed, tiny)
