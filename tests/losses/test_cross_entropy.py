"""The chunked vocabulary loss against the plain formula over the whole logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mora_jax.backend import compiling_for
from mora_jax.losses import chunked_sum
from mora_jax.losses.chunked_sum import chunk_size, over_chunks, pack_weighted_tokens, part_size, take
from mora_jax.losses.cross_entropy import next_token_targets, weighted_loss
from mora_jax.losses.token_nll import token_sums


def case(seed: int = 0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(4, 13, 8)).astype(np.float32)
    kernel = rng.normal(size=(37, 8)).astype(np.float32)
    targets = rng.integers(0, 37, (4, 13))
    weights = (rng.random((4, 13)) * (rng.random((4, 13)) > 0.5)).astype(np.float32)
    return hidden, kernel, targets, weights


def plain(hidden, kernel, targets, weights, softcap=None):
    logits = hidden @ kernel.T
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(logits, targets))


# The cap has nothing to do with the way the tokens are cut: all ways without, one with it, the rest when there is time.
CUTS = [(1, 5), (2, 7), (4, 1), (1, 100)]
CASES = [(None, *cut) for cut in CUTS] + [
    pytest.param(3.0, *cut, marks=() if cut == (2, 7) else pytest.mark.slow) for cut in CUTS
]


@pytest.mark.parametrize(("softcap", "shards", "chunk"), CASES)
def test_value_and_gradients(softcap, shards, chunk):
    hidden, kernel, targets, weights = case()

    @jax.jit
    def ours(hidden, kernel):
        return -3 * weighted_loss(hidden, kernel, targets, weights, softcap=softcap, shards=shards, chunk=chunk)

    value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, kernel)
    expected, right = jax.value_and_grad(lambda *args: -3 * plain(*args), (0, 1))(
        hidden, kernel, targets, weights, softcap
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(ours(hidden, kernel), expected, rtol=1e-5)
    for found, wanted in zip(gradients, right, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_accelerators_form_gives_the_same(scale):
    """Also where a target is so unlikely that the powers over its own overflow."""
    hidden, kernel, targets, weights = case()
    hidden[0] *= scale

    def ours(hidden, kernel):
        return weighted_loss(hidden, kernel, targets, weights, shards=2, chunk=7)

    with compiling_for("tpu"):
        value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, kernel)
    expected, right = jax.value_and_grad(plain, (0, 1))(hidden, kernel, targets, weights)
    worst = np.max(optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel.T, targets))
    assert (worst > 88) == (scale > 1)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, wanted in zip(gradients, right, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * scale)


def test_no_weight_gives_zero_and_finite_gradients():
    hidden, kernel, targets, weights = case()
    hidden[0, 0] = np.inf  # not looked at
    value, gradients = jax.value_and_grad(lambda h, k: weighted_loss(h, k, targets, 0 * weights, chunk=5), (0, 1))(
        hidden, kernel
    )
    assert value == 0
    assert all(not np.any(gradient) for gradient in gradients)


@pytest.mark.slow
@pytest.mark.parametrize("used", [0, 1, 31, 32, 33, 64, 65, 128, 129, 191, 192, 193, 256])
def test_a_last_chunk_of_parts_gives_the_same_and_runs_over_few_tokens_in_vain(used, monkeypatch):
    monkeypatch.setattr(chunked_sum, "chunk_size", lambda vocab_size, tokens, heads: 128)
    monkeypatch.setattr(chunked_sum, "part_size", lambda vocab_size, chunk: 32)
    rng = np.random.default_rng(used)
    hidden, kernel = rng.normal(size=(2, 128, 4)).astype(np.float32), rng.normal(size=(11, 4)).astype(np.float32)
    targets, weights = rng.integers(0, 11, (2, 128)), np.zeros(256, np.float32)
    weights[rng.permutation(256)[:used]] = rng.random(used) + 0.1
    weights = weights.reshape(2, 128)
    found = jax.jit(jax.value_and_grad(weighted_loss, (0, 1)))(hidden, kernel, targets, weights)
    right = jax.jit(jax.value_and_grad(plain, (0, 1)))(hidden, kernel, targets, weights)
    for mine, its in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-5)
    frozen_head = jax.jit(jax.grad(weighted_loss))(hidden, kernel, targets, weights)
    np.testing.assert_allclose(frozen_head, right[1][0], rtol=1e-4, atol=1e-5)

    options, (scales, numbers) = pack_weighted_tokens(
        weights, np.arange(256).reshape(2, 128), kernel=kernel, softcap=None, shards=1, chunk=None
    )
    assert (options.chunk, options.part) == (128, 32)

    def add(options, index, seen):
        (those,) = take(options, index, numbers)
        return seen.at[those].add(1)

    seen = np.asarray(over_chunks(options, scales, add, jnp.zeros(256, jnp.int32)))
    assert np.all(seen[weights.reshape(-1) > 0] == 1) and np.all(seen <= 1)
    assert used <= seen.sum() < used + (32 if used % 128 <= 64 else 128)


def test_logits_of_the_whole_batch_never_exist():
    hidden, kernel = jnp.zeros((2, 512, 8)), jnp.zeros((5000, 8))
    targets, weights = jnp.zeros((2, 512), jnp.int32), jnp.ones((2, 512))
    compiled = jax.jit(jax.grad(lambda h: weighted_loss(h, kernel, targets, weights, chunk=64))).lower(hidden).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1024 * 5000 * 4 / 4
    assert chunk_size(50_000, 4096) * 50_000 * 4 <= 2**27


def test_chunks_are_about_equal():
    for vocab, tokens in ((49_152, 510), (49_152, 512), (49_152, 2_000), (152_064, 300), (32_000, 1_025)):
        chunk = chunk_size(vocab, tokens)
        assert -(-tokens // chunk) * chunk < tokens + 32 * -(-tokens // chunk)
    assert [chunk_size(49_152, tokens) for tokens in (1, 7, 300)] == [1, 7, 300]
    assert [part_size(49_152, chunk) for chunk in (256, 300, 64)] == [64, None, None]
    with compiling_for("tpu"):
        assert chunk_size(152_064, 4_096) == 1024 and chunk_size(152_064, 1_536) == 768
        assert part_size(152_064, 1_024) is None


def test_token_sums():
    hidden, kernel, targets, weights = case()
    logits = hidden @ kernel.T
    unseen = np.where(weights[..., None] > 0, hidden, np.inf)  # of tokens without weight
    found = token_sums(unseen, kernel, targets, weights, chunk=5)
    for row in range(len(weights)):
        own = (array[row : row + 1] for array in (hidden, targets, weights))
        expected = plain(next(own), kernel, *own)
        np.testing.assert_allclose(found.nll[row], expected, rtol=1e-5)
    np.testing.assert_allclose(found.weight, weights.sum(axis=1), rtol=1e-6)
    assert found.tokens.tolist() == np.sum(weights > 0, axis=1).tolist()
    assert found.correct.tolist() == np.sum((logits.argmax(-1) == targets) & (weights > 0), axis=1).tolist()


def test_targets_and_weights_shift_together():
    ids = np.array([[5, 6, 7, 8]])
    weights = np.array([[0.0, 0.0, 1.0, 0.5]], np.float32)  # token 7 counts 1, token 8 counts a half
    targets, shifted = next_token_targets(ids, weights)
    assert targets[0, :3].tolist() == [6, 7, 8]
    assert shifted.tolist() == [[0.0, 1.0, 0.5, 0.0]]


def test_no_token_is_predicted_from_another_example_or_at_padding():
    ids = np.arange(8)[None]
    segments = np.array([[1, 1, 1, 2, 2, 0, 0, 3]])
    targets, shifted = next_token_targets(ids, np.ones((1, 8), np.float32), segments)
    # Tokens 1 and 2 of the first example, token 4 of the second.
    assert shifted.tolist() == [[1, 1, 0, 1, 0, 0, 0, 0]]
    assert targets[0, [0, 1, 3]].tolist() == [1, 2, 4]
    mask = segments > 0
    assert next_token_targets(ids, np.ones((1, 8), np.float32), mask)[1].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


def test_shards_must_share_the_rows():
    hidden, kernel, targets, weights = case()
    with pytest.raises(ValueError, match="3 shards can't share 4 rows"):
        weighted_loss(hidden, kernel, targets, weights, shards=3)
