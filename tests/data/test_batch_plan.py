"""Batches by seed and step."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mora_jax.data import BatchPlan


def test_every_epoch_is_a_new_order_of_all():
    plan = BatchPlan(10, 4, seed=1, epochs=2)
    assert (plan.steps, plan.steps_per_epoch, len(plan)) == (6, 3, 6)
    batches = [plan.indices(step) for step in range(6)]
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = np.concatenate(batches[:3]), np.concatenate(batches[3:])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first.tolist() != second.tolist()
    assert [plan.epoch(step) for step in range(6)] == [0, 0, 0, 1, 1, 1]


def test_any_step_can_be_asked_for_in_any_order():
    plan = BatchPlan(10, 3, seed=7, steps=9)
    batches = [plan.indices(step).tolist() for step in range(9)]
    again = BatchPlan(10, 3, seed=7, steps=9)
    assert [again.indices(step).tolist() for step in reversed(range(9))] == batches[::-1]
    assert BatchPlan(10, 3, seed=8, steps=9).indices(0).tolist() != batches[0]


def test_steps_win_over_epochs_and_repeat_the_data():
    assert BatchPlan(3, 2, steps=7, epochs=1).steps == 7
    assert BatchPlan(3, 2).steps == 2
    assert BatchPlan(10, 4, epochs=0.5).steps == 2
    assert sorted(BatchPlan(3, 8, steps=5).indices(4)) == [0, 1, 2]


def test_without_shuffling():
    plan = BatchPlan(5, 2, epochs=1, shuffle=False)
    assert [plan.indices(step).tolist() for step in range(3)] == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0)])
def test_empty_plans(arguments):
    with pytest.raises(ValueError, match="must be at least 1"):
        BatchPlan(*arguments)


def test_negative_lengths_and_steps_outside():
    with pytest.raises(ValueError, match="steps=-1"):
        BatchPlan(1, 1, steps=-1)
    with pytest.raises(ValueError, match="step 2 is outside the plan's 2 steps"):
        BatchPlan(2, 1, epochs=1).indices(2)
    nothing = BatchPlan(2, 1, steps=0)
    assert (len(nothing), nothing.padding(8)) == (0, 0.0)


LENGTHS = np.random.default_rng(0).integers(3, 60, 200)


def test_packed_epochs_hold_every_example_once_and_know_their_steps():
    plan = BatchPlan(LENGTHS, 4, seed=2, epochs=3, max_length=64, packing=True)
    seen: dict[int, list[int]] = {}
    for step in range(plan.steps):
        rows = plan.rows(step)
        assert 1 <= len(rows) <= 4
        assert all(LENGTHS[members].sum() <= 64 for members in rows)
        seen.setdefault(plan.epoch(step), []).extend(np.concatenate(rows).tolist())
    assert sorted(seen) == [0, 1, 2]
    assert all(sorted(examples) == list(range(200)) for examples in seen.values())
    assert seen[0] != seen[1]
    assert plan.padding(64) < 0.1 < BatchPlan(LENGTHS, 4, epochs=1).padding(64)


def test_any_packed_step_can_be_asked_for_in_any_order():
    def plan():
        return BatchPlan(LENGTHS, 4, seed=2, steps=120, max_length=64, packing=True)

    one, other = plan(), plan()
    expected = [[members.tolist() for members in one.rows(step)] for step in range(120)]
    for step in np.random.default_rng(0).permutation(120).tolist():
        assert [members.tolist() for members in other.rows(step)] == expected[step]


def test_buckets_are_batches_of_like_length():
    plan = BatchPlan(LENGTHS, 8, seed=1, epochs=1, max_length=64, bucketing=True)
    examples = np.concatenate([plan.indices(step) for step in range(plan.steps)])
    assert sorted(examples.tolist()) == list(range(200))
    spread = np.mean([np.ptp(LENGTHS[plan.indices(step)]) for step in range(plan.steps)])
    mixed = BatchPlan(LENGTHS, 8, seed=1, epochs=1)
    assert spread < 5 < np.mean([np.ptp(LENGTHS[mixed.indices(step)]) for step in range(plan.steps)])
    order = [int(LENGTHS[plan.indices(step)].max()) for step in range(plan.steps)]
    assert order != sorted(order)


def test_the_lengths_of_buckets_are_those_of_its_batches():
    lengths = np.random.default_rng(3).integers(5, 900, 211)
    for steps in (None, 5, 500):
        plan = BatchPlan(lengths, 4, seed=2, steps=steps, max_length=1000, bucketing=True)
        first = range(min(plan.steps, plan.steps_per_epoch))
        seen = [plan.length(step, 1000) for step in first]
        assert list(plan.lengths(1000).items()) == [(length, seen.index(length)) for length in dict.fromkeys(seen)]
    assert BatchPlan(lengths, 4, max_length=1000).lengths(1000) == {1000: 0}


def test_buckets_have_few_lengths():
    lengths = np.array([10, 70, 130, 500, 900] * 20)
    plan = BatchPlan(lengths, 4, epochs=1, max_length=1000, bucketing=True)
    assert {plan.length(step, 1000) for step in range(plan.steps)} <= {64, 128, 256, 512, 1000}
    for step in range(plan.steps):
        assert lengths[plan.indices(step)].max() <= plan.length(step, 1000)


def test_plans_that_cannot_be():
    with pytest.raises(ValueError, match="choose packing or bucketing"):
        BatchPlan(LENGTHS, 4, max_length=64, packing=True, bucketing=True)
    with pytest.raises(ValueError, match="need the examples' lengths"):
        BatchPlan(10, 4, packing=True)
    with pytest.raises(ValueError, match="more than max_length=32"):
        BatchPlan(LENGTHS, 4, max_length=32, packing=True)


def test_threads_see_one_plan(monkeypatch):
    """Steps of many epochs, asked for by several threads at once, as the prefetching does."""

    def slow(plan, epoch):
        time.sleep(0.005)  # Long enough for the other threads to come in between.
        return [np.array([epoch, row]) for row in range(3 + 2 * epoch)]

    monkeypatch.setattr(BatchPlan, "_make_rows", slow)
    plan = BatchPlan(LENGTHS, 1, steps=99, max_length=64, packing=True)
    with ThreadPoolExecutor(8) as pool:
        found = [step[0].tolist() for step in pool.map(plan.rows, range(99))]
    assert found == [[epoch, row] for epoch in range(9) for row in range(3 + 2 * epoch)]
