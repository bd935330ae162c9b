"""What a step minimises: normalisers, packs, NEFTune and the divergence, against loops over tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import read_config
from mora_jax.training import step as step_module
from mora_jax.training.build_step import base_structure
from mora_jax.training.neftune import embedding_noise
from mora_jax.training.sharding.mesh import make_mesh
from mora_jax.training.sharding.runner import JitRunner, PmapRunner
from mora_jax.training.state import Structure, flat_arrays, initial_state
from mora_jax.training.step import StepConfig, make_step
from tests.models.tiny import LLAMA, fill_randomly

SMALL = LLAMA | {"num_hidden_layers": 1}
# Two of the seven matrices, of attention and of the MLP, whose gradients are large: rounding is judged by them.
SOME = ("v_proj", "down_proj")
CONFIGS = {
    "lora": mj.LoRAConfig(rank=2, targets=SOME),
    "mora": mj.MoRAConfig(rank=2, kind="rotation", targets=SOME),
    "full": mj.FullConfig(),
    # One layer of two, and one of the three matrices that are fused.
    "partial": mj.LoRAConfig(rank=2, targets=r".*layers\.1\.self_attn\.v_proj"),
    "head": mj.LoRAConfig(rank=2, targets=("lm_head", "q_proj")),
    "tied table": mj.LoRAConfig(rank=2, targets=("embed_tokens", "q_proj")),
}
LENGTHS = [3, 16, 5, 2, 9, 11, 4, 14]
LENGTH = 16


def base_model(**fields) -> Decoder:
    return Decoder(read_config(SMALL | fields, "config.json"), dtype=jnp.float32, rngs=nnx.Rngs(0))


def model_for(method: str, *, fresh: bool = False, **fields) -> Decoder:
    model = base_model(**fields)
    mj.attach(model, CONFIGS[method], rngs=nnx.Rngs(1))
    if method != "full" and not fresh:
        fill_randomly(model)
    return model


@dataclasses.dataclass
class Example:
    """Tokens with their weights; those of the first token are there to be left out."""

    ids: np.ndarray
    weights: np.ndarray
    kl_weights: np.ndarray


def examples(lengths=LENGTHS, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        weights = rng.random(length) * (rng.random(length) > 0.3)
        kl_weights = rng.random(length) * (rng.random(length) > 0.5)
        weights[0], kl_weights[0], weights[-1] = 7.0, 5.0, 1.0
        ids = rng.integers(0, SMALL["vocab_size"], length).astype(np.int32)
        made.append(Example(ids, weights.astype(np.float32), kl_weights.astype(np.float32)))
    return made


def lay(rows: list[list[Example]], length: int, counts: bool = True) -> dict[str, np.ndarray]:
    """Examples side by side in rows; every example counts 1 in the normaliser."""
    batch = {name: np.zeros((len(rows), length), np.int32) for name in ("input_ids", "segment_ids", "positions")}
    batch |= {name: np.zeros((len(rows), length), np.float32) for name in ("weights", "kl_weights")}
    for number, members in enumerate(rows):
        start = 0
        for place, example in enumerate(members, start=1):
            here = slice(start, start + len(example.ids))
            batch["input_ids"][number, here], batch["segment_ids"][number, here] = example.ids, place
            batch["positions"][number, here] = np.arange(len(example.ids))
            batch["weights"][number, here] = example.weights
            batch["kl_weights"][number, here] = example.kl_weights
            start = here.stop
    if counts:
        batch["counts"] = np.array([len(members) for members in rows], np.float32)
    return batch


def run(model, batch, *, micro_batches=1, devices=1, pmap=False, **options):
    """One step of plain descent at rate 1; returns the metrics and the gradient."""
    graphdef, adapters, frozen = mj.partition(model)
    step = make_step(
        Structure(graphdef, adapters, frozen),
        optax.sgd(1.0),
        optax.constant_schedule(1.0),
        StepConfig(
            shards=1 if pmap else devices,
            axis_name="data" if pmap else None,
            base=base_structure(model) if options.get("kl_weight") else None,
            **options,
        ),
    )
    runner = PmapRunner(step, devices) if pmap else JitRunner(step, make_mesh(devices))
    arrays = flat_arrays(adapters)
    # A copy: the state is donated, and the model is used again.
    state = runner.place(initial_state(jax.tree.map(jnp.copy, arrays), optax.sgd(1.0), 0))
    split = {name: value.reshape(micro_batches, -1, *value.shape[1:]) for name, value in batch.items()}
    state, metrics = runner(state, runner.place(flat_arrays(frozen)), runner.place_batch(split))
    assert runner.compilations == 1
    after = runner.unreplicate(state).adapters
    gradient = {name: np.asarray(value) - np.asarray(after[name]) for name, value in arrays.items()}
    return jax.device_get(metrics), gradient


def assert_same(found, expected, message: str) -> None:
    """To 1e-6 of the largest entry: float32, summed in another order."""
    for name in ("loss", "kl", "normalizer", "grad_norm"):
        wanted = getattr(expected[0], name)
        np.testing.assert_allclose(getattr(found[0], name), wanted, rtol=2e-6, atol=1e-8, err_msg=f"{message} {name}")
    for name in ("tokens", "trained_tokens"):
        assert getattr(found[0], name) == getattr(expected[0], name), message
    largest = max(np.abs(value).max() for value in expected[1].values())
    assert largest > 0
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=0, atol=2e-6 * largest, err_msg=f"{message} {name}")


def negative_log_likelihoods(model, example: Example) -> np.ndarray:
    """Of each token but the first, in float64, for the example alone (what follows it is never seen)."""
    logits = np.asarray(model(np.pad(example.ids, (0, LENGTH - len(example.ids)))[None]), np.float64)[0]
    found = np.zeros(len(example.ids))
    for place in range(1, len(example.ids)):
        row = logits[place - 1]
        found[place] = np.log(np.sum(np.exp(row))) - row[example.ids[place]]
    return found


@pytest.mark.parametrize(
    "method, options",
    [
        ("lora", {"counts": False}),
        pytest.param("mora", {"kl_weight": 0.7}, marks=pytest.mark.slow),
        pytest.param("full", {"divisor": 3.0}, marks=pytest.mark.slow),
    ],
)
def test_any_layout_gives_the_same_gradient(method, options):
    """One example a row or several, in micro-batches or not, on one device or four."""
    options = dict(options)
    counts = options.pop("counts", True)
    model, all_of_them = model_for(method), examples()
    alone = lay([[example] for example in all_of_them], LENGTH, counts)
    numbers = [[1], [0, 2, 3], [6, 4], [5], [7], [], [], []]
    packed = lay([[all_of_them[number] for number in row] for row in numbers], LENGTH, counts)
    longer = lay([all_of_them[:2], all_of_them[2:5], all_of_them[5:7], all_of_them[7:]], 29, counts)
    expected = run(model, alone, **options)
    assert expected[0].trained_tokens == sum(np.count_nonzero(example.weights[1:]) for example in all_of_them)
    for name, batch, split in (
        ("micro-batches", alone, {"micro_batches": 4}),
        ("packed, devices and micro-batches", packed, {"devices": 2, "micro_batches": 2}),
        ("packed longer, pmap", longer, {"devices": 2, "pmap": True, "micro_batches": 2}),
    ):
        assert_same(run(model, batch, **split, **options), expected, name)


def test_normalizers_against_loops_over_tokens():
    """As the data room prepares them: the step itself knows a sum of weights, counts and a constant."""
    model, rng = model_for("lora"), np.random.default_rng(3)
    made = examples()
    nll = [negative_log_likelihoods(model, example) for example in made]
    is_response = [rng.random(length) > 0.5 for length in LENGTHS]
    for mask in is_response:
        mask[0], mask[-1] = False, True
    sums = [sum(float(e.weights[t]) * each[t] for t in range(1, len(each))) for e, each in zip(made, nll, strict=True)]
    own_weights = [float(e.weights[1:].sum()) for e in made]
    weighted, kept = sum(sums), sum(own_weights)
    nonzero = sum(np.count_nonzero(e.weights[1:]) for e in made)
    responses = [np.count_nonzero(mask & (e.weights > 0)) for e, mask in zip(made, is_response, strict=True)]

    rows = lay([[e] for e in made], LENGTH)
    without = {name: value for name, value in rows.items() if name != "counts"}
    divided = rows["weights"] / rows["weights"][:, 1:].sum(axis=1, keepdims=True)
    for name, batch, options, expected in (
        ("token", without, {}, weighted / kept),
        ("example", rows | {"weights": divided}, {}, np.mean(np.divide(sums, own_weights))),
        ("response", rows | {"counts": np.array(responses, np.float32)}, {}, weighted / sum(responses)),
        ("nonzero", rows | {"counts": np.float32(rows["weights"][:, 1:] > 0).sum(axis=1)}, {}, weighted / nonzero),
        ("constant", rows, {"divisor": 12.5}, weighted / 12.5),
    ):
        metrics, _ = run(model, batch, **options)
        np.testing.assert_allclose(metrics.loss, expected, rtol=1e-5, err_msg=name)
        assert metrics.trained_tokens == nonzero, name
        assert metrics.kl == 0


@pytest.mark.parametrize("emptied", ["counts", "weights"])
def test_nothing_to_train_on_gives_zero_and_finite_gradients(emptied):
    batch = lay([[example] for example in examples()], LENGTH)
    batch[emptied] *= 0
    if emptied == "weights":
        del batch["counts"]
    batch["kl_weights"] *= 0
    metrics, gradient = run(model_for("lora"), batch, kl_weight=1.0)
    assert (metrics.loss, metrics.kl, metrics.grad_norm, metrics.normalizer) == (0, 0, 0, 0)
    assert all(not np.any(value) for value in gradient.values())


def test_the_first_token_of_an_example_and_padding_carry_no_loss():
    """Their weights are left out, whatever they are."""
    model, made = model_for("lora"), examples([5, 7, 4])
    batch = lay([made], 20, counts=False)
    clean = {name: value.copy() for name, value in batch.items()}
    clean["weights"][0, [0, 5, 12]] = clean["kl_weights"][0, [0, 5, 12]] = 0
    batch["weights"][0, 16:], batch["input_ids"][0, 16:] = 3.0, 9
    expected, found = run(model, clean, kl_weight=0.5), run(model, batch, kl_weight=0.5)
    assert found[0] == expected[0]
    for name, value in expected[1].items():
        np.testing.assert_array_equal(found[1][name], value)


def divergence(model, base, batch, noise=None) -> float:
    """Mean over tokens by their weight, from whole logits in float64."""
    arrays = batch["input_ids"], batch["segment_ids"], batch["positions"]
    tuned = np.asarray(model.head().logits(model.hidden(*arrays, embedding_noise=noise)), np.float64)
    frozen = np.asarray(base.head().logits(base.hidden(*arrays)), np.float64)
    total = weight = 0.0
    for row, place in zip(*np.nonzero(batch["kl_weights"]), strict=True):
        if batch["positions"][row, place] == 0:
            continue
        log_p, log_q = (z[row, place - 1] - np.log(np.sum(np.exp(z[row, place - 1]))) for z in (tuned, frozen))
        total += float(batch["kl_weights"][row, place]) * float(np.sum(np.exp(log_p) * (log_p - log_q)))
        weight += float(batch["kl_weights"][row, place])
    return total / weight


@pytest.mark.parametrize(
    "method",
    ["tied table", *(pytest.param(name, marks=pytest.mark.slow) for name in ("partial", "lora", "mora", "head"))],
)
def test_divergence_from_the_model_before_it_got_adapters(method):
    family = {"architectures": ["Gemma2ForCausalLM"], "head_dim": 8, "final_logit_softcapping": 3.0}
    fields = family | {"num_hidden_layers": 2} if method == "partial" else {}
    if method == "tied table":
        fields = {"tie_word_embeddings": True}
    model, base = model_for(method, **fields), base_model(**fields)
    batch = lay([examples([3, 10]), examples([12], seed=1)], LENGTH)
    plain, nll_gradient = run(model, batch)
    with_kl, gradient = run(model, batch, kl_weight=0.5)
    expected = divergence(model, base, batch)
    assert expected > 1e-3
    np.testing.assert_allclose(with_kl.kl, expected, rtol=1e-4)
    np.testing.assert_allclose(with_kl.loss, plain.loss + 0.5 * expected, rtol=1e-5)

    graphdef, adapters, frozen = mj.partition(model)
    arrays = batch["input_ids"], batch["segment_ids"]
    base_logits = base(*arrays)
    inside = (batch["kl_weights"] * (batch["positions"] > 0))[:, 1:]

    @jax.jit
    @jax.grad
    def dense(adapters):
        log_p = jax.nn.log_softmax(nnx.merge(graphdef, adapters, frozen)(*arrays))[:, :-1]
        log_q = jax.nn.log_softmax(base_logits)[:, :-1]
        return jnp.sum(inside * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)) / jnp.sum(inside)

    for name, wanted in flat_arrays(dense(adapters)).items():
        found = (gradient[name] - nll_gradient[name]) / 0.5
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.parametrize("method", ["lora", pytest.param("mora", marks=pytest.mark.slow)])
def test_a_fresh_adapter_diverges_nowhere(method):
    model = model_for(method, fresh=True)
    batch = lay([[example] for example in examples()], LENGTH)
    expected = run(model, batch)
    metrics, gradient = run(model, batch, kl_weight=100.0)
    assert abs(metrics.kl) < 1e-6
    largest = max(np.abs(value).max() for value in expected[1].values())
    for name, value in expected[1].items():
        np.testing.assert_allclose(gradient[name], value, rtol=0, atol=1e-4 * largest)


def test_full_fine_tuning_has_no_base_to_diverge_from():
    graphdef, adapters, frozen = mj.partition(model_for("full"))
    structure = Structure(graphdef, adapters, frozen)
    with pytest.raises(ValueError, match="full fine-tuning keeps no frozen base"):
        make_step(structure, optax.sgd(1.0), optax.constant_schedule(1.0), StepConfig(kl_weight=0.1, base=structure))
    with pytest.raises(ValueError, match="kl_weight needs the base"):
        StepConfig(kl_weight=0.1)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="divisor must be positive"):
            StepConfig(divisor=bad)


def step_noise(batch, alpha: float) -> jax.Array:
    """What the first step of seed 0 draws."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 0), step_module._NOISE)
    rows = jnp.arange(len(batch["input_ids"]))
    return embedding_noise(key, rows, jnp.asarray(batch["segment_ids"]), SMALL["hidden_size"], alpha)


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_neftune_is_the_gradient_with_that_noise(method):
    model = model_for(method)
    batch = lay([examples([3, 10]), examples([12], seed=1)], LENGTH)
    noise = step_noise(batch, 5.0)
    graphdef, adapters, frozen = mj.partition(model)
    inside = np.zeros_like(batch["weights"])
    inside[:, 1:] = batch["weights"][:, 1:] * (batch["positions"][:, 1:] > 0)

    @jax.jit
    @jax.value_and_grad
    def loss(adapters, noise):
        model = nnx.merge(graphdef, adapters, frozen)
        hidden = model.hidden(batch["input_ids"], batch["segment_ids"], embedding_noise=noise)
        logits = model.head().logits(hidden)
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch["input_ids"][:, 1:])
        return jnp.sum(each * inside[:, 1:]) / jnp.sum(batch["counts"])

    value, expected = loss(adapters, noise)
    quiet, _ = loss(adapters, 0 * noise)
    metrics, gradient = run(model, batch, neftune_alpha=5.0)
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    assert abs(metrics.loss - quiet) > 1e-3
    for name, wanted in flat_arrays(expected).items():
        np.testing.assert_allclose(gradient[name], wanted, rtol=1e-3, atol=2e-5 * np.abs(wanted).max(), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "split",
    [
        {"devices": 2, "micro_batches": 4},
        pytest.param({"devices": 2, "pmap": True, "micro_batches": 2}, marks=pytest.mark.slow),
    ],
)
def test_noise_does_not_depend_on_the_split(split):
    model = model_for("mora")
    batch = lay([[example] for example in examples()], LENGTH)
    options = {"neftune_alpha": 5.0, "kl_weight": 0.3}
    expected = run(model, batch, **options)
    # The base is compared with, without noise.
    np.testing.assert_allclose(
        expected[0].kl, divergence(model, base_model(), batch, step_noise(batch, 5.0)), rtol=1e-4
    )
    assert_same(run(model, batch, **split, **options), expected, str(split))


def test_noise_is_new_in_every_step_and_absent_without_alpha():
    graphdef, adapters, frozen = mj.partition(model_for("lora"))
    batch = {name: value[None] for name, value in lay([examples([12])], LENGTH).items()}
    state = initial_state(flat_arrays(adapters), optax.sgd(0.0), 0)

    def compiled(alpha: float):
        step = make_step(
            Structure(graphdef, adapters, frozen),
            optax.sgd(0.0),
            optax.constant_schedule(0.0),
            StepConfig(neftune_alpha=alpha),
        )
        return jax.jit(step).lower(state, flat_arrays(frozen), batch).compile()

    noisy = compiled(5.0)
    first, metrics = noisy(state, flat_arrays(frozen), batch)
    again = noisy(state, flat_arrays(frozen), batch)[1]
    second = noisy(first, flat_arrays(frozen), batch)[1]
    assert metrics.loss == again.loss
    assert abs(metrics.loss - second.loss) > 1e-4
    # Random bits are made of exclusive ors; without noise there are none.
    assert "xor" in noisy.as_text()
    assert "xor" not in compiled(0.0).as_text()
