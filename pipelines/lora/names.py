"""The keys of LoRA files, in the spellings of all trainers that were met, as layers of diffusers' Wan transformer. No torch.

Sources: keys written by ai-toolkit 0.12.26 and older (`diffusion_model.`, `lycoris_`, `lora_transformer_`), kohya and musubi
(`lora_unet_`), VideoX-Fun (`lora_unet__`), diffusers and PEFT (`transformer.`, `base_model.model.`), DiffSynth (`pipe.dit.`,
`pipe.dit2.`, `.default`), OneTrainer, and ComfyUI (`model.diffusion_model.`). A block's `diff_m` is the difference of its
modulation, in lightx2v's distilled files (Comfy-Org/ComfyUI, issue 8922). The names of the layers are those of Wan's own code
and of diffusers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Side = Literal["high", "low"]

_PREFIXES = ("base_model.", "pipe.", "model.", "diffusion_model.", "transformer.", "unet.", "dit.")
"""They may follow each other, as in `base_model.model.`."""
_UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
"""Behind these, the layer's name has underscores in place of dots."""
_SIDES: dict[str, Side] = {
    "transformer_1.": "high",
    "transformer_2.": "low",
    "high_noise_model.": "high",
    "low_noise_model.": "low",
    "high_noise.": "high",
    "low_noise.": "low",
    "high.": "high",
    "low.": "low",
    "dit2.": "low",
}
"""How both sides of a MoE model are written into one file: by ai-toolkit, with the names of Wan's own folders or of trainers'
files, and by DiffSynth, whose `dit.` is the high side where there is a `dit2.`."""
_SIDES_UNDERSCORED = {prefix.replace(".", "_"): side for prefix, side in _SIDES.items()}
_SIDES_UNDERSCORED |= {"1_": "high", "2_": "low"}  # behind `lora_transformer_`
_COMPONENT = {"transformer_1.": "transformer.", "transformer_2.": "transformer.", "dit2.": "dit."}
_TEXT_ENCODER = ("text_encoder", "lora_te", "te1.", "te2.")

_KEY = re.compile(
    r"(?P<layer>.+?)\.(?P<part>lora_(?:A|B|down|up)|lora\.(?:down|up)|lokr_\w+|hada_\w+|oft_\w+|alpha|diff_[bm]|diff|magnitude"
    r"|dora_scale|lora_magnitude_vector)(?P<adapter>\.(?!weight|bias|scale)[\w-]+)?(?P<tensor>\.weight|\.bias|\.scale_weight"
    r"|\.weight_scale|\.scale)?"
)
_PART = {"lora_down": "A", "lora_A": "A", "lora.down": "A", "lora_up": "B", "lora_B": "B", "lora.up": "B"}
_PART |= dict.fromkeys(("magnitude", "dora_scale", "lora_magnitude_vector"), "magnitude")

_IN_BLOCK = {
    **{f"self_attn.{short}": f"attn1.to_{short}" for short in "qkv"},
    **{f"cross_attn.{short}": f"attn2.to_{short}" for short in "qkv"},
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "modulation": "scale_shift_table",
    # ai-toolkit renames attention to Wan's names and leaves the rest as diffusers has it.
    "self_attn.to_out.0": "attn1.to_out.0",
    "cross_attn.to_out.0": "attn2.to_out.0",
    "cross_attn.norm_added_k": "attn2.norm_added_k",
}
_OUTSIDE = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_DIFFUSERS_OUTSIDE = (*_OUTSIDE.values(), "patch_embedding")

_IN_BLOCK_UNDERSCORED = {name.replace(".", "_"): to for name, to in _IN_BLOCK.items()} | {
    name.replace(".", "_"): name for name in _IN_BLOCK.values()
}
_OUTSIDE_UNDERSCORED = {name.replace(".", "_"): to for name, to in _OUTSIDE.items()} | {
    name.replace(".", "_"): name for name in _DIFFUSERS_OUTSIDE
}


@dataclass(frozen=True)
class Name:
    """What a key says."""

    layer: str
    """As diffusers names it; as the file does where it is not a layer of Wan."""
    part: str
    """`A`, `B`, `B.bias`, `alpha`, `diff`, `diff_b`, `magnitude`, `lokr_w1`, …; `A.scale` is the scale of an fp8 tensor."""
    side: Side | None = None


def is_of_text_encoder(key: str) -> bool:
    """Whether a key belongs to a LoRA of the text encoder, which no trainer makes for Wan, and which is not applied."""
    return key.startswith(_TEXT_ENCODER)


def is_of_first_transformer(key: str) -> bool:
    """Whether a key names `transformer` or `dit`, which beside `transformer_2` or `dit2` is the high side."""
    return re.match(r"((base_)?model\.|pipe\.)*(transformer|dit)\.|lora_transformer_", key) is not None


def without_side(key: str) -> str:
    """The key as a file of one side has it."""
    underscored = next((prefix for prefix in _UNDERSCORED if key.startswith(prefix)), None)
    before = underscored or re.match(rf"({'|'.join(map(re.escape, _PREFIXES))})*", key)[0]  # type: ignore[index]
    rest, markers = key.removeprefix(before), _SIDES_UNDERSCORED if underscored else _SIDES
    marker = next((marker for marker in markers if rest.startswith(marker)), "")
    is_name_of_component = not underscored and not before.endswith(("diffusion_model.", "transformer."))
    return before + (_COMPONENT.get(marker, "") if is_name_of_component else "") + rest.removeprefix(marker)


def parse(key: str) -> Name | None:
    """The layer and the part that a key names. None for a key that belongs to no layer, and for one of a text encoder."""
    if is_of_text_encoder(key):
        return None
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    part = _PART.get(match["part"], match["part"])
    if match["tensor"] == ".bias":
        part += ".bias"
    elif match["tensor"] in (".scale_weight", ".weight_scale", ".scale"):
        part += ".scale"
    layer = match["layer"]
    side: Side | None = None
    underscored = next((prefix for prefix in _UNDERSCORED if layer.startswith(prefix)), None)
    if part == "diff_m":
        layer, part = f"{layer}{'_' if underscored else '.'}modulation", "diff"
    if underscored:
        layer = layer.removeprefix(underscored).lstrip("_")
        while prefix := next((prefix for prefix in _SIDES_UNDERSCORED if layer.startswith(prefix)), None):
            side = _SIDES_UNDERSCORED[prefix]
            layer = layer.removeprefix(prefix)
        return Name(_layer_of_underscored(layer), part, side)
    while prefix := next((prefix for prefix in (*_PREFIXES, *_SIDES) if layer.startswith(prefix)), None):
        side = _SIDES.get(prefix, side)
        layer = layer.removeprefix(prefix)
    return Name(_layer_of(layer), part, side)


def _layer_of(name: str) -> str:
    block = re.fullmatch(r"blocks\.(\d{1,3})\.(.+)", name, re.ASCII)
    if block:
        return f"blocks.{block[1]}.{_IN_BLOCK.get(block[2], block[2])}"
    return _OUTSIDE.get(name, name)


def _layer_of_underscored(name: str) -> str:
    block = re.fullmatch(r"blocks_(\d{1,3})_(.+)", name, re.ASCII)
    if block:
        return f"blocks.{block[1]}.{_IN_BLOCK_UNDERSCORED.get(block[2], block[2])}"
    return _OUTSIDE_UNDERSCORED.get(name, name)
