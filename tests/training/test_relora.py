"""Restarts: what one does to base, adapters and moments; the jagged schedule; runs that are cut short around one."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import mora_jax as mj
from mora_jax.adapters.config import ReLoRAConfig, ReMoRAConfig
from mora_jax.adapters.methods.mora import SHARED
from mora_jax.errors import InputError
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import read_config
from mora_jax.training import loop
from mora_jax.training.config.load import config_from_dict
from mora_jax.training.config.schema import OptimizerConfig
from mora_jax.training.optimizer import make_optimizer, make_schedule
from mora_jax.training.relora import Restarter, Restarts, prune_moments, renewed
from mora_jax.training.state import Structure, flat_arrays, initial_state
from tests.adapters import oracle
from tests.models.tiny import LLAMA, fill_randomly, random_ids
from tests.training.test_loop import Interrupting, config, inputs as inputs, metrics, quiet

LAYERS = (0, 2)  # of three: the restart must leave the other one alone
# Two matrices that share a kernel with others, and one alone; the restart must leave the rest alone.
SOME = {"targets": ("q_proj", "v_proj", "down_proj"), "restart_warmup": 0}
CONFIGS = {
    "relora": ReLoRAConfig(rank=2, alpha=6.0, prune=0.75, layers_to_transform=LAYERS, **SOME),
    "remora": ReMoRAConfig(rank=2, prune=0.75, layers_to_transform=LAYERS, **SOME),
}
KERNELS = ("layers.mlp.down_proj.kernel", "layers.self_attn.qkv_proj.kernel")


class Restartable:
    """A tiny model with random adapters and moments, and its restart."""

    def __init__(self, config, dtype=jnp.float32):
        model = Decoder(read_config(LLAMA, "config.json"), dtype=dtype, rngs=nnx.Rngs(0))
        mj.attach(model, config, rngs=nnx.Rngs(1))
        fill_randomly(model)
        graphdef, adapters, frozen = mj.partition(model)
        self.structure = Structure(graphdef, adapters, frozen)
        optimizer = make_optimizer(OptimizerConfig(), 100)
        state = initial_state(flat_arrays(adapters), optimizer, 0)._replace(step=jnp.asarray(7, jnp.int32))
        draw = np.random.default_rng(1)
        moments = jax.tree.map(
            lambda leaf: draw.standard_normal(leaf.shape).astype(np.float32) if leaf.ndim else leaf + 7, state.optimizer
        )
        # On the device, as the loop has them: a restart gives arrays back where they were.
        self.state = jax.device_put(state._replace(optimizer=moments))
        self.frozen = jax.device_put(flat_arrays(frozen))
        self.restarter = Restarter(self.structure, Restarts.of(config, 100), self.state, self.frozen)

    def restart(self) -> None:
        self.state, self.frozen = self.restarter(self.state, self.frozen)

    def refill(self, seed: int) -> None:
        draw = np.random.default_rng(seed)
        filled = {n: 0.1 * draw.standard_normal(a.shape).astype(np.float32) for n, a in self.state.adapters.items()}
        self.state = jax.device_put(self.state._replace(adapters=filled))

    def logits(self) -> np.ndarray:
        return np.asarray(self.structure.model(self.state.adapters, self.frozen)(jnp.asarray(random_ids(2, 8))))

    def numpy(self) -> tuple[dict, dict, list[np.ndarray]]:
        state, frozen = jax.device_get((self.state._replace(key=None), self.frozen))
        copied = {name: np.array(array) for name, array in frozen.items()}
        return dict(state.adapters), copied, [np.array(leaf) for leaf in jax.tree.leaves(state.optimizer)]


def down_update(config, adapters: dict, layer: int, kind: str) -> np.ndarray:
    """The update on `down_proj`, `[in, out]`, in float64."""
    arrays = {
        name.rpartition(".")[2]: np.asarray(array, np.float64)[layer]
        for name, array in adapters.items()
        if "down_proj" in name
    }
    if "m" in arrays:
        return oracle.dense(arrays["m"], LLAMA["intermediate_size"], LLAMA["hidden_size"], kind).T
    return config.alpha / config.rank * arrays["lora_a"] @ arrays["lora_b"]


def pruned_slowly(matrix: np.ndarray, share: float) -> np.ndarray:
    """What is at most the quantile `share` of its matrix becomes 0, by sorting."""
    sizes = sorted(abs(float(value)) for value in matrix.ravel())
    place = share * (len(sizes) - 1)
    low = math.floor(place)
    border = sizes[low] + (place - low) * (sizes[min(low + 1, len(sizes) - 1)] - sizes[low])
    return np.where(np.abs(matrix) > border, matrix, 0)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_restart_merges_starts_anew_and_prunes(method):
    run = Restartable(CONFIGS[method])
    kinds = iter(("sharing", "grouped"))
    for round_ in range(2):
        kind = next(kinds)
        before, frozen, moments = run.numpy()
        logits = run.logits()
        run.restart()
        after, base, pruned = run.numpy()
        kernel = "layers.mlp.down_proj.kernel"
        for layer in range(3):
            update = down_update(CONFIGS[method], before, layer, kind) if layer in LAYERS else 0.0
            np.testing.assert_allclose(base[kernel][layer], frozen[kernel][layer] + update, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(base[kernel][1], frozen[kernel][1])
        assert np.abs(base[kernel] - frozen[kernel])[0].max() > 0.01
        for name, array in after.items():
            if name.endswith("lora_a"):
                bound = 1 / math.sqrt(array.shape[-2])
                assert 0.8 * bound < np.abs(array).max() <= bound and not np.isclose(array, before[name]).any()
            else:
                np.testing.assert_array_equal(array, 0)
        count = len(after)  # Adam's moments: of all arrays the first, then of all the second
        firsts, seconds = ([m for m in run_moments if m.ndim] for run_moments in (moments, pruned))
        assert len(firsts) == len(seconds) == 2 * count
        for place in range(count):
            pair = firsts[place], firsts[place + count]
            kept = [np.stack([pruned_slowly(layer, 0.75) for layer in old]) != 0 for old in pair]
            for old, new in zip(pair, (seconds[place], seconds[place + count]), strict=True):
                np.testing.assert_array_equal(new, np.where(kept[0] & kept[1], old, 0))
        for old, new in zip(moments, pruned, strict=True):
            assert old.ndim or new == old  # Adam's count goes on
        assert int(run.state.step) == 7
        np.testing.assert_allclose(run.logits(), logits, rtol=0, atol=2e-5)
        assert run.restarter.names == tuple(n for n in base if n in KERNELS or n.endswith("turn"))
        changed = {n for n, array in base.items() if not np.array_equal(array, frozen[n])}
        assert changed == set(run.restarter.names)
        run.refill(round_)


def test_fresh_factors_differ_by_restart_layer_and_matrix_and_repeat():
    runs = [Restartable(CONFIGS["relora"]) for _ in range(2)]
    for run in runs:
        run.restart()
    first, again = (run.numpy()[0] for run in runs)
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name])
    values = [
        first[name][layer].ravel()[:4] * math.sqrt(first[name].shape[-2])
        for name in first
        if name.endswith("lora_a")
        for layer in range(3)
    ]
    runs[0].state = runs[0].state._replace(step=runs[0].state.step + 1)
    runs[0].restart()
    later = runs[0].numpy()[0]
    values += [later[name][0].ravel()[:4] * math.sqrt(later[name].shape[-2]) for name in later if "lora_a" in name]
    assert len({tuple(np.round(value, 5)) for value in values}) == len(values)


def test_remora_goes_through_its_kinds_with_one_program():
    run = Restartable(CONFIGS["remora"])
    traces = []

    @jax.jit
    def logits(adapters, frozen):
        traces.append(1)
        return run.structure.model(adapters, frozen)(jnp.asarray(random_ids(2, 8)))

    name = "layers.mlp.down_proj.adapters.down_proj.turn"
    before = logits(run.state.adapters, run.frozen)
    for turn in (1, 2, 3, 0):
        run.restart()
        np.testing.assert_array_equal(run.frozen[name], np.full(3, turn, np.float32))
        np.testing.assert_allclose(logits(run.state.adapters, run.frozen), before, rtol=0, atol=5e-5)
        run.refill(turn)
        before = logits(run.state.adapters, run.frozen)
    assert len(traces) == 1


@pytest.mark.shared
def test_chains_of_the_authors_code(shared_dir):
    arrays = np.load(shared_dir / "goldens/mora_goldens.npz")
    chains = sorted({key.split("/")[0] for key in arrays if key.startswith("remora_")})
    assert chains
    for chain in chains:
        rank = int(re.findall(r"_r(\d+)_", chain)[0])
        kernel = arrays[f"{chain}/W0"].T
        model = nnx.Linear(*kernel.shape, use_bias=False, rngs=nnx.Rngs(0))
        model.kernel[...] = jnp.asarray(kernel)
        mj.attach(model, ReMoRAConfig(rank=rank, targets=".*"), rngs=nnx.Rngs(0))
        graphdef, adapters, frozen = mj.partition(model)
        structure, trained, base = Structure(graphdef, adapters, frozen), flat_arrays(adapters), flat_arrays(frozen)
        for step in range(5):
            filled = {name: jnp.asarray(arrays[f"{chain}/M{step}"]) for name in trained}
            zero, changed = renewed(structure, filled, base, jax.random.key(0))
            base = base | changed
            right = arrays[f"{chain}/W{step + 1}"].T
            np.testing.assert_allclose(base["kernel"], right, rtol=0, atol=1e-4, err_msg=f"{chain} {step}")
            assert not any(np.asarray(array).any() for array in zero.values())


def test_dora_starts_anew_from_the_new_base():
    run = Restartable(ReLoRAConfig(rank=2, use_dora=True, **SOME))
    logits = run.logits()
    run.restart()
    np.testing.assert_allclose(run.logits(), logits, rtol=0, atol=2e-5)
    kernel, magnitude = run.frozen["layers.mlp.down_proj.kernel"], "layers.mlp.down_proj.adapters.down_proj.magnitude"
    norms = np.linalg.norm(np.asarray(kernel, np.float64), axis=1)
    np.testing.assert_allclose(run.state.adapters[magnitude], norms, rtol=1e-5)


def test_a_bfloat16_base_is_rounded_once():
    run = Restartable(CONFIGS["relora"], jnp.bfloat16)
    before, frozen, _ = run.numpy()
    run.restart()
    name = "layers.mlp.down_proj.kernel"
    exact = np.asarray(frozen[name], np.float64)[0] + down_update(CONFIGS["relora"], before, 0, "")
    found = np.asarray(run.frozen[name], np.float64)[0]
    assert run.frozen[name].dtype == jnp.bfloat16
    assert (np.abs(found - exact) <= 2.0**-8 * np.abs(exact)).all()


def test_pruning_of_whole_and_of_single_matrices():
    draws = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    for share, right in ((0.0, draws), (1.0, 0 * draws), (0.5, np.stack([pruned_slowly(m, 0.5) for m in draws]))):
        state = {"mu": {"a": draws, "b": draws}, "count": np.int32(3)}
        pruned = prune_moments(state, {"a": draws, "b": draws}, ["a"], share)
        np.testing.assert_array_equal(pruned["mu"]["a"], right)
        assert (pruned["mu"]["b"] == draws).all() and pruned["count"] == 3
    single = prune_moments({"mu": {"a": draws[0]}}, {"a": draws[0]}, ["a"], 0.5)["mu"]["a"]
    np.testing.assert_array_equal(single, pruned_slowly(draws[0], 0.5))


def test_pruned_moments_move_no_weight_far_where_there_is_no_gradient():
    """A's gradient is zero in the first step after a restart, since B is; Adam then still moves by its moments."""
    draw, rate = np.random.default_rng(0), 0.01
    adam, weights = optax.adam(rate), {"a": jnp.zeros((16, 8))}
    state = adam.init(weights)
    for _ in range(30):
        _, state = adam.update({"a": draw.standard_normal((16, 8)).astype(np.float32)}, state)
    state = prune_moments(state, weights, ["a"], 0.9)
    moved, _ = adam.update(jax.tree.map(jnp.zeros_like, weights), state)
    assert 0 < np.abs(moved["a"]).max() < 2 * rate


