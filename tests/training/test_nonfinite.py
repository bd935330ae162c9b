"""Updates that are not finite are left out inside the step, counted in the state, and end the run in time."""

import jax
import numpy as np
import pytest

import mora_jax as mj
from mora_jax.errors import InputError
from mora_jax.training.observe.observer import NonFinite
from mora_jax.training.optimizer import make_optimizer, make_schedule
from mora_jax.training.sharding.mesh import make_mesh
from mora_jax.training.sharding.runner import JitRunner, PmapRunner
from mora_jax.training.state import Structure, flat_arrays, initial_state
from mora_jax.training.step import StepConfig, make_step
from tests.training.test_step import LENGTH, OPTIMIZER, STEPS, batches, model_for


def host(tree):
    return jax.tree.map(lambda x: np.array(jax.random.key_data(x) if x.dtype.name.startswith("key") else x), tree)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("pmap", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["jit", "pmap"])
def test_a_bad_row_changes_nothing_but_the_counts(pmap):
    graphdef, adapters, frozen = mj.partition(model_for("mora"))
    optimizer, schedule = make_optimizer(OPTIMIZER, STEPS), make_schedule(OPTIMIZER, STEPS)
    structure = Structure(graphdef, adapters, frozen)
    if pmap:
        runner = PmapRunner(make_step(structure, optimizer, schedule, StepConfig(shards=1, axis_name="data")), 2)
    else:
        runner = JitRunner(make_step(structure, optimizer, schedule, StepConfig(shards=2)), make_mesh(2))
    good = [{name: value.reshape(1, -1, LENGTH) for name, value in batch.items()} for batch in batches()]
    bad = good[2] | {"weights": good[2]["weights"].copy()}
    row = int(np.argmax(bad["segment_ids"][0].sum(1)))
    bad["weights"][0, row, 1] = np.inf
    # The sum of weights stays 1: the loss is finite, and the squares of its gradient are beyond float32.
    large = good[2] | {"weights": good[2]["weights"] * 1e25, "counts": np.full(good[2]["weights"].shape[:2], 0.125)}
    large["counts"] = large["counts"].astype(np.float32)
    ones = {"counts": np.ones(good[0]["weights"].shape[:2], np.float32)}
    held = runner.place(flat_arrays(frozen))

    def steps(state, given):
        found = []
        for batch in given:
            state, metrics = runner(state, held, runner.place_batch(ones | batch))
            found.append(jax.device_get(metrics))
        return state, found

    def start():
        return runner.place(initial_state(flat_arrays(adapters), optimizer, 0))

    before, _ = steps(start(), good[:2])
    kept = host(runner.unreplicate(before))
    state, (infinite, overflow) = steps(before, [bad, large])
    after = host(runner.unreplicate(state))
    assert not np.isfinite(infinite.loss) and np.isfinite(overflow.loss) and not np.isfinite(overflow.grad_norm)
    same(after.adapters, kept.adapters)
    moments = [leaf for leaf in jax.tree.leaves(after.optimizer) if leaf.ndim]
    same(moments, [leaf for leaf in jax.tree.leaves(kept.optimizer) if leaf.ndim])
    assert max(np.abs(leaf).max() for leaf in moments) > 0
    counts = sorted(int(leaf) for leaf in jax.tree.leaves(after.optimizer) if not leaf.ndim)
    assert counts == [2, 4]  # Adam has made two updates; the schedule is four steps on
    assert (int(after.step), int(after.skips.total), int(after.skips.in_row)) == (4, 2, 2)
    assert [(int(m.skipped), int(m.skipped_in_row)) for m in (infinite, overflow)] == [(1, 1), (2, 2)]
    state, (last,) = steps(state, good[4:])
    assert (int(last.skipped), int(last.skipped_in_row)) == (2, 0)
    ended = host(runner.unreplicate(state)).adapters
    assert all(np.isfinite(value).all() and (value != kept.adapters[name]).any() for name, value in ended.items())
    assert runner.compilations == 1


def test_what_is_said_and_when_the_run_stops():
    said = NonFinite(2, 1e-3)
    assert said.note(5, 1.0, 2.0, 3, 0) is None
    assert said.note(6, np.nan, np.nan, 4, 1) == (
        "step 6: the loss is nan; the update is skipped (1 in a row of at most 2, 4 in all)"
    )
    with pytest.raises(InputError, match=r"the gradient's norm is inf at step 7, number 2 in a row .* \(now 0.001\)"):
        said.note(7, 1.0, np.inf, 5, 2)


def test_weights_whose_sum_is_beyond_float32_are_no_loss_of_zero():
    graphdef, adapters, frozen = mj.partition(model_for("mora"))
    optimizer, schedule = make_optimizer(OPTIMIZER, STEPS), make_schedule(OPTIMIZER, STEPS)
    step = jax.jit(make_step(Structure(graphdef, adapters, frozen), optimizer, schedule, StepConfig()))
    good = {name: value.reshape(1, -1, LENGTH) for name, value in batches()[0].items()}
    heavy = good | {"weights": good["weights"] * np.float32(3e38)}
    start = initial_state(flat_arrays(adapters), optimizer, 0)
    expected = host(start)
    state, metrics = step(start, flat_arrays(frozen), heavy)
    assert np.isinf(metrics.normalizer) and np.isnan(metrics.loss) and metrics.skipped == 1
    same(host(state).adapters, expected.adapters)
