"""`mora_jax.linen.adapted` on models of every kind of layer: same rules as `attach`, merged weights as the oracle."""

from __future__ import annotations

import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

from mora_jax.adapters.config import (
    AdaLoRAConfig,
    BitFitConfig,
    DoRAConfig,
    FullConfig,
    HiRAConfig,
    IA3Config,
    LoRAConfig,
    LoRAFAConfig,
    LoRAPlusConfig,
    MiSSConfig,
    MoRAConfig,
    OFTConfig,
    OLoRAConfig,
    PiSSAConfig,
    RandLoRAConfig,
    ReLoRAConfig,
    ReMoRAConfig,
    VeRAConfig,
)
from mora_jax.linen import adapted, merge
from mora_jax.training.freeze import train_adapters

KEY = jax.random.key(0)
IDS = jnp.arange(6).reshape(2, 3)
X = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8)), jnp.float32)


def filled(tree, seed=0, scale=0.3):
    """The tree with random values in place of every array, so that no factor is zero."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(treedef, [jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype) for leaf in leaves])


def wave(key, shape, dtype=jnp.float32):
    """Starting values without a generator, which takes long to compile: another key, other numbers."""
    phase = (jax.random.key_data(key)[-1] % 1024).astype(dtype)
    return (0.5 * jnp.sin(phase + jnp.arange(math.prod(shape), dtype=dtype) ** 2)).reshape(shape)


WAVES = {"kernel_init": wave, "bias_init": wave}


class Everything(nn.Module):
    """A layer of every class: table and tied head, attention, an einsum with transposed axes, a convolution."""

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 8, embedding_init=wave, name="embed")
        x = embed(ids)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn", **WAVES)(x, x)
        x = nn.Einsum((2, 8, 3), "btd,ndh->bthn", name="mix", **WAVES)(x)
        x = nn.DenseGeneral(8, axis=(-2, -1), name="join", **WAVES)(x)
        x = nn.Conv(8, (2,), name="conv", **WAVES)(x)
        return embed.attend(nn.tanh(nn.Dense(8, **WAVES)(x)))


class Few(nn.Module):
    """One layer whose kernel is a matrix, and one whose kernel has to be turned and split."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, **WAVES)(nn.Einsum((2, 8, 3), "bd,ndh->bhn", name="mix", **WAVES)(x).reshape(2, 6))


LINEAR = ["query", "key", "value", "attn.out", "mix", "join", "Dense_0"]
METHODS = {
    "gaussian": LoRAConfig(rank=2, init="gaussian"),
    "pissa": PiSSAConfig(rank=2),
    "olora": OLoRAConfig(rank=2),
    "lora_fa": LoRAFAConfig(rank=2),
    "mora": MoRAConfig(rank=1, kind="rotation", use_dora=True),
    "ia3": IA3Config(targets="all-linear", feedforward=["Dense_0"]),
    "ia3 on inputs": IA3Config(targets="all-linear", feedforward=["mix", "Dense_0"]),
    "hira": HiRAConfig(rank=2),
    "oft": OFTConfig(4, use_cayley_neumann=False),
    "bitfit": BitFitConfig(),
    "vera": VeRAConfig(rank=3, widths=(8, 8)),
    "randlora": RandLoRAConfig(rank=3, alpha=2.0, widths=(8, 8)),
    "miss": MiSSConfig(rank=3),
}


def check_against_merged(model, config, x):
    """A fresh adapter changes nothing, and a trained one does what the merged kernels do; returns the report."""

    @jax.jit
    def run(key):
        fresh = model.init(key, x)
        full = fresh | {"adapters": filled(fresh["adapters"], 1)}
        return fresh, full, model.apply(fresh, x), model.apply(full, x)

    with adapted(config) as report:
        fresh, full, start, y = run(KEY)
    plain, merged = (
        jax.jit(model.apply)({"params": params}, x) for params in (fresh["params"], merge(full, config, report=report))
    )
    # One compiled program may round otherwise than another.
    np.testing.assert_allclose(start, plain, rtol=0, atol=1e-6)
    assert np.abs(y - plain).max() > 0.01
    np.testing.assert_allclose(y, merged, rtol=5e-4, atol=5e-4)
    return report


