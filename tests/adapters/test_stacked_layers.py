"""Layers that `nnx.vmap` made: an adapter for each, under `nnx.scan` and `nnx.vmap`, merged, saved and loaded.

The oracle is the same model with its layers in a list, each with the slice of the stack that belongs to it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from tests.adapters.test_attach import fill
from tests.adapters.test_conformance import CASES

DEPTH, WIDTH = 3, 6
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, WIDTH)), jnp.float32)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(WIDTH, 8, rngs=rngs)
        self.out = nnx.Einsum("...d,hd->...h", (WIDTH, 8), (WIDTH,), rngs=rngs)
        for layer in (self.up, self.out):
            layer.bias[...] = jnp.arange(1.0, 1.0 + layer.bias.size) / layer.bias.size
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.out(jnp.tanh(self.up(self.norm(x)))))


class Scanned(nnx.Module):
    """Blocks made by `nnx.vmap`, run by `nnx.scan`."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=DEPTH)
        @nnx.vmap
        def make(rngs: nnx.Rngs) -> Block:
            return Block(rngs)

        self.blocks = make(rngs)
        self.head = nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return block(x)

        return self.head(run(self.blocks, x))


class Listed(nnx.Module):
    """The same blocks, in a list."""

    def __init__(self, scanned: Scanned):
        graphdef, state = nnx.split(scanned.blocks)
        slices = [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(DEPTH)]
        self.blocks = nnx.List([nnx.merge(graphdef, one) for one in slices])
        self.head = nnx.clone(scanned.head)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss(model, x):
    return jnp.sum(jnp.sin(model(x)))


@pytest.mark.parametrize(
    "name",
    [
        *("lora with biases", "mora rotation"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("vera", "dora", "pissa", "adalora", "ia3 on inputs")),
    ],
)
def test_each_layer_of_a_stack_has_its_adapter(name, tmp_path):
    config = CASES[name]
    model = Scanned(nnx.Rngs(0))
    plain = Listed(model)
    expected = nnx.clone(plain)(X)
    report = mj.attach(model, config, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(model(X), expected, atol=1e-5, err_msg="a fresh adapter changes nothing")
    layers = {match.path: match.layers for match in report.matches}
    assert layers == {"blocks.*.out": DEPTH, "blocks.*.up": DEPTH, "head": 1}

    model = fill(model)
    listed = Listed(model)
    adapted = nnx.jit(lambda model, x: model(x))(model, X)
    assert not np.allclose(adapted, expected, atol=1e-2)
    np.testing.assert_allclose(adapted, listed(X), atol=1e-5)
    assert [entry.path for entry in adapters_of(model)].count("blocks.1.up") == 1
    assert report.trainable == sum(leaf.size for leaf in jax.tree.leaves(mj.partition(listed)[1]))
    _gradients_agree(model, listed)

    mj.save_adapter(model, tmp_path / "adapter")
    again = Scanned(nnx.Rngs(0))
    mj.load_adapter(again, tmp_path / "adapter")
    np.testing.assert_allclose(again(X), adapted, atol=1e-4)
    merged = mj.merge(model)
    assert type(model.blocks.up) is nnx.Linear
    np.testing.assert_allclose(model(X), adapted, atol=1e-4)
    mj.unmerge(model, merged)
    np.testing.assert_allclose(model(X), adapted, atol=1e-4)


def _gradients_agree(model, listed):
    """Under `nnx.scan` as in the list, for every trained array."""

    def gradients(model):
        graphdef, adapters, frozen = mj.partition(model)
        found = jax.jit(jax.grad(lambda adapters: loss(nnx.merge(graphdef, adapters, frozen, copy=True), X)))(adapters)
        return dict(nnx.to_flat_state(found))

    stacked, single = gradients(model), gradients(listed)
    for (first, *path), value in stacked.items():
        if first != "blocks":
            np.testing.assert_allclose(value[...], single[(first, *path)][...], rtol=1e-4, atol=1e-4)
            continue
        for i in range(DEPTH):
            np.testing.assert_allclose(value[...][i], single[("blocks", i, *path)][...], rtol=1e-4, atol=1e-4)


class Turned(nnx.Module):
    """A layer of a class that Flax does not have."""

    def __init__(self, rngs: nnx.Rngs):
        self.weight = nnx.Param(nnx.initializers.normal(0.5)(rngs.params(), (WIDTH, WIDTH)))
        self.bias = nnx.Param(jnp.arange(1.0, 1.0 + WIDTH))
        self.equation = "...i,oi->...o"

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.weight[...]) + self.bias[...]


mj.register_layer(Turned, example=Turned(nnx.Rngs(0)), kernel="weight", einsum="equation", bias="bias")
MAKERS = {
    "linear": lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs),
    "general": lambda rngs: nnx.LinearGeneral(WIDTH, (2, 3), rngs=rngs),
    "einsum": lambda rngs: nnx.Einsum("...d,hd->...h", (WIDTH, WIDTH), rngs=rngs),
    "embed": lambda rngs: nnx.Embed(10, WIDTH, rngs=rngs),
    "turned": Turned,
    "LoRALinear": lambda rngs: mj.LoRALinear(WIDTH, WIDTH, rank=2, alpha=3.0, dropout=0.5, rngs=rngs),
    "MoRALinear": lambda rngs: mj.MoRALinear(WIDTH, WIDTH, rank=2, kind="rotation", rngs=rngs),
}


