"""AdaLoRA's penalty, budget and allocation, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mora_jax as mj
from mora_jax.adapters.adalora import allocate, budget, orthogonality, start_importance

CONFIG = mj.AdaLoRAConfig(rank=4, target_rank=1, tinit=2, tfinal=3, total_steps=12, delta_t=2, beta1=0.8, beta2=0.7)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def arrays(seed):
    return {
        "q.lora_a": draw(seed, 2, 5, 4),
        "q.lora_e": draw(seed + 1, 2, 4),
        "q.lora_b": draw(seed + 2, 2, 4, 3),
        "v.lora_a": draw(seed + 3, 6, 4),
        "v.lora_e": draw(seed + 4, 4),
        "v.lora_b": draw(seed + 5, 4, 2),
        "norm.weight": draw(seed + 6, 4),
    }


def test_orthogonality_is_the_mean_norm():
    given = arrays(0)
    norms = []
    for a in [*given["q.lora_a"], given["v.lora_a"]]:
        norms.append(np.linalg.norm(a.T @ a - np.eye(4)))
    for b in [*given["q.lora_b"], given["v.lora_b"]]:
        norms.append(np.linalg.norm(b @ b.T - np.eye(4)))
    np.testing.assert_allclose(orthogonality(given), np.mean(norms), rtol=1e-5)
    perfect = {"lora_a": jnp.eye(4), "lora_b": jnp.eye(4), "lora_e": jnp.ones(4)}
    slope = jax.grad(orthogonality)(perfect)
    assert np.isfinite(slope["lora_a"]).all() and orthogonality(perfect) < 1e-5


def test_the_budget_falls_along_a_cubic():
    found = [int(budget(CONFIG, jnp.asarray(step), 12)) for step in range(13)]
    expected = [int(np.floor(3 + 9 * (1 - min(max(step - 2, 0), 7) / 7) ** 3 + 1e-6)) for step in range(13)]
    assert found == expected
    assert found[:3] == [12] * 3 and found[9:] == [3] * 4


def test_allocation_keeps_the_most_important_triplets_without_recompiling():
    adapters = {name: jnp.asarray(value) for name, value in arrays(0).items()}
    state, traces = start_importance(adapters), []

    @jax.jit
    def step(state, adapters, gradients, number):
        traces.append(1)
        return allocate(CONFIG, state, adapters, gradients, number)

    smooth = {name: np.zeros(value.shape) for name, value in adapters.items()}
    spread = {name: np.zeros(value.shape) for name, value in adapters.items()}
    for number in range(13):
        gradients = arrays(100 + number)
        values = {name: np.float64(value) for name, value in adapters.items()}
        before = {name: np.asarray(mask) for name, mask in state.kept.items()}
        state, adapters = step(state, adapters, gradients, jnp.asarray(number))
        for name, value in values.items():
            now = np.abs(value * gradients[name])
            smooth[name] = 0.8 * smooth[name] + 0.2 * now
            spread[name] = 0.7 * spread[name] + 0.3 * np.abs(now - smooth[name])
        scores = {}
        for prefix in ("q", "v"):
            a, e, b = (smooth[f"{prefix}.{n}"] * spread[f"{prefix}.{n}"] for n in ("lora_a", "lora_e", "lora_b"))
            scores[f"{prefix}.lora_e"] = e + a.mean(-2) + b.mean(-1)
        masks = before
        if number > 2 and number % 2 == 0 and number <= 9:
            every = np.sort(np.concatenate([score.ravel() for score in scores.values()]))[::-1]
            least = every[int(budget(CONFIG, jnp.asarray(number), 12)) - 1]
            masks = {name: score >= least for name, score in scores.items()}
        for name, mask in masks.items():
            np.testing.assert_array_equal(state.kept[name], mask)
            np.testing.assert_allclose(adapters[name], values[name] * mask, rtol=1e-5)
        # Training goes on and moves what was zeroed.
        adapters = adapters | {name: adapters[name] + 0.1 for name in masks}
    assert sum(int(mask.sum()) for mask in state.kept.values()) == int(budget(CONFIG, jnp.asarray(8), 12)) < 12
    np.testing.assert_array_equal(adapters["norm.weight"], arrays(0)["norm.weight"])
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_rank": 13}, "target_rank is 13, more than rank 12"),
        ({"tinit": 60, "tfinal": 60, "total_steps": 100}, r"tinit \+ tfinal is 120, more than total_steps 100"),
        ({"beta1": 1.0}, r"beta1 must lie in \(0, 1\), not 1.0"),
        ({"delta_t": 0}, "delta_t must be a positive integer"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        mj.AdaLoRAConfig(**settings)
