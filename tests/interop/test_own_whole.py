"""Modules of one's own model that are trained whole, and biases of all modules: there and back, and in real peft."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import mora_jax as mj
from mora_jax.adapters.base import AdapterParam
from tests.models.tiny import fill_randomly
from tests.peers import peft, torch

SIZE = 6
X = np.random.default_rng(0).normal(size=(2, 5, SIZE)).astype(np.float32)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Gain(nnx.Module):
    def __init__(self):
        self.gain, self.bias = nnx.Param(jnp.ones(SIZE)), nnx.Param(jnp.zeros(SIZE))

    def __call__(self, x):
        return x * self.gain[...] + self.bias[...]


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(SIZE, rngs=rngs)
        self.up = nnx.Linear(SIZE, 2 * SIZE, rngs=rngs)
        self.down = nnx.Linear(2 * SIZE, SIZE, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(SIZE, SIZE, (3,), rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.final_norm = nnx.LayerNorm(SIZE, rngs=rngs)
        self.gain = Gain()
        self.head = nnx.Linear(SIZE, 3, rngs=rngs)

    def __call__(self, x):
        x = self.conv(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.gain(self.final_norm(x)))


def trained(out, **settings):
    """A model that is adapted with random values, and saved."""
    model = Model(nnx.Rngs(0))
    mj.attach(model, mj.LoRAConfig(rank=2, targets=("up", "down"), **settings), rngs=nnx.Rngs(1))
    fill_randomly(model)
    mj.save_adapter(model, out)
    return model


def loaded(folder):
    model = Model(nnx.Rngs(0))
    mj.load_adapter(model, folder)
    return model


def fields(folder, **changes):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"modules_to_save": ("head", "conv")}, ["conv", "head"]),
        ({"modules_to_save": ("norm", "gain")}, ["blocks.0.norm", "blocks.1.norm", "gain"]),
        ({"modules_to_save": "head", "bias": "all"}, ["head"]),
        ({"modules_to_save": ("norm", "final_norm"), "bias": "lora_only"}, ["final_norm", "norm"]),
        ({"bias": "all"}, None),
    ],
)
def test_there_and_back(tmp_path, settings, names):
    model = trained(tmp_path / "a", **settings)
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["modules_to_save"] == names
    again = loaded(tmp_path / "a")
    assert np.abs(np.asarray(model(X)) - np.asarray(Model(nnx.Rngs(0))(X))).max() > 0.1
    np.testing.assert_allclose(again(X), model(X), rtol=1e-5, atol=1e-5)
    found, expected = (nnx.to_flat_state(nnx.state(one, AdapterParam)) for one in (again, model))
    assert [path for path, _ in found] == [path for path, _ in expected]
    mj.save_adapter(again, tmp_path / "b")
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in "ab")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_allclose(second[name], tensor, rtol=1e-5, atol=1e-6, err_msg=name)
    mj.merge(again)
    np.testing.assert_allclose(again(X), model(X), rtol=1e-4, atol=1e-4)


def test_names_and_shapes_in_the_file(tmp_path):
    model = trained(tmp_path / "a", modules_to_save=("head", "conv", "norm", "gain"))
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    found = {n.removeprefix("base_model.model."): tensor for n, tensor in tensors.items() if "lora" not in n}
    np.testing.assert_array_equal(found.pop("head.weight"), np.asarray(model.head.kernel[...]).T)
    np.testing.assert_array_equal(found.pop("conv.kernel"), model.conv.kernel[...])
    np.testing.assert_array_equal(found.pop("blocks.1.norm.weight"), model.blocks[1].norm.scale[...])
    np.testing.assert_array_equal(found.pop("gain.gain"), model.gain.gain[...])
    assert sorted(found) == [
        *("blocks.0.norm.bias", "blocks.0.norm.weight", "blocks.1.norm.bias", "conv.bias", "gain.bias", "head.bias")
    ]


def test_biases_alone_are_those_of_all_modules(tmp_path):
    trained(tmp_path / "a", bias="all")
    found = [name for name in load_file(tmp_path / "a" / WEIGHTS) if name.endswith(".bias")]
    biases = [path for path, _ in nnx.to_flat_state(nnx.state(Model(nnx.Rngs(0)))) if path[-1] == "bias"]
    assert len(found) == len(biases) == 10


@pytest.mark.parametrize(
    ("settings", "broken", "line"),
    [
        ({"modules_to_save": "head"}, lambda t: t.pop("base_model.model.head.bias"), "there is no tensor head.bias"),
        ({"bias": "all"}, lambda t: t.pop("base_model.model.conv.bias"), "the biases of 1 modules are missing"),
        ({"bias": "all"}, lambda t: t.update({"base_model.model.x.bias": np.ones(2)}), "x.bias belongs to nothing"),
        ({}, lambda t: t.update({"base_model.model.conv.kernel": np.ones(2)}), "modules_to_save is not set"),
        ({}, lambda t: t.update({"base_model.model.conv.filter": np.ones(2)}), "filter is no part of an adapter"),
        (
            {"modules_to_save": "conv"},
            lambda t: t.update({"base_model.model.conv.kernel": np.ones((SIZE, SIZE, 3))}),
            "conv.kernel has shape",
        ),
    ],
)
def test_files_that_do_not_fit_change_nothing(tmp_path, settings, broken, line):
    trained(tmp_path / "a", **settings)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    broken(tensors)
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    model = Model(nnx.Rngs(0))
    before = nnx.graphdef(model)
    with pytest.raises(mj.InputError, match=line):
        mj.load_adapter(model, tmp_path / "a")
    assert nnx.graphdef(model) == before


@pytest.mark.peers
def test_the_real_peft_loads_it(tmp_path):
    class Twin(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = torch.nn.Embedding(7, SIZE), torch.nn.LayerNorm(SIZE)
            self.up, self.head = torch.nn.Linear(SIZE, SIZE), torch.nn.Linear(SIZE, 3)

        def forward(self, ids):
            return self.head(self.up(self.norm(self.embed(ids))))

    class Ours(nnx.Module):
        def __init__(self, rngs):
            self.embed, self.norm = nnx.Embed(7, SIZE, rngs=rngs), nnx.LayerNorm(SIZE, epsilon=1e-5, rngs=rngs)
            self.up, self.head = nnx.Linear(SIZE, SIZE, rngs=rngs), nnx.Linear(SIZE, 3, rngs=rngs)

        def __call__(self, ids):
            return self.head(self.up(self.norm(self.embed(ids))))

    ids = np.arange(7)
    for settings in ({"modules_to_save": ("head", "norm", "embed")}, {"bias": "all", "modules_to_save": "embed"}):
        model = Ours(nnx.Rngs(0))
        twin = Twin()
        pairs = {twin.embed.weight: model.embed.embedding[...], twin.norm.weight: model.norm.scale[...]}
        pairs |= {twin.up.weight: model.up.kernel[...].T, twin.head.weight: model.head.kernel[...].T}
        pairs |= {one.bias: own.bias[...] for one, own in ((twin.norm, model.norm), (twin.up, model.up))}
        pairs |= {twin.head.bias: model.head.bias[...]}
        with torch.no_grad():
            for parameter, value in pairs.items():
                parameter.copy_(torch.from_numpy(np.array(value)))
        mj.attach(model, mj.LoRAConfig(rank=2, targets="up", **settings), rngs=nnx.Rngs(1))
        fill_randomly(model)
        mj.save_adapter(model, tmp_path / "a", overwrite=True)
        tuned = peft.PeftModel.from_pretrained(twin, str(tmp_path / "a"))
        with torch.no_grad():
            np.testing.assert_allclose(model(ids), tuned(torch.from_numpy(ids)), rtol=1e-4, atol=1e-4)
        # And what peft writes comes back.
        tuned.save_pretrained(str(tmp_path / "b"))
        again = Ours(nnx.Rngs(0))
        mj.load_adapter(again, tmp_path / "b")
        np.testing.assert_allclose(again(ids), model(ids), rtol=1e-4, atol=1e-4)
