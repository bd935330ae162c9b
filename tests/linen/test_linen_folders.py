"""Linen adapters as PEFT folders: round trips, and to and from NNX models of the same names."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import mora_jax as mj
from mora_jax.linen import adapted, load_adapter, merge, save_adapter

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 8)), jnp.float32)


def filled(tree, seed=0, scale=0.3):
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(treedef, [jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype) for leaf in leaves])


def trained(model, config, x):
    """Variables with random adapters, the model's output with them, and the report."""
    with adapted(config, deterministic=True) as report:
        variables = jax.jit(model.init)(KEY, x)
        variables = {**variables, "adapters": filled(variables["adapters"])}
        y = jax.jit(model.apply)(variables, x)
    return variables, y, report


def output(model, config, variables, x):
    with adapted(config, deterministic=True):
        return jax.jit(model.apply)(variables, x)


def test_float64_layers_keep_their_digits(tmp_path):
    with jax.enable_x64(True):
        model, config = nn.Sequential([nn.Dense(6, param_dtype=jnp.float64)]), mj.LoRAConfig(rank=2)
        x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8)))
        variables, y, _ = trained(model, config, x)
        save_adapter(variables, tmp_path / "adapter", config)
        found, read = load_adapter({"params": variables["params"]}, tmp_path / "adapter")
        for leaf, other in zip(*map(jax.tree.leaves, (read["adapters"], variables["adapters"])), strict=True):
            assert leaf.dtype == jnp.float64
            np.testing.assert_array_equal(leaf, other)
        np.testing.assert_array_equal(output(model, found, read, x), y)


class Attending(nn.Module):
    """A model with an NNX twin."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, name="out")(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(x, x)
        return nn.Dense(3, name="head")(x)


class Twin(nnx.Module):
    def __init__(self, rngs):
        self.out = nnx.Linear(8, 6, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(num_heads=2, in_features=6, decode=False, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.attn(self.out(x)))

    def layers(self):
        names = ("query", "key", "value", "out")
        return {"out": self.out, "head": self.head, "attn": {name: getattr(self.attn, name) for name in names}}


def params_of(twin):
    return jax.tree.map(
        lambda layer: {"kernel": layer.kernel[...], "bias": layer.bias[...]},
        twin.layers(),
        is_leaf=lambda node: isinstance(node, nnx.Linear | nnx.LinearGeneral),
    )


@pytest.mark.parametrize(
    "config",
    [
        mj.RsLoRAConfig(rank=2, alpha=3.0, dropout=0.2, rank_pattern={"attn.out": 1}, alpha_pattern={"head": 5.0}),
        mj.DoRAConfig(rank=2, targets=["query", "head"]),
        mj.PiSSAConfig(rank=2, targets=r"out|attn\.key"),
    ],
    ids=["rslora with patterns", "dora", "pissa"],
)
def test_folders_of_nnx_and_linen_are_the_same(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    twin = Twin(nnx.Rngs(0))
    params, plain = params_of(twin), twin(X)
    mj.attach(twin, config, rngs=nnx.Rngs(1))
    graphdef, adapters, frozen = mj.partition(twin)
    twin = nnx.merge(graphdef, filled(adapters), frozen)
    twin.eval()
    expected = twin(X)
    assert np.abs(expected - plain).max() > 0.01
    mj.save_adapter(twin, "from_nnx")

    found, variables = load_adapter({"params": params}, "from_nnx")
    np.testing.assert_allclose(output(Attending(), found, variables, X), expected, rtol=1e-4, atol=1e-5)

    save_adapter(variables, "from_linen", found)
    one, other = (
        json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("from_nnx", "from_linen")
    )
    assert {**one, "target_modules": None} == {**other, "target_modules": None}
    again = Twin(nnx.Rngs(0))
    mj.load_adapter(again, "from_linen")
    again.eval()
    np.testing.assert_allclose(again(X), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [mj.MoRAConfig(rank=2), mj.IA3Config(targets="all-linear", feedforward=())])
def test_biases_say_how_kernels_of_a_folder_of_nnx_are_matrices(config, tmp_path):
    twin = Twin(nnx.Rngs(0))
    params = params_of(twin)
    mj.attach(twin, config, rngs=nnx.Rngs(1))
    graphdef, adapters, frozen = mj.partition(twin)
    twin = nnx.merge(graphdef, filled(adapters), frozen)
    mj.save_adapter(twin, tmp_path / "adapter")
    found, variables = load_adapter({"params": params}, tmp_path / "adapter")
    np.testing.assert_allclose(output(Attending(), found, variables, X), twin(X), rtol=1e-4, atol=1e-5)
    del params["attn"]["query"]["bias"]
    with pytest.raises(mj.InputError, match=r"attn.query: the shape \(6, 2, 3\) .* in several ways"):
        load_adapter({"params": params}, tmp_path / "adapter")


class Mixed(nn.Module):
    """Names that end alike, a table, an einsum that shapes don't explain, and a scanned stack."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, 8, name="table")(ids)
        x = nn.Einsum((2, 8, 4), "btd,ndh->btnh", name="out")(x).reshape(*x.shape)
        axes = {"params": 0, "adapters": 0}
        stack = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)
        return stack(name="block")(x, None)[0]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(8, name="out")(x), None


