"""AdaLoRA's budget in training: ranks fall to their end, runs that are cut short go on bit for bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import mora_jax as mj
from mora_jax.adapters.config import AdaLoRAConfig
from mora_jax.adapters.methods.adalora import existing, orthogonality
from mora_jax.adapters.sites import adapted_sites
from mora_jax.errors import InputError
from mora_jax.training import loop
from mora_jax.training.adalora import RankBudget
from mora_jax.training.config.schema import AdapterConfig, adapter_config
from tests.training.test_loop import ROWS, Interrupting, config, inputs as inputs, metrics, quiet

RUN = {
    "adapter__method": "adalora",
    "adapter__rank": 3,
    "adapter__target_rank": 1,
    "adapter__tinit": 2,
    "adapter__tfinal": 2,
    "adapter__delta_t": 2,
    "adapter__targets": ("q_proj", "down_proj"),
    "adapter__dropout": 0.0,
    "train__steps": 8,
    "train__save_every": 3,
    "train__log_every": 1,
}


@pytest.fixture(scope="module")
def unbroken(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "adalora"
    assert loop.train(config(inputs, out, **RUN), quiet()) == 0
    return out


@pytest.mark.slow
def test_ranks_fall_to_their_end_and_are_written(unbroken):
    rows = [row for row in metrics(unbroken) if "mean_rank" in row]
    ranks = [row["mean_rank"] for row in rows]
    assert ranks[:2] == [3, 3] and ranks[-3:] == [1, 1, 1] and sorted(ranks, reverse=True) == ranks
    assert all(row["penalty"] > 0 for row in rows) and rows[-1]["penalty"] < rows[0]["penalty"]
    assert json.loads((unbroken / "summary.json").read_text())["compilations"] == 1
    fields = json.loads((unbroken / "adapter" / "adapter_config.json").read_text())
    assert (fields["total_step"], fields["target_r"], fields["init_r"], fields["deltaT"]) == (8, 1, 3, 2)
    tensors = load_file(unbroken / "adapter" / "adapter_model.safetensors")
    left = {name: tensor.shape[0] for name, tensor in tensors.items() if "lora_E" in name}
    assert sum(left.values()) == len(left) and sum(map(sum, fields["rank_pattern"].values())) == len(left)
    assert all((tensors[name] != 0).all() for name in left)


def test_a_killed_run_resumes_bit_for_bit(inputs, unbroken, tmp_path):
    def die():
        raise MemoryError("as good as a kill: nothing after this line runs")

    out = tmp_path / "run"
    with pytest.raises(MemoryError):
        loop.train(config(inputs, out, **RUN), Interrupting(5, die))
    assert loop.resume(str(out), quiet()) == 0
    assert metrics(out) == metrics(unbroken)
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (unbroken / name).read_bytes()


def test_the_stage_zeroes_values_and_leaves_other_updates_alone():
    draw = np.random.default_rng(0)
    shapes = {"x.lora_a": (6, 4), "x.lora_e": (4,), "x.lora_b": (4, 5), "x.bias": (5,)}
    params = {name: jnp.asarray(draw.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}
    method = AdaLoRAConfig(rank=4, target_rank=1, total_steps=4)
    budget = RankBudget(method, existing(params, {"x.scaling": np.float32(1.0)}))
    plain, staged = optax.adamw(0.1), budget.around(optax.adamw(0.1))
    plain_update, update = jax.jit(plain.update), jax.jit(staged.update)
    plain_state, state = plain.init(params), staged.init(params)
    for step in range(1, 5):
        slopes = {name: jnp.asarray(draw.standard_normal(shape).astype(np.float32)) for name, shape in shapes.items()}
        expected, plain_state = plain_update(slopes, plain_state, params)
        updates, state = update(slopes, state, params)
        moved = optax.apply_updates(params, updates)
        kept = np.asarray(state.importance.kept["x.lora_e"]) == 1
        assert kept.sum() == round(budget.mean_rank(step))
        assert not np.asarray(moved["x.lora_e"])[~kept].any()
        values, right = np.asarray(updates["x.lora_e"]), np.asarray(expected["x.lora_e"])
        np.testing.assert_allclose(values[kept], right[kept], rtol=1e-5)
        for name in ("x.lora_a", "x.lora_b", "x.bias"):
            np.testing.assert_allclose(updates[name], expected[name], rtol=1e-5)
        params = moved
    slope, expected = jax.grad(budget.penalty)(params), jax.grad(orthogonality)(params, {"x.lora_e": np.ones(4, bool)})
    np.testing.assert_allclose(slope["x.lora_a"], 0.5 * expected["x.lora_a"], rtol=1e-6)
    assert RankBudget.of(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), params, {}) is None


def test_settings():
    assert adapter_config(AdapterConfig(method="adalora"), 40).total_steps == 40
    assert adapter_config(AdapterConfig(method="adalora", rank=6), 40).target_rank == 4
    with pytest.raises(InputError, match=r"adapter: tinit \+ tfinal is 30, which must be less than total_steps 20"):
        adapter_config(AdapterConfig(method="adalora", tinit=10, tfinal=20), 20)


def test_a_run_goes_on_from_a_pruned_adapter_with_its_own_schedule(inputs, unbroken, tmp_path):
    more = {"adapter__path": str(unbroken / "adapter"), "adapter__tinit": 0, "train__steps": 4, "train__save_every": 0}
    assert loop.train(config(inputs, tmp_path / "run", **(RUN | more)), quiet()) == 0
    before, after = (
        json.loads((run / "adapter" / "adapter_config.json").read_text()) for run in (unbroken, tmp_path / "run")
    )
    assert (after["total_step"], after["tinit"], after["target_r"], after["init_r"]) == (4, 0, 1, 3)
    for name, mask in after["rank_pattern"].items():
        assert not any(now and not then for now, then in zip(mask, before["rank_pattern"][name], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adalora", "vera", "ia3", "bitfit"])
def test_a_mesh_changes_nothing(inputs, tmp_path, method):
    settings = (RUN if method == "adalora" else {}) | {"adapter__method": method, "adapter__dropout": 0.0}
    losses = []
    for name, mesh in {"one": {}, "cut": {"mesh__data": 1, "mesh__fsdp": 2, "mesh__tensor": 2}}.items():
        run = {"train__log_every": 1, "train__save_every": 0} | settings | mesh
        assert loop.train(config(inputs, tmp_path / name, **run), quiet()) == 0
        losses.append([row["loss"] for row in metrics(tmp_path / name) if "loss" in row])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    one, cut = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "cut"))
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in cut.items()}


def test_a_model_that_carries_an_adalora_is_trained_by_the_runs_schedule(inputs):
    model, tokenizer = mj.load_pretrained(inputs / "model", dtype="float32")
    method = AdaLoRAConfig(rank=3, target_rank=1, targets=("q_proj", "down_proj"), tinit=1, tfinal=1, total_steps=500)
    mj.attach(model, method, rngs=nnx.Rngs(0))
    settings = {"tokenizer": tokenizer, "steps": 6, "display": quiet()}
    result = mj.finetune(model, ROWS, config={"adapter.delta_t": 1, "mesh.data": 1}, **settings)
    assert [row["mean_rank"] for row in result.metrics][::5] == [3, 1]
    assert {site.adapter.config.total_steps for site in adapted_sites(model)} == {6}
    with pytest.raises(InputError, match=r"adapter: tinit \+ tfinal is 2, which must be less than total_steps 2"):
        mj.finetune(model, ROWS, config={"mesh.data": 1}, **settings | {"steps": 2})