def test_the_jagged_cosine():
    steps, every, first, again, peak = 60, 20, 6, 4, 0.5
    settings = OptimizerConfig(learning_rate=peak, schedule="cosine", warmup_steps=first, min_ratio=0.1)
    found = make_schedule(settings, steps, Restarts(every, steps, again, 1.0))

    def cosine(t):
        return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (t - first) / (steps - first))))

    for t in range(steps):
        since = t % every
        if t < first:
            right = peak * (t + 1) / first
        elif t >= every and since < again:
            right = (since + 1) / again * cosine(t - since + again)
        else:
            right = cosine(t)
        np.testing.assert_allclose(found(jnp.asarray(t, jnp.int32)), right, rtol=1e-5, err_msg=str(t))
    assert found(20) < found(19) / 3 and found(24) > found(30)
    np.testing.assert_allclose(make_schedule(settings, steps)(steps), 0.1 * peak, rtol=1e-5)


def test_when_restarts_are_due():
    restarts = Restarts(3, 9, 0, 1.0)
    assert [done for done in range(12) if restarts.due(done)] == [3, 6]
    assert [restarts.count(done) for done in (0, 2, 3, 5, 6, 8, 9)] == [0, 0, 1, 1, 2, 2, 2]
    assert Restarts.of(mj.LoRAConfig(), 9) is None


