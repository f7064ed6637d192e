"""With a private name of a library gone, the worker does without it, or does not start. It never makes wrong frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.hooks import group_offloading
from diffusers.models import attention_dispatch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanDecoder3d
from diffusers.models.transformers import transformer_wan
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft.tuners.lora import LoraLayer

from pipelines import Adapter, Sampling, WanModel, load_pipeline
from pipelines import diffusers_privates as privates
from pipelines.errors import LibraryMoved
from pipelines.lora.file import LoraFile

SAMPLING = Sampling("a boat", width=64, height=64, num_frames=9, num_inference_steps=2)


def frames(model: WanModel, tiny: Path) -> np.ndarray:
    model.apply_loras([Adapter(LoraFile.read(tiny / "loras/wan21_1b/rank16.safetensors"))])
    return np.concatenate(list(model.generate(SAMPLING)))


@pytest.fixture
def usual(tiny: Path) -> np.ndarray:
    return frames(load_pipeline("wan21_1b", tiny, "cpu"), tiny)


def test_the_installed_versions_are_the_tested_ones(tiny: Path) -> None:
    assert privates.check(load_pipeline("wan21_1b", tiny, "cpu")._pipe, "none") == []


def test_with_another_diffusers_videos_are_decoded_by_its_public_call(
    tiny: Path, usual: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(privates.TESTED_WITH, "diffusers", "0.40.0")
    model = load_pipeline("wan21_1b", tiny, "cpu")
    assert "diffusers is 0.42.1, tested is 0.40.0" in caplog.text
    assert "videos are decoded in one piece" in caplog.text
    monkeypatch.setattr(privates, "decode_pieces", None)
    assert (frames(model, tiny) == usual).all()


def test_without_a_part_of_the_decode_videos_are_decoded_by_its_public_call(
    tiny: Path, usual: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("diffusers.models.autoencoders.autoencoder_kl_wan.WanDecoder3d.forward", renamed_argument())
    model = load_pipeline("wan21_1b", tiny, "cpu")
    assert "videos are decoded in one piece" in caplog.text
    assert (frames(model, tiny) == usual).all()


def renamed_argument():
    """The decoder's forward, with `first_chunk` under another name in its signature."""
    forward = WanDecoder3d.forward

    def renamed(self, x, feat_cache=None, feat_idx=None, **named):
        return forward(self, x, feat_cache=feat_cache, feat_idx=feat_idx, **named)

    return renamed


@pytest.mark.parametrize("change", ["gone", "another argument"])
def test_a_text_encoder_that_is_called_in_another_way_is_not_cached(
    tiny: Path, usual: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    from diffusers import WanPipeline

    original = WanPipeline._get_t5_prompt_embeds

    def with_another_argument(self, *arguments, clean=True, **named):
        return original(self, *arguments, **named)

    if change == "gone":
        monkeypatch.delattr(WanPipeline, "_get_t5_prompt_embeds")
    else:
        monkeypatch.setattr(WanPipeline, "_get_t5_prompt_embeds", with_another_argument)
    model = load_pipeline("wan21_1b", tiny, "cpu")
    assert "text embeddings are not cached" in caplog.text
    if change != "gone":
        assert (frames(model, tiny) == usual).all()


def test_a_peft_that_keeps_adapters_elsewhere_stops_the_start_and_blames_no_lora(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update_layer = LoraLayer.update_layer

    def moved(self, adapter_name, *arguments, **named):
        update_layer(self, adapter_name, *arguments, **named)
        self.down, self.lora_A = self.lora_A, torch.nn.ModuleDict()

    monkeypatch.setattr(LoraLayer, "update_layer", moved)
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.update_layer", moved, raising=False)
    with pytest.raises(LibraryMoved, match=r"peft 0.21.2 has moved the tensors of an adapter; install peft 0.21.2"):
        load_pipeline("wan21_1b", tiny, "cpu")


def test_offloading_whose_hooks_have_moved_stops_the_start(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load_pipeline("wan21_1b", tiny, "cpu")._pipe
    with pytest.raises(LibraryMoved, match="has moved the hooks of offloading"):
        privates.check(pipe, "group")  # nothing was hooked: as if apply_group_offloading left its mark elsewhere
    with pytest.raises(LibraryMoved, match="has moved the hooks of offloading"):
        privates.check(pipe, "model")


def test_group_offloading_without_its_refresh_stops_the_start(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.offload import place

    pipe = load_pipeline("wan21_1b", tiny, "cpu")._pipe
    place(pipe, torch.device("cpu"), "group")
    assert privates.check(pipe, "group") == []
    monkeypatch.delattr(group_offloading, "_maybe_remove_and_reapply_group_offloading")
    with pytest.raises(LibraryMoved, match="has moved the refresh of group offloading"):
        privates.check(pipe, "group")
    privates.refresh_group_offloading(load_pipeline("wan21_1b", tiny, "cpu")._pipe.transformer)  # not streamed: not needed


def test_without_the_group_of_what_lies_in_no_block_it_is_streamed_too(tiny: Path) -> None:
    from pipelines.offload import place

    model = load_pipeline("wan21_1b", tiny, "cpu")
    model._offloading = place(model._pipe, torch.device("cpu"), "group")
    hook = model._pipe.transformer._diffusers_hook.hooks["group_offloading"]
    del hook.group
    (warning,) = privates.check(model._pipe, "group")
    assert "no block of a transformer is streamed too" in warning
    assert privates.take_unmatched(model._pipe.transformer) == []


def test_without_the_registry_of_attention_the_start_says_native(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(attention_dispatch, "_AttentionBackendRegistry")
    assert privates.active_attention() == "native"


def test_attention_backends_that_have_moved_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LibraryMoved, match="has moved its attention backends"):
        privates.attention_backend("_FLASH_9")


def test_a_compiler_option_that_has_moved_is_noticed() -> None:
    with pytest.raises(LibraryMoved, match="has moved the compiler's option no_such_option"):
        privates.compiler_settings(no_such_option=1)


@pytest.mark.parametrize(
    ("owner", "name"), [(transformer_wan, "dispatch_attention_fn"), (WanAttnProcessor, "_parallel_config")]
)
def test_without_the_place_of_self_attention_no_pass_is_split(
    owner: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    privates.check_self_attention()
    monkeypatch.delattr(owner, name)
    with pytest.raises(LibraryMoved, match="its context parallelism"):
        privates.check_self_attention()
