"""Experts: routing and grouped products against loops, whole families against transformers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.adapters import expert_projection
from mora_jax.adapters.products import grouped
from mora_jax.adapters.products.quantization import FORMATS, Quantized, quantize
from mora_jax.evaluation import Generator
from mora_jax.models.experts import routed
from mora_jax.planning.memory_model import estimate_memory
from mora_jax.training.config.schema import Config
from mora_jax.training.observe.flops import StepFlops
from mora_jax.training.sharding.mesh import make_mesh
from mora_jax.training.sharding.rules import base_shardings
from mora_jax.training.state import flat_arrays
from tests.models.quantized import quantized_copy, rounded_copy
from tests.models.tiny import fill_randomly
from tests.models.tiny_experts import ARCHITECTURES, FAMILIES, SIZES, ours, tokens

SIZES_BY_GROUP = ([3, 0, 4], [0, 0, 7], [2, 1, 2], [1, 0, 0])


def _by_loop(x, w, sizes):
    """Row by row, in float64."""
    y, start = np.zeros((len(x), w.shape[2])), 0
    for group, size in enumerate(sizes):
        for row in range(start, start + size):
            y[row] = x[row].astype(np.float64) @ w[group].astype(np.float64)
        start += size
    return y


def _by_all(x, w, sizes):
    """Every row by every matrix, of which its own is kept: plain JAX."""
    owner = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(x)), side="right")
    return jnp.einsum("ri,eio,re->ro", x, w, jax.nn.one_hot(owner, len(sizes)))


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])  # blocks, and the ragged products of jax, which run here too
@pytest.mark.parametrize("sizes", SIZES_BY_GROUP, ids=str)
@pytest.mark.parametrize("short", [5, 256])  # gradients with the last two axes swapped, and as they are
def test_grouped_products_are_those_of_a_loop(short, sizes, backend, monkeypatch):
    monkeypatch.setattr(grouped, "backend", lambda: backend)
    monkeypatch.setattr(grouped, "SHORT", short)
    monkeypatch.setattr(grouped, "BLOCKS", (2, 3))
    rng = np.random.default_rng(0)
    x, w, slope = (rng.standard_normal(shape).astype(np.float32) for shape in ((7, 5), (3, 5, 4), (7, 4)))

    def total(x, w):
        return jnp.sum(grouped.grouped_dot(x, w, jnp.asarray(sizes, jnp.int32)) * slope)

    y = grouped.grouped_dot(jnp.asarray(x), jnp.asarray(w), jnp.asarray(sizes, jnp.int32))
    np.testing.assert_allclose(y, _by_loop(x, w, sizes), rtol=1e-5, atol=1e-5)
    dx, dw = jax.grad(total, (0, 1))(jnp.asarray(x), jnp.asarray(w))
    np.testing.assert_allclose(dx, _by_loop(slope, w.transpose(0, 2, 1), sizes), rtol=1e-5, atol=1e-5)
    start = 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        np.testing.assert_allclose(dw[group], x[rows].T @ slope[rows], rtol=1e-5, atol=1e-5)
        start += size


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("held", FORMATS)
def test_quantised_products_are_those_of_a_loop_over_rounded_matrices(held, backend, monkeypatch):
    monkeypatch.setattr(grouped, "backend", lambda: backend)
    rng = np.random.default_rng(0)
    x, w, slope = (rng.standard_normal(shape).astype(np.float32) for shape in ((7, 70), (3, 70, 4), (7, 4)))
    values, scales = (np.stack(arrays) for arrays in zip(*(quantize(matrix, held) for matrix in w), strict=True))
    rounded = Quantized(jnp.asarray(values), jnp.asarray(scales), held, 70)
    dense, sizes = np.asarray(rounded.dense(np.float32, 1)), [3, 0, 2]
    assert 0.001 < np.abs(dense - w).max() < 0.5
    y, slopes = jax.vjp(lambda x: grouped.grouped_dot(x, rounded, jnp.asarray(sizes, jnp.int32)), jnp.asarray(x))
    np.testing.assert_allclose(y, _by_loop(x, dense, sizes), rtol=1e-5, atol=1e-5)
    (dx,) = slopes(jnp.asarray(slope))
    np.testing.assert_allclose(dx, _by_loop(slope, dense.transpose(0, 2, 1), sizes), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "held"), [("mixtral", "int8"), ("gpt_oss", "nf4")])
def test_a_quantised_base_with_adapters(family, held, tmp_path):
    """Read from files it is its rounded values: logits, and gradients of adapters."""
    mj.save_pretrained(ours(family, nnx.Rngs(0), num_hidden_layers=1), tmp_path / "model")
    plain, model = (mj.load_pretrained(tmp_path / "model", dtype="float32", quantize=how)[0] for how in ("none", held))
    spread, _ = mj.load_pretrained(
        tmp_path / "model",
        dtype="float32",
        quantize=held,
        shardings=lambda shapes: base_shardings(make_mesh(1, 2, 2), shapes),
    )
    copy = quantized_copy(plain, held)
    for other in (copy, spread):
        jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(other))
    ids, gradients, logits = tokens(), [], []
    for each in (model, rounded_copy(plain, held)):
        mj.attach(each, mj.LoRAConfig(rank=3), rngs=nnx.Rngs(1))
        fill_randomly(each)
        graphdef, adapters, frozen = mj.partition(each)

        def loss(adapters, graphdef=graphdef, frozen=frozen):
            y = nnx.merge(graphdef, adapters, frozen)(ids)
            return jnp.mean(jnp.square(y)), y

        (_, y), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapters)
        gradients.append(slopes)
        logits.append(y)
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *gradients)


def test_frozen_bfloat16_kernels_are_never_promoted():
    x, w = jnp.ones((64, 12), jnp.bfloat16), jnp.ones((4, 12, 24), jnp.bfloat16)

    def total(x):
        return jnp.sum(grouped.grouped_dot(x, w, jnp.full(4, 16, jnp.int32)))

    program = str(jax.make_jaxpr(jax.grad(total))(x))
    assert "f32[4,12,24]" not in program and "f32[12,24]" not in program
    assert "bf16[12,24]" in program  # one expert's kernel, as it is stored


@pytest.mark.parametrize("normalize", [True, False])
def test_routing_is_that_of_a_loop(normalize):
    scores = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    weights, experts = routed(jnp.asarray(scores), 3, normalize)
    for row, (weight, expert) in enumerate(zip(weights, experts, strict=True)):
        best = sorted(range(5), key=lambda e: -scores[row, e])[:3]
        shares = np.exp(scores[row].astype(np.float64))
        shares = shares / (shares[best].sum() if normalize else shares.sum())
        assert list(expert) == best
        np.testing.assert_allclose(weight, shares[best], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_is_the_same_whatever_else_is_in_the_batch(family):
    """None is dropped, and examples packed into a row don't see each other."""
    model, ids = ours(family, nnx.Rngs(0)), tokens(1, 20)
    segments = np.array([[1] * 9 + [2] * 8 + [0] * 3])
    packed = np.asarray(model(ids, segments))
    for here in (slice(0, 9), slice(9, 17)):
        np.testing.assert_allclose(packed[:, here], model(ids[:, here]), rtol=2e-5, atol=2e-5)


