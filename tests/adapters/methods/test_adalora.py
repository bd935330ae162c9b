"""AdaLoRA's penalty against loops, its budget and allocation against PEFT."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mora_jax as mj
from mora_jax.adapters.methods.adalora import allocate, budget, existing, orthogonality, start_importance
from tests.peers import peft, torch

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


def everywhere(adapters):
    """That every triplet exists."""
    return {name: np.ones(value.shape, bool) for name, value in adapters.items() if name.endswith("lora_e")}


def test_orthogonality_is_the_mean_norm():
    given = arrays(0)
    norms = []
    for a in [*given["q.lora_a"], given["v.lora_a"]]:
        norms.append(np.linalg.norm(a.T @ a - np.eye(4)))
    for b in [*given["q.lora_b"], given["v.lora_b"]]:
        norms.append(np.linalg.norm(b @ b.T - np.eye(4)))
    np.testing.assert_allclose(orthogonality(given, everywhere(given)), np.mean(norms), rtol=1e-5)
    perfect = {"lora_a": jnp.eye(4), "lora_b": jnp.eye(4), "lora_e": jnp.ones(4)}
    exists = everywhere(perfect)
    slope = jax.grad(orthogonality)(perfect, exists)
    assert np.isfinite(slope["lora_a"]).all() and orthogonality(perfect, exists) < 1e-5


def test_triplets_that_do_not_exist_are_not_counted():
    given = arrays(0)
    given["v.lora_a"][:, 1] = 0
    scalings = {"q.scaling": np.array([1.0, 0.0]), "v.scaling": np.array(1.0)}
    exists = existing(given, scalings)
    assert exists["q.lora_e"].tolist() == [[True] * 4, [False] * 4]
    assert exists["v.lora_e"].tolist() == [True, False, True, True]
    small = {name: value[0] if name.startswith("q") else value for name, value in given.items()}
    small["v.lora_a"] = small["v.lora_a"][:, [0, 2, 3]]
    small["v.lora_b"] = small["v.lora_b"][[0, 2, 3]]
    small["v.lora_e"] = small["v.lora_e"][[0, 2, 3]]
    np.testing.assert_allclose(orthogonality(given, exists), orthogonality(small, everywhere(small)), rtol=1e-5)
    slope = jax.grad(orthogonality)(given, exists)
    assert not slope["q.lora_a"][1].any() and slope["q.lora_a"][0].all()
    assert (budget(CONFIG, exists, 0), budget(CONFIG, exists, 12)) == (7, 2)
    assert [int(start_importance(given, exists).kept[name].sum()) for name in exists] == [4, 3]


def test_allocation_by_its_equations():
    """The paper's equations in numpy, for steps that keep 12, then 6, then 3 of 12 triplets."""
    adapters = {name: jnp.asarray(value) for name, value in arrays(0).items()}
    exists = everywhere(adapters)
    state = start_importance(adapters, exists)
    step = jax.jit(lambda *given: allocate(CONFIG, *given, exists))
    smooth, spread = ({name: np.zeros_like(value) for name, value in arrays(0).items()} for _ in range(2))
    in_use = []
    for number in range(1, CONFIG.total_steps + 1):
        gradients, moves = arrays(100 + number), arrays(200 + number)
        adapters = {name: value + 0.1 * moves[name] for name, value in adapters.items()}
        if number < CONFIG.total_steps - CONFIG.tfinal:
            for name, value in adapters.items():
                now = np.abs(value * gradients[name])
                smooth[name] = 0.8 * smooth[name] + 0.2 * now
                spread[name] = 0.7 * spread[name] + 0.3 * np.abs(now - smooth[name])
        importance = {name: smooth[name] * spread[name] for name in smooth}
        scores = [
            importance[f"{m}.lora_e"] + importance[f"{m}.lora_a"].mean(-2) + importance[f"{m}.lora_b"].mean(-1)
            for m in "qv"
        ]
        state, adapters = step(state, adapters, gradients, jnp.asarray(number))
        used = [np.asarray(adapters[f"{m}.lora_e"]) != 0 for m in "qv"]
        in_use.append(sum(int(one.sum()) for one in used))
        if number in (4, 6, 8):
            flat, kept = (np.concatenate([one.reshape(-1) for one in both]) for both in (scores, used))
            assert set(np.flatnonzero(kept)) == set(np.argsort(-flat)[: in_use[-1]])
    assert in_use == [12, 12, 12, 6, 12, 3, 12, 3, 3, 3, 3, 3]


