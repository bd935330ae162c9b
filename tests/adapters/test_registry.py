"""Methods by name."""

import dataclasses

import pytest

import mora_jax as mj
from mora_jax.adapters.registry import CONFIGS, METHOD_KEYS, METHODS, adapter_class, config_from


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_named_configured_and_exported(name):
    config = config_from({"method": name, "rank": None, "unknown": 1})
    assert config == CONFIGS[name]()
    assert getattr(mj, type(config).__name__) is CONFIGS[name]
    assert set(METHOD_KEYS[name]) == {field.name for field in dataclasses.fields(config)}
    if name != "full":
        assert adapter_class(config).method == name
    assert hash(config) == hash(CONFIGS[name]())


def test_settings_reach_the_configuration():
    section = {"method": "dora", "rank": 4, "alpha": 2.0, "kind": "rotation", "rank_pattern": {"q_proj": 2}}
    assert config_from(section) == mj.DoRAConfig(4, 2.0, rank_pattern={"q_proj": 2})
    with pytest.raises(ValueError, match="method must be one of lora, .*, not 'lorra'"):
        config_from({"method": "lorra"})