QUICK = {("mora", "qwen3_moe"), ("lora", "gpt_oss")}


@pytest.mark.parametrize(
    ("method", "family"),
    [
        pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)
        for pair in itertools.product(("lora", "mora"), FAMILIES)
    ],
)
def test_adapters_on_experts(family, method, monkeypatch):
    """A fresh one changes nothing, gradients are those that jax finds of plain products, and merging is the same."""
    model, ids = ours(family, nnx.Rngs(0)), tokens()
    before = np.asarray(model(ids))
    config = mj.LoRAConfig(rank=3) if method == "lora" else mj.MoRAConfig(rank=2, kind="rotation")
    report = mj.attach(model, config, rngs=nnx.Rngs(1))
    assert report.experts is not None and report.experts[0] == report.experts[1] > 0
    np.testing.assert_array_equal(model(ids), before)
    fill_randomly(model)
    after = np.asarray(model(ids))
    assert np.abs(after - before).max() > 0.1
    graphdef, adapters, frozen = mj.partition(model)

    def loss(adapters):
        return jnp.mean(jnp.square(nnx.merge(graphdef, adapters, frozen)(ids)))

    gradients = jax.grad(loss)(adapters)
    monkeypatch.setattr(expert_projection, "grouped_dot", _by_all)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradients, jax.grad(loss)(adapters)
    )
    monkeypatch.undo()
    mj.merge(model)
    np.testing.assert_allclose(model(ids), after, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        mj.RsLoRAConfig(rank=2),
        mj.LoRAFAConfig(rank=2),
        mj.PiSSAConfig(rank=2),
        mj.LoRAConfig(rank=2, rank_pattern={r"layers\.1\..*": 3}),
        mj.MoRAConfig(rank=2, kind="sharing"),
    ],
    ids=lambda config: type(config).__name__,
)
def test_relatives_of_lora_on_experts(config):
    model, ids = ours("qwen3_moe", nnx.Rngs(0)), tokens()
    before = np.asarray(model(ids))
    mj.attach(model, config, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(model(ids), before, rtol=1e-5, atol=1e-5)
    fill_randomly(model)
    after = np.asarray(model(ids))
    assert np.abs(after - before).max() > 0.01
    mj.merge(model)
    np.testing.assert_allclose(model(ids), after, rtol=1e-4, atol=1e-4)


def test_sums_of_experts_in_bfloat16_are_near_float32():
    model, ids = ours("gpt_oss", nnx.Rngs(0)), tokens()
    wide = np.asarray(model(ids))
    graphdef, state = nnx.split(model)
    narrow = nnx.merge(graphdef, jax.tree.map(lambda a: a.astype(jnp.bfloat16), state))
    narrow.dtype = jnp.dtype("bfloat16")
    assert np.median(np.abs(np.asarray(narrow(ids)) - wide)) < 0.03 * np.abs(wide).max()


@pytest.mark.parametrize(
    "config, message",
    [
        (mj.DoRAConfig(rank=2), "DoRA would need the norms"),
        (mj.IA3Config(), "ia3 has no form for .*experts"),
        (mj.ReMoRAConfig(rank=2), "remora has no form for"),
        (mj.LoRAConfig(rank=2, targets=("gate_up_proj", "gate_proj")), "'gate_up_proj' matches no layer"),
    ],
    ids=str,
)
def test_methods_without_a_form_are_refused(config, message):
    model = ours("qwen3_moe", nnx.Rngs(0))
    before = jax.tree.leaves(nnx.state(model))
    with pytest.raises(ValueError, match=message):
        mj.attach(model, config, rngs=nnx.Rngs(0))
    assert len(jax.tree.leaves(nnx.state(model))) == len(before)


def test_passed_over_experts_are_said():
    model = ours("qwen3_moe", nnx.Rngs(0))
    with pytest.warns(UserWarning, match="no expert carries an adapter, and experts hold 65 %"):
        report = mj.attach(model, mj.LoRAConfig(rank=2, targets=("q_proj", "v_proj")), rngs=nnx.Rngs(0))
    said = " ".join(str(report).split())
    assert "experts: adapters on 0 of their 34,560 parameters (0 %)" in said
    assert "the router of experts, which stays as it is" in said


@pytest.mark.parametrize(
    "family, targets, parts",
    [
        ("qwen3_moe", ("gate_proj",), {"gate_proj"}),
        ("qwen3_moe", ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), {"gate_up_proj", "down_proj"}),
        ("mixtral", ("gate_proj", "up_proj", "down_proj"), {"w1", "w2", "w3"}),
        ("mixtral", ("w2", "gate_up_proj"), {"w2", "gate_up_proj"}),
        ("gpt_oss", r".*experts\..*", {"gate_up_proj", "down_proj"}),
        ("gpt_oss", ("up_proj",), {"up_proj"}),
    ],
)
def test_targets_name_one_matrix_or_two(family, targets, parts):
    model = ours(family, nnx.Rngs(0))
    report = mj.attach(model, mj.LoRAConfig(rank=2, targets=targets), rngs=nnx.Rngs(0))
    assert {match.path.rpartition(".")[2] for match in report.matches} == parts