@pytest.mark.parametrize(
    "config", [LoRAConfig(rank=2, targets=["embed", *LINEAR]), DoRAConfig(rank=2)], ids=["lora and the table", "dora"]
)
def test_every_class_of_layer(config):
    report = check_against_merged(Everything(), config, IDS)
    table = {"embed"} if config.targets != "all-linear" else set()
    assert {match.path for match in report.table.matches} == {*LINEAR, *table} - {"query", "key", "value"} | {
        "attn.query",
        "attn.key",
        "attn.value",
    }
    left = {one.paths: (one.kind, one.parameters, one.reason) for one in report.table.skipped}
    if table:
        assert left == {("conv",): ("", 128, "not among the targets")}
    else:
        convolution = {("conv",): ("", 128, "a convolution, which all-linear leaves out")}
        assert left == convolution | {("embed",): ("", 56, "an embedding, which all-linear leaves out")}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method(name):
    report = check_against_merged(Few(), METHODS[name], X)
    assert [match.path for match in report.table.matches] == ["mix", "Dense_0"]


@pytest.mark.parametrize("config", [DoRAConfig(rank=2), MoRAConfig(rank=1, use_dora=True)], ids=["dora", "mora"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_fresh_magnitude_changes_no_bit(config, dtype):
    model = nn.Dense(6, dtype=dtype, bias_init=nn.initializers.normal())
    with adapted(config):
        variables = model.init(KEY, X)
        y = model.apply(variables, X)
    np.testing.assert_array_equal(np.float32(y), np.float32(model.apply({"params": variables["params"]}, X)))


@pytest.mark.parametrize("config", [LoRAConfig(rank=2), DoRAConfig(rank=2)], ids=["lora", "dora"])
def test_float64_layers_stay_float64(config):
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8)))
        model = nn.Dense(6, param_dtype=jnp.float64, bias_init=nn.initializers.normal())
        with adapted(config):
            fresh = model.init(KEY, x)
            start = model.apply(fresh, x)
            variables = {**fresh, "adapters": filled(fresh["adapters"])}
            y = model.apply(variables, x)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float64"}
        np.testing.assert_array_equal(start, model.apply({"params": fresh["params"]}, x))
        np.testing.assert_allclose(y, model.apply({"params": merge(variables, config)}, x), rtol=1e-13, atol=1e-13)


def test_einsum_with_transposed_axes_against_a_matrix_by_loops():
    layer = nn.Einsum((2, 5, 3), "btd,ndh->bhtn", bias_init=nn.initializers.normal())
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 5)), jnp.float32)
    config = LoRAConfig(rank=2, alpha=4.0)
    with adapted(config):
        variables = layer.init(KEY, x)
        variables = {**variables, "adapters": filled(variables["adapters"])}
        y = layer.apply(variables, x)
    a, b = (np.float64(variables["adapters"][name]) for name in ("lora_a", "lora_b"))
    expected = np.float64(layer.apply({"params": variables["params"]}, x))
    for n in range(2):
        for h in range(3):
            for d in range(5):
                change = 2.0 * sum(a[d, r] * b[r, n * 3 + h] for r in range(2))
                expected[:, h, :, n] += np.float64(x)[:, :, d] * change
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_without_a_report_a_kernel_of_another_stack_is_refused():
    """An array that fits the kernel's last axes, were the first a stack, has no axis of that stack."""
    layer, config = nn.Einsum((3, 5, 2), "td,hdn->htn"), IA3Config(targets=".*", feedforward=("",))
    with adapted(config) as report:
        variables = layer.init(KEY, jnp.ones((4, 5)))
    with pytest.raises(ValueError, match=r"ia3_l is \(5,\); IA.* asks for \(3, 5\); else give the report"):
        merge(variables, config)
    merge(variables, config, report=report)


