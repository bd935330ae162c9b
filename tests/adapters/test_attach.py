"""Attaching to models of all sorts: what matches, what is refused, what is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from mora_jax.adapters.base import FullParam
from mora_jax.adapters.matrices import Matrix
from mora_jax.adapters.projection import Part, Projection


class Model(nnx.Module):
    """Every kind of layer that can carry an adapter, one of them used twice."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs), self.first])
        self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, rngs=rngs, decode=False)
        self.einsum = nnx.Einsum("...td,dnh->...tnh", (8, 2, 3), (2, 3), rngs=rngs)
        self.experts = nnx.Einsum("etd,edf->etf", (6, 3, 2), rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)

    def __call__(self, ids):
        x = self.blocks[0](jnp.tanh(self.blocks[1](self.embed(ids))))
        x = self.einsum(x + self.attention(x)).reshape(*ids.shape, 6)
        return self.embed.attend(self.norm(x))


IDS = np.arange(10).reshape(2, 5)
LINEAR = {"first", "blocks.0", "attention.query", "attention.key", "attention.value", "attention.out", "einsum"}


def fill(model):
    graphdef, adapters, frozen = mj.partition(model)
    leaves, tree = jax.tree.flatten(adapters)
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(rng.normal(size=leaf.shape) * 0.3, jnp.float32) for leaf in leaves]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves), frozen)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (mj.LoRAConfig(rank=2), LINEAR),
        (mj.MoRAConfig(rank=2, kind="rotation"), LINEAR),
        (mj.LoRAConfig(rank=2, targets=("embed", "first")), {"embed", "first"}),
        (mj.LoRAConfig(rank=2, targets=r".*attention.*"), {n for n in LINEAR if n.startswith("attention")}),
        (mj.MoRAConfig(rank=2, targets="einsum"), {"einsum"}),
        (mj.LoRAConfig(rank=2, targets=("attention.query", "0")), {"attention.query", "blocks.0"}),
    ],
)
def test_matches_changes_nothing_and_merges(config, expected):
    model = Model(nnx.Rngs(0))
    before = np.asarray(model(IDS))
    report = mj.attach(model, config, rngs=nnx.Rngs(1))
    found = {match.path for match in report.matches}
    assert {"first" if path == "blocks.1" else path for path in found} == expected
    np.testing.assert_array_equal(model(IDS), before)
    _, adapters, _ = mj.partition(model)
    assert report.trainable == sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(adapters))
    model = fill(model)
    tuned = np.asarray(model(IDS))
    assert np.abs(tuned - before).max() > 1e-2
    mj.merge(model)
    np.testing.assert_allclose(model(IDS), tuned, rtol=1e-4, atol=1e-5)
    assert type(model.first) is nnx.Linear and model.blocks[1] is model.first


def test_report_prints_a_table():
    model = Model(nnx.Rngs(0))
    text = str(mj.attach(model, mj.LoRAConfig(rank=2, targets=("first",)), rngs=nnx.Rngs(1)))
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "layers", "in", "out", "trainable"]
    assert lines[2].split()[1:] == ["1", "6", "8", "28"]
    assert lines[4].startswith("lora: 28 of ") and lines[4].endswith("%)")
    assert lines[5].startswith("not adapted: key, out, query, ")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (mj.LoRAConfig(targets=("nope",)), "match no layer; layers that could have matched: key, out, "),
        (mj.LoRAConfig(targets=("first", "q_proj")), "target 'q_proj' matches no layer"),
        (mj.LoRAConfig(targets=r"["), "no regular expression"),
        (mj.LoRAConfig(targets="experts"), "no product with one matrix"),  # one matrix an expert, not a single product
        (mj.MoRAConfig(targets=("embed",)), "embed is an embedding, for which mora has no form"),
    ],
)
def test_refusals_leave_the_model_alone(config, words):
    model = Model(nnx.Rngs(0))
    with pytest.raises(ValueError, match=words):
        mj.attach(model, config, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="nothing to train"):
        mj.partition(model)