@pytest.mark.parametrize(
    "targets, dense, experts",
    [
        (("gate_proj", "down_proj"), {"gate_proj", "down_proj"}, set()),
        (r".*\.(up|down)_proj", {"up_proj", "down_proj"}, set()),
        (("experts.gate_up_proj", "experts.down_proj"), set(), {"gate_up_proj", "down_proj"}),
        (("up_proj", "experts.up_proj"), {"up_proj"}, {"up_proj"}),
        (r".*layers\.1\.experts\.down_proj\.[0-3]", set(), {"down_proj"}),
    ],
)
@pytest.mark.filterwarnings("ignore:no expert carries an adapter")
def test_plain_names_are_those_of_a_dense_mlp_beside_experts(targets, dense, experts):
    model = ours("gemma4_text", nnx.Rngs(0))
    report = mj.attach(model, mj.LoRAConfig(rank=2, targets=targets), rngs=nnx.Rngs(0))
    paths = [match.path.split(".") for match in report.matches]
    assert {path[-1] for path in paths if "mlp" in path} == dense
    assert {path[path.index("experts") + 1] for path in paths if "experts" in path} == experts


def test_the_parameters_that_peft_targets_are_targets():
    config = mj.LoRAConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    assert config.targets == ("q_proj", "mlp.experts.down_proj")
    assert mj.LoRAConfig(target_parameters=["experts.gate_up_proj"]).targets == ("experts.gate_up_proj",)
    with pytest.raises(TypeError, match="target_parameters is a list beside a list of targets"):
        mj.LoRAConfig(targets="all-linear", target_parameters=["experts.down_proj"])


