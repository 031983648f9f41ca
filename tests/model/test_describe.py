import pytest

from model.config import PRESETS
from model.describe import count_parameters
from model.recipe import load_recipe
from model.transformer import Transformer


def test_gpt3_has_the_published_size() -> None:
    """Brown et al. 2020, matrices alone; 175 billion parameters are counted without allocating any."""
    parts = {part.part: part.matrices for part in count_parameters(PRESETS["gpt3"])}
    assert parts["attention"] == 57_982_058_496
    assert parts["feed-forward"] == 115_964_116_992
    assert parts["embedding"] == parts["output"] == 50_257 * 12_288
    assert sum(parts.values()) == 175_181_291_520


def test_transformer_tiny_has_the_published_size() -> None:
    """Wu et al. 2021: 2,568,192 parameters at a joint vocabulary of 9,712, everything counted."""
    parts = count_parameters(load_recipe("multi30k-en-de").model_config(9_712))
    assert sum(part.matrices + part.vectors for part in parts) == 2_568_192


@pytest.mark.parametrize("name", ["dates", "tinyshakespeare", "sst2"])
def test_every_parameter_is_counted_once(name: str) -> None:
    config = load_recipe(name).model_config(300)
    total = sum(part.matrices + part.vectors for part in count_parameters(config))
    assert total == sum(p.numel() for p in Transformer(config).parameters())