def stacked(make, rngs, depth=DEPTH, **axes):
    return nnx.split_rngs(splits=depth)(nnx.vmap(make, **axes))(rngs)


class Stack(nnx.Module):
    """One stack of layers, and a head."""

    def __init__(self, make, rngs: nnx.Rngs):
        self.layers = stacked(make, rngs)
        self.head = nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return jnp.tanh(layer(x))

        return self.head(run(self.layers, x))


def one_by_one(layers, x):
    """What every layer of a stack makes of one input, `[L, …]`."""
    graphdef, state = nnx.split(layers)
    slices = [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(DEPTH)]
    return jnp.stack([nnx.merge(graphdef, one)(x) for one in slices])


def at_once(layers, x):
    return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(layers, x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["LoRALinear", "MoRALinear"])
def test_layers_with_adapters_of_their_own(kind, tmp_path):
    model = fill(Stack(MAKERS[kind], nnx.Rngs(0)))
    if kind == "LoRALinear":
        draws = [at_once(model.layers, X) for _ in range(2)]
        assert not np.allclose(*draws), "each call draws masks anew"
    model.eval()
    plain = Stack(MAKERS["linear"], nnx.Rngs(0))
    nnx.update(plain, nnx.state(model, lambda path, _: path[-1] in ("kernel", "bias")))
    y = model(X)
    np.testing.assert_allclose(at_once(model.layers, X), one_by_one(model.layers, X), atol=1e-5)

    graphdef, adapters, frozen = mj.partition(model)

    def value(adapters):
        return loss(nnx.merge(graphdef, adapters, frozen, copy=True), X)

    gradient, along = jax.jit(jax.grad(value))(adapters), jax.tree.map(jnp.ones_like, adapters)
    slope = sum(float(leaf.sum()) for leaf in jax.tree.leaves(gradient))
    ends = [value(jax.tree.map(lambda a, d, s=s: a + s * d, adapters, along)) for s in (3e-3, -3e-3)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 6e-3, rtol=1e-2, atol=1e-2)

    mj.save_adapter(model, tmp_path / "adapter")
    again = nnx.clone(plain)
    mj.load_adapter(again, tmp_path / "adapter")
    again.eval()
    np.testing.assert_allclose(again(X), y, atol=1e-5)
    merged = mj.merge(model)
    assert type(model.layers) is nnx.Linear
    np.testing.assert_allclose(model(X), y, atol=1e-5)
    mj.unmerge(model, merged)
    np.testing.assert_allclose(model(X), y, atol=1e-5)


def test_two_axes(tmp_path):
    def make(rngs):
        return stacked(lambda rngs: stacked(MAKERS["linear"], rngs), rngs, 2)

    def run(rows, x):
        scan = nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return scan(lambda row, x: scan(lambda layer, x: jnp.tanh(layer(x)))(row, x))(rows, x)

    model = nnx.Dict(rows=make(nnx.Rngs(0)), head=nnx.Linear(WIDTH, 2, rngs=nnx.Rngs(0)))
    before, base = run(model.rows, X), nnx.clone(model)
    config = mj.LoRAConfig(rank=2, use_dora=True, rank_pattern={"rows.1.2": 3}, targets=("rows",))
    match = mj.attach(model, config, rngs=nnx.Rngs(1)).matches[0]
    assert (match.path, match.layers, match.trainable) == ("rows.*.*", 6, 6 * 2 * 2 * WIDTH + 2 * WIDTH + 6 * WIDTH)
    np.testing.assert_allclose(run(model.rows, X), before, atol=1e-5)
    model = fill(model)
    y, x = run(model.rows, X), X
    assert not np.allclose(y, before, atol=1e-2)
    entries = {entry.path: entry for entry in adapters_of(model)}
    assert {path: entry.config.rank for path, entry in entries.items()} == {
        f"rows.{i}.{j}": 3 if (i, j) == (1, 2) else 2 for i in range(2) for j in range(3)
    }
    for i in range(2):  # DoRA, as its paper writes it
        for j in range(3):
            p = entries[f"rows.{i}.{j}"].params
            kernel = base.rows.kernel[i, j] + p["scaling"] * p["lora_a"] @ p["lora_b"]
            kernel = kernel / jnp.linalg.norm(kernel, axis=0) * p["magnitude"]
            x = jnp.tanh(x @ kernel + base.rows.bias[i, j])
    np.testing.assert_allclose(y, x, atol=1e-5)
    mj.save_adapter(model, tmp_path / "adapter")
    mj.load_adapter(base, tmp_path / "adapter")
    np.testing.assert_allclose(run(base.rows, X), y, atol=1e-5)
    mj.merge(model)
    np.testing.assert_allclose(run(model.rows, X), y, atol=1e-5)