def test_attaching_twice_is_refused():
    model = Model(nnx.Rngs(0))
    mj.attach(model, mj.LoRAConfig(targets=("first",)), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="carries an adapter already"):
        mj.attach(model, mj.LoRAConfig(), rngs=nnx.Rngs(1))
    with pytest.raises(TypeError, match="must be one of LoRAConfig, .*FullConfig, not dict"):
        mj.attach(model, {"rank": 2}, rngs=nnx.Rngs(1))
    mj.merge(model)
    with pytest.raises(ValueError, match="no adapter to merge"):
        mj.merge(model)


def test_full_trains_every_parameter_once():
    model = Model(nnx.Rngs(0))
    before = np.asarray(model(IDS))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    report = mj.attach(model, mj.FullConfig(), rngs=nnx.Rngs(1))
    assert report.trainable == report.total == count
    np.testing.assert_array_equal(model(IDS), before)
    _, trainable, frozen = mj.partition(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == count
    assert not jax.tree.leaves(nnx.filter_state(frozen, nnx.Param))


def test_parameters_in_a_list_are_trained_with_the_whole_model():
    class Scales(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.first = nnx.Linear(3, 3, rngs=rngs)
            self.scales = nnx.List([nnx.Param(jnp.full(3, 2.0)), nnx.Param(jnp.full(3, 5.0))])

    model = Scales(nnx.Rngs(0))
    assert mj.attach(model, mj.FullConfig(), rngs=nnx.Rngs(1)).trainable == 18
    assert [type(scale) for scale in model.scales] == [FullParam, FullParam]
    assert [float(scale[...][0]) for scale in model.scales] == [2.0, 5.0]
    with pytest.raises(ValueError, match="modules_to_save: scales is a list of parameters"):
        mj.attach(Scales(nnx.Rngs(0)), mj.LoRAConfig(modules_to_save=("scales",)), rngs=nnx.Rngs(1))


def test_other_code_finds_adapters_as_lora_params():
    model = Model(nnx.Rngs(0))
    mj.attach(model, mj.MoRAConfig(rank=2), rngs=nnx.Rngs(1))
    found = nnx.state(model, nnx.LoRAParam)
    assert len(jax.tree.leaves(found)) == len(LINEAR)


def stack() -> Projection:
    return Projection(
        (Part("gate_proj", 1), Part("up_proj", 1)),
        4,
        out_shape=(2, 5),
        axes=("embed", "gate_up", "mlp"),
        num_layers=3,
        path="model.layers.{layer}.mlp.{name}",
        rngs=nnx.Rngs(0),
        init_std=0.5,
    )


def test_some_layers_of_a_stack():
    projection = stack()
    config = mj.LoRAConfig(rank=2, targets=r"model\.layers\.[02]\.mlp\.up_proj")
    report = mj.attach(projection, config, rngs=nnx.Rngs(1))
    assert [(m.path, m.layers, m.trainable) for m in report.matches] == [("model.layers.*.mlp.up_proj", 2, 36)]
    projection = fill(projection)
    entries = {entry.path: entry for entry in adapters_of(projection)}
    assert set(entries) == {"model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"}
    kernel = np.asarray(projection.kernel[...])
    expected = kernel.copy()
    for layer in (0, 2):
        params = entries[f"model.layers.{layer}.mlp.up_proj"].params
        expected[layer, :, 1] += params["scaling"] * params["lora_a"] @ params["lora_b"]
    mj.merge(projection)
    np.testing.assert_allclose(projection.kernel[...], expected, atol=1e-5)


def test_rotation_says_which_inputs_it_ignores():
    model = nnx.Linear(512, 64, rngs=nnx.Rngs(0))
    report = mj.attach(model, mj.MoRAConfig(rank=8, kind="rotation"), rngs=nnx.Rngs(1))
    assert report.warnings == (
        "rotation at rank 8 ignores 444 of the 512 inputs of (the model itself) (in > out, as in the authors' code)",
    )


@pytest.mark.parametrize(
    ("spec", "shape", "axes"),
    [
        ("td,df->tf", (3, 4), ((0,), (1,))),
        ("bthd,hdo->bto", (2, 3, 4), ((0, 1), (2,))),
        ("td,fd->tf", (4, 3), ((1,), (0,))),
        ("td,edf->tef", (5, 3, 4), ((1,), (0, 2))),
        ("etd,edf->etf", (5, 3, 4), None),  # a batch axis in the kernel: several matrices
        ("td,d->t", (3,), None),
        ("td,dd->t", (3, 3), None),
        ("", (3, 4), None),
    ],
)
def test_which_einsums_are_matrix_products(spec, shape, axes):
    matrix = Matrix.of_einsum("kernel", spec, shape)
    assert (None if matrix is None else (matrix.contracted, matrix.free)) == axes


@pytest.mark.parametrize(
    "make",
    [
        lambda: mj.PiSSAConfig(rank=7, targets=("first", "einsum", "attention.query"), modules_to_save=("norm",)),
        lambda: mj.OLoRAConfig(rank=7, bias="all"),
        lambda: mj.LoRAConfig(rank=3, init="orthogonal"),
        lambda: mj.LoRAConfig(rank=2, modules_to_save=("nothing",)),
    ],
)
def test_attaching_is_done_whole_or_not_at_all(make):
    model = Model(nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    classes = [type(node) for _, node in nnx.iter_graph(model)]
    for _ in range(2):
        with pytest.raises(ValueError, match="rank|modules_to_save"):
            mj.attach(model, make(), rngs=nnx.Rngs(1))
        assert [type(node) for _, node in nnx.iter_graph(model)] == classes
        after, same = nnx.split(model)
        assert after == graphdef
        jax.tree.map(np.testing.assert_array_equal, same, state)


SOME = [mj.LoRAConfig(rank=2), mj.DoRAConfig(rank=2), mj.MoRAConfig(rank=2, kind="rotation"), mj.BitFitConfig()]


@pytest.mark.parametrize("config", [*SOME, mj.IA3Config(targets="all-linear"), mj.MoRAConfig(rank=2, kind="decouple")])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda rngs: nnx.Linear(3, 4, rngs=rngs), (0, 3)),
        (lambda rngs: nnx.Einsum("...td,dnh->...tnh", (3, 2, 4), rngs=rngs), (2, 0, 3)),
        (lambda rngs: nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=rngs), (0, 2, 3)),
    ],
)
def test_no_rows(config, make, shape):
    plain = make(nnx.Rngs(0))(jnp.zeros(shape))
    model = make(nnx.Rngs(0))
    mj.attach(model, config, rngs=nnx.Rngs(1))
    y, gradient = jax.value_and_grad(lambda x: model(x).sum())(jnp.zeros(shape))
    assert model(jnp.zeros(shape)).shape == plain.shape and y == 0 and gradient.shape == shape


