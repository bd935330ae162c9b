"""The arrays of an adapter on a Linen layer, and what the layer computes with them."""

from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn, nnx
from jax import Array

from mora_jax.adapters.config.common import MethodConfig
from mora_jax.adapters.matrices import KERNELS, Matrix, Product
from mora_jax.adapters.methods.registry import adapter_class, array_shapes, fresh_arrays
from mora_jax.adapters.products.around import around, attended, embedded
from mora_jax.linen.tree_sites import Arrays, scaled

COLLECTION = "adapters"  # what is trained
FIXED = "adapter_state"  # what methods with frozen factors (LoRA-FA, PiSSA, OLoRA, VeRA) keep beside it


def check_config(config: Any) -> None:
    """Refuses a configuration that has no form in Linen.

    Raises:
        TypeError: `config` is no adapter configuration.
        ValueError: the method, or one of its settings, has no form in Linen.
    """
    if isinstance(config, MethodConfig) and config.tree_refusal:
        raise ValueError(config.tree_refusal)
    adapter_class(config)
    if config.bias != "none":
        raise ValueError(f"Linen layers have no bias={config.bias!r}; BitFitConfig trains biases alone")
    if config.trainable_tokens:
        raise ValueError("trainable_tokens has no form in Linen: adapt the embedding, or train it with your optimizer")
    if config.modules_to_save:
        raise ValueError(
            f"modules_to_save names {config.modules_to_save[0]!r}, but in Linen adapters alone are added: train that "
            "part of variables['params'] with your optimizer"
        )


def param(module: nn.Module, name: str) -> Array:
    """An array of the layer's own, out of any box."""
    return nn.meta.unbox(module.get_variable("params", name))


def _arrays(module: nn.Module, config: Any, matrix: Matrix) -> Arrays:
    """The layer's adapter; made where there is none and the collection may be written."""
    trained, fixed = array_shapes(config, matrix)
    made: Mapping[str, Array] = {}
    arrays = {}
    for collection, names in ((COLLECTION, trained), (FIXED, fixed)):
        for name, shape in names.items():
            value = _held(module, matrix, collection, name)
            if value is None:
                _check_writable(module, collection, config)
                if not made:
                    kernel = matrix.take(param(module, matrix.array))
                    made = ChainMap(*fresh_arrays(config, matrix, nnx.Rngs(params=_key(module, matrix)), kernel))
                value = made[name]
                _hold(module, matrix, collection, name, value)
            arrays[name] = nn.meta.unbox(value)
            if arrays[name].shape != shape:
                given = f"{title(module.path)}: {collection}/{name} is {arrays[name].shape}"
                raise ValueError(f"{given}, but {in_words(config)} asks for {shape}")
    return scaled(config, arrays)


def _held(module: nn.Module, matrix: Matrix, collection: str, name: str) -> Any:
    """An array of a layer's adapter, beside its own or under the name that this has (`adapter_path`); else None."""
    if matrix.array in KERNELS:
        return module.get_variable(collection, name)
    held: dict[str, Any] = module.get_variable(collection, matrix.array, {})
    return held.get(name)


def _hold(module: nn.Module, matrix: Matrix, collection: str, name: str, value: Any) -> None:
    if matrix.array not in KERNELS:
        name, value = matrix.array, {**module.get_variable(collection, matrix.array, {}), name: value}
    module.put_variable(collection, name, value)


def _key(module: nn.Module, matrix: Matrix) -> Array:
    """A key for a fresh adapter that leaves those of the parameters as they are."""
    assert module.scope is not None, "a module that runs"
    # Other layers of a shared scope are still to make their parameters; that of this one has reserved the name.
    stream = module if matrix.array in KERNELS else module.scope.push(matrix.array, reuse=True)
    return stream.make_rng("params")


def _check_writable(module: nn.Module, collection: str, config: Any) -> None:
    if module.is_mutable_collection(collection):
        return
    where = title(module.path)
    if module.is_initializing():
        raise ValueError(
            f"{where} runs under a transformation (nn.scan, nn.vmap, nn.RNN) that passes on no collection "
            f"{collection!r}: name it beside 'params' in variable_axes (or variable_broadcast), or leave the layer out "
            "of targets"
        )
    raise ValueError(
        f"{where} has no adapter of {type(config).__name__} among the variables: give apply the collection "
        f"{collection!r} that init makes inside the context; under nn.scan or nn.vmap, variable_axes has to name it too"
    )


def in_words(config: Any) -> str:
    """A configuration in a few words, for messages."""
    settings = [f"{name}={getattr(config, name)!r}" for name in ("rank", "kind") if hasattr(config, name)]
    return f"{type(config).__name__}({', '.join(settings)})"


def title(path: tuple[str, ...]) -> str:
    """The path of a module in words, for messages."""
    return ".".join(path) or "(the model itself)"


def adapted_output(
    module: nn.Module,
    config: Any,
    product: Product,
    call: Callable[[Array], Array],
    inputs: Array,
    deterministic: bool | None,
    bias: str | None,
) -> Array:
    """What a layer with an adapter gives.

    Args:
        module: the layer, bound.
        config: for this layer.
        product: how the layer's call is a product with its matrix.
        call: the plain layer.
        inputs: as the layer takes them.
        deterministic: whether dropout is off; None where the configuration has none.
        bias: the name of the layer's bias, or None.
    """
    method, matrix = adapter_class(config), product.matrix
    first = None
    if any(_held(module, matrix, COLLECTION, name) is None for name in array_shapes(config, matrix)[0]):
        first = call(inputs)  # makes the kernel that a fresh adapter starts from, which leaves the inputs as they are
    params = _arrays(module, config, matrix)

    def real(x: Array) -> Array:
        y = call(x) if first is None else first
        if jnp.issubdtype(y.dtype, jnp.complexfloating):
            raise ValueError(
                f"{title(module.path)} computes in {y.dtype}: adapters are real, so complex layers can't carry one"
            )
        return y

    key, kernel = _dropout_key(module, config, deterministic), param(module, matrix.array)
    own_bias = None if bias is None else param(module, bias)
    return around(method, config, params, product, real, inputs, kernel, own_bias, key)


def _dropout_key(module: nn.Module, config: Any, deterministic: bool | None) -> Array | None:
    """The key of the layer's dropout; None where nothing is dropped."""
    if config.dropout == 0.0:
        return None
    if deterministic is None:
        raise ValueError(f"dropout is {config.dropout}: deterministic must be True (no dropout) or False")
    return None if deterministic else module.make_rng("dropout")


def table_output(
    module: nn.Module, config: Any, matrix: Matrix, call: Callable[[Array], Array], inputs: Array, *, attends: bool
) -> Array:
    """What an `nn.Embed` with an adapter gives.

    Args:
        module: the layer.
        config: of the adapter.
        matrix: the table.
        call: the module's own look-up, or its own `attend`.
        inputs: ids `[...]`, on which dropout doesn't act, as in PEFT; or queries `[..., D]`.
        attends: whether it makes products with every row of the table, as a tied output head does.
    """
    method = adapter_class(config)
    method.check_embedding(title(module.path))
    run, params = attended if attends else embedded, _arrays(module, config, matrix)
    return run(method, config, params, call, inputs, param(module, matrix.array))
