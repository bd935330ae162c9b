"""The training step: the same update however the rows are split, on one device or four, by jit or pmap."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mora_jax as mj
from mora_jax.models.block import Block
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import read_config
from mora_jax.training.config.schema import OptimizerConfig
from mora_jax.training.optimizer import make_optimizer, make_schedule
from mora_jax.training.sharding.mesh import make_mesh
from mora_jax.training.sharding.runner import JitRunner, PmapRunner
from mora_jax.training.state import Structure, flat_arrays, initial_state
from mora_jax.training.step import StepConfig, make_step
from tests.models.tiny import LLAMA, fill_randomly
from tests.training.meshed import SIZES

CONFIGS = {
    "lora": mj.LoRAConfig(rank=2, targets=("q_proj", "up_proj", "down_proj")),
    "dropout": mj.LoRAConfig(rank=2, dropout=0.3, targets=("q_proj", "up_proj", "down_proj")),
    "mora": mj.MoRAConfig(rank=2, kind="rotation", targets=("q_proj", "up_proj", "down_proj")),
    "full": mj.FullConfig(),
}
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.01)
ROWS, LENGTH, STEPS = 8, 16, 5


def model_for(method: str, dtype=jnp.float32, layers: int = 1) -> Decoder:
    """One layer is no loop, which would compile for twice as long; test_rules.py has steps of three layers."""
    config = read_config(LLAMA | {"num_hidden_layers": layers}, "config.json")
    model = Decoder(config, dtype=dtype, rngs=nnx.Rngs(0))
    mj.attach(model, CONFIGS[method], rngs=nnx.Rngs(1))
    if method != "full":
        fill_randomly(model)
    return model


def batches() -> list[dict[str, np.ndarray]]:
    """Ragged rows, and a last batch in which three of eight rows are empty."""
    rng = np.random.default_rng(0)
    made = []
    for step in range(STEPS):
        segments = (np.arange(LENGTH)[None] < rng.integers(2, LENGTH + 1, (ROWS, 1))).astype(np.int32)
        weights = (segments * rng.random((ROWS, LENGTH)) * (rng.random((ROWS, LENGTH)) > 0.4)).astype(np.float32)
        weights[:, 0] = 0
        if step == STEPS - 1:
            segments[5:], weights[5:] = 0, 0
        ids = rng.integers(0, LLAMA["vocab_size"], (ROWS, LENGTH)).astype(np.int32)
        made.append({"input_ids": ids, "segment_ids": segments, "weights": weights})
    return made


@functools.cache
def run(method: str, *, devices: int = 1, micro_batches: int = 1, pmap: bool = False, dtype=jnp.float32):
    """Trains five steps; returns the runner, the metrics and the trained arrays."""
    graphdef, adapters, frozen = mj.partition(model_for(method, dtype))
    optimizer, schedule = make_optimizer(OPTIMIZER, STEPS), make_schedule(OPTIMIZER, STEPS)
    step = make_step(
        Structure(graphdef, adapters, frozen),
        optimizer,
        schedule,
        StepConfig(shards=1 if pmap else devices, axis_name="data" if pmap else None, dropout=method == "dropout"),
    )
    runner = PmapRunner(step, devices) if pmap else JitRunner(step, make_mesh(devices))
    state = runner.place(initial_state(flat_arrays(adapters), optimizer, 0))
    held = runner.place(flat_arrays(frozen))
    metrics = []
    for batch in batches():
        split = {name: value.reshape(micro_batches, -1, LENGTH) for name, value in batch.items()}
        state, found = runner(state, held, runner.place_batch(split))
        metrics.append([float(value) for value in jax.tree.leaves(jax.device_get(found))])
    trained = {name: np.asarray(value) for name, value in runner.unreplicate(state).adapters.items()}
    return runner, np.array(metrics), trained, held


BOTH = {"devices": 4, "micro_batches": 2}, {"devices": 2, "pmap": True, "micro_batches": 2}


@pytest.mark.parametrize(
    ("method", "splits"),
    [
        ("dropout", BOTH),
        pytest.param("mora", (*BOTH, {"micro_batches": 4}), marks=pytest.mark.slow),
        pytest.param("full", BOTH[:1], marks=pytest.mark.slow),
    ],
)
def test_any_split_gives_the_same_run(method, splits):
    # Each split is compiled, for seconds of a core: those that split twice stand for four devices alone, which
    # test_rules.py and test_loop.py have.
    _, metrics, trained, _ = run(method)
    for split in splits:
        runner, other, arrays, _ = run(method, **split)
        assert runner.compilations == 1
        np.testing.assert_allclose(other, metrics, rtol=1e-4, atol=1e-6, err_msg=str(split))
        for name, value in trained.items():
            np.testing.assert_allclose(arrays[name], value, rtol=0, atol=2e-4, err_msg=f"{split} {name}")


def test_the_model_is_put_together_once_and_only_its_layers_are_taken_apart(monkeypatch):
    graphdef, adapters, frozen = mj.partition(model_for("dropout", layers=3))
    optimizer, schedule = make_optimizer(OPTIMIZER, STEPS), make_schedule(OPTIMIZER, STEPS)
    step = make_step(Structure(graphdef, adapters, frozen), optimizer, schedule, StepConfig(dropout=True))
    state = initial_state(flat_arrays(adapters), optimizer, 0)
    merge, split = nnx.merge, nnx.split
    merged, taken_apart = [], []

    def counted_merge(*arguments):
        merged.append(type(model := merge(*arguments)))
        return model

    def counted_split(node, *filters):
        taken_apart.append(type(node))
        return split(node, *filters)

    monkeypatch.setattr(nnx, "merge", counted_merge)
    monkeypatch.setattr(nnx, "split", counted_split)
    jax.eval_shape(step, state, flat_arrays(frozen), {name: value[None] for name, value in batches()[0].items()})
    assert merged.count(Decoder) == 1
    assert taken_apart == [Block]


def test_a_process_gets_its_rows_together_with_what_places_them():
    runner = JitRunner(lambda *arguments: arguments, make_mesh(2))
    batch = {name: value[None] for name, value in batches()[0].items()}
    share = runner.share(ROWS)
    assert share.rows is None
    for placed in (share.place(batch), runner.place_batch(batch)):
        jax.tree.map(np.testing.assert_array_equal, placed, batch)
        assert placed["weights"].sharding.shard_shape((1, ROWS, LENGTH)) == (1, ROWS // 2, LENGTH)


def test_whole_arrays_under_pmap_need_no_program_of_all_devices():
    state = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.int32(7)}
    runner = PmapRunner(lambda *arguments: arguments, 4)
    placed = runner.place(state)
    assert placed["a"].shape == (4, 2, 3)
    whole = runner.unreplicate(placed)
    assert {tuple(array.devices()) for array in whole.values()} == {(jax.devices()[0],)}
    jax.tree.map(np.testing.assert_array_equal, whole, state)


def test_dropout_changes_the_run_and_every_step_draws_anew():
    plain, dropped = (run(method)[1][:, 0] for method in ("lora", "dropout"))
    assert np.abs(plain - dropped).min() > 1e-4


def test_first_loss_and_gradient_against_the_formula():
    model = model_for("lora")
    batch = batches()[0]
    graphdef, adapters, frozen = mj.partition(model)

    @jax.jit
    @jax.value_and_grad
    def loss(adapters):
        logits = nnx.merge(graphdef, adapters, frozen)(batch["input_ids"], batch["segment_ids"])
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch["input_ids"][:, 1:])
        return jnp.sum(each * batch["weights"][:, 1:]) / jnp.sum(batch["weights"][:, 1:])

    value, gradient = loss(adapters)
    _, metrics, _, _ = run("lora")
    np.testing.assert_allclose(metrics[0, 0], value, rtol=1e-5)
    np.testing.assert_allclose(metrics[0, 1], optax.tree.norm(gradient), rtol=1e-4)
    assert metrics[0, 3] == batch["segment_ids"].sum()
    assert metrics[0, 4] == (batch["weights"][:, 1:] > 0).sum()


def test_only_adapters_change_and_the_base_stays_where_it_is():
    model = model_for("lora")
    before = {name: np.asarray(value) for name, value in flat_arrays(mj.partition(model)[1]).items()}
    frozen = {name: np.asarray(value) for name, value in flat_arrays(mj.partition(model)[2]).items()}
    _, _, trained, held = run("lora")
    assert set(trained) == set(before)
    assert all(name.rpartition(".")[2] in ("lora_a", "lora_b") for name in trained)
    assert all(np.abs(trained[name] - before[name]).max() > 0 for name in trained)
    for name, value in held.items():
        np.testing.assert_array_equal(value, frozen[name], err_msg=name)


def test_a_new_shape_is_a_second_compilation():
    runner, _, _, held = run("lora")
    before = runner.compilations
    graphdef, adapters, frozen = mj.partition(model_for("lora"))
    state = runner.place(initial_state(flat_arrays(adapters), make_optimizer(OPTIMIZER, STEPS), 0))
    longer = {name: np.pad(value, ((0, 0), (0, 8)))[None] for name, value in batches()[0].items()}
    runner(state, held, runner.place_batch(longer))
    assert runner.compilations == before + 1


def test_a_step_without_weights_changes_nothing():
    graphdef, adapters, frozen = mj.partition(model_for("lora"))
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0)
    optimizer = make_optimizer(config, STEPS)
    step = make_step(Structure(graphdef, adapters, frozen), optimizer, make_schedule(config, STEPS))
    batch = {name: value[None] for name, value in batches()[0].items()}
    batch["weights"] = batch["weights"] * 0
    arrays = flat_arrays(adapters)
    state, metrics = jax.jit(step)(initial_state(arrays, optimizer, 0), flat_arrays(frozen), batch)
    assert float(metrics.loss) == 0 and float(metrics.grad_norm) == 0
    for name, value in state.adapters.items():
        np.testing.assert_array_equal(value, arrays[name])


def test_bfloat16_base_keeps_float32_masters():
    _, metrics, trained, held = run("lora", dtype=jnp.bfloat16)
    _, exact, _, _ = run("lora")
    assert all(value.dtype == np.float32 for value in trained.values())
    assert held["layers.mlp.down_proj.kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(metrics[:, 0], exact[:, 0], rtol=0.05)


def test_schedules():
    linear = make_schedule(OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=4), 14)
    np.testing.assert_allclose([linear(i) for i in (0, 1, 3, 4, 9, 13)], [0.25, 0.5, 1, 1, 0.5, 0.1], rtol=1e-6)
    cosine = make_schedule(OptimizerConfig(learning_rate=2.0, schedule="cosine"), 10)
    np.testing.assert_allclose([cosine(0), cosine(5)], [2.0, 1.0], rtol=1e-6)
    constant = make_schedule(OptimizerConfig(learning_rate=2.0, schedule="constant", warmup_steps=2), 10)
    np.testing.assert_allclose([constant(i) for i in (0, 1, 9)], [1.0, 2.0, 2.0], rtol=1e-6)


def test_weight_decay_leaves_norms_and_biases_alone():
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5, clip_norm=None), 10)
    arrays = {
        "layers.mlp.down_proj.kernel": jnp.ones((2, 3, 3)),
        "layers.mlp_norm.weight": jnp.ones((2, 3)),
        "layers.self_attn.qkv_proj.bias": jnp.ones((2, 3)),
        "norm.weight": jnp.ones(3),
    }
    zero = jax.tree.map(jnp.zeros_like, arrays)
    updates, _ = optimizer.update(zero, optimizer.init(arrays), arrays)
    moved = {name for name, value in updates.items() if np.any(value)}
    assert moved == {"layers.mlp.down_proj.kernel"}


@pytest.mark.slow
def test_the_balance_of_experts_is_part_of_the_loss():
    values = SIZES["experts"] | {"num_hidden_layers": 1}
    model = Decoder(read_config(values, "config.json"), rngs=nnx.Rngs(0))
    mj.attach(model, CONFIGS["lora"], rngs=nnx.Rngs(1))
    fill_randomly(model)
    graphdef, adapters, frozen = mj.partition(model)
    optimizer, schedule = make_optimizer(OPTIMIZER, STEPS), make_schedule(OPTIMIZER, STEPS)

    def metrics(micro_batches: int, **settings) -> dict[str, float]:
        step = make_step(Structure(graphdef, adapters, frozen), optimizer, schedule, StepConfig(**settings))
        runner = JitRunner(step, make_mesh(settings.get("shards", 1)))
        state = runner.place(initial_state(flat_arrays(adapters), optimizer, 0))
        batch = {name: value.reshape(micro_batches, -1, LENGTH) for name, value in batches()[0].items()}
        _, found = runner(state, runner.place(flat_arrays(frozen)), runner.place_batch(batch))
        return {"loss": float(found.loss), **{name: float(value) for name, value in found.of_loss.items()}}

    plain, balanced = metrics(2), metrics(2, balance_weight=0.3)
    rows = batches()[0]["input_ids"], batches()[0]["segment_ids"]
    halves = [model.forward(*(array[part] for array in rows), balanced=True)[1] for part in (slice(4), slice(4, 8))]
    np.testing.assert_allclose(balanced["balance"], np.mean(halves), rtol=1e-5)
    np.testing.assert_allclose(balanced["loss"] - plain["loss"], 0.3 * balanced["balance"], rtol=1e-4)
    on_devices = metrics(1, balance_weight=0.3, shards=4)
    np.testing.assert_allclose(on_devices["balance"], model.forward(*rows, balanced=True)[1], rtol=1e-5)
