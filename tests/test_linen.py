"""`mora_jax.linen`: against matrices built by plain loops, finite differences and plain `nn.Dense`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mora_jax.adapters.config import DoRAConfig, LoRAConfig, MoRAConfig, RsLoRAConfig
from mora_jax.adapters.methods.mora import KINDS
from mora_jax.linen import LoRADense, MoRADense, adapted, merge, rename_layers

IN, OUT, RANK, ALPHA = 10, 7, 3, 5.0
LORA = LoRAConfig(rank=RANK, alpha=ALPHA)


def filled(tree, seed=0, scale=0.5):
    """The tree with random values in place of every array, so that no factor is zero."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(treedef, [jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype) for leaf in leaves])


def randomized(variables, seed=0):
    return {**variables, "adapters": filled(variables["adapters"], seed)}


def inputs(*shape, seed=1, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def lora_matrix(a, b):
    """alpha / rank · A B by loops, `[in, out]` in float64."""
    w = np.zeros((IN, OUT))
    for i in range(IN):
        for o in range(OUT):
            for r in range(RANK):
                w[i, o] += ALPHA / RANK * float(a[i, r]) * float(b[r, o])
    return w


def sharing_matrix(m):
    """MoRA `sharing` by loops: input i goes to entry i mod q, padding and outputs start again."""
    q = len(m)
    w = np.zeros((IN, OUT))
    for position in range(-(-IN // q) * q):
        for o in range(OUT):
            w[position % IN, o] += float(m[o % q, position % q])
    return w


def rotation_matrix(m):
    """MoRA `rotation` by loops: block k of the input, rotated by k·θ, times Mᵀ is block k of the output."""
    q = len(m)
    blocks = -(-IN // q)
    w = np.zeros((IN, OUT))
    for o in range(OUT):
        k = (o // q) % blocks
        for j in range(q):
            pair = (j + q // 2) % q
            angle = k * 10000.0 ** (-2.0 * (j % (q // 2)) / q)
            sign = -1.0 if j < q // 2 else 1.0
            # rotated[j] = x[j] cos + sign · x[pair] sin
            w[(k * q + j) % IN, o] += float(m[o % q, j]) * np.cos(angle)
            w[(k * q + pair) % IN, o] += float(m[o % q, j]) * sign * np.sin(angle)
    return w


LAYERS = {
    "lora": (LoRADense(OUT, RANK, ALPHA), lambda f: lora_matrix(f["lora_a"], f["lora_b"])),
    "sharing": (MoRADense(OUT, 1, "sharing"), lambda f: sharing_matrix(f["m"])),
    "rotation": (MoRADense(OUT, 1, "rotation"), lambda f: rotation_matrix(f["m"])),
}
CONFIGS = {"lora": LORA, "sharing": MoRAConfig(rank=1), "rotation": MoRAConfig(rank=1, kind="rotation")}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("leading", [(), (4,), (2, 3, 2)])
def test_equals_dense_matrix_from_loops(name, leading):
    layer, matrix = LAYERS[name]
    x = inputs(*leading, IN)
    variables = randomized(layer.init(jax.random.key(0), x))
    kernel = np.float64(variables["params"]["kernel"]) + matrix(variables["adapters"])
    expected = np.float64(x) @ kernel + np.float64(variables["params"]["bias"])
    np.testing.assert_allclose(layer.apply(variables, x), expected, rtol=1e-5, atol=1e-5)


RELATIVES = {
    "rslora": (LoRADense(OUT, RANK, ALPHA, use_rslora=True), RsLoRAConfig(rank=RANK, alpha=ALPHA)),
    "dora": (LoRADense(OUT, RANK, ALPHA, use_dora=True), DoRAConfig(rank=RANK, alpha=ALPHA)),
    "rslora and dora": (
        LoRADense(OUT, RANK, ALPHA, use_rslora=True, use_dora=True, use_bias=False),
        RsLoRAConfig(rank=RANK, alpha=ALPHA, use_dora=True),
    ),
    "sharing and dora": (MoRADense(OUT, 1, use_dora=True), MoRAConfig(rank=1, use_dora=True)),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_of_lora(name):
    """Formulas by loops; a fresh layer is plain `nn.Dense`; merging and interception give the same."""
    layer, config = RELATIVES[name]
    x = inputs(4, IN)
    fresh = layer.init(jax.random.key(0), x)
    plain = nn.Dense(OUT, use_bias=layer.use_bias)
    if layer.use_bias:
        fresh["params"]["bias"] = jnp.arange(OUT, dtype=jnp.float32)
    np.testing.assert_allclose(layer.apply(fresh, x), plain.apply({"params": fresh["params"]}, x), rtol=1e-5, atol=1e-5)
    variables = randomized(fresh)
    factors, kernel = variables["adapters"], np.float64(fresh["params"]["kernel"])
    factor = np.sqrt(RANK) if isinstance(config, RsLoRAConfig) else 1.0
    update = (
        sharing_matrix(factors["m"]) if "m" in factors else factor * lora_matrix(factors["lora_a"], factors["lora_b"])
    )
    kernel = kernel + update
    if config.use_dora:
        for o in range(OUT):
            kernel[:, o] *= float(factors["magnitude"][o]) / np.sqrt(sum(kernel[i, o] ** 2 for i in range(IN)))
    expected = np.float64(x) @ kernel + np.float64(fresh["params"].get("bias", np.zeros(OUT)))
    np.testing.assert_allclose(layer.apply(variables, x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(merge(variables, config)["kernel"], kernel, rtol=1e-4, atol=1e-5)
    with adapted(config):
        np.testing.assert_allclose(plain.apply(variables, x), expected, rtol=1e-4, atol=1e-5)


def test_variables_have_the_names_of_dense_and_float32_factors():
    x = inputs(2, IN)
    layer = LoRADense(OUT, RANK, ALPHA, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x)
    assert jax.tree.map(lambda v: (v.shape, v.dtype.name), variables) == {
        "params": {"kernel": ((IN, OUT), "bfloat16"), "bias": ((OUT,), "bfloat16")},
        "adapters": {"lora_a": ((IN, RANK), "float32"), "lora_b": ((RANK, OUT), "float32")},
    }
    without_bias = MoRADense(OUT, RANK, "rotation", use_bias=False).init(jax.random.key(0), x)
    assert set(without_bias["params"]) == {"kernel"}
    assert set(without_bias["adapters"]) == {"m"}


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_fresh_layer_is_the_trained_dense_bit_for_bit(name, dtype):
    layer = LAYERS[name][0].clone(dtype=dtype)
    x = inputs(5, IN)
    dense = nn.Dense(OUT, dtype=dtype)
    trained = filled(dense.init(jax.random.key(1), x))
    fresh = layer.init(jax.random.key(0), x)
    assert jax.tree.structure(fresh["params"]) == jax.tree.structure(trained["params"])
    y = layer.apply({**fresh, "params": trained["params"]}, x)
    assert y.dtype == (dtype or jnp.float32)
    np.testing.assert_array_equal(y, dense.apply(trained, x))


def test_the_fields_of_dense_are_used():
    def ones(key, shape, dtype):
        return jnp.ones(shape, dtype)

    calls = []

    def dot_general(*args, **kwargs):
        calls.append(kwargs)
        return jax.lax.dot_general(*args, **kwargs)

    x = inputs(2, IN)
    highest = jax.lax.Precision.HIGHEST
    layer = LoRADense(OUT, 2, 2.0, kernel_init=ones, bias_init=ones, dot_general=dot_general, precision=highest)
    variables = layer.init(jax.random.key(0), x)
    expected = np.tile(x.sum(-1, keepdims=True) + 1, OUT)
    np.testing.assert_allclose(layer.apply(variables, x), expected, rtol=1e-5)
    assert calls[-1] == {"precision": highest}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_by_finite_differences(name):
    layer = LAYERS[name][0]
    x = inputs(4, IN)
    variables = randomized(layer.init(jax.random.key(0), x))
    target = inputs(4, OUT, seed=5)

    def loss(v, x):
        return jnp.sum(layer.apply(v, x) * target)

    grads, dx = jax.grad(loss, argnums=(0, 1))(variables, x)
    direction = filled(variables, seed=7)
    dx_direction = inputs(4, IN, seed=8)
    exact = sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, direction))) + jnp.vdot(dx, dx_direction)

    def along(t):
        moved = jax.tree.map(lambda v, d: v + t * d, variables, direction)
        return float(loss(moved, x + t * dx_direction))

    step = 1e-2
    numeric = (along(step) - along(-step)) / (2 * step)
    assert abs(numeric - float(exact)) < 5e-3 * abs(numeric) + 1e-2


class TwoLayers(nn.Module):
    """A plain model, auto-named."""

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(16)(x))
        return nn.Dense(OUT)(x)


class TwoAdapted(nn.Module):
    """The same with adapters in the code."""

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(LoRADense(16, RANK, ALPHA)(x))
        return MoRADense(OUT, 2, "rotation")(x)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_equals_forward_for_every_kind(kind):
    layer = MoRADense(OUT, 2, kind)
    x = inputs(6, IN)
    variables = randomized(layer.init(jax.random.key(0), x))
    merged = merge(variables, MoRAConfig(rank=2, kind=kind))
    np.testing.assert_allclose(
        nn.Dense(OUT).apply({"params": merged}, x), layer.apply(variables, x), rtol=1e-5, atol=1e-5
    )


def test_merge_of_mixed_layers_and_back_to_the_plain_names():
    x = inputs(6, IN)
    model = TwoAdapted()
    variables = randomized(model.init(jax.random.key(0), x))
    merged = merge(variables, LORA, MoRAConfig(rank=2, kind="rotation"))
    plain = {"Dense_0": merged["LoRADense_0"], "Dense_1": merged["MoRADense_0"]}
    np.testing.assert_allclose(TwoLayers().apply({"params": plain}, x), model.apply(variables, x), rtol=1e-5, atol=1e-5)


def test_merge_in_bfloat16_is_within_the_rounding_of_the_products():
    layer = LoRADense(OUT, RANK, ALPHA, dtype=jnp.bfloat16)
    x = inputs(64, IN)
    variables = randomized(layer.init(jax.random.key(0), x))
    adapted_out = np.float32(layer.apply(variables, x))
    merged_out = np.float32(nn.Dense(OUT, dtype=jnp.bfloat16).apply({"params": merge(variables, LORA)}, x))
    exact = np.float64(nn.Dense(OUT).apply({"params": merge(variables, LORA)}, x))
    # Operands round at 2⁻⁹ relative each; a row's error is bounded by the sum of the terms' magnitudes.
    bound = 6 * 2**-9 * (np.abs(x) @ np.abs(merge(variables, LORA)["kernel"]) + np.abs(exact) + 1)
    assert np.all(np.abs(adapted_out - exact) < bound)
    assert np.all(np.abs(merged_out - exact) < bound)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: ({"params": v["params"]}, LORA), "no collection 'adapters'"),
        (lambda v: (v, MoRAConfig(rank=2)), "holds lora_a, lora_b, but none of the configurations"),
        (lambda v: (v, LoRAConfig(rank=4, alpha=1.0)), r"lora_a is \(10, 3\)"),
        (lambda v: ({**v, "params": {}}, LORA), "no kernel"),
    ],
)
def test_merge_refuses(change, message):
    variables = LoRADense(OUT, RANK, ALPHA).init(jax.random.key(0), inputs(2, IN))
    broken, config = change(variables)
    with pytest.raises(ValueError, match=message):
        merge(broken, config)


def test_bfloat16_never_promotes_the_frozen_product():
    layer = LoRADense(64, 4, 8.0, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    x = inputs(3, 32, dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), x)

    def loss(adapters, x):
        y = layer.apply({"params": variables["params"], "adapters": adapters}, x)
        assert y.dtype == jnp.bfloat16
        return y.astype(jnp.float32).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(variables["adapters"], x)
    products = [eqn for eqn in equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert len(products) >= 7  # frozen: forward and dx; the factors: 2 forward, 4 backward
    for eqn in products:
        assert [v.aval.dtype.name for v in eqn.invars] == ["bfloat16", "bfloat16"]


def equations(jaxpr):
    """All equations, those of inner jaxprs too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_acts_on_the_adapter_path_only(name):
    layer = LAYERS[name][0].clone(dropout=0.5)
    x = inputs(200, IN)
    fresh = layer.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x, deterministic=True)
    noisy = {"rngs": {"dropout": jax.random.key(2)}, "deterministic": False}
    dense = nn.Dense(OUT).apply({"params": fresh["params"]}, x)
    np.testing.assert_array_equal(layer.apply(fresh, x, **noisy), dense)

    variables = randomized(fresh)
    quiet = LAYERS[name][0].apply(variables, x)
    np.testing.assert_array_equal(layer.apply(variables, x, deterministic=True), quiet)
    np.testing.assert_array_equal(layer.clone(deterministic=True).apply(variables, x), quiet)
    dropped = layer.apply(variables, x, **noisy)
    assert not np.allclose(dropped, quiet)
    np.testing.assert_array_equal(layer.apply(variables, x, **noisy), dropped)
    # Kept features are doubled: over many keys the mean is the quiet output.
    keys = jax.random.split(jax.random.key(3), 400)
    noisy_each = jax.vmap(lambda k: layer.apply(variables, x[:4], deterministic=False, rngs={"dropout": k}))
    mean = noisy_each(keys).mean(0)
    spread = np.abs(quiet[:4] - dense[:4]).max()
    assert np.abs(mean - quiet[:4]).max() < 0.4 * spread + 0.2
    with pytest.raises(ValueError, match="deterministic"):
        layer.apply(variables, x)


def test_jit_vmap_and_scan():
    x = inputs(3, 4, IN)
    layer = LoRADense(OUT, RANK, ALPHA)
    variables = randomized(layer.init(jax.random.key(0), x))
    expected = layer.apply(variables, x)
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(layer.apply, in_axes=(None, 0))(variables, x), expected, rtol=1e-5, atol=1e-6)


class Residual(nn.Module):
    """One layer of a scanned stack."""

    method: str

    @nn.compact
    def __call__(self, x, _):
        layer = LoRADense(IN, RANK, ALPHA) if self.method == "lora" else MoRADense(IN, 2, "rotation")
        return x + 0.1 * layer(x), None


@pytest.mark.parametrize("method", ["lora", "mora"])
def test_scanned_stack_equals_its_layers_and_merges(method):
    stack = nn.scan(Residual, variable_axes={"params": 0, "adapters": 0}, split_rngs={"params": True}, length=3)(method)
    x = inputs(5, IN)
    variables = randomized(stack.init(jax.random.key(0), x, None))
    (name,) = variables["params"]
    assert variables["params"][name]["kernel"].shape == (3, IN, IN)
    y, _ = stack.apply(variables, x, None)
    expected = x
    for i in range(3):
        expected, _ = Residual(method).apply(jax.tree.map(lambda v, i=i: v[i], variables), expected, None)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)

    merged = merge(variables, LORA if method == "lora" else MoRAConfig(rank=2, kind="rotation"))
    by_hand = x
    for i in range(3):
        dense = {"params": jax.tree.map(lambda v, i=i: v[i], merged[name])}
        by_hand = by_hand + 0.1 * nn.Dense(IN).apply(dense, by_hand)
    np.testing.assert_allclose(y, by_hand, rtol=1e-5, atol=1e-5)


def test_vmapped_layer_has_its_own_factors_in_each_row():
    rows = nn.vmap(LoRADense, variable_axes={"params": 0, "adapters": 0}, split_rngs={"params": True}, in_axes=0)(
        OUT, RANK, ALPHA
    )
    x = inputs(3, 4, IN)
    variables = randomized(rows.init(jax.random.key(0), x))
    y = rows.apply(variables, x)
    for i in range(3):
        one = jax.tree.map(lambda v, i=i: v[i], variables)
        np.testing.assert_allclose(y[i], LoRADense(OUT, RANK, ALPHA).apply(one, x[i]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        y,
        jax.vmap(lambda p, x: nn.Dense(OUT).apply({"params": p}, x))(merge(variables, LORA), x),
        rtol=1e-5,
        atol=1e-5,
    )


def test_merge_keeps_partitioning_boxes_and_dtype():
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    layer = LoRADense(OUT, RANK, ALPHA, kernel_init=kernel_init, param_dtype=jnp.bfloat16)
    variables = randomized(layer.init(jax.random.key(0), inputs(2, IN)))
    kernel = merge(variables, LORA)["kernel"]
    assert isinstance(kernel, nn.Partitioned)
    assert kernel.names == ("embed", "mlp")
    assert kernel.value.dtype == jnp.bfloat16


@pytest.mark.parametrize("name", CONFIGS)
def test_interception_leaves_params_alone_and_equals_the_layers(name):
    x = inputs(4, IN)
    model = TwoLayers()
    trained = filled(model.init(jax.random.key(0), x))
    with adapted(CONFIGS[name]):
        fresh = model.init(jax.random.key(1), x)
        start = model.apply({**fresh, "params": trained["params"]}, x)
    assert jax.tree.structure(fresh["params"]) == jax.tree.structure(trained["params"])
    np.testing.assert_array_equal(start, model.apply(trained, x))

    variables = randomized({**fresh, "params": trained["params"]})

    @jax.jit
    def forward(variables, x):
        with adapted(CONFIGS[name]):
            return model.apply(variables, x)

    layer = {
        "lora": lambda features: LoRADense(features, RANK, ALPHA),
        "sharing": lambda features: MoRADense(features, 1),
        "rotation": lambda features: MoRADense(features, 1, "rotation"),
    }[name]

    def at(dense):
        return {collection: tree[dense] for collection, tree in variables.items()}

    expected = layer(OUT).apply(at("Dense_1"), nn.gelu(layer(16).apply(at("Dense_0"), x)))
    np.testing.assert_allclose(forward(variables, x), expected, rtol=1e-5, atol=1e-5)
    merged = merge(variables, CONFIGS[name])
    np.testing.assert_allclose(model.apply({"params": merged}, x), expected, rtol=1e-5, atol=1e-5)


def test_interception_targets_dropout_and_layers_that_have_adapters_already():
    x = inputs(4, IN)
    for targets in (("Dense_1",), "Dense_1", r".*_1"):
        with adapted(LoRAConfig(rank=2, targets=targets)):
            assert set(TwoLayers().init(jax.random.key(0), x)["adapters"]) == {"Dense_1"}
    could = "targets 'q_proj' match no layer; layers that could have matched: Dense_0, Dense_1"
    with pytest.raises(ValueError, match=could), adapted(LoRAConfig(targets="q_proj")):
        TwoLayers().init(jax.random.key(0), x)
    with adapted(LoRAConfig(rank=2, dropout=0.5), deterministic=False):
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        variables = randomized(TwoLayers().init(rngs, x))
        one = TwoLayers().apply(variables, x, rngs={"dropout": jax.random.key(2)})
        two = TwoLayers().apply(variables, x, rngs={"dropout": jax.random.key(3)})
    assert not np.allclose(one, two)
    mixed = nn.Sequential([LoRADense(OUT, 2, 2.0), nn.Dense(2)])
    with adapted(MoRAConfig(rank=1)):
        found = mixed.init(jax.random.key(0), x)["adapters"]
    assert {name: set(arrays) for name, arrays in found.items()} == {
        "layers_0": {"lora_a", "lora_b"},
        "layers_1": {"m"},
    }


def test_rename_layers():
    plain = {"Dense_0": 1, "Block_0": {"Dense_0": 2, "Dense_1": 3, "Dense_2": 4, "Conv_0": 5}}
    renamed = rename_layers(plain, "LoRADense")
    assert renamed == {
        "LoRADense_0": 1,
        "Block_0": {"LoRADense_0": 2, "LoRADense_1": 3, "LoRADense_2": 4, "Conv_0": 5},
    }
    many = {f"Dense_{i}": i for i in range(12)}
    assert rename_layers(many, "LoRADense") == {f"LoRADense_{i}": i for i in range(12)}
    assert rename_layers(renamed, "Dense", source="LoRADense") == plain
    assert rename_layers(plain, "LoRADense", only=r"Block_\d\.Dense_1") == {
        "Dense_0": 1,
        "Block_0": {"Dense_0": 2, "LoRADense_0": 3, "Dense_1": 4, "Conv_0": 5},
    }
    with pytest.raises(ValueError, match="no layer Conv_<number>"):
        rename_layers({"Dense_0": 1}, "LoRADense", source="Conv")
    with pytest.raises(ValueError, match="that matches 'x'"):
        rename_layers({"Dense_0": 1}, "LoRADense", only="x")
    with pytest.raises(ValueError, match="already has LoRADense layers"):
        rename_layers({"Dense_0": 1, "LoRADense_0": 2}, "LoRADense")


def test_trained_auto_named_tree_loads():
    x = inputs(4, IN)

    class Adapted(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.gelu(nn.Dense(16)(x))
            return LoRADense(OUT, RANK, ALPHA)(x)

    trained = filled(TwoLayers().init(jax.random.key(0), x))["params"]
    fresh = Adapted().init(jax.random.key(1), x)
    params = rename_layers(trained, "LoRADense", only="Dense_1")
    assert jax.tree.structure(params) == jax.tree.structure(fresh["params"])
    np.testing.assert_array_equal(
        Adapted().apply({**fresh, "params": params}, x), TwoLayers().apply({"params": trained}, x)
    )


def test_one_layer_called_twice_in_setup_and_under_remat():
    class Shared(nn.Module):
        def setup(self):
            self.layer = nn.remat(MoRADense)(IN, 2, "rotation")

        def __call__(self, x):
            return self.layer(self.layer(x))

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(IN)
            return layer(layer(x))

    x = inputs(4, IN)
    variables = randomized(Shared().init(jax.random.key(0), x))
    assert set(variables["adapters"]) == {"layer"}
    config = MoRAConfig(rank=2, kind="rotation")
    merged = {"Dense_0": merge(variables, config)["layer"]}
    expected = Plain().apply({"params": merged}, x)
    np.testing.assert_allclose(Shared().apply(variables, x), expected, rtol=1e-4, atol=1e-4)
    intercepted = {collection: {"Dense_0": tree["layer"]} for collection, tree in variables.items()}
    with adapted(config):
        np.testing.assert_allclose(Plain().apply(intercepted, x), expected, rtol=1e-4, atol=1e-4)
