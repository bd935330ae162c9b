"""The optimizers by name: how gradients become updates, before weight decay and the learning rate.

What optax has is made for one matrix an array. Trained arrays are stacks `[layers, in, out]`, so where an optimizer
looks at a matrix as a whole, here it looks at each matrix of the stack by itself.
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import optax

from mora_jax.adapters.methods.registry import VECTORS

#: Parameters of the base that are trained whole and rows of tables: several matrices in one, or none.
_NO_FACTORS = ("kernel", "embedding", "token_delta")
#: A step of a path that ends as names of norms do: `RMSNorm_0`, `input_layernorm`, `q_norm`; not `normal_proj`.
_NORM = re.compile(r"norm(alization)?s?(_?\d+|_[a-z])?(?=\.|$)", re.IGNORECASE)


class Rule(NamedTuple):
    """An optimizer.

    Attributes:
        settings: the keys of the section `optimizer` that it uses beside those of all, with its values for them.
        scale: from these to a transformation of dictionaries of arrays by dotted path, with states in float32.
        by_matrix: whether it looks at matrices as a whole, so that a state of its own has no number for each weight.
    """

    settings: Mapping[str, float]
    scale: Callable[..., optax.GradientTransformation]
    by_matrix: bool = False


def decays(name: str, array: jax.Array) -> bool:
    """Whether weight decay applies: to matrices, not to norms, biases, attention sinks and other vectors, stacked or
    not."""
    last = name.rpartition(".")[2]
    return array.ndim >= 2 and not _NORM.search(name) and last not in (*VECTORS, "scale", "sinks")


def weight_masks(adapters: dict[str, jax.Array]) -> dict[str, bool]:
    """Which arrays weight decay applies to."""
    return {name: decays(name, array) for name, array in adapters.items()}


def of_each_matrix(rule: optax.GradientTransformation, axes: int = 2) -> optax.GradientTransformation:
    """`rule` on every matrix of every array alone, `[…, in, out]`; or with `axes` 1 on every vector."""

    def mapped(function: Callable[..., Any], array: jax.Array) -> Callable[..., Any]:
        for _ in range(array.ndim - axes):
            function = jax.vmap(function)
        return function

    def init(params: dict[str, Any]) -> dict[str, Any]:
        def start(name: str, param: jax.Array) -> Any:
            return mapped(lambda one: rule.init({name: one}), param)(param)

        return {name: start(name, param) for name, param in params.items() if not is_masked(param)}

    def update(updates: dict[str, Any], state: dict[str, Any], params: Any = None) -> tuple[Any, dict[str, Any]]:
        def one(name: str, *arrays: Any) -> tuple[jax.Array, Any]:
            update, state, param = arrays
            result, state = rule.update({name: update}, state, {name: param})
            return result[name], state

        results = {
            name: mapped(partial(one, name), update)(update, state[name], params[name])
            for name, update in updates.items()
            if not is_masked(update)
        }
        states = {name: new for name, (_, new) in results.items()}
        return updates | {name: result for name, (result, _) in results.items()}, states

    return optax.GradientTransformation(init, update)


def is_masked(node: Any) -> bool:
    """Whether a place of a dictionary is another optimizer's (`optax.partition`)."""
    return isinstance(node, optax.MaskedNode)


def _adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1, b2, eps, mu_dtype="float32")


def _adafactor(eps: float) -> optax.GradientTransformation:
    # Without the scale of the parameter, which starts at zero for half of LoRA's.
    one = optax.chain(optax.scale_by_factored_rms(epsilon=eps), optax.clip_by_block_rms(1.0))

    def kinds(params: dict[str, jax.Array]) -> dict[str, str]:
        return {name: "matrices" if decays(name, array) else "vectors" for name, array in params.items()}

    return optax.partition({"matrices": of_each_matrix(one), "vectors": of_each_matrix(one, axes=1)}, kinds)


def _lion(b1: float, b2: float) -> optax.GradientTransformation:
    return optax.scale_by_lion(b1, b2, mu_dtype="float32")


def _sgd(momentum: float) -> optax.GradientTransformation:
    return optax.trace(momentum, accumulator_dtype="float32") if momentum else optax.identity()


def _muon(momentum: float, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Muon for the factors of adapters, Adam for all else; updates as large as Adam's, for the same learning rates."""
    axes = optax.contrib.MuonDimensionNumbers()
    muon = optax.contrib.scale_by_muon(
        beta=momentum, mu_dtype="float32", weight_dimension_numbers=partial(jax.tree.map, lambda _: axes)
    )

    def sized(updates: Any, params: Any = None) -> Any:
        # Liu et al., 2025 (arXiv 2502.16982): the root mean square that AdamW's updates have.
        return jax.tree.map(lambda update: 0.2 * math.sqrt(max(update.shape)) * update, updates)

    one = optax.chain(muon, optax.stateless(sized))

    def kinds(params: dict[str, jax.Array]) -> dict[str, str]:
        factors = {name: decays(name, array) and not name.endswith(_NO_FACTORS) for name, array in params.items()}
        return {name: "matrices" if factor else "others" for name, factor in factors.items()}

    return optax.partition({"matrices": of_each_matrix(one), "others": _adam(b1, b2, eps)}, kinds)


#: By the values of `optimizer.name`.
RULES = {
    "adamw": Rule({"b1": 0.9, "b2": 0.999, "eps": 1e-8}, _adam),
    "adafactor": Rule({"eps": 1e-30}, _adafactor, by_matrix=True),
    "lion": Rule({"b1": 0.9, "b2": 0.99}, _lion),
    "sgd": Rule({"momentum": 0.0}, _sgd),
    "muon": Rule({"momentum": 0.95, "b1": 0.9, "b2": 0.999, "eps": 1e-8}, _muon, by_matrix=True),
}
#: In their place: an optax object that `mora_jax.finetune` was given.
OBJECT = "object"
