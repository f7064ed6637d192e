"""Every private name of diffusers, peft and torch that the pipelines use, and a check at start that it is still there.

A private that a newer library has moved either has a public way around it, which is slower, or it has none. `check` takes the
way around and says so in a warning, or raises LibraryMoved. Nothing here guesses: where the versions differ from those that
were tested, the public way is taken wherever there is one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import metadata
from typing import Any

import torch
from diffusers.hooks import group_offloading
from diffusers.models import attention_dispatch
from diffusers.models.autoencoders import autoencoder_kl_wan
from diffusers.models.transformers import transformer_wan

from pipelines.catalog import OFFLOAD, OffloadMode
from pipelines.errors import LibraryMoved

TESTED_WITH = {"torch": "2.13.0", "diffusers": "0.42.1", "peft": "0.21.2"}

ADAPTER = "lora"
"""The name of the one adapter that a transformer carries."""


def check(pipe: Any, mode: OffloadMode) -> list[str]:
    """What works in another way here than with the tested versions. Raises LibraryMoved for what does not work at all.

    Called once, when `pipe` is loaded and its offloading is set up.
    """
    warnings = [
        f"{name} is {installed}, tested is {tested}"
        for name, tested in TESTED_WITH.items()
        if (installed := _version(name)) != tested
    ]
    if not can_decode_in_pieces(pipe.vae):
        warnings.append("videos are decoded in one piece, since the VAE's cache has moved")
    if not can_cache_embeddings(pipe):
        warnings.append("text embeddings are not cached, since the pipeline encodes texts in another way")
    _check_offloading(pipe, mode)
    if "transformer" in (OFFLOAD[mode].streamed or ()) and _unmatched(pipe.transformer) is None:
        warnings.append("what lies in no block of a transformer is streamed too, since group offloading has changed")
    _check_adapters()
    return warnings


def _version(package: str) -> str:
    return metadata.version(package).partition("+")[0]


def _moved(library: str, what: str) -> LibraryMoved:
    tested = f"{library} {TESTED_WITH[library]}"
    return LibraryMoved(f"{library} {_version(library)} has moved {what}; install {tested}, which this worker was tested with")


# Offloading: hooks of accelerate (`model`, `sequential`) and of diffusers (the modes that stream)


def is_offloaded(component: Any) -> bool:
    """Whether hooks move the component, or parts of it, to the device and back."""
    return is_moved_whole(component) or any(map(_has_hooks, component.modules()))


def is_moved_whole(component: Any) -> bool:
    """Whether accelerate moves the component, or each of its layers: diffusers must know when tensors join it."""
    return any(hasattr(module, "_hf_hook") for module in component.modules())


def _has_hooks(module: Any) -> bool:
    """diffusers leaves an empty registry of hooks on every transformer that it has run."""
    return bool(getattr(getattr(module, "_diffusers_hook", None), "hooks", None))


def refresh_group_offloading(component: Any) -> None:
    """Make streaming list the component's tensors anew, after some were replaced. Does nothing where it is not streamed."""
    if is_offloaded(component):
        group_offloading._maybe_remove_and_reapply_group_offloading(component)


def take_unmatched(component: Any) -> list[torch.Tensor]:
    """The tensors of a component, streamed by blocks, that lie in none of its blocks. From now on, streaming leaves them alone.

    diffusers brings them for each pass from pageable memory, and takes them back. It does so again after a refresh.
    """
    group = _unmatched(component)
    if group is None:
        return []
    tensors = [tensor for module in group.modules for tensor in (*module.parameters(), *module.buffers())]
    tensors += [*group.parameters, *group.buffers]
    group.modules, group.parameters, group.buffers = [], [], []
    return tensors


def _unmatched(component: Any) -> Any:
    """The group of what lies in no block; None where it cannot be found, and is streamed as well."""
    hook = component._diffusers_hook.hooks.get("group_offloading")
    group = getattr(hook, "group", None)
    return group if all(hasattr(group, name) for name in ("modules", "parameters", "buffers")) else None


def _check_offloading(pipe: Any, mode: OffloadMode) -> None:
    streamed = OFFLOAD[mode].streamed
    moved = list(pipe.components) if streamed is None else streamed
    parts = [part for name in moved if isinstance(part := getattr(pipe, name, None), torch.nn.Module)]
    if not all(is_offloaded(part) for part in parts):
        raise _moved("diffusers", "the hooks of offloading")
    if streamed and not hasattr(group_offloading, "_maybe_remove_and_reapply_group_offloading"):
        raise _moved("diffusers", "the refresh of group offloading")


# The decode, one latent frame at a time


def can_decode_in_pieces(vae: Any) -> bool:
    """Whether `decode_pieces` does what `vae.decode` does. Other code of another version may compute in another way."""
    if _version("diffusers") != TESTED_WITH["diffusers"]:
        return False
    parameters = inspect.signature(vae.decoder.forward).parameters
    vae.clear_cache()
    caches = isinstance(getattr(vae, "_feat_map", None), list) and hasattr(vae, "_conv_idx")
    return (
        caches and {"feat_cache", "feat_idx", "first_chunk"} <= parameters.keys() and hasattr(autoencoder_kl_wan, "unpatchify")
    )


