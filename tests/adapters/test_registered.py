"""Layers of classes that Flax does not have, and what a report says of matrices that were passed over."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.attach import adapters_of
from mora_jax.adapters.layers import ADAPTED
from mora_jax.adapters.matrices import FORMS, SHIPPED
from tests.models.tiny import fill_randomly

WIDTH, HEADS, SIZE = 12, 3, 4
X = np.random.default_rng(0).normal(size=(2, 5, WIDTH)).astype(np.float32)


class Contraction(nnx.Module):
    """As model libraries for JAX write it: one parameter, one equation, a dtype that both are cast to."""

    def __init__(self, einsum_str, shape, *, rngs, dtype=jnp.float32):
        self.einsum_str = einsum_str
        self.shape = shape
        self.dtype = dtype
        self.w = nnx.Param(0.3 * jax.random.normal(rngs.params(), shape))

    @jax.named_scope("contraction")
    def __call__(self, x):
        return jnp.einsum(self.einsum_str, jnp.asarray(x, self.dtype), jnp.asarray(self.w[...], self.dtype))


mj.register_layer(Contraction, example=Contraction("btd,df->btf", (2, 3), rngs=nnx.Rngs(0)), kernel="w")


class Attention(nnx.Module):
    """Queries, keys and values together, an output: contracted axes one or two, free axes in another order."""

    def __init__(self, rngs, dtype=jnp.float32):
        self.q_einsum = Contraction("BTD,NDH->BTNH", (HEADS, WIDTH, SIZE), rngs=rngs, dtype=dtype)
        self.kv_einsum = Contraction("BSD,CKDH->CBSKH", (2, HEADS, WIDTH, SIZE), rngs=rngs, dtype=dtype)
        self.attn_vec_einsum = Contraction("BTNH,NHD->BTD", (HEADS, SIZE, WIDTH), rngs=rngs, dtype=dtype)
        self.q_bias = nnx.Param(jnp.ones((HEADS, SIZE)))

    def __call__(self, x):
        q = self.q_einsum(x) + self.q_bias[...]
        k, v = self.kv_einsum(x)
        weights = nnx.softmax(jnp.einsum("btnh,bsnh->bnts", q, k))
        return self.attn_vec_einsum(jnp.einsum("bnts,bsnh->btnh", weights, v))


class Block(nnx.Module):
    def __init__(self, rngs, dtype=jnp.float32):
        self.attn = Attention(rngs, dtype)
        self.up_proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(WIDTH))

    def __call__(self, x):
        x = x + self.attn(x * self.scale[...])
        return x + self.up_proj(x)


class Model(nnx.Module):
    def __init__(self, rngs=None, dtype=jnp.float32):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.layers = nnx.List([Block(rngs, dtype) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, 7, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


EINSUMS = ("q_einsum", "kv_einsum", "attn_vec_einsum")


def dense(entry):
    """The update `[in, out]` by loops over its definition."""
    return entry.params["scaling"] * entry.params["lora_a"] @ entry.params["lora_b"]


@pytest.mark.parametrize(
    "config",
    [
        mj.LoRAConfig(rank=2),
        pytest.param(mj.DoRAConfig(rank=2), marks=pytest.mark.slow),
        pytest.param(mj.PiSSAConfig(rank=2), marks=pytest.mark.slow),
        mj.MoRAConfig(rank=2, kind="sharing", use_dora=True),
        mj.VeRAConfig(rank=8, targets=EINSUMS),
        pytest.param(mj.AdaLoRAConfig(rank=3, target_rank=2, total_steps=9, tinit=1, tfinal=1), marks=pytest.mark.slow),
        mj.IA3Config(targets=EINSUMS, feedforward=("attn_vec_einsum",)),
    ],
    ids=lambda config: type(config).__name__,
)
def test_every_method_stands_beside_them(tmp_path, config):
    model = Model()
    before = np.asarray(model(X))
    report = mj.attach(model, config, rngs=1)
    assert {f"layers.{i}.attn.{name}" for i in range(2) for name in EINSUMS} <= {m.path for m in report.matches}
    np.testing.assert_allclose(model(X), before, rtol=1e-6, atol=1e-6)
    fill_randomly(model)
    tuned = np.asarray(model(X))
    assert np.abs(tuned - before).max() > 1e-2
    mj.save_adapter(model, tmp_path)
    again = Model()
    mj.load_adapter(again, tmp_path)
    np.testing.assert_allclose(again(X), tuned, rtol=1e-4, atol=1e-4)
    merged = mj.merge(model)
    np.testing.assert_allclose(model(X), tuned, rtol=1e-4, atol=1e-4)
    assert all(type(getattr(layer.attn, name)) is Contraction for layer in model.layers for name in EINSUMS)
    mj.unmerge(model, merged)
    np.testing.assert_allclose(model(X), tuned, rtol=1e-4, atol=1e-4)


def test_the_update_is_that_of_the_matrix_of_the_einsum():
    model, plain = Model(), Model()
    mj.attach(model, mj.LoRAConfig(rank=2, targets=EINSUMS), rngs=1)
    fill_randomly(model)
    for entry in adapters_of(model):
        layer, name = int(entry.path.split(".")[1]), entry.path.rpartition(".")[2]
        kernel = getattr(plain.layers[layer].attn, name).w
        update = dense(entry)
        if name == "q_einsum":  # [D, (N H)] → [N, D, H]
            change = update.reshape(WIDTH, HEADS, SIZE).transpose(1, 0, 2)
        elif name == "kv_einsum":  # [D, (C K H)] → [C, K, D, H]
            change = update.reshape(WIDTH, 2, HEADS, SIZE).transpose(1, 2, 0, 3)
        else:
            change = update.reshape(HEADS, SIZE, WIDTH)
        kernel[...] = kernel[...] + change
    np.testing.assert_allclose(model(X), plain(X), rtol=1e-4, atol=1e-4)


def test_they_train():
    model = Model()
    mj.attach(model, mj.LoRAConfig(rank=2, targets=EINSUMS), rngs=1)
    graphdef, adapters, frozen = mj.partition(model)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(adapters)

    @jax.jit
    def step(adapters, state):
        def loss(adapters):
            return jnp.mean(nnx.merge(graphdef, adapters, frozen)(X) ** 2)

        value, slopes = jax.value_and_grad(loss)(adapters)
        updates, state = optimizer.update(slopes, state)
        return optax.apply_updates(adapters, updates), state, value

    losses = []
    for _ in range(12):
        adapters, state, value = step(adapters, state)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]


def test_dropout_and_low_precision():
    model = Model(dtype=jnp.bfloat16)
    mj.attach(model, mj.LoRAConfig(rank=2, dropout=0.5), rngs=1)
    fill_randomly(model)
    model.train()
    assert not np.array_equal(model(X), model(X))
    model.eval()
    np.testing.assert_array_equal(model(X), model(X))
    assert model.layers[0].attn.q_einsum(X).dtype == jnp.bfloat16


def test_an_abstract_model_is_the_same():
    config = mj.LoRAConfig(rank=2)
    abstract = nnx.eval_shape(lambda: attached(Model(), config))
    real = attached(Model(), config)
    assert jax.tree.map(jnp.shape, nnx.state(abstract)) == jax.tree.map(jnp.shape, nnx.state(real))


def attached(model, config):
    from mora_jax.adapters.attach import add_adapters

    add_adapters(model, config, rngs=nnx.Rngs(0))
    return model


class Turned(nnx.Module):
    """A matrix as other libraries lay it out, with a bias under a name of its own."""

    def __init__(self, rngs, bias=True):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (5, WIDTH)))
        self.b = nnx.Param(jnp.arange(5.0)) if bias else None

    def __call__(self, x):
        y = x @ self.weight[...].T
        return y if self.b is None else y + self.b[...]


class Louder(Turned):
    def __call__(self, x):
        return 2.0 * super().__call__(x)


class Same(Turned):
    pass


class Named(nnx.Linear):
    pass


def test_a_registered_class_with_a_bias(tmp_path):
    class Own(Turned):
        pass

    with pytest.raises(ValueError, match=r"no layer; .*none: the model has no linear layer"):
        mj.attach(nnx.Sequential(Own(nnx.Rngs(0))), mj.LoRAConfig(rank=2), rngs=0)
    mj.register_layer(Own, example=Own(nnx.Rngs(1)), kernel="weight", einsum="...i,oi->...o", bias="b")
    for config in (
        mj.LoRAConfig(rank=2, bias="lora_only"),
        mj.DoRAConfig(rank=2, bias="lora_only"),
        mj.IA3Config(targets="0"),
        mj.BitFitConfig(),
    ):
        model = nnx.Sequential(Own(nnx.Rngs(0)))
        before = np.asarray(model(X))
        mj.attach(model, config, rngs=0)
        np.testing.assert_allclose(model(X), before, rtol=1e-6, atol=1e-6)
        fill_randomly(model)
        tuned = np.asarray(model(X))
        if not isinstance(config, mj.IA3Config):
            mj.save_adapter(model, tmp_path, overwrite=True)
            again = nnx.Sequential(Own(nnx.Rngs(0)))
            mj.load_adapter(again, tmp_path)
            np.testing.assert_allclose(again(X), tuned, rtol=1e-4, atol=1e-4)
        mj.merge(model)
        np.testing.assert_allclose(model(X), tuned, rtol=1e-4, atol=1e-4)
        assert np.abs(tuned - before).max() > 1e-2
    bare = nnx.Sequential(Own(nnx.Rngs(0), bias=False))
    with pytest.raises(ValueError, match="has no bias, nor a place for one"):
        mj.attach(bare, mj.BitFitConfig(), rngs=0)


def test_what_can_not_be_registered_or_adapted():
    turned, names = Turned(nnx.Rngs(0)), {"kernel": "weight", "einsum": "...i,oi->...o"}
    for kind in (nnx.Linear, Named):
        with pytest.raises(TypeError, match=f"{kind.__name__} carries adapters already"):
            mj.register_layer(kind, example=turned)
    with pytest.raises(TypeError, match="takes a class of nnx.Module"):
        mj.register_layer(turned, example=turned)
    with pytest.raises(TypeError, match="example must be a layer of the class Turned, not Same"):
        mj.register_layer(Turned, example=Same(nnx.Rngs(0)), **names)
    refused = [
        (turned, names, "its call computes something other than its einsum"),
        (Louder(nnx.Rngs(0)), {**names, "bias": "b"}, "its call computes something other than its einsum"),
        (turned, {"kernel": "weight", "einsum": "...o,oi->...i"}, r"its call refused an input \[5\] \(TypeError\)"),
        (turned, {"kernel": "weight", "einsum": "e...,eo->e..."}, "its einsum is no product with one matrix"),
        (turned, {"kernel": "nothing", "einsum": "...i,oi->...o"}, "a layer has no nnx.Param nothing or no equation"),
        (turned, {"kernel": "weight"}, "a layer has no nnx.Param weight or no equation einsum_str"),
    ]
    for example, given, words in refused:
        before = dict(FORMS)
        with pytest.raises(ValueError, match=f"^{type(example).__name__} can't be registered: {words}"):
            mj.register_layer(type(example), example=example, **given)
        assert before == FORMS
    mj.register_layer(Turned, example=turned, **names, bias="b")
    model = nnx.Dict(same=Same(nnx.Rngs(0)), louder=Louder(nnx.Rngs(0)))
    report = mj.attach(nnx.Sequential(model["same"], model["louder"]), mj.LoRAConfig(rank=2), rngs=0)
    assert [match.path for match in report.matches] == ["layers.0"]
    (left,) = report.skipped
    assert (left.paths, left.kind, left.parameters) == (("layers.*",), "Louder", 5 * WIDTH)
    assert left.reason == "its class overrides the call of Turned"


def test_an_einsum_that_is_no_product_is_left_alone():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        Contraction("btd,df->btf", (WIDTH, 6), rngs=rngs),
        Contraction("etd,edf->etf", (2, 6, 6), rngs=rngs),
    )
    report = mj.attach(model, mj.LoRAConfig(rank=2), rngs=0)
    assert [match.path for match in report.matches] == ["layers.0"]
    assert [(one.parameters, one.reason) for one in report.skipped] == [(72, "no product with one matrix")]
    with pytest.warns(UserWarning, match=r"targets name what can't be adapted: layers\.\*, no product with one matrix"):
        mj.attach(nnx.Sequential(model.layers[1], nnx.Linear(6, 6, rngs=rngs)), BOTH, rngs=0)
    with pytest.raises(ValueError, match=r"targets name layers\.0 \(Contraction\), which can't be adapted: no product"):
        mj.attach(nnx.Sequential(model.layers[1]), BOTH, rngs=0)


class Watched(nnx.Module):
    """An einsum that nobody registered, and that must not be run."""

    def __init__(self):
        self.einsum_str = "btd,df->btf"
        self.kernel = nnx.Param(jnp.ones((6, 6)))

    def __call__(self, x):
        raise AssertionError("attach ran a layer")


def test_attaching_runs_no_layer_and_changes_no_table():
    def tables():
        return dict(FORMS), dict(ADAPTED), dict(SHIPPED)

    before = tables()
    for _ in range(2):
        model = nnx.Sequential(Watched(), nnx.Linear(6, 6, rngs=nnx.Rngs(0)), Model())
        report = mj.attach(model, mj.LoRAConfig(rank=2), rngs=0)
        assert "layers.1" in {match.path for match in report.matches}
        reasons = {one.paths: one.reason for one in report.skipped}
        assert reasons[("layers.*",)] == "a class without adapters, see mj.register_layer"
        assert type(model.layers[0]) is Watched
        assert tables() == before


def test_classes_of_libraries_are_known_by_name():
    """Nothing of the library is imported: a class of that name stands for it."""
    body = dict(vars(Contraction)) | {"__module__": "tunix.models.qwen3.model", "__qualname__": "Einsum"}
    body = {name: value for name, value in body.items() if name in ("__module__", "__qualname__", "__call__")}
    kind = type("Einsum", (nnx.Module,), body)
    layer = kind()
    layer.einsum_str, layer.shape, layer.dtype = "BTD,DNH->BTNH", (WIDTH, HEADS, SIZE), jnp.float32
    layer.w = nnx.Param(jax.random.normal(jax.random.key(0), layer.shape))
    plain = np.asarray(layer(X))
    mj.attach(layer, mj.LoRAConfig(rank=2), rngs=0)
    fill_randomly(layer)
    tuned = np.asarray(layer(X))
    assert np.abs(tuned - plain).max() > 1e-2
    mj.merge(layer)
    np.testing.assert_allclose(layer(X), tuned, rtol=1e-4, atol=1e-4)
    kind.__module__ = "tunix.models.other"
    with pytest.raises(ValueError, match="match no layer"):
        mj.attach(layer, mj.LoRAConfig(rank=2), rngs=0)


BOTH = mj.LoRAConfig(rank=2, targets=r"layers\.\d")


class Mixed(nnx.Module):
    """A bit of everything that is passed over."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 6, rngs=rngs)
        self.conv = nnx.ConvTranspose(6, 6, (3,), rngs=rngs)
        self.window = nnx.Conv(6, 6, (3,), rngs=rngs)
        self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(3)])
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.experts = nnx.Param(jnp.zeros((2, 6, 6)))
        self.lm_head = nnx.Linear(6, 11, rngs=rngs)