@pytest.mark.parametrize(
    "config",
    [
        mj.LoRAConfig(rank=2, alpha=3.0, targets=["table", "out"], rank_pattern={"block.out": 3}),
        mj.MoRAConfig(rank=1, kind="decouple"),
        mj.IA3Config(targets="out", feedforward=()),
    ],
    ids=["lora", "mora", "ia3"],
)
def test_round_trip_of_stacks_tables_and_einsums(config, tmp_path):
    ids = jnp.arange(6).reshape(2, 3)
    variables, y, report = trained(Mixed(), config, ids)
    save_adapter(variables, tmp_path / "adapter", config, report=report)
    shapes = mj.interop.peft.load.tensor_shapes(tmp_path / "adapter")
    table = {"table"} if isinstance(config.targets, tuple) and "table" in config.targets else set()
    assert set(shapes) == {"out", "block.0.out", "block.1.out"} | table
    found, loaded = load_adapter({"params": variables["params"]}, tmp_path / "adapter", report=report)
    np.testing.assert_array_equal(output(Mixed(), found, loaded, ids), y)
    with pytest.raises(mj.InputError, match="give the report of the context"):
        save_adapter(variables, tmp_path / "other", config)
    assert not (tmp_path / "other").exists()
    # A new process has no report: the folder says how kernels are matrices. One of NNX doesn't.
    found, loaded = load_adapter({"params": variables["params"]}, tmp_path / "adapter")
    np.testing.assert_array_equal(output(Mixed(), found, loaded, ids), y)
    (tmp_path / "adapter" / "linen_layers.json").unlink()
    with pytest.raises(mj.InputError, match="give the report of a context"):
        load_adapter({"params": variables["params"]}, tmp_path / "adapter")
    (tmp_path / "adapter" / "linen_layers.json").write_text('{"out": {}}')
    with pytest.raises(mj.InputError, match=r"linen_layers.json is not what mora_jax.linen.save_adapter writes"):
        load_adapter({"params": variables["params"]}, tmp_path / "adapter")


def test_every_layer_of_stacks_in_stacks_is_kept(tmp_path):
    axes, config = {"params": 0, "adapters": 0}, mj.LoRAConfig(rank=2)
    split = {"variable_axes": axes, "split_rngs": {"params": True}}
    model = nn.scan(nn.scan(Block, length=3, **split), length=2, **split)()
    with adapted(config) as report:
        variables = model.init(KEY, X, None)
        variables = {**variables, "adapters": filled(variables["adapters"])}
        y, _ = model.apply(variables, X, None)
    save_adapter(variables, tmp_path / "adapter", config, report=report)
    names = {f"{i}.{j}.out" for i, j in np.ndindex(2, 3)}
    assert set(mj.interop.peft.load.tensor_shapes(tmp_path / "adapter")) == names
    found, loaded = load_adapter({"params": variables["params"]}, tmp_path / "adapter")
    with adapted(found):
        np.testing.assert_array_equal(model.apply(loaded, X, None)[0], y)


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        cell = nn.RNN(nn.LSTMCell(8), variable_broadcast=["params", "adapters"], name="cell")
        return x + cell(x), None


