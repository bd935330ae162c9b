"""The methods by name, collected from the files of this package: a new method is one file.

A method is a subclass of `Adapter` with a `method` of its own, and beside it its configuration under the same name with
`Config` behind it: `LoRA` and `LoRAConfig`.
"""

import functools
import importlib
import pkgutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mora_jax.adapters import methods as package
from mora_jax.adapters.base import Adapter, AdapterParam, Params
from mora_jax.adapters.config.common import MethodConfig
from mora_jax.adapters.matrices import Matrix
from mora_jax.adapters.methods.full import FullConfig
from mora_jax.adapters.token_rows import TokenRows, TokenRowsConfig


class Method(NamedTuple):
    """A method: its configuration, and its adapter class (None for full fine-tuning, which has none)."""

    config: type[MethodConfig]
    adapter: type[Adapter] | None


def _collected() -> dict[str, Method]:
    methods = {}
    for file in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if file.name == __name__:
            continue
        names = vars(importlib.import_module(file.name))
        for name, value in names.items():
            defined_here = isinstance(value, type) and issubclass(value, Adapter) and value.__module__ == file.name
            if defined_here and "method" in vars(value):
                methods[value.method] = Method(names[f"{name}Config"], value)
    # LoRA first, then its relatives, then the others; what changes the base comes last.
    lora, kinds = methods["lora"].config, {name: method.config for name, method in methods.items()}
    order = sorted(methods, key=lambda m: (kinds[m].changes_base, m != "lora", not issubclass(kinds[m], lora), m))
    return {name: methods[name] for name in order} | {"full": Method(FullConfig, None)}


# What stands beside the adapters of any method.
BESIDE = Method(TokenRowsConfig, TokenRows)
METHODS: dict[str, Method] = _collected()
CONFIGS: dict[str, type[MethodConfig]] = {name: method.config for name, method in METHODS.items()}
# The arrays of all adapters that hold one number a feature.
VECTORS = Adapter.vectors.union(*(method.adapter.vectors for method in METHODS.values() if method.adapter is not None))


def adapter_class(config: Any) -> type[Adapter]:
    """The adapter class of a configuration.

    Raises:
        TypeError: `config` is no adapter configuration.
    """
    for method in (*METHODS.values(), BESIDE):
        if method.config is type(config) and method.adapter is not None:
            return method.adapter
    known = ", ".join(kind.__name__ for kind in CONFIGS.values())
    raise TypeError(f"config must be one of {known}, not {type(config).__name__}")


def fresh_arrays(config: Any, matrix: Matrix, rngs: nnx.Rngs, kernel: Array) -> tuple[Params, Params]:
    """The arrays of a fresh adapter but for its scaling: those that are trained, and those that stay as they are.

    Args:
        config: the method's.
        matrix: that gets the adapter.
        rngs: keys of its start.
        kernel: the base's `[*stack, in, out]`, which some methods start from.
    """
    method: Any = adapter_class(config)
    make = method.for_embedding if matrix.is_embedding else method
    adapter = make(*matrix.sizes, config, rngs=rngs, stack=kernel.shape[:-2])
    adapter.fit(kernel.dtype)
    adapter.init_from_kernel(lambda: kernel)
    arrays: tuple[Params, Params] = {}, {}
    for name, variable in vars(adapter).items():
        if isinstance(variable, nnx.Variable) and name != "scaling":
            arrays[not isinstance(variable, AdapterParam)][name] = variable.get_value()
    return arrays


@functools.cache
def array_shapes(config: Any, matrix: Matrix) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The shapes of `fresh_arrays`, for one matrix."""
    kernel = jax.ShapeDtypeStruct(matrix.sizes, jnp.float32)
    trained, fixed = jax.eval_shape(lambda kernel: fresh_arrays(config, matrix, nnx.Rngs(0), kernel), kernel)
    return {k: v.shape for k, v in trained.items()}, {k: v.shape for k, v in fixed.items()}