class Numbered(nn.Module):
    """Blocks with automatic names, between layers without a number."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(4, name="head")(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(8)(nn.gelu(nn.Dense(8)(x)))


def made(config, model=None, x=X):
    with adapted(config) as report:
        variables = jax.eval_shape((model or Numbered()).init, KEY, x)
    return flax.traverse_util.flatten_dict(variables.get("adapters", {}), sep="."), report


def test_layer_numbers_and_patterns_are_those_of_attach():
    found, report = made(LoRAConfig(rank=2, layers_to_transform=[1]))
    assert [one.reason for one in report.table.skipped] == ["outside layers_to_transform"]
    assert {path.rpartition(".")[0] for path in found} == {"Block_1.Dense_0", "Block_1.Dense_1"}
    found, _ = made(LoRAConfig(rank=2, rank_pattern={r"Block_1\..*": 3, "head": 1}, targets=["Dense_1", "head"]))
    ranks = {path.removesuffix(".lora_a"): value.shape[1] for path, value in found.items() if path.endswith("lora_a")}
    assert ranks == {"Block_0.Dense_1": 2, "Block_1.Dense_1": 3, "head": 1}

    config = LoRAConfig(rank=2, alpha=4.0, alpha_pattern={"layers_1": 12.0})
    model = nn.Sequential([nn.Dense(8), nn.Dense(4)])
    with adapted(config):
        variables = model.init(KEY, X)
        variables = {**variables, "adapters": filled(variables["adapters"])}
        y = model.apply(variables, X)
    hidden = X
    for name, scaling in (("layers_0", 2.0), ("layers_1", 6.0)):
        base, own = variables["params"][name], variables["adapters"][name]
        hidden = hidden @ (base["kernel"] + scaling * own["lora_a"] @ own["lora_b"]) + base["bias"]
    np.testing.assert_allclose(y, hidden, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.apply({"params": merge(variables, config)}, X), hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(targets=["Dense_1", "q_proj"]), "target 'q_proj' matches no layer"),
        (LoRAConfig(targets="q_proj"), "targets 'q_proj' match no layer; layers that could have matched: "),
        (LoRAConfig(layers_to_transform=7), "layers_to_transform names layer 7, which the model does not have"),
        (LoRAConfig(targets="Dense_("), "no regular expression"),
        (LoRAConfig(bias="all"), "no bias='all'"),
        (LoRAConfig(modules_to_save=["head"]), "modules_to_save names 'head'"),
        (LoRAConfig(init="eva"), "init='eva'"),
        (LoRAPlusConfig(), "two learning rates"),
        (AdaLoRAConfig(), "AdaLoRA takes ranks away"),
        (ReLoRAConfig(), "ReLoRA merges into the base"),
        (ReMoRAConfig(), "ReMoRA merges into the base"),
        (VeRAConfig(), "give widths="),
        (RandLoRAConfig(), "give widths="),
        (FullConfig(), "full fine-tuning has no adapter"),
    ],
)
def test_refusals(config, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        made(config)


class Convolved(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.ConvLocal(3, (2,), name="local")(nn.Conv(4, (2,))(x))


def test_layers_that_cannot_be_adapted_are_named():
    x = jnp.ones((1, 5, 4))
    with pytest.raises(ValueError, match="match no layer; layers that could have matched: Conv_0"):
        made(LoRAConfig(), Convolved(), x)
    with pytest.raises(
        ValueError, match=r"targets name local \(ConvLocal\), which can't be adapted: a kernel for each"
    ):
        made(LoRAConfig(targets=["local"]), Convolved(), x)
    mixed = nn.Sequential([nn.ConvLocal(4, (2,)), nn.Dense(2)])
    with pytest.warns(UserWarning, match="targets name what can't be adapted: layers_0, a kernel for each place"):
        found, _ = made(LoRAConfig(targets=".*"), mixed, x)
    assert set(found) == {"layers_1.lora_a", "layers_1.lora_b"}
    with pytest.raises(ValueError, match="is an embedding, for which mora has no form"):
        made(MoRAConfig(targets=["embed"]), Everything(), IDS)
    with pytest.raises(ValueError, match="computes in complex64"):
        made(LoRAConfig(), nn.Dense(3, param_dtype=jnp.complex64))


class Doubled(nn.Dense):
    """Its product is its parent's."""

    @nn.compact
    def __call__(self, inputs):
        return 2.0 * super().__call__(inputs)


