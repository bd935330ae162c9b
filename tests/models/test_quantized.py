"""A decoder on quantised kernels computes what one computes on the values that they stand for, and keeps none dense."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters.attach import add_adapters
from mora_jax.adapters.products.quantization import FORMATS
from mora_jax.adapters.report import count
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import read_config
from mora_jax.models.init import init_decoder
from mora_jax.planning.jaxpr_cost import read_traced
from tests.models.quantized import quantized_copy, rounded_copy
from tests.models.tiny import LLAMA, fill_randomly, random_ids

#: One input that fills blocks, one whose last block is part of one.
SIZES = LLAMA | {"hidden_size": 64, "intermediate_size": 80, "head_dim": 16}
IDS = random_ids(2, 12)
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
METHODS = {
    "lora": [mj.LoRAConfig(rank=2)],
    # What adds to a product beside what turns its input.
    "lora, oft": [mj.LoRAConfig(rank=2, targets=ATTENTION), mj.OFTConfig(8, targets=MLP)],
    "rslora": [mj.RsLoRAConfig(rank=2)],
    "dora": [mj.DoRAConfig(rank=2)],
    "lora_plus": [mj.LoRAPlusConfig(rank=2)],
    "lora_fa": [mj.LoRAFAConfig(rank=2)],
    "mora": [mj.MoRAConfig(rank=2, kind="rotation")],
    "vera": [mj.VeRAConfig(rank=4)],
    "adalora": [mj.AdaLoRAConfig(rank=3, target_rank=2, total_steps=10)],
    "ia3": [mj.IA3Config()],
    "hira": [mj.HiRAConfig(rank=2)],
    "oft": [mj.OFTConfig(8)],
    "ia3_inputs": [mj.IA3Config(targets=("q_proj", "up_proj"), feedforward=("q_proj", "up_proj"))],
    "bitfit": [mj.BitFitConfig()],
    "head": [mj.LoRAConfig(rank=2, targets=("q_proj", "embed_tokens"))],
}


def dense(**options) -> Decoder:
    sizes = SIZES | {"num_hidden_layers": options.pop("layers", 3)}
    if options.pop("biased", False):
        sizes |= {"architectures": ["Qwen2ForCausalLM"]}
    return init_decoder(sizes, nnx.Rngs(0), **({"dtype": "float32"} | options))


def gradient_of(model, method):
    """Loss, logits and gradient as a function of the adapters, and the adapters with random values."""
    for config in METHODS[method]:
        mj.attach(model, config, rngs=nnx.Rngs(1))
    fill_randomly(model)
    graphdef, adapters, frozen = mj.partition(model)

    def loss(adapters):
        logits = nnx.merge(graphdef, adapters, frozen)(IDS)
        return jnp.mean(jnp.square(logits)), logits

    return jax.value_and_grad(loss, has_aux=True), adapters


@pytest.mark.slow
def test_gradients_are_those_of_the_rounded_base():
    check_gradients("nf4", "lora, oft")


@pytest.mark.slow
@pytest.mark.parametrize("held", FORMATS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gets_the_gradients_of_the_rounded_base(held, method):
    check_gradients(held, method)


def check_gradients(held, method):
    base = dense(biased=method == "bitfit")
    found, expected = [], []
    for model, leaves in ((quantized_copy(base, held), found), (rounded_copy(base, held), expected)):
        gradient, adapters = gradient_of(model, method)
        leaves += jax.tree.leaves(jax.jit(gradient)(adapters))
    assert_same(found, expected)


def assert_same(found, expected):
    """Up to the rounding of sums over three layers."""
    assert all(np.abs(leaf).max() > 0 for leaf in expected)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=5e-6 * np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_remat_changes_nothing(remat):
    base = dense(remat=remat)
    gradient, adapters = gradient_of(quantized_copy(base, "nf4"), "lora")
    plain, _ = gradient_of(rounded_copy(base, "nf4"), "lora")
    assert_same(*(jax.tree.leaves(jax.jit(one)(adapters)) for one in (gradient, plain)))


# Each method and each remat with both formats.
KEPT = {(method, remat) for method in ("lora", "dora") for remat in ("none", "dots", "full")}
QUICK = {("lora", "none"), ("dora", "dots"), ("lora", "full")}


@functools.cache
def kept(held, method, remat):
    """What the forward loop stacks up for the backward one, in bytes."""
    model = dense(dtype="bfloat16", remat=remat)
    gradient, adapters = gradient_of(model if held is None else quantized_copy(model, held), method)
    return read_traced(jax.make_jaxpr(gradient)(adapters), (3,), 1, SIZES["hidden_size"]).saved


@pytest.mark.parametrize("held", FORMATS)
@pytest.mark.parametrize(
    "method, remat", [*sorted(QUICK), *(pytest.param(*case, marks=pytest.mark.slow) for case in sorted(KEPT - QUICK))]
)
def test_the_loop_over_layers_hands_no_kernel_to_the_backward_pass(held, method, remat):
    """What the forward loop stacks up is to the byte what it stacks up beside dense kernels, which are arguments."""
    assert kept(None, method, remat) == kept(held, method, remat) > 0


@pytest.mark.parametrize("held", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_no_layer_stays_dense_in_the_compiled_step(held):
    """Each layer more takes little beside the arguments, where its dense kernels would be as much as they are."""
    # Small matrices are never made dense on a CPU; these are as in a real model.
    sizes = LLAMA | {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64}
    layer = 256 * (512 + 256 + 3 * 768) * 4
    taken = []
    for layers in (2, 4):

        def build(layers=layers):
            config = read_config(sizes | {"num_hidden_layers": layers}, "config.json")
            model = Decoder(config, rngs=None, quantize=held)
            # One of several matrices with one input, and one alone.
            add_adapters(model, mj.LoRAConfig(rank=2, targets=("q_proj", "down_proj")), rngs=nnx.Rngs(1))
            return model

        graphdef, adapters, frozen = mj.partition(nnx.eval_shape(build))

        def loss(adapters, frozen, graphdef=graphdef):
            return jnp.mean(jnp.square(nnx.merge(graphdef, adapters, frozen)(IDS[:1, :8])))

        compiled = jax.jit(jax.grad(loss)).lower(adapters, frozen).compile()
        taken.append(compiled.memory_analysis().temp_size_in_bytes)
    assert (taken[1] - taken[0]) / 2 < 0.2 * layer


@pytest.mark.parametrize("held", FORMATS)
def test_answers_are_made_from_the_same_numbers(held):
    model, plain = quantized_copy(dense(), held), rounded_copy(dense(), held)
    for one in (model, plain):
        mj.attach(one, METHODS["lora"][0], rngs=nnx.Rngs(1))
        fill_randomly(one)
    found, expected = (one.extend(one.init_cache(2, 16), IDS)[0] for one in (model, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("held", FORMATS)
def test_packed_numbers_count_as_what_they_stand_for(held):
    base = dense()
    model = quantized_copy(base, held)
    assert count(model) == count(base)
    reports = [mj.attach(one, METHODS["lora"][0], rngs=nnx.Rngs(1)) for one in (base, model)]
    assert str(reports[0]) == str(reports[1])


REFUSED = {
    "full fine-tuning": mj.FullConfig(),
    "relora": mj.ReLoRAConfig(rank=2, restart_every=50),
    "remora": mj.ReMoRAConfig(rank=2, restart_every=50),
    "pissa": mj.PiSSAConfig(rank=2),
    "olora": mj.LoRAConfig(rank=2, init="olora"),
    "modules_to_save: down_proj": mj.LoRAConfig(rank=2, targets=("q_proj",), modules_to_save=("down_proj",)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_would_change_the_base_is_refused(words):
    model = quantized_copy(dense(), "nf4")
    with pytest.raises(ValueError, match=rf"{words}.*model\.quantize=nf4"):
        mj.attach(model, REFUSED[words], rngs=nnx.Rngs(1))


def test_modules_that_are_not_quantised_are_trained_whole():
    model = quantized_copy(dense(), "nf4")
    config = mj.LoRAConfig(rank=2, targets=("q_proj",), modules_to_save=("lm_head",))
    assert mj.attach(model, config, rngs=nnx.Rngs(1)).trainable > 97 * 64


def test_a_quantised_model_is_neither_merged_nor_saved(tmp_path):
    model = quantized_copy(dense(), "int8")
    with pytest.raises(mj.InputError, match="quantize=int8"):
        mj.save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    mj.attach(model, METHODS["lora"][0], rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="quantize=int8"):
        mj.merge(model)


def test_a_quantised_decoder_is_not_drawn():
    with pytest.raises(ValueError, match="can't be drawn"):
        Decoder(dense().config, rngs=nnx.Rngs(0), quantize="nf4")
    with pytest.raises(ValueError, match="quantize must be one of none, int8, nf4"):
        Decoder(dense().config, rngs=None, quantize="fp4")