def test_no_rows_of_an_embedding():
    model = nnx.Embed(5, 4, rngs=nnx.Rngs(0))
    mj.attach(model, mj.LoRAConfig(rank=2, targets=".*"), rngs=nnx.Rngs(1))
    assert model(jnp.zeros((0, 3), jnp.int32)).shape == (0, 3, 4) and model.attend(jnp.zeros((0, 4))).shape == (0, 5)


def test_an_einsum_that_is_given_at_the_call():
    model = nnx.Einsum("td,df->tf", (3, 3), rngs=nnx.Rngs(0))
    mj.attach(model, mj.LoRAConfig(rank=2), rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(model(jnp.ones((2, 3)), "td, df -> tf"), model(jnp.ones((2, 3))))
    with pytest.raises(ValueError, match="is for 'td,df->tf', and merges for it; with 'tf,df->td'"):
        model(jnp.ones((2, 3)), "tf,df->td")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (linen.Dense(3), r"Dense is one of Linen, .* with mora_jax.linen.adapted\(config\): model.init"),
        (
            {"dense": {"kernel": jnp.ones((2, 3))}},
            "not a tree of arrays: of a Linen model use mora_jax.linen.adapted; ",
        ),
        ([nnx.Linear(2, 3, rngs=nnx.Rngs(0))], "attach takes a Flax NNX module, not list"),
        (None, "attach takes a Flax NNX module, not NoneType"),
    ],
    ids=["linen", "arrays", "list", "none"],
)
def test_what_is_no_nnx_module_is_refused_with_the_way(model, words):
    for config in (mj.LoRAConfig(), mj.FullConfig()):
        with pytest.raises(TypeError, match=words) as raised:
            mj.attach(model, config, rngs=0)
        assert "\n" not in str(raised.value)
