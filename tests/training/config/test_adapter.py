"""The section `adapter` becomes the method's own configuration."""

import pytest

from mora_jax.adapters.config import DoRAConfig, FullConfig, LoRAConfig, MoRAConfig
from mora_jax.errors import InputError
from mora_jax.training.config.schema import METHOD_KEYS, AdapterConfig, Config, adapter_config, lay_over


def section(**values) -> AdapterConfig:
    return lay_over(Config(), [(f"adapter.{name}", value, "test") for name, value in values.items()]).adapter


def test_every_method_has_its_configuration():
    for method in METHOD_KEYS:
        assert adapter_config(section(method=method)) is not None
    assert adapter_config(section(rank=4, alpha=2.0)) == LoRAConfig(rank=4, alpha=2.0)
    assert adapter_config(section(method="mora", kind="rotation")) == MoRAConfig(rank=8, kind="rotation")
    assert adapter_config(section(method="dora")) == DoRAConfig(rank=8, alpha=16.0)
    assert adapter_config(section(method="lora_plus", lr_ratio=4.0)).lr_ratio == 4.0
    assert adapter_config(section(method="pissa")).init == "pissa"
    assert adapter_config(section(method="full")) == FullConfig()


def test_patterns_layers_and_whole_modules():
    found = adapter_config(
        section(
            rank_pattern=("q_proj=16", r"layers\.[0=]\..*=2"),
            alpha_pattern=("q_proj=32",),
            layers_to_transform=(0, 3),
            modules_to_save=("lm_head",),
            bias="lora_only",
        )
    )
    assert found.rank_pattern == (("q_proj", 16), (r"layers\.[0=]\..*", 2))
    assert found.alpha_pattern == (("q_proj", 32.0),)
    assert (found.layers_to_transform, found.modules_to_save, found.bias) == ((0, 3), ("lm_head",), "lora_only")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rank_pattern": ("q_proj",)}, 'should read "REGEX=NUMBER"'),
        ({"rank_pattern": ("q_proj=1.5",)}, "should read"),
        ({"rank_pattern": ("q_proj=0",)}, "adapter: rank_pattern"),
        ({"rank_pattern": ("(=4",)}, "no regular expression"),
        ({"layers_to_transform": (-1,)}, "adapter.layers_to_transform must be a list of integers, at least 0"),
        ({"layers_to_transform": ("a",)}, "a list of integers"),
    ],
)
def test_values_that_cannot_be(values, words):
    with pytest.raises(InputError, match=words):
        adapter_config(section(**values))
