"""The sizes in the documentation come from the real shapes."""

from __future__ import annotations

import pytest

from benchmarks import real_size
from builder import sizes
from docs import figures
from pipelines.catalog import MODELS, ModelSpec
from pipelines.trained import quantization_in
from pipelines.weights import STEM_OF


@pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS)
def test_a_component_has_so_many_parameters(spec: ModelSpec) -> None:
    counted = {part: count * sizes.BF16 for part, count in sizes.parameters(spec).items()}
    assert counted == real_size.bytes_of_parts(spec.id)


@pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS)
def test_every_component_with_weights_is_counted(spec: ModelSpec) -> None:
    assert set(sizes.parameters(spec)) == {part for part in spec.sources if part in STEM_OF}


def test_the_weights_take_as_much_disk_as_the_table_says() -> None:
    shown = {row[0].strip("`"): row[2:] for row in figures.stored_table()[1:]}
    for spec in (MODELS["wan22_5b"], MODELS["wan21_1b"]):
        kept = [real_size.bytes_of_parts(spec.id, quantization_in(spec, name)) for name in ("none", "qfloat8", "uint4")]
        assert shown[spec.id] == tuple(f"{sum(parts.values()) / 1e9:.1f}" for parts in kept)


def test_the_hub_has_wan21_in_float32_and_wan22_in_bfloat16_but_for_the_vae_and_the_5b_transformer() -> None:
    in_bf16 = {
        (spec.id, part)
        for spec in MODELS.values()
        for part in sizes.parameters(spec)
        if sizes.bytes_per_number(part, spec.sources[part]) == sizes.BF16
    }
    wan22_14b = ("wan22_14b_i2v", "wan22_14b_t2v")
    assert in_bf16 == {
        *((model_id, part) for model_id in wan22_14b for part in ("transformer", "transformer_2")),
        *((model_id, "text_encoder") for model_id in (*wan22_14b, "wan22_5b")),
    }