def test_what_is_not_supported_is_said():
    with pytest.raises(mj.InputError, match="num_experts_per_tok .9. is more than num_local_experts .5."):
        ours("mixtral", None, num_experts_per_tok=9)
    with pytest.raises(mj.InputError, match="top_k_experts .9. is more than num_experts .6."):
        ours("gemma4_text", None, top_k_experts=9)
    with pytest.raises(mj.InputError, match="mlp_only_layers must be a list of layer numbers"):
        ours("qwen3_moe", None, mlp_only_layers=["1"])


@pytest.mark.peers
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_generation_are_those_of_transformers(family, tmp_path):
    from tests.models.tiny_experts import torch, torch_model
    from tests.models.tiny_torch import hf_logits

    reference = torch_model(family)
    reference.save_pretrained(tmp_path)
    model, _ = mj.load_pretrained(tmp_path, dtype="float32")
    ids = tokens()
    np.testing.assert_allclose(model(ids), hf_logits(reference, ids), rtol=1e-4, atol=1e-4)
    prompts = [list(map(int, row)) for row in tokens(2, 5)]
    found = Generator(model).batch(prompts, 20)  # well beyond the windows
    plan = estimate_memory(Config(), reference.config.to_dict(), (1,) * 5, "tpu")
    assert plan.parameters - plan.trainable == sum(parameter.numel() for parameter in reference.parameters())
    with torch.no_grad():
        wanted = reference.generate(torch.tensor(prompts), max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert [list(map(int, row)) for row in found] == [list(map(int, row[5:])) for row in wanted]


@pytest.mark.peers
@pytest.mark.parametrize("family", FAMILIES)
def test_the_balance_is_that_of_transformers(family, tmp_path):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from tests.models.tiny_experts import torch, torch_model

    reference = torch_model(family, **({"mlp_only_layers": [1]} if family == "qwen3_moe" else {}))
    reference.save_pretrained(tmp_path)
    model, _ = mj.load_pretrained(tmp_path, dtype="float32")
    ids, mask = tokens(), np.ones((2, 23), np.int32)
    mask[0, 15:] = 0
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        found = reference(**inputs, output_router_logits=True)
        wanted = getattr(found, "aux_loss", None)
        if wanted is None:  # Gemma 4 has no such loss; its router gives probabilities
            scores = tuple(map(torch.log, found.router_logits))
            values = FAMILIES[family]
            wanted = load_balancing_loss_func(
                scores, values["num_experts"], values["top_k_experts"], inputs["attention_mask"]
            )
    hidden, found = model.forward(ids, mask, balanced=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_array_equal(hidden, model.forward(ids, mask))
    # Packed: both texts in one row count as they do in two.
    packed = np.concatenate([ids[:1, :15], ids[1:]], axis=1)
    _, again = model.forward(packed, np.repeat([[1, 2]], (15, 23), axis=1), balanced=True)
    np.testing.assert_allclose(again, wanted, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no expert carries an adapter")
@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_balance_has_the_gradient_of_differences(remat):
    model = ours("qwen3_moe", nnx.Rngs(0), mlp_only_layers=[1])
    model.remat = remat
    mj.attach(model, mj.LoRAConfig(rank=2, targets=("q_proj",)), rngs=nnx.Rngs(0))
    fill_randomly(model)
    graphdef, adapters, frozen = mj.partition(model)

    @jax.jit
    def balance(adapters):
        return nnx.merge(graphdef, adapters, frozen).forward(tokens(), balanced=True)[1]

    slope = jax.grad(balance)(adapters)
    # So short that no token changes its experts.
    step = jax.tree.map(lambda leaf: 2e-4 * leaf / jnp.linalg.norm(leaf), slope)
    found = balance(jax.tree.map(jnp.add, adapters, step)) - balance(jax.tree.map(jnp.subtract, adapters, step))
    wanted = 2 * sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(step), strict=True))
    assert wanted > 0
    np.testing.assert_allclose(found, wanted, rtol=0.02)


@pytest.mark.peers
@pytest.mark.parametrize(
    "family, changes",
    [
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"mlp_only_layers": [1]}),
        ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}),
        ("mixtral", {"sliding_window": None}),
    ],
)
def test_other_settings(family, changes, tmp_path):
    from tests.models.tiny_experts import torch_model
    from tests.models.tiny_torch import hf_logits

    reference = torch_model(family, **changes)
    reference.save_pretrained(tmp_path)
    model, _ = mj.load_pretrained(tmp_path, dtype="float32")
    np.testing.assert_allclose(model(tokens()), hf_logits(reference, tokens()), rtol=1e-4, atol=1e-4)
    assert (SIZES | changes)["num_hidden_layers"] == model.config.num_layers


