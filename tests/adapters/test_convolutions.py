"""Adapters on `nnx.Conv` and `nn.Conv`: against loops over windows, merged, in files, and against peft."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx

import mora_jax as mj
import mora_jax.linen as ml
from mora_jax.adapters.methods.registry import CONFIGS

#: All with groups of channels and without; elsewhere one of each way to compute.
METHODS = dict.fromkeys(("plain", "dilated", "depthwise"), ["lora", "dora", "mora", "oft"])
METHODS |= dict.fromkeys(("strided", "groups"), [name for name in CONFIGS if name != "full"])
SHAPES = {
    "plain": {"kernel_size": (3, 3)},
    "strided": {"kernel_size": (3, 2), "strides": (2, 1), "padding": "VALID", "use_bias": False},
    "dilated": {"kernel_size": (3,), "kernel_dilation": 2, "padding": "CAUSAL"},
    "groups": {"kernel_size": (2, 2), "feature_group_count": 2, "padding": ((1, 0), (0, 2))},
    "depthwise": {"kernel_size": (3,), "feature_group_count": 4, "padding": "CIRCULAR"},
}


class Model(nnx.Module):
    def __init__(self, features=8, **settings):
        self.conv = nnx.Conv(4, features, **settings, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.conv(x)


def inputs(settings):
    return jax.random.normal(jax.random.key(1), (2, *(7, 6)[: len(settings["kernel_size"])], 4))


def config_of(name, **settings):
    if name == "adalora":
        settings["target_rank"] = 1
    if hasattr(CONFIGS[name], "rank"):
        settings["rank"] = 2
    if name == "oft":
        settings = {"block_size": 4, "targets": settings["targets"]}
    return CONFIGS[name](**settings)


def moved(model):
    """The model with random numbers in its adapter: some start at zero."""
    graphdef, adapters, frozen = mj.partition(model)
    keys = iter(jax.random.split(jax.random.key(2), 20))
    return nnx.merge(
        graphdef, jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), adapters), frozen
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*block_size")
@pytest.mark.parametrize("shape", SHAPES)
def test_every_method_is_nothing_at_first_and_merges_to_what_it_computes(shape):
    settings = SHAPES[shape]
    x = inputs(settings)
    before = Model(**settings)(x)
    for name in METHODS[shape]:
        model = Model(**settings)
        mj.attach(model, config_of(name, targets=("conv",)), rngs=1)
        np.testing.assert_allclose(model(x), before, atol=2e-6, err_msg=name)
        model = moved(model)
        adapted = model(x)
        assert jnp.abs(adapted - before).max() > 1e-2, name
        assert mj.merge(model) and type(model.conv) is nnx.Conv
        scale = float(jnp.abs(adapted).max())
        np.testing.assert_allclose(model(x) / scale, adapted / scale, atol=3e-6, err_msg=name)


def by_loops(x, kernel, a, b, scaling, strides, groups):
    """A convolution without padding and LoRA beside it, window by window, in float64."""
    x, kernel, a, b = (np.asarray(array, np.float64) for array in (x, kernel, a, b))
    rows, width = kernel.shape[:2]
    sizes = [(x.shape[axis + 1] - kernel.shape[axis]) // strides[axis] + 1 for axis in (0, 1)]
    y = np.zeros((len(x), *sizes, kernel.shape[-1]))
    ins, outs = x.shape[-1] // groups, kernel.shape[-1] // groups
    for n, i, j, group in itertools.product(range(len(x)), range(sizes[0]), range(sizes[1]), range(groups)):
        window = x[n, i * strides[0] :, j * strides[1] :][:rows, :width, group * ins : (group + 1) * ins].reshape(-1)
        columns = slice(group * outs, (group + 1) * outs)
        y[n, i, j, columns] = window @ kernel.reshape(-1, kernel.shape[-1])[:, columns]
        y[n, i, j, columns] += scaling * (window @ a) @ b[:, columns]
    return y


@pytest.mark.parametrize("groups", [1, 2])
def test_lora_by_loops_over_windows(groups):
    settings = {"kernel_size": (3, 2), "strides": (2, 1), "padding": "VALID", "use_bias": False}
    model, x = Model(**settings, feature_group_count=groups), inputs(settings)
    mj.attach(model, mj.LoRAConfig(rank=2, alpha=6.0, targets=["conv"]), rngs=1)
    model = moved(model)
    a, b = (getattr(model.conv.adapter, name)[...] for name in ("lora_a", "lora_b"))
    expected = by_loops(x, model.conv.kernel[...], a, b, 3.0, (2, 1), groups)
    np.testing.assert_allclose(model(x), expected, atol=1e-5)
    assert a.shape == (3 * 2 * 4 // groups, 2)


def test_two_convolutions_and_no_dense_update():
    settings = SHAPES["plain"]
    model, x = Model(features=64, **settings), inputs(settings)
    mj.attach(model, mj.LoRAConfig(rank=2, targets=["conv"]), rngs=1)
    graphdef, adapters, frozen = mj.partition(model)
    step = jax.make_jaxpr(jax.grad(lambda adapters: nnx.merge(graphdef, adapters, frozen)(x).sum()))(adapters)
    assert "f32[36,64]" not in str(step) and str(step).count("conv_general_dilated") >= 3


def test_linen_gives_the_same_and_the_files_are_the_same(tmp_path):
    settings = SHAPES["plain"]
    x, config = inputs(settings), mj.LoRAConfig(rank=2, targets=["conv"])
    model = Model(**settings)
    mj.attach(model, config, rngs=1)
    model = moved(model)
    mj.save_adapter(model, tmp_path / "adapter")

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(8, (3, 3), name="conv")(x)

    plain = Plain()
    params = {"conv": {"kernel": Model(**settings).conv.kernel[...], "bias": Model(**settings).conv.bias[...]}}
    with ml.adapted(config) as report:
        variables = plain.init(jax.random.key(0), x)
        variables["params"] = params
        variables["adapters"]["conv"] = {name: getattr(model.conv.adapter, name)[...] for name in ("lora_a", "lora_b")}
        y = plain.apply(variables, x)
    np.testing.assert_allclose(y, model(x), atol=1e-6)
    merged = ml.merge(variables, config, report=report)
    np.testing.assert_allclose(plain.apply({"params": merged}, x), y, atol=1e-5)
    ml.save_adapter(variables, tmp_path / "linen", config, report=report)
    assert read(tmp_path / "linen").keys() == read(tmp_path / "adapter").keys()
    found, loaded = ml.load_adapter({"params": params}, tmp_path / "linen")
    with ml.adapted(found):
        np.testing.assert_allclose(plain.apply(loaded, x), y, atol=1e-6)


def read(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("shape", ["plain", "groups"])
@pytest.mark.parametrize("name", ["dora", "mora", "vera", "ia3"])
def test_files(name, shape, tmp_path):
    model, x = Model(**SHAPES[shape]), inputs(SHAPES[shape])
    mj.attach(model, config_of(name, targets=("conv",)), rngs=1)
    model = moved(model)
    mj.save_adapter(model, tmp_path / "adapter")
    again = Model(**SHAPES[shape])
    mj.load_adapter(again, tmp_path / "adapter")
    np.testing.assert_allclose(again(x), model(x), atol=1e-5)


def test_all_linear_passes_convolutions_over_and_masks_and_transposed_ones_are_refused():
    class Mixed(Model):
        def __init__(self, **settings):
            super().__init__(kernel_size=(3,))
            rngs = nnx.Rngs(0)
            self.up = nnx.ConvTranspose(4, 4, (3,), rngs=rngs)
            self.masked = nnx.Conv(4, 4, (3,), mask=jnp.ones((3, 4, 4)), rngs=rngs)
            self.out = nnx.Linear(4, 4, rngs=rngs)

    report = mj.attach(Mixed(), mj.LoRAConfig(rank=2), rngs=1)
    assert [match.path for match in report.matches] == ["out"]
    reasons = {path: skipped.reason for skipped in report.skipped for path in skipped.paths}
    assert reasons["conv"] == "a convolution, which all-linear leaves out"
    assert reasons["masked"] == "a mask on its kernel, which an update wouldn't have"
    assert reasons["up"] == "a transposed convolution, whose kernel is no matrix from inputs to outputs"
    for name in ("up", "masked"):
        with pytest.raises(ValueError, match=f"targets name {name} .*can't be adapted: a "):
            mj.attach(Mixed(), mj.LoRAConfig(rank=2, targets=[name]), rngs=1)


@pytest.mark.peers
@pytest.mark.parametrize("use_dora", [False, True])
def test_peft_both_ways(use_dora, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    settings = {"kernel_size": (3, 2), "strides": (2, 1), "padding": ((1, 1), (0, 0))}
    model, x = Model(**settings), inputs(settings)
    mj.attach(model, mj.LoRAConfig(rank=2, alpha=6.0, targets=["conv"], use_dora=use_dora), rngs=1)
    model = moved(model)
    mj.save_adapter(model, tmp_path / "ours")

    def theirs():
        twin = torch.nn.Module()
        twin.conv = torch.nn.Conv2d(4, 8, (3, 2), (2, 1), (1, 0))
        twin.forward = lambda x: twin.conv(x)
        kernel = np.moveaxis(np.asarray(model.conv.kernel[...]), (3, 2), (0, 1))
        twin.conv.weight.data = torch.tensor(np.ascontiguousarray(kernel))
        twin.conv.bias.data = torch.tensor(np.asarray(model.conv.bias[...]))
        return twin

    def run(twin):
        y = twin.base_model.model.conv(torch.tensor(np.moveaxis(np.asarray(x), 3, 1)))
        return np.moveaxis(y.detach().numpy(), 1, 3)

    twin = peft.PeftModel.from_pretrained(theirs(), str(tmp_path / "ours"))
    np.testing.assert_allclose(run(twin), model(x), atol=1e-5)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["conv"], use_dora=use_dora)
    twin = peft.get_peft_model(theirs(), config)
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    twin.save_pretrained(tmp_path / "theirs")
    again = Model(**settings)
    mj.load_adapter(again, tmp_path / "theirs")
    np.testing.assert_allclose(again(x), run(twin), atol=1e-5)
    grouped = Model(**settings, feature_group_count=2)
    with pytest.raises(mj.InputError, match="reads all groups of channels"):
        mj.load_adapter(grouped, tmp_path / "theirs")