def test_the_report_says_what_was_passed_over():
    model = Mixed(nnx.Rngs(0))
    report = mj.attach(model, mj.LoRAConfig(rank=2, layers_to_transform=(0, 2)), rngs=0)
    assert [(one.paths, one.kind, one.parameters, one.reason) for one in report.skipped] == [
        (("embed",), "", 66, "an embedding, which all-linear leaves out"),
        (("layers.*",), "", 36, "outside layers_to_transform"),
        (("lm_head",), "", 66, "the output head, which all-linear leaves out"),
        (("window",), "", 108, "a convolution, which all-linear leaves out"),
        (("conv",), "ConvTranspose", 108, "a transposed convolution, whose kernel is no matrix from inputs to outputs"),
        (("(the model itself)",), "Mixed", 72, "a class without adapters, see mj.register_layer"),
    ]
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80
    assert "not adapted: conv (ConvTranspose), 108 parameters: a transposed convolution," in lines
    model = Mixed(nnx.Rngs(0))
    report = mj.attach(model, mj.LoRAConfig(rank=2, targets=("0", "embed"), modules_to_save=("lm_head",)), rngs=0)
    assert [one.paths for one in report.skipped][:1] == [("layers.*", "window")]
    assert report.skipped[0].parameters == 180 and report.skipped[0].reason == "not among the targets"
    assert not {"embed", "lm_head"} & {path for one in report.skipped for path in one.paths}