@pytest.mark.peers
def test_mxfp4_files_are_read_as_transformers_reads_them(tmp_path):
    """Random bytes: every code and many exponents."""
    import json

    from safetensors.numpy import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    from tests.models.tiny_experts import saved, torch

    folder = saved(tmp_path, "gpt_oss", intermediate_size=32)
    tensors, rng, wanted = load_file(folder / "model.safetensors"), np.random.default_rng(0), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8)
        scales = rng.integers(110, 128, (experts, outputs, inputs // 32)).astype(np.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        dense = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales)).float().numpy()
        wanted[name] = dense if dense.shape == (experts, inputs, outputs) else dense.transpose(0, 2, 1)
    save_file(tensors, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}))
    for dtype in ("bfloat16", "float32"):
        model, _ = mj.load_pretrained(folder, dtype=dtype)
        # Then as saved without the head's class around them.
        save_file(
            {name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors"
        )
        for part in ("gate_up_proj", "down_proj"):
            kernel = np.asarray(getattr(model.layers.mlp, part).kernel[...], np.float32)
            for layer in range(3):
                dense = wanted[f"model.layers.{layer}.mlp.experts.{part}"]
                np.testing.assert_array_equal(kernel[layer].reshape(dense.shape), dense)
    mj.save_pretrained(model, tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    again, _ = mj.load_pretrained(tmp_path / "dense", dtype="float32")
    np.testing.assert_array_equal(again(tokens()), model(tokens()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, per_token, sizes",
    [
        ("qwen3_moe", "num_experts_per_tok", 3 * (32 + 256)),
        ("gemma4_text", "top_k_experts", (32 + 2 * 256) + (256 + 32)),  # one A for gate and up
    ],
)
def test_plans_count_the_experts_that_a_token_has(family, per_token, sizes):
    values = SIZES | FAMILIES[family] | {"architectures": [ARCHITECTURES[family]], "pad_token_id": None}
    values |= {"num_experts": 8, "moe_intermediate_size": 256, "norm_topk_prob": True}

    def flops(count: int) -> float:
        return estimate_memory(Config(), values | {per_token: count}, (1,) * 5, "tpu").flops

    rows = 6 * Config().train.batch_size * Config().data.max_length  # six experts more for each token
    # Three matrices of the base forward and backward, their factors for the gradients of these as well; three layers.
    wanted = 3 * 2 * rows * (2 * 3 * 32 * 256 + 3 * sizes * mj.LoRAConfig().rank)
    np.testing.assert_allclose(flops(8) - flops(2), wanted, rtol=0.01)


def test_flops_of_a_run_count_them_beside_a_dense_mlp():
    def body(count: int) -> int:
        model = ours("gemma4_text", None, top_k_experts=count)
        return StepFlops.of(model.config, {}, flat_arrays(nnx.state(model, nnx.Param)), [23]).body

    assert body(6) - body(2) == 4 * 3 * (3 * 32 * 20)  # of four experts in three layers three matrices
