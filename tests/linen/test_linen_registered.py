"""Linen layers of classes that Flax does not have, as model libraries write them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import mora_jax as mj
from mora_jax.adapters.matrices import FORMS
from mora_jax.linen import adapted, load_adapter, merge, register_layer, save_adapter
from mora_jax.training.freeze import train_adapters
from tests.linen.test_interception import filled

WIDTH, HEADS, SIZE, HIDDEN = 12, 3, 4, 10
X = np.random.default_rng(0).normal(size=(2, 5, WIDTH)).astype(np.float32)


class Contraction(nn.Module):
    """An equation that comes with the call, a parameter whose name is an attribute, a factor of it."""

    shape: tuple[int, ...]
    weight_name: str = "w"
    w_scale: float | None = None

    @nn.compact
    def __call__(self, eqn, x):
        w = self.param(self.weight_name, nn.initializers.normal(0.3), self.shape)
        return jnp.einsum(eqn, x, w if self.w_scale is None else w * self.w_scale)


class FeedForward(nn.Module):
    """Two layers in one scope: their arrays are `gating` and `linear` of the module itself."""

    @nn.compact
    def __call__(self, x):
        gating = Contraction((2, HIDDEN, WIDTH), weight_name="gating")
        nn.share_scope(self, gating)
        gate = gating("...F,NHF->...NH", x)
        linear = Contraction((HIDDEN, WIDTH), weight_name="linear")
        nn.share_scope(self, linear)
        return linear("...H,HF->...F", nn.gelu(gate[..., 0, :]) * gate[..., 1, :])


class Block(nn.Module):
    def setup(self):
        self.qkv_einsum = Contraction((3, HEADS, WIDTH, SIZE))
        self.attn_vec_einsum = Contraction((HEADS, SIZE, WIDTH))
        self.mlp = FeedForward()

    def __call__(self, x, _=None):
        q, k, v = self.qkv_einsum("BTD,SNDH->SBTNH", x)
        weights = nn.softmax(jnp.einsum("btnh,bsnh->bnts", q, k))
        x = x + self.attn_vec_einsum("BTNH,NHD->BTD", jnp.einsum("bnts,bsnh->btnh", weights, v))
        return x + self.mlp(x), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "adapters": 0}
        blocks = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)
        return blocks(name="layers")(x, None)[0]


register_layer(
    Contraction, example=(Contraction((2, 3)), "td,df->tf", jnp.ones((4, 2))), kernel="weight_name", einsum="eqn"
)
PATHS = ("qkv_einsum", "attn_vec_einsum", "mlp.gating", "mlp.linear")


@pytest.mark.parametrize(
    "config",
    [mj.LoRAConfig(rank=2, alpha=4.0, use_dora=True), mj.MoRAConfig(rank=2)],
    ids=["dora", "mora"],
)
def test_layers_of_one_equation_are_adapted_merged_and_saved(config, tmp_path):
    model = Stack()
    init, apply = jax.jit(model.init), jax.jit(model.apply)
    with adapted(config) as report:
        variables = init(jax.random.key(0), X)
        variables = dict(variables) | {"adapters": filled(variables["adapters"], scale=0.1)}
        y = apply(variables, X)
    plain = {"params": variables["params"]}
    assert {match.path: match.layers for match in report.table.matches} == {f"layers.{path}": 2 for path in PATHS}
    assert not report.table.skipped and sorted(variables["adapters"]["layers"]["mlp"]) == ["gating", "linear"]
    assert np.abs(y - apply(plain, X)).max() > 0.1
    merged = {"params": merge(variables, config, report=report)}
    np.testing.assert_allclose(apply(merged, X), y, rtol=2e-4, atol=2e-5)
    save_adapter(variables, tmp_path, config, report=report, overwrite=True)
    config, again = load_adapter(plain, tmp_path)
    with adapted(config):
        np.testing.assert_allclose(apply(again, X), y, rtol=1e-5, atol=1e-6)


def test_a_shared_scope_against_loops():
    model, config = FeedForward(), mj.LoRAConfig(rank=2, alpha=6.0)
    plain = model.init(jax.random.key(0), X)
    with adapted(config):
        variables = model.init(jax.random.key(0), X)
        jax.tree.map(np.testing.assert_array_equal, plain["params"], variables["params"])
        variables = dict(variables) | {"adapters": filled(variables["adapters"])}
        y = model.apply(variables, X)
    params, adapters = (jax.tree.map(np.asarray, variables[name]) for name in ("params", "adapters"))
    gating = params["gating"].astype(np.float64)
    update = 3.0 * adapters["gating"]["lora_a"] @ adapters["gating"]["lora_b"]
    for n in range(2):
        for h in range(HIDDEN):
            for f in range(WIDTH):
                gating[n, h, f] += update[f, n * HIDDEN + h]
    linear = params["linear"] + 3.0 * adapters["linear"]["lora_a"] @ adapters["linear"]["lora_b"]
    gate, up = (X @ gating[n].T for n in range(2))
    np.testing.assert_allclose(y, (np.asarray(nn.gelu(gate)) * up) @ linear, rtol=1e-4, atol=1e-5)


def test_training_changes_the_adapters_alone_and_targets_name_arrays():
    model, config = FeedForward(), mj.LoRAConfig(rank=2, targets=["linear"])
    with adapted(config) as report:
        variables = start = jax.jit(model.init)(jax.random.key(0), X)
        assert [match.path for match in report.table.matches] == ["linear"]
        optimizer = train_adapters(optax.sgd(0.1))
        state, losses = optimizer.init(variables), []

        @jax.jit
        def step(variables, state):
            value, gradients = jax.value_and_grad(lambda v: jnp.mean((model.apply(v, X) - X) ** 2))(variables)
            updates, state = optimizer.update(gradients, state, variables)
            return optax.apply_updates(variables, updates), state, value

        for _ in range(8):
            variables, state, value = step(variables, state)
            losses.append(float(value))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, start["params"], variables["params"])
    assert "gating" not in variables["adapters"]


class Biased(nn.Module):
    """As torch lays a matrix out, with a bias under a name that libraries have."""

    features: int

    @nn.compact
    def __call__(self, inputs):
        weight = self.param("weight", nn.initializers.normal(), (self.features, inputs.shape[-1]))
        return inputs @ weight.T + self.param("b", nn.initializers.normal(), (self.features,))


def test_a_bias_is_adapted_and_merged():
    class Own(Biased):
        pass

    example = Biased(3), jnp.ones((2, 5))
    register_layer(Biased, example=example, kernel="weight", einsum="...i,oi->...o", bias="b")
    model, config = nn.Sequential([Biased(7), Own(4)]), mj.BitFitConfig()
    init, apply = jax.jit(model.init), jax.jit(model.apply)
    with adapted(config) as report:
        variables = init(jax.random.key(0), X)
        variables = dict(variables) | {"adapters": filled(variables["adapters"])}
        y = apply(variables, X)
    assert len(report.table.matches) == 2
    params = merge(variables, config, report=report)
    np.testing.assert_allclose(apply({"params": params}, X), y, rtol=1e-4, atol=1e-5)
    assert np.abs(y - apply({"params": variables["params"]}, X)).max() > 0.1


class Louder(nn.Module):
    @nn.compact
    def __call__(self, x):
        return 2.0 * x @ self.param("kernel", nn.initializers.normal(), (x.shape[-1], 3))


class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Contraction((WIDTH, 4), w_scale=0.5, name="scaled")("td,df->tf", x)
        return nn.Dense(3)(Louder(name="louder")(x))


def test_refusals_and_reasons(monkeypatch):
    monkeypatch.setitem(FORMS, Contraction, dataclasses.replace(FORMS[Contraction], scale="w_scale"))
    with adapted(mj.LoRAConfig(rank=2)) as report:
        jax.eval_shape(Mixed().init, jax.random.key(0), X[0])
    assert [match.in_features for match in report.table.matches] == [3]
    assert {one.paths[0]: one.reason for one in report.table.skipped} == {
        "scaled": "its kernel is multiplied with a factor before the product",
        "louder": "a class without adapters, see mora_jax.linen.register_layer",
    }
    with pytest.raises(ValueError, match=r"louder \(Louder\), which can't be adapted: .*linen\.register_layer"):
        with adapted(mj.LoRAConfig(rank=2, targets=["louder"])):
            jax.eval_shape(Mixed().init, jax.random.key(0), X[0])
    layer = Louder()
    with pytest.raises(ValueError, match=r"Louder can't be registered: its call computes something other"):
        register_layer(Louder, example=(layer, X), einsum="...i,io->...o")
    with pytest.raises(ValueError, match=r"no parameter w "):
        register_layer(Louder, example=(layer, X), einsum="...i,io->...o", kernel="w")
    with pytest.raises(ValueError, match=r"a bias is called bias or b, not 'beta'"):
        register_layer(Louder, example=(layer, X), einsum="...i,io->...o", bias="beta")
    with pytest.raises(TypeError, match=r"in a tuple"):
        register_layer(Louder, example=layer, einsum="...i,io->...o")
    with pytest.raises(TypeError, match=r"Dense carries adapters already"):
        register_layer(nn.Dense, example=(nn.Dense(2), X))
    with pytest.raises(TypeError, match=r"flax\.linen\.Module, not"):
        register_layer(nnx.Linear, example=(layer, X))
    with pytest.raises(TypeError, match=r"classes of Linen go to mora_jax\.linen\.register_layer"):
        mj.register_layer(Louder, example=layer)
