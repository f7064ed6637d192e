"""The sizes in the documentation come from the real shapes."""

from __future__ import annotations

import pytest

from benchmarks import real_size
from builder import sizes
from pipelines.catalog import MODELS
from pipelines.weights import STEM_OF


@pytest.mark.parametrize("model_id", MODELS)
def test_a_component_has_so_many_parameters(model_id: str) -> None:
    counted = {part: count * sizes.BF16 for part, (count, _) in sizes.COMPONENTS[model_id].items()}
    assert counted == real_size.bytes_of_parts(model_id)


@pytest.mark.parametrize("model_id", MODELS)
def test_every_component_with_weights_is_counted(model_id: str) -> None:
    assert set(sizes.COMPONENTS[model_id]) == {part for part in MODELS[model_id].sources if part in STEM_OF}
