"""Batches through grain: the right ones, in order, from any step, for any number of processes."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from mora_jax.data import BatchPlan, Conversation, EncodedDataset, Message
from mora_jax.data.pipeline import BatchIterator, BatchSource


@pytest.fixture(scope="module")
def dataset(make_tokenizer):
    random = np.random.default_rng(0)
    rows = [
        Conversation((Message("user", f"What is {i}?"), Message("assistant", "yes " * int(random.integers(1, 30)))))
        for i in range(50)
    ]
    return EncodedDataset.build(rows, make_tokenizer("byte_level", "chatml"), max_length=128)


def source(dataset, packing=False, micro=4, **settings):
    plan = BatchPlan(dataset.lengths, 8, seed=3, epochs=2, max_length=128, packing=packing)
    return BatchSource(dataset, plan, micro, "example", **settings)


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("packing", [False, True])
def test_in_order_and_again_from_any_step(dataset, packing):
    batches = source(dataset, packing)
    with contextlib.closing(BatchIterator(batches)) as iterator:
        seen = []
        for step, batch in enumerate(iterator):
            seen.append(batch)
            assert iterator.get_state() == {"next_index": step + 1}
    assert len(seen) == batches.plan.steps
    assert all(equal(batch, batches[step]) for step, batch in enumerate(seen))
    for start in (1, batches.plan.steps // 2, batches.plan.steps - 1):
        with contextlib.closing(BatchIterator(batches, start)) as iterator:
            assert all(equal(*pair) for pair in zip(iterator, seen[start:], strict=True))


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_micro_batch(dataset, packing, processes):
    whole = source(dataset, packing)
    parts = [
        source(dataset, packing, rows=tuple(range(first, first + 4 // processes)))
        for first in range(0, 4, 4 // processes)
    ]
    for step in range(whole.plan.steps):
        pieces = [part[step] for part in parts]
        assert pieces[0]["input_ids"].shape[1] == 4 // processes
        joined = {name: np.concatenate([piece[name] for piece in pieces], axis=1) for name in pieces[0]}
        assert equal(joined, whole[step])


def test_micro_batches_are_the_rows_in_order(dataset):
    one, four = source(dataset, micro=8)[0], source(dataset, micro=2)[0]
    for name, value in four.items():
        np.testing.assert_array_equal(value.reshape(1, 8, *value.shape[2:]), one[name])


def test_shares_that_cannot_be(dataset):
    with pytest.raises(ValueError, match="micro_batch=3 must divide the batch of 8 rows"):
        source(dataset, micro=3)
    with pytest.raises(ValueError, match=r"rows \(3, 4\) are not all in a micro-batch of 4"):
        source(dataset, rows=(3, 4))