def test_loops_that_share_their_variables_stack_nothing(tmp_path):
    axes, config = {"params": 0, "adapters": 0}, mj.LoRAConfig(rank=2, targets=("hi", "ig"))
    model = nn.scan(Recurrent, variable_axes=axes, split_rngs={"params": True}, length=2)()
    with adapted(config) as report:
        variables = model.init(KEY, X, None)
        variables = {**variables, "adapters": filled(variables["adapters"])}
        y, _ = model.apply(variables, X, None)
    save_adapter(variables, tmp_path / "adapter", config, report=report)
    names = set(mj.interop.peft.load.tensor_shapes(tmp_path / "adapter"))
    assert len(names) == 4 and {name[0] for name in names} == {"0", "1"}
    found, loaded = load_adapter({"params": variables["params"]}, tmp_path / "adapter")
    with adapted(found):
        np.testing.assert_array_equal(model.apply(loaded, X, None)[0], y)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        mj.LoRAConfig(rank=2),
        mj.MoRAConfig(rank=2),
        mj.IA3Config(targets="all-linear"),
        mj.BitFitConfig(),
        mj.OFTConfig(block_size=2),
        mj.HiRAConfig(rank=2),
        mj.MiSSConfig(rank=2),
    ],
    ids=lambda config: type(config).__name__,
)
def test_attention_is_loaded_without_a_report(config, tmp_path):
    variables, y, report = trained(Attending(), config, X)
    save_adapter(variables, tmp_path / "adapter", config, report=report)
    found, loaded = load_adapter({"params": variables["params"]}, tmp_path / "adapter")
    np.testing.assert_array_equal(output(Attending(), found, loaded, X), y)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "adapters": 0}
        stack = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)
        return stack(name="block")(x, None)[0]


@pytest.mark.parametrize(
    "config",
    [mj.IA3Config(targets="out"), mj.DoRAConfig(rank=2), mj.BitFitConfig(), mj.HiRAConfig(rank=2), mj.LoRAConfig()],
    ids=lambda config: type(config).__name__,
)
def test_layers_of_a_stack_that_the_folder_leaves_out_compute_the_base(config, tmp_path):
    """A folder of NNX that holds layer 1 of three."""
    params = Scanned().init(KEY, X)["params"]
    kernels, biases = (np.asarray(params["block"]["out"][name]) for name in ("kernel", "bias"))
    listed = nnx.Dict(block=nnx.List([nnx.Dict(out=nnx.Linear(8, 8, rngs=nnx.Rngs(i))) for i in range(3)]))
    for i, layer in enumerate(listed.block):
        layer.out.kernel[...], layer.out.bias[...] = kernels[i], biases[i]
    mj.attach(listed, dataclasses.replace(config, layers_to_transform=(1,)), rngs=1)
    graphdef, adapters, frozen = mj.partition(listed)
    listed = nnx.merge(graphdef, filled(adapters), frozen)
    mj.save_adapter(listed, tmp_path / "adapter")
    expected = X
    for layer in listed.block:
        expected = expected + layer.out(expected)
    found, variables = load_adapter({"params": params}, tmp_path / "adapter")
    np.testing.assert_allclose(output(Scanned(), found, variables, X), expected, rtol=1e-4, atol=1e-5)


