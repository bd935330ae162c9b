"""A run starts from the folder that an earlier run wrote, with its method or one of the same function."""

import json

import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from mora_jax.adapters.methods.registry import METHODS
from mora_jax.models.families import read_config
from mora_jax.training.config.schema import METHOD_KEYS, Config, lay_over
from mora_jax.training.setup import put_adapter
from tests.adapters.made import config_from
from tests.models.tiny import LLAMA, fill_randomly

# One of several matrices with one input, twice, and one alone.
TARGETS = ("k_proj", "up_proj", "down_proj")
PATTERNS = {"rank_pattern": {r"layers\.1\..*": 2}, "alpha_pattern": {"up_proj": 6.0}}


def decoder() -> mj.models.Decoder:
    return mj.models.Decoder(read_config(LLAMA | {"num_hidden_layers": 2}, "config.json"), rngs=nnx.Rngs(0))


def config_of(values):
    return config_from({"targets": TARGETS} | values)


def changes(model) -> dict[str, np.ndarray]:
    """By path and name, what the adapters' arrays amount to: LoRA's product, and the others as they are."""
    found = {}
    for entry in adapters_of(model):
        params = dict(entry.params)
        if "lora_a" in params and entry.method != "adalora":
            first_a, first_b = params.pop("initial_a", None), params.pop("initial_b", None)
            lora_a, lora_b = params.pop("lora_a"), params.pop("lora_b")
            product, rank = lora_a @ lora_b, len(lora_b)
            if first_a is not None:
                product = product - first_a[:, :rank] @ first_b[:rank]
            params["product"] = params.pop("scaling") * product
        found |= {f"{entry.path}.{name}": value for name, value in params.items()}
    return found


def same(found, expected) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def written(folder, config) -> dict[str, np.ndarray]:
    """Writes an adapter with random values; returns its changes."""
    model = decoder()
    mj.attach(model, config, rngs=nnx.Rngs(1))
    fill_randomly(model)
    mj.save_adapter(model, folder)
    return changes(model)


def started(folder, **section) -> mj.models.Decoder:
    """The model of a run that starts from `folder`."""
    values = [(f"adapter.{name}", value, "test") for name, value in section.items()]
    config = lay_over(Config(), [*values, ("adapter.path", str(folder), "test")])
    model = decoder()
    put_adapter(model, config, steps=5)
    return model


def trained(model) -> set[str]:
    _, adapters, _ = mj.partition(model)
    return {str(path[-1]) for path, _ in nnx.to_flat_state(adapters)}


OWN = {name: {"rank": 4} for name in METHODS if "path" in METHOD_KEYS[name]} | {
    "adalora": {"rank": 4, "target_rank": 2},
    "oft": {"block_size": 8},
    "lora with magnitude": {"method": "lora", "rank": 4, "use_dora": True},
    "lora_plus with magnitude": {"method": "lora_plus", "rank": 4, "use_dora": True},
    "rslora with magnitude": {"method": "rslora", "rank": 4, "use_dora": True},
    "pissa with magnitude": {"method": "pissa", "rank": 4, "use_dora": True},
    "lora from singular vectors": {"method": "lora", "rank": 4, "init": "pissa"},
    "pissa with patterns": {"method": "pissa", "rank": 4, **PATTERNS},
    "lora_fa with patterns": {"method": "lora_fa", "rank": 4, **PATTERNS},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_every_method_goes_on_from_what_it_wrote(name, tmp_path):
    values = {"method": name} | OWN[name]
    config = config_of(values)
    before = written(tmp_path / "a", config)
    model = started(tmp_path / "a", method=values["method"], **({"target_rank": 2} if name == "adalora" else {}))
    same(changes(model), before)
    first = decoder()
    mj.attach(first, config, rngs=nnx.Rngs(1))
    assert trained(model) == trained(first)
    assert {entry.method for entry in adapters_of(model)} == {values["method"]}
    # and what it writes then is the same again
    mj.save_adapter(model, tmp_path / "b")
    again = decoder()
    mj.load_adapter(again, tmp_path / "b")
    same(changes(again), before)


@pytest.mark.parametrize(
    ("start", "method"), [("lora", "lora_plus"), ("rslora", "lora_plus"), ("dora", "lora_fa"), ("pissa", "lora_fa")]
)
def test_any_lora_is_trained_by_how_it_is_to_be_trained(start, method, tmp_path):
    before = written(tmp_path / "a", config_of({"method": start, "rank": 4, **PATTERNS}))
    ratio = {"lr_ratio": 4.0} if method == "lora_plus" else {}
    model = started(tmp_path / "a", method=method, **ratio)
    same(changes(model), before)
    entry = next(adapters_of(model))
    assert entry.method == method
    assert ("lora_a" in trained(model)) == (method == "lora_plus")
    if method == "lora_plus":
        assert entry.config.rates["lora_b"] == 4.0


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_the_start_stays_fixed(method, tmp_path):
    written(tmp_path / "a", config_of({"method": method, "rank": 4}))
    first, model = decoder(), started(tmp_path / "a", method=method)
    mj.attach(first, config_of({"method": method, "rank": 4}), rngs=nnx.Rngs(1))
    for ours, fresh in zip(adapters_of(model), adapters_of(first), strict=True):
        assert ours.config.rank == 4
        for name in ("initial_a", "initial_b"):
            np.testing.assert_allclose(ours.params[name], fresh.params[name], atol=1e-5)


@pytest.mark.parametrize(
    ("start", "method", "words"),
    [
        ("lora", "pissa", "the LoRA on .* did not start as pissa from this base.*; set adapter.method=lora"),
        ("olora", "pissa", "did not start as pissa"),
        ("lora", "rslora", "holds a lora adapter, but adapter.method is rslora; set adapter.method=lora"),
        ("rslora", "lora", "set adapter.method=rslora"),
        ("lora", "dora", "set adapter.method=lora"),
        ("mora", "lora_plus", "set adapter.method=mora"),
    ],
)
def test_another_function_is_refused(start, method, words, tmp_path):
    written(tmp_path / "a", config_of({"method": start, "rank": 4}))
    with pytest.raises(mj.InputError, match=words) as raised:
        started(tmp_path / "a", method=method)
    assert "\n" not in str(raised.value)


def test_feedforward_layers_of_ia3_are_told_by_name(tmp_path):
    model = decoder()
    mj.attach(model, mj.IA3Config(targets=("k_proj", "down_proj"), feedforward=("down_proj",)), rngs=nnx.Rngs(1))
    fill_randomly(model)
    mj.save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    told, targets = config["feedforward_modules"], config["target_modules"]
    assert (told, sorted(targets)) == (["down_proj"], ["down_proj", "k_proj"])