def test_an_embedding(tmp_path):
    ids = jnp.arange(4)
    model = nnx.Dict(tables=stacked(MAKERS["embed"], nnx.Rngs(0)), head=nnx.Linear(WIDTH, 2, rngs=nnx.Rngs(0)))
    base, config = nnx.clone(model), mj.LoRAConfig(rank=2, use_dora=True, targets=("tables",))
    mj.attach(model, config, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(at_once(model.tables, ids), at_once(base.tables, ids), atol=1e-5)
    model = fill(model)
    y = at_once(model.tables, ids)
    assert not np.allclose(y, at_once(base.tables, ids), atol=1e-2)
    np.testing.assert_allclose(y, one_by_one(model.tables, ids), atol=1e-5)
    mj.save_adapter(model, tmp_path / "adapter")
    mj.load_adapter(base, tmp_path / "adapter")
    np.testing.assert_allclose(at_once(base.tables, ids), y, atol=1e-5)
    mj.merge(model)
    np.testing.assert_allclose(at_once(model.tables, ids), y, atol=1e-5)


def test_layers_of_other_classes():
    model = Stack(Turned, nnx.Rngs(0))
    base = at_once(model.layers, X)
    mj.attach(model, mj.LoRAConfig(rank=2, use_dora=True, targets=("layers",)), rngs=nnx.Rngs(1))
    np.testing.assert_allclose(at_once(model.layers, X), base, atol=1e-5)
    model = fill(model)
    y = at_once(model.layers, X)
    assert not np.allclose(y, base, atol=1e-2)
    np.testing.assert_allclose(y, one_by_one(model.layers, X), atol=1e-5)
    mj.merge(model)
    assert type(model.layers) is Turned
    np.testing.assert_allclose(at_once(model.layers, X), y, atol=1e-5)


def test_dropout_has_masks_by_layer_and_draws_them_anew():
    model = Stack(MAKERS["linear"], nnx.Rngs(0))
    mj.attach(model, mj.LoRAConfig(rank=WIDTH, dropout=0.5, targets=("layers",)), rngs=nnx.Rngs(1))
    layers, ones, eye = model.layers, jnp.ones((8, WIDTH)), jnp.broadcast_to(jnp.eye(WIDTH), (DEPTH, WIDTH, WIDTH))
    layers.kernel[...], layers.bias[...] = jnp.zeros_like(layers.kernel), jnp.zeros_like(layers.bias)
    layers.adapter.lora_a[...] = layers.adapter.lora_b[...] = eye  # so that the output is the input with its holes
    first, second = at_once(layers, ones), at_once(layers, ones)
    masks = {np.asarray(mask).tobytes() for mask in (*first, *second)}
    assert len(masks) == 2 * DEPTH
    np.testing.assert_allclose(np.unique(first), [0.0, 2.0 * layers.adapter.config.alpha / WIDTH], rtol=1e-6)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_call_outside_scan_and_vmap_is_refused(kind):
    model = Stack(MAKERS[kind], nnx.Rngs(0))
    if not hasattr(model.layers, "adapter"):
        mj.attach(model, mj.LoRAConfig(rank=2, targets=("layers",)), rngs=nnx.Rngs(1))
    x = jnp.arange(4) if kind == "embed" else X
    calls = [model.layers, model.layers.attend] if kind == "embed" else [model.layers]
    for call in calls:
        with pytest.raises(ValueError, match=r"a stack of \[3\] layers: call it inside nnx.scan or nnx.vmap"):
            call(x)


def test_scalings_of_all_layers_in_one_are_refused():
    """With as many layers as outputs they would scale the columns of each."""
    layers = stacked(lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.Rngs(0), depth=WIDTH)
    mj.attach(layers, mj.LoRAConfig(rank=2, alpha_pattern={"5": 64.0}), rngs=1)
    axes = nnx.StateAxes({nnx.Param: 0, ...: None})
    with pytest.raises(ValueError, match="AdapterState is that of"):
        nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, None))(layers, X)


def test_an_axis_behind_is_refused():
    model = nnx.Dict(layer=stacked(MAKERS["linear"], nnx.Rngs(0), out_axes=1))
    with pytest.raises(ValueError, match=r"\[6, 3, 6\], no layers of 6 by 6 stacked along axes in front: .*out_axes=0"):
        mj.attach(model, mj.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
    assert type(model.layer) is nnx.Linear


def test_layers_of_a_stack_that_are_left_out_are_reported():
    model = Stack(MAKERS["linear"], nnx.Rngs(0))
    config = mj.LoRAConfig(rank=2, layers_to_transform=(1,), targets=("layers",))
    report = mj.attach(model, config, rngs=nnx.Rngs(1))
    assert {(one.paths, one.parameters, one.reason) for one in report.skipped} == {
        (("layers.*",), 2 * WIDTH * WIDTH, "outside layers_to_transform"),
        (("head",), 2 * WIDTH, "not among the targets"),
    }
