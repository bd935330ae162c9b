"""Batches by seed and step."""

from __future__ import annotations

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