class Numbered(nn.Module):
    """Layers whose number stands inside their names."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = x + Inner()(x)
        for i in range(2):
            x = x + nn.Dense(8, name=f"layers_{i}")(x)
        return x


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(x)


def test_layers_to_transform_are_written(tmp_path):
    config = mj.LoRAConfig(rank=2, layers_to_transform=(1,))
    variables, y, report = trained(Numbered(), config, X)
    assert sorted(variables["adapters"]) == ["Inner_1", "layers_1"]
    save_adapter(variables, tmp_path / "adapter", config, report=report)
    found, loaded = load_adapter({"params": variables["params"]}, tmp_path / "adapter")
    np.testing.assert_array_equal(output(Numbered(), found, loaded, X), y)


def test_merging_a_bias_into_a_layer_without_one():
    plain, config = nn.Dense(4, use_bias=False), mj.BitFitConfig()
    variables, y, _ = trained(plain, config, X)
    assert np.abs(y - plain.apply(variables, X)).max() > 0.1
    with pytest.warns(UserWarning, match="the layer has no bias, and its adapter added one: .* use_bias=True"):
        params = merge(variables, config)
    np.testing.assert_allclose(nn.Dense(4).apply({"params": params}, X), y, atol=1e-5)


def test_refusals(tmp_path):
    model, config = nn.Sequential([nn.Dense(8), nn.Dense(4)]), mj.LoRAConfig(rank=2)
    variables, _, _ = trained(model, config, X)
    with pytest.raises(mj.InputError, match="no collection 'adapters'"):
        save_adapter({"params": variables["params"]}, tmp_path / "adapter", config)
    save_adapter(variables, tmp_path / "adapter", config)
    with pytest.raises(mj.InputError, match="overwrite=True"):
        save_adapter(variables, tmp_path / "adapter", config)
    doubled = variables | {"adapters": jax.tree.map(lambda leaf: 2 * leaf, variables["adapters"])}
    save_adapter(doubled, tmp_path / "adapter", config, overwrite=True)
    loaded = load_adapter({"params": variables["params"]}, tmp_path / "adapter")[1]["adapters"]
    jax.tree.map(np.testing.assert_array_equal, loaded, doubled["adapters"])
    save_adapter(variables, tmp_path / "adapter", config, overwrite=True)
    with pytest.raises(mj.InputError, match="layers_1"):
        load_adapter({"params": {"layers_0": variables["params"]["layers_0"]}}, tmp_path / "adapter")
    other = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]) if leaf.ndim == 2 else leaf, variables["params"])
    with pytest.raises(mj.InputError, match="shape"):
        load_adapter({"params": other}, tmp_path / "adapter")
    with pytest.raises(mj.InputError, match="has no adapter_"):
        load_adapter(variables, tmp_path)
    own = nnx.Dict(layers_0=nnx.Linear(X.shape[-1], 8, rngs=nnx.Rngs(0)), layers_1=nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    mj.attach(own, mj.LoRAConfig(rank=2, targets="layers_0", modules_to_save="layers_1"), rngs=0)
    mj.save_adapter(own, tmp_path / "whole")
    with pytest.raises(mj.InputError, match="it trains layers_1 whole, for which a tree of parameters has no form"):
        load_adapter({"params": variables["params"]}, tmp_path / "whole")


class Outer(nn.Module):
    """A scanned stack, beside whose layers stands another one."""

    @nn.compact
    def __call__(self, x, _):
        split = {"variable_axes": {"params": 0, "adapters": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Block, length=2, **split)(name="inner")(x, None)
        return x + nn.Dense(8, name="own")(x), None


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        split = {"variable_axes": {"params": 0, "adapters": 0}, "split_rngs": {"params": True}}
        return nn.Dense(8, name="head")(nn.scan(Outer, length=3, **split)(name="outer")(x, None)[0])


@pytest.mark.parametrize("writer", ["linen", "tree"])
def test_trees_and_linen_read_each_others_stacks_at_different_depths(writer, tmp_path):
    config = mj.LoRAConfig(rank=2, targets=("out", "own", "head"))
    variables, y, report = trained(Nested(), config, X)
    params = variables["params"]
    if writer == "linen":
        save_adapter(variables, tmp_path / "adapter", config, report=report)
    else:
        by_path = {
            "outer.inner.out": variables["adapters"]["outer"]["inner"]["out"],
            "outer.own": variables["adapters"]["outer"]["own"],
            "head": variables["adapters"]["head"],
        }
        mj.functional.save(params, by_path, tmp_path / "adapter", config)
    names = {f"outer.{i}.inner.{j}.out" for i, j in np.ndindex(3, 2)} | {f"outer.{i}.own" for i in range(3)} | {"head"}
    assert set(mj.interop.peft.load.tensor_shapes(tmp_path / "adapter")) == names
    found, adapters = mj.functional.load(params, tmp_path / "adapter")
    merged = mj.functional.merge(params, adapters, found)
    np.testing.assert_allclose(Nested().apply({"params": merged}, X), y, rtol=1e-4, atol=1e-5)
    found, loaded = load_adapter({"params": params}, tmp_path / "adapter")
    np.testing.assert_array_equal(output(Nested(), found, loaded, X), y)


class Sharing(nn.Module):
    base: nn.Module

    def setup(self):
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x):
        return self.base(x) + nn.Dense(4, name="extra")(x)


@pytest.mark.parametrize("config", [mj.LoRAConfig(rank=2), mj.MoRAConfig(rank=2), mj.IA3Config(targets="all-linear")])
@pytest.mark.parametrize(
    "model", [nn.DenseGeneral((3, 2)), Sharing(nn.Dense(4)), nn.Sequential([Sharing(nn.Dense(4))])]
)
def test_layers_without_a_scope_of_their_own_come_back(model, config, tmp_path):
    x = X[0]
    variables, y, report = trained(model, config, x)
    assert np.abs(y - model.apply({"params": variables["params"]}, x)).max() > 1e-2
    save_adapter(variables, tmp_path / "adapter", config, report=report)
    found, read = load_adapter({"params": variables["params"]}, tmp_path / "adapter", report=report)
    np.testing.assert_allclose(output(model, found, read, x), y, atol=1e-6)