@pytest.mark.parametrize("config", [ReLoRAConfig, ReMoRAConfig])
def test_settings_that_cannot_be(config):
    for values, words in (
        ({"restart_every": 0}, "restart_every"),
        ({"restart_every": 5, "restart_warmup": 6}, "restart_warmup must be an integer from 0 to restart_every=5"),
        ({"prune": 1.5}, "prune must be a finite number, at least 0 and at most 1"),
    ):
        with pytest.raises(ValueError, match=words):
            config(**values)
    with pytest.raises(ValueError, match="kinds must be some of sharing, grouped"):
        ReMoRAConfig(kinds=("sharing", "rotation"))
    assert ReMoRAConfig().kinds == SHARED


RUN = {
    "train__steps": 8,
    "train__save_every": 3,
    "train__keep": 9,
    "adapter__restart_every": 3,
    "adapter__restart_warmup": 1,
    "adapter__dropout": 0.1,
    "optimizer__learning_rate": 1e-2,
}


def settings(method: str, **more) -> dict:
    return RUN | {"adapter__method": method} | more


@pytest.fixture(scope="module", params=CONFIGS)
def unbroken(request, inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / request.param
    shown = quiet()
    assert loop.train(config(inputs, out, **settings(request.param)), shown) == 0
    assert "restart 2 after step 6: adapters merged into the base" in shown.stream.getvalue()
    return request.param, out


def test_a_run_with_restarts_leaves_a_model(inputs, unbroken):
    method, out = unbroken
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["compilations"], summary["restarts"], summary["method"]) == (1, 2, method)
    assert summary["restart_compile_seconds"] > 0 and not (out / "adapter").exists()
    base, tuned = (load_file(path / "model.safetensors") for path in (inputs / "model", out / "model"))
    assert set(base) == set(tuned)
    # Two restarts and the rest: more than the rank of one adapter.
    name = "model.layers.0.mlp.down_proj.weight"
    sizes = np.linalg.svd((tuned[name] - base[name]).astype(np.float64), compute_uv=False)
    assert sizes[4] > 1e-5 * sizes[0]
    np.testing.assert_array_equal(tuned["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    model, _ = mj.load_pretrained(out / "model", dtype="float32")
    assert np.isfinite(np.asarray(model(jnp.ones((1, 4), jnp.int32)))).all()


@pytest.mark.parametrize("unbroken", ["relora", pytest.param("remora", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize("step", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_bit_for_bit_around_restarts(inputs, unbroken, tmp_path, step):
    """The checkpoint is that of step 3, right after its restart; step 6 is shown right before the second one."""
    method, whole = unbroken

    def die():
        raise MemoryError("as good as a kill: nothing after this line runs")

    out = tmp_path / "run"
    with pytest.raises(MemoryError):
        loop.train(config(inputs, out, **settings(method)), Interrupting(step, die))
    resumed = quiet()
    assert loop.resume(str(out), resumed) == 0
    assert re.findall(r"step (\d+)/8", resumed.stream.getvalue())[0] == "4"
    assert metrics(out) == metrics(whole)
    name = "model/model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("unbroken", [pytest.param("relora", marks=pytest.mark.slow), "remora"], indirect=True)
def test_a_checkpoint_right_before_a_restart(inputs, unbroken, tmp_path):
    method, whole = unbroken

    def stop():
        raise MemoryError("killed")

    out = tmp_path / "run"
    # Saved after 2, 4, 6 steps: one before the restart that follows step 3, one after it, one with the other.
    changed = config(inputs, out, **settings(method, train__save_every=2))
    with pytest.raises(MemoryError):
        loop.train(changed, Interrupting(3, stop))
    assert loop.resume(str(out), quiet()) == 0
    assert metrics(out) == metrics(whole)
    sizes = [sum(f.stat().st_size for f in (out / "checkpoints" / str(n)).rglob("*") if f.is_file()) for n in (2, 8)]
    assert sizes[0] < sizes[1] - 4 * 32 * 48  # the base is written only once it has changed
    name = "model/model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("method", "devices"),
    [
        ("relora", {}),
        pytest.param("relora", {"mesh__data": 2, "mesh__pmap": True}, marks=pytest.mark.slow),
        pytest.param("remora", {"mesh__data": -1, "mesh__fsdp": 2}, marks=pytest.mark.slow),
    ],
)
def test_the_loss_goes_on_at_a_restart_on_one_device_or_two(inputs, tmp_path, method, devices):
    losses = []
    runs = {"later": {"adapter__restart_every": 4}, "restarted": {}} | ({"shared": devices} if devices else {})
    for name, more in runs.items():
        values = settings(method, adapter__dropout=0.0, train__save_every=0, train__steps=5, **more)
        values |= {"optimizer__schedule": "constant", "train__batch_size": 2}
        assert loop.train(config(inputs, tmp_path / name, **values), quiet()) == 0
        losses.append([row["loss"] for row in metrics(tmp_path / name)])
    np.testing.assert_allclose(losses[1][:4], losses[0][:4], rtol=2e-5)  # step 4 is the first after the restart
    assert abs(losses[1][3] - losses[1][0]) > 1e-3
    np.testing.assert_allclose(losses[-1], losses[1], rtol=2e-4)


def test_settings_of_a_run_are_checked_together(inputs, tmp_path):
    for method, more, words in (
        ("relora", {"adapter__restart_every": 8}, "restart_every=8 must be less than the run's 8 steps"),
        ("relora", {"loss__kl_weight": 0.1}, "kl_weight needs a base that stays frozen"),
        (
            "relora",
            {"adapter__restart_warmup": 4},
            "adapter: restart_warmup must be an integer from 0 to restart_every=3",
        ),
        ("remora", {"adapter__kinds": ("sharing", "rotation")}, "adapter: kinds must be some of sharing, grouped"),
    ):
        wrong = config(inputs, tmp_path / "x", **settings(method, **more)).to_dict()
        with pytest.raises(InputError, match=re.escape(words)):
            config_from_dict(wrong)


@pytest.mark.slow
def test_moments_in_the_hosts_memory_are_pruned_too(inputs, tmp_path):
    settings = {"adapter__method": "relora", "adapter__restart_every": 2, "adapter__restart_warmup": 1}
    settings |= {"adapter__prune": 0.75, "adapter__dropout": 0.0, "train__save_every": 0}
    losses = []
    for name, offload in {"device": False, "host": True}.items():
        assert loop.train(config(inputs, tmp_path / name, optimizer__offload=offload, **settings), quiet()) == 0
        losses.append([row["loss"] for row in metrics(tmp_path / name)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