def decode_pieces(vae: Any, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the pieces that `vae.decode` puts together: [1, 3, n, height, width] in -1..1, first one frame, then four."""
    if hasattr(vae, "_hf_hook"):
        vae._hf_hook.pre_forward(vae)  # brings an offloaded VAE to its device, as its `decode` would
    vae.clear_cache()
    try:
        latents = vae.post_quant_conv(latents)
        for number in range(latents.shape[2]):
            vae._conv_idx = [0]
            piece = vae.decoder(
                latents[:, :, number : number + 1],
                feat_cache=vae._feat_map,
                feat_idx=vae._conv_idx,
                first_chunk=number == 0,
            )
            if vae.config.patch_size is not None:
                piece = autoencoder_kl_wan.unpatchify(piece, patch_size=vae.config.patch_size)
            yield piece.clamp(-1.0, 1.0)
    finally:
        vae.clear_cache()


def decode_whole(vae: Any, latents: torch.Tensor) -> Iterator[torch.Tensor]:
    """The same in one piece, by diffusers' public call."""
    yield vae.decode(latents, return_dict=False)[0]


# Text embeddings

_EMBEDDING_ARGUMENTS = ["prompt", "num_videos_per_prompt", "max_sequence_length", "device", "dtype"]


def can_cache_embeddings(pipe: Any) -> bool:
    """Whether the pipeline encodes a text by the call that the cache wraps."""
    encode = getattr(pipe, "_get_t5_prompt_embeds", None)
    return encode is not None and list(inspect.signature(encode).parameters) == _EMBEDDING_ARGUMENTS


def wrap_embeddings(pipe: Any, wrap: Any) -> None:
    """Replace the pipeline's text encoding by `wrap(encode)`; both take the arguments of `_get_t5_prompt_embeds`."""
    pipe._get_t5_prompt_embeds = wrap(pipe._get_t5_prompt_embeds)


# Adapters of peft


def adapter_layers(transformer: Any) -> dict[str, Any]:
    """The layers that carry the adapter, by name: each has `lora_A`, `lora_B` and `scaling` by the adapter's name."""
    return {name: module for name, module in transformer.named_modules() if ADAPTER in getattr(module, "lora_A", {})}


def _check_adapters() -> None:
    """Put an adapter on one linear layer, and look where peft keeps it."""
    from peft import LoraConfig, inject_adapter_in_model

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    inject_adapter_in_model(LoraConfig(r=1, lora_alpha=3, target_modules=["0"]), model, ADAPTER)
    layer: Any = adapter_layers(model).get("0")
    try:
        fits = layer.lora_A[ADAPTER].weight.shape == (1, 2) and layer.lora_B[ADAPTER].weight.shape == (2, 1)
        fits = fits and layer.scaling[ADAPTER] == 3
    except (AttributeError, KeyError, TypeError):
        fits = False
    if not fits:
        raise _moved("peft", "the tensors of an adapter")


# Attention


def attention_backend(name: str) -> Any:
    """The attention backend of that name. Raises LibraryMoved."""
    backends = attention_dispatch.AttentionBackendName
    if name not in backends.__members__ or not hasattr(attention_dispatch, "_check_attention_backend_requirements"):
        raise _moved("diffusers", "its attention backends")
    return backends[name]


def check_attention_requirements(backend: Any) -> None:
    """Raises whatever diffusers raises when the packages of the backend are missing."""
    attention_dispatch._check_attention_backend_requirements(backend)


def active_attention() -> str:
    """The name of the attention backend in use; `native` where diffusers does not tell."""
    try:
        return str(attention_dispatch._AttentionBackendRegistry.get_active_backend()[0].value)
    except AttributeError:
        return "native"


def check_self_attention() -> None:
    """Raises LibraryMoved when `self_attention_by` cannot work."""
    processor = transformer_wan.WanAttnProcessor
    if not hasattr(transformer_wan, "dispatch_attention_fn") or not hasattr(processor, "_parallel_config"):
        raise _moved("diffusers", "its context parallelism")


@contextmanager
def self_attention_by(transformer: Any, call: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Within the block, have `call(attend, query, key, value)` run instead of each self-attention `attend(query, key, value)`.

    It takes the place of diffusers' own context parallelism, which a processor starts for self-attention only.
    """
    processors = [block.attn1.processor for block in transformer.blocks]
    try:
        transformer_wan.dispatch_attention_fn = _dispatch_attention
        for processor in processors:
            processor._parallel_config = call
        yield
    finally:
        transformer_wan.dispatch_attention_fn = attention_dispatch.dispatch_attention_fn
        for processor in processors:
            processor._parallel_config = None


def _dispatch_attention(
    *inputs: torch.Tensor, parallel_config: Callable[..., torch.Tensor] | None = None, **named: Any
) -> torch.Tensor:
    """`dispatch_attention_fn` for processors whose `_parallel_config` is the `call` of `self_attention_by`, or None."""
    attend: Callable[..., torch.Tensor] = partial(attention_dispatch.dispatch_attention_fn, **named)
    return parallel_config(attend, *inputs) if parallel_config else attend(*inputs)


# The compiler


def compiler_settings(**settings: Any) -> AbstractContextManager[None]:
    """Options of torch's compiler, in this thread and within the block. Raises LibraryMoved when one is not there."""
    for name in settings:
        if not hasattr(torch._dynamo.config, name):
            raise _moved("torch", f"the compiler's option {name}")
    patch: AbstractContextManager[None] = torch._dynamo.config.patch(**settings)
    return patch