def peft_matrix(a, e, b):
    """One adapted matrix, its parameters named and laid out as in PEFT."""
    module = torch.nn.Module()
    for name, value in (("lora_A", a.T), ("lora_E", e[:, None]), ("lora_B", b.T)):
        setattr(module, name, torch.nn.ParameterDict({"default": torch.tensor(np.array(value))}))
    return module


def matrices(values):
    """The three matrices of `arrays`."""
    stack = [[values[f"q.{name}"][i] for name in ("lora_a", "lora_e", "lora_b")] for i in range(2)]
    return [*stack, [values[f"v.{name}"] for name in ("lora_a", "lora_e", "lora_b")]]


@pytest.mark.peers
def test_allocation_is_that_of_peft_without_recompiling():
    total, values = CONFIG.total_steps, arrays(0)
    model = torch.nn.ModuleList(peft_matrix(*given) for given in matrices(values))
    settings = {"init_r": 4, "target_r": 1, "tinit": 2, "tfinal": 3, "total_step": total, "deltaT": 2}
    config = peft.AdaLoraConfig(beta1=0.8, beta2=0.7, **settings)
    theirs = SimpleNamespace(model=model, peft_config={"default": config}, trainable_adapter_name="default")
    theirs.rankallocator = peft.tuners.adalora.layer.RankAllocator(model, config, "default")
    adapters = {name: jnp.asarray(value) for name, value in values.items()}
    exists = everywhere(adapters)
    state, traces, sizes = start_importance(adapters, exists), [], []

    @jax.jit
    def step(state, adapters, gradients, number):
        traces.append(1)
        return allocate(CONFIG, state, adapters, gradients, number, exists)

    for number in range(1, total + 1):
        gradients, moves = arrays(100 + number), arrays(200 + number)
        adapters = {name: value + 0.1 * moves[name] * ("lora" in name) for name, value in adapters.items()}
        triples = zip(model, matrices(gradients), matrices(moves), strict=True)
        for matrix, slopes, change in triples:
            pairs = (("lora_A", 0, lambda x: x.T), ("lora_E", 1, lambda x: x[:, None]), ("lora_B", 2, lambda x: x.T))
            for name, i, turned in pairs:
                parameter = getattr(matrix, name)["default"]
                parameter.data += 0.1 * torch.tensor(np.array(turned(change[i])))
                parameter.grad = torch.tensor(np.array(turned(slopes[i])))
        peft.tuners.adalora.model.AdaLoraModel.update_and_allocate(theirs, number)
        state, adapters = step(state, adapters, gradients, jnp.asarray(number))
        expected = [matrix.lora_E["default"].detach().numpy()[:, 0] for matrix in model]
        for ours, given in zip([*adapters["q.lora_e"], adapters["v.lora_e"]], expected, strict=True):
            np.testing.assert_array_equal(ours == 0, given == 0)
            np.testing.assert_allclose(ours, given, rtol=1e-5)
        sizes.append(sum(int((value != 0).sum()) for value in expected))
    assert sizes == [12, 12, 12, 6, 12, 3, 12, 3, 3, 3, 3, 3]
    np.testing.assert_array_equal(adapters["norm.weight"], arrays(0)["norm.weight"])
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_rank": 13}, "target_rank is 13, more than rank 12"),
        (
            {"tinit": 60, "tfinal": 60, "total_steps": 100},
            r"tinit \+ tfinal is 120, which must be less than total_steps 100",
        ),
        ({"beta1": 1.0}, "beta1 must be a finite number, above 0 and below 1, not 1.0"),
        ({"delta_t": 0}, "delta_t must be a positive integer"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        mj.AdaLoRAConfig(**settings)