class Own(nn.Dense):
    """Its product is its own, which no adapter knows."""

    @nn.compact
    def __call__(self, inputs):
        return inputs @ self.param("kernel", self.kernel_init, (inputs.shape[-1], self.features))


@pytest.mark.parametrize("wrapper", [nn.WeightNorm, nn.SpectralNorm])
def test_a_kernel_that_is_normalised_before_the_product_carries_none(wrapper):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"update_stats": True} if wrapper is nn.SpectralNorm else {}
            x = wrapper(nn.Dense(4, name="inner"), name="norm")(x, **options)
            return nn.Dense(4, name="out")(x)

    with adapted(LoRAConfig(rank=2)) as report:
        variables = Model().init(KEY, X)
    assert set(variables["adapters"]) == {"out"}
    (reason,) = [left.reason for left in report.table.skipped if "inner" in left.paths]
    assert reason.startswith("WeightNorm or SpectralNorm changes its kernel")


def test_one_kernel_contracted_over_either_axis_is_refused():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            einsum = nn.Einsum((8, 8), use_bias=False, name="tied")
            return einsum(jnp.tanh(einsum(x, "...i,io->...o")), "...o,io->...i")

    with pytest.raises(ValueError, match="tied contracts other axes of its kernel"), adapted(LoRAConfig(rank=2)):
        Tied().init(KEY, X)


def test_subclasses_are_adapted_in_their_parents_product_or_named():
    model = nn.Sequential([Doubled(8), Own(3)])
    config = LoRAConfig(rank=2)
    with adapted(config) as report:
        variables = model.init(KEY, X)
        variables = {**variables, "adapters": filled(variables["adapters"])}
        y = model.apply(variables, X)
    assert set(variables["adapters"]) == {"layers_0"}
    left = [(one.paths, one.kind, one.parameters, one.reason) for one in report.table.skipped]
    assert left == [(("layers_1",), "Own", 24, "its class computes its product in a way of its own")]
    expected = model.apply({"params": merge(variables, config)}, X)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_what_was_compiled_outside_is_compiled_anew_inside():
    model = nn.Dense(4)
    config = LoRAConfig(rank=2)
    with adapted(config):
        variables = model.init(KEY, X)
    variables = {**variables, "adapters": filled(variables["adapters"])}
    traced = []

    @jax.jit
    def forward(variables, x):
        traced.append(None)
        return model.apply(variables, x)

    outside = forward(variables, X)
    with adapted(config):
        inside = forward(variables, X)
    with adapted(LoRAConfig(rank=2, alpha=1.0)):
        other = forward(variables, X)
    with adapted(config) as report:
        np.testing.assert_array_equal(forward(variables, X), inside)
    np.testing.assert_array_equal(forward(variables, X), outside)
    assert len(traced) == 3
    assert not np.allclose(outside, inside) and not np.allclose(inside, other)
    assert str(report) == "no layer was traced in this context: what ran, if anything, was compiled before"


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        hidden = nn.DenseGeneral((2, 4), name="up")(x)
        return x + nn.DenseGeneral(8, axis=(-2, -1), name="down")(nn.gelu(hidden)), None