def test_messages_are_short():
    model = Model()
    cases = [
        (("q_einsun",), "did you mean 'q_einsum'?"),
        ("all_linear", "did you mean 'all-linear'?"),
        (("up_proj", "kv_einsm"), "did you mean 'kv_einsum'?"),
        ("q_einsum|up_proj", "has to match the whole path, as '.*(q_einsum|up_proj).*' would"),
        (tuple(f"name{i}" for i in range(99)), "layers that could have matched: head, attn_vec_einsum, "),
    ]
    for targets, words in cases:
        with pytest.raises(ValueError, match="could have matched") as error:
            mj.attach(model, mj.LoRAConfig(rank=2, targets=targets), rngs=0)
        assert words in str(error.value) and len(str(error.value)) < 240


def test_a_kernel_with_a_factor_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setitem(FORMS, Contraction, dataclasses.replace(FORMS[Contraction], scale="w_scale"))
    model = Model()
    model.layers[0].attn.q_einsum.w_scale = 0.5
    report = mj.attach(model, mj.LoRAConfig(rank=2), rngs=1)
    left = {one.paths: one.reason for one in report.skipped}
    assert left["layers.*.attn.q_einsum",] == "its kernel is multiplied with a factor before the product"
    assert "layers.1.attn.q_einsum" in {match.path for match in report.matches}