class Stack(nn.Module):
    """A scanned stack of rematerialised layers, and a head under `nn.jit`."""

    collections: tuple[str, ...] = ("params", "adapters")

    @nn.compact
    def __call__(self, x):
        axes = dict.fromkeys(self.collections, 0)
        scanned = nn.scan(nn.remat(Layer), variable_axes=axes, split_rngs={"params": True}, length=3)
        x, _ = scanned(name="layers")(x, None)
        return nn.jit(nn.Dense)(4, name="head")(x)


@pytest.mark.parametrize("config", [MoRAConfig(rank=1), DoRAConfig(rank=2)], ids=["mora", "dora"])
def test_a_scanned_stack_has_adapters_for_each_layer(config):
    model = Stack()
    with adapted(config) as report:
        variables = jax.jit(model.init)(KEY, X)
        variables = {**variables, "adapters": filled(variables["adapters"])}
        y, gradients = jax.jit(jax.value_and_grad(lambda v: jnp.sum(model.apply(v, X) ** 2)))(variables)
    assert {m.path: m.layers for m in report.table.matches} == {"layers.up": 3, "layers.down": 3, "head": 1}
    merged = merge(variables, config, report=report)
    np.testing.assert_allclose(y, np.sum(np.square(model.apply({"params": merged}, X))), rtol=1e-4)
    x = X
    for i in range(3):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], merged["layers"])
        x, _ = Layer().apply({"params": one}, x, None)
    by_hand = nn.Dense(4).apply({"params": merged["head"]}, x)
    np.testing.assert_allclose(y, np.sum(np.square(by_hand)), rtol=1e-4)
    for leaf in jax.tree.leaves(gradients["adapters"]["layers"]):
        assert leaf.shape[0] == 3 and np.all(np.abs(np.asarray(leaf)).reshape(3, -1).max(1) > 0)
    # The layers of a stack start apart.
    if "lora_a" in variables["adapters"]["head"]:
        fresh = made(config, model)[0]["layers.up.lora_a"]
        assert fresh.shape == (3, 8, 2)


def test_transformations_that_do_not_pass_the_adapters_on_are_refused():
    with pytest.raises(ValueError, match=r"layers.up runs under .* no collection 'adapters'.*variable_axes"):
        made(LoRAConfig(rank=2), Stack(collections=("params",)))
    with pytest.raises(ValueError, match=r"cell.ii runs under .*nn.RNN"):
        made(LoRAConfig(rank=2), nn.RNN(nn.LSTMCell(4)), jnp.ones((1, 3, 2)))
    rnn = nn.RNN(nn.LSTMCell(4), variable_broadcast=["params", "adapters"])
    found, report = made(LoRAConfig(rank=2, targets=["ii"]), rnn, jnp.ones((1, 3, 2)))
    assert found["cell.ii.lora_a"].shape == (2, 2)
    assert report.table.matches[0].layers == 1


def test_variables_without_adapters_are_refused():
    model, config = nn.Dense(4), LoRAConfig(rank=2)
    params = {"params": model.init(KEY, X)["params"]}
    with adapted(config), pytest.raises(ValueError, match="no adapter of LoRAConfig among the variables"):
        model.apply(params, X)
    with adapted(config):
        _, new = model.apply(params, X, mutable=["adapters"], rngs={"params": KEY})
        other = model.init(KEY, X)
        with (
            pytest.raises(ValueError, match=r"lora_a is \(8, 2\), but .*rank=3.* asks for \(8, 3\)"),
            adapted(LoRAConfig(rank=3)),
        ):
            model.apply(params | new, X)
    assert jax.tree.map(jnp.shape, new["adapters"]) == jax.tree.map(jnp.shape, other["adapters"])
    wrong = r"lora_a is \(8, 2\), but LoRAConfig\(rank=3\) asks for \(8, 3\)"
    with adapted(LoRAConfig(rank=3)), pytest.raises(ValueError, match=wrong):
        model.apply(params | new, X)


def test_frozen_dicts_intermediates_tabulate_and_shared_scopes():
    model, config = nn.Sequential([nn.Dense(8), nn.Dense(4)]), LoRAConfig(rank=2)
    with adapted(config) as report:
        variables = model.init(KEY, X)
        variables = flax.core.freeze({**variables, "adapters": filled(variables["adapters"])})
        y, kept = model.apply(variables, X, capture_intermediates=True)
        again = model.init(KEY, X)
        table = nn.tabulate(model, KEY, console_kwargs={"width": 160})(X)
    np.testing.assert_array_equal(kept["intermediates"]["layers_1"]["__call__"][0], y)
    expected = model.apply({"params": merge(variables, config)}, X)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, flax.core.unfreeze(variables["params"]), again["params"])
    assert report.table.trainable == 2 * 16 + 2 * 12 and report.table.total == 56 + 108
    assert "lora_a" in table and "lora_a" not in nn.tabulate(model, KEY, console_kwargs={"width": 160})(X)

    class Sharing(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(8)
            nn.share_scope(self, layer)
            return layer(layer(x))

    with adapted(config):
        variables = Sharing().init(KEY, X)
        variables = {**variables, "adapters": filled(variables["adapters"])}
        y = Sharing().apply(variables, X)
    expected = Sharing().apply({"params": merge(variables, config)}, X)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_boxes_of_logical_axes_stay():
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    layer, config = nn.Dense(6, kernel_init=init, param_dtype=jnp.bfloat16), DoRAConfig(rank=2)
    with adapted(config):
        variables = layer.init(KEY, X)
        y = layer.apply(variables, X)
    np.testing.assert_array_equal(np.float32(y), np.float32(layer.apply({"params": variables["params"]}, X)))
    kernel = merge(variables, config)["kernel"]
    assert isinstance(kernel, nn.LogicallyPartitioned) and kernel.names == ("embed", "mlp")
    assert kernel.value.dtype == jnp.bfloat16 and variables["adapters"]["lora_a"].dtype == jnp.float32


def test_train_state_of_flax_trains_the_adapters_alone():
    model, config = Numbered(), LoRAConfig(rank=2, dropout=0.1)
    with adapted(config, deterministic=True):
        variables = model.init(KEY, X)
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=train_adapters(optax.adam(1e-2)))

    @jax.jit
    def step(state, key):
        def loss(variables):
            return jnp.mean(state.apply_fn(variables, X, rngs={"dropout": key}) ** 2)

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    losses = []
    with adapted(config, deterministic=False):
        for i in range(8):
            state, value = step(state, jax.random.key(i))
            losses.append(float(value))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, state.params["params"], variables["params"])
    with adapted(config), pytest.raises(ValueError, match="dropout is 0.1: deterministic"):
        model.apply(state.params, X)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
@pytest.mark.parametrize("config", [LoRAConfig(rank=2), DoRAConfig(rank=2)], ids=["lora", "dora"])
def test_on_the_mesh_that_make_mesh_gives(config):
    """Axes are Explicit there: the output lies as the plain layer's, and gradients are those of one device."""
    model, mesh = nn.DenseGeneral((2, 4)), jax.make_mesh((2, 2), ("data", "model"))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3, 8)), jnp.float32)

    def value_and_gradient(variables, x):
        return model.apply(variables, x), jax.grad(lambda v: jnp.sum(model.apply(v, x) ** 2))(variables)

    with adapted(config):
        variables = model.init(KEY, x)
        variables = {**variables, "adapters": filled(variables["adapters"])}
        y, gradients = jax.jit(value_and_gradient)(variables, x)
        with jax.set_mesh(mesh):
            cut = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.P()), variables)
            cut["params"]["kernel"] = jax.device_put(variables["params"]["kernel"], jax.P(None, "model"))
            placed, found = jax.jit(value_and_gradient)(cut, jax.device_put(x, jax.P("data")))

    assert placed.sharding.spec == jax.P("data", None, "model", None)
    np.testing.assert_allclose(placed, y, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, gradients)
