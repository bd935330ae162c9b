"""The arrays of an adapter on a Linen layer, and what the layer computes with them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn, nnx
from jax import Array

from mora_jax.adapters.base import Adapter
from mora_jax.adapters.config.common import MethodConfig
from mora_jax.adapters.matrices import KERNELS, Matrix, Product
from mora_jax.adapters.methods.lora import LoRA
from mora_jax.adapters.methods.registry import adapter_class, fresh_arrays
from mora_jax.adapters.products.around import around, attended as attended_by, embedded as embedded_by

Arrays = dict[str, Array]

COLLECTION = "adapters"  # what is trained
FIXED = "adapter_state"  # what methods with frozen factors (LoRA-FA, PiSSA, OLoRA, VeRA) keep beside it


def check_config(config: Any) -> type[Adapter]:
    """The adapter class of a configuration that has a form in Linen.

    Raises:
        TypeError: `config` is no adapter configuration.
        ValueError: the method, or one of its settings, has no form in Linen.
    """
    if isinstance(config, MethodConfig) and config.tree_refusal:
        raise ValueError(config.tree_refusal)
    method = adapter_class(config)
    if config.bias != "none":
        raise ValueError(f"Linen layers have no bias={config.bias!r}; BitFitConfig trains biases alone")
    if config.trainable_tokens:
        raise ValueError("trainable_tokens has no form in Linen: adapt the embedding, or train it with your optimizer")
    if config.modules_to_save:
        raise ValueError(
            f"modules_to_save names {config.modules_to_save[0]!r}, but in Linen adapters alone are added: train that "
            "part of variables['params'] with your optimizer"
        )
    return method


def fresh(config: Any, matrix: Matrix, key: Array, kernel: Array) -> tuple[Arrays, Arrays]:
    """New arrays for one matrix, the trained and the fixed ones by name; `kernel` is the base's `[in, out]`."""
    check_config(config)
    return fresh_arrays(config, matrix, nnx.Rngs(params=key), lambda: kernel, kernel.dtype)


@functools.cache
def expected(config: Any, matrix: Matrix) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The shapes of `fresh`."""
    kernel = jax.ShapeDtypeStruct((matrix.in_features, matrix.out_features), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    trained, fixed = jax.eval_shape(lambda key, kernel: fresh(config, matrix, key, kernel), key, kernel)
    return {k: v.shape for k, v in trained.items()}, {k: v.shape for k, v in fixed.items()}


def scaled(config: Any, arrays: Arrays) -> Arrays:
    """The arrays as the adapters' own classes take them."""
    dtype = jnp.result_type(jnp.float32, *arrays.values())
    return dict(arrays) | {"scaling": jnp.asarray(adapter_class(config).scale(config), dtype)}


def param(module: nn.Module, name: str) -> Array:
    """An array of the layer's own, out of any box."""
    return nn.meta.unbox(module.get_variable("params", name))


def _arrays(module: nn.Module, config: Any, matrix: Matrix) -> Arrays:
    """The layer's adapter; made where there is none and the collection may be written."""
    trained, fixed = expected(config, matrix)
    made: Arrays = {}

    def first(name: str) -> Array:
        if not made:
            kernel = matrix.take(param(module, matrix.array))
            for arrays in fresh(config, matrix, _key(module, matrix), kernel):
                made.update(arrays)
        return made[name]

    found = {}
    for collection, names in ((COLLECTION, trained), (FIXED, fixed)):
        for name, shape in names.items():
            value = _held(module, matrix, collection, name)
            if value is None:
                _check_writable(module, collection, config)
                value = first(name)
                _hold(module, matrix, collection, name, value)
            found[name] = nn.meta.unbox(value)
            if found[name].shape != shape:
                given = f"{title(module)}: {collection}/{name} is {found[name].shape}"
                raise ValueError(f"{given}, but {in_words(config)} asks for {shape}")
    return scaled(config, found)


def _held(module: nn.Module, matrix: Matrix, collection: str, name: str) -> Any:
    """An array of a layer's adapter, beside its own or under the name that this has (`adapter_path`); else None."""
    if matrix.array in KERNELS:
        return module.get_variable(collection, name)
    held: dict[str, Any] = module.get_variable(collection, matrix.array, {})
    return held.get(name)


def _hold(module: nn.Module, matrix: Matrix, collection: str, name: str, value: Array) -> None:
    if matrix.array in KERNELS:
        module.put_variable(collection, name, value)
    else:
        held: dict[str, Any] = module.get_variable(collection, matrix.array, {})
        module.put_variable(collection, matrix.array, {**held, name: value})


def _key(module: nn.Module, matrix: Matrix) -> Array:
    """A key for a fresh adapter that leaves those of the parameters as they are."""
    assert module.scope is not None, "a module that runs"
    # Other layers of a shared scope are still to make their parameters; that of this one has reserved the name.
    stream = module if matrix.array in KERNELS else module.scope.push(matrix.array, reuse=True)
    return stream.make_rng("params")


def _check_writable(module: nn.Module, collection: str, config: Any) -> None:
    if module.is_mutable_collection(collection):
        return
    if module.is_initializing():
        raise ValueError(
            f"{title(module)} runs under a transformation (nn.scan, nn.vmap, nn.RNN) that passes on no collection "
            f"{collection!r}: name it beside 'params' in variable_axes (or variable_broadcast), or leave the layer out "
            "of targets"
        )
    raise ValueError(
        f"{title(module)} has no adapter of {type(config).__name__} among the variables: give apply the collection "
        f"{collection!r} that init makes inside the context; under nn.scan or nn.vmap, variable_axes has to name it too"
    )


def in_words(config: Any) -> str:
    """A configuration in a few words, for messages."""
    settings = [f"{name}={getattr(config, name)!r}" for name in ("rank", "kind") if hasattr(config, name)]
    return f"{type(config).__name__}({', '.join(settings)})"


def title(module: nn.Module) -> str:
    """The path of a module in words, for messages."""
    return ".".join(module.path) or "(the model itself)"


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
    method, matrix = check_config(config), product.matrix
    first = None
    if any(_held(module, matrix, COLLECTION, name) is None for name in expected(config, matrix)[0]):
        first = call(inputs)  # makes the kernel that a fresh adapter starts from, which leaves the inputs as they are
    params = _arrays(module, config, matrix)

    def real(x: Array) -> Array:
        y = call(x) if first is None else first
        if jnp.issubdtype(y.dtype, jnp.complexfloating):
            raise ValueError(
                f"{title(module)} computes in {y.dtype}: adapters are real, so complex layers can't carry one"
            )
        return y

    key, kernel = _dropout_key(module, config, deterministic), param(module, matrix.array)
    return around(
        method, config, params, product, real, inputs, kernel, None if bias is None else param(module, bias), key
    )


def _dropout_key(module: nn.Module, config: Any, deterministic: bool | None) -> Array | None:
    """The key of the layer's dropout; None where nothing is dropped."""
    if config.dropout == 0.0:
        return None
    if deterministic is None:
        raise ValueError(f"dropout is {config.dropout}: deterministic must be True (no dropout) or False")
    return None if deterministic else module.make_rng("dropout")


def embedded(module: nn.Module, config: Any, matrix: Matrix, call: Callable[[Array], Array], ids: Array) -> Array:
    """Looked-up rows of a table with an adapter; dropout doesn't act on token ids, as in PEFT.

    Args:
        module: the `nn.Embed`.
        config: of the adapter.
        matrix: the table.
        call: the module's own look-up.
        ids: int `[...]`.
    """
    y = call(ids)  # which makes the table that a fresh adapter starts from
    params, method = _table(module, config, matrix)
    return embedded_by(method, config, params, lambda _: y, ids, param(module, matrix.array))


def attended(module: nn.Module, config: Any, matrix: Matrix, call: Callable[[Array], Array], query: Array) -> Array:
    """Products with every row of the adapted table: a tied output head.

    Args:
        module: the `nn.Embed`.
        config: of the adapter.
        matrix: the table.
        call: the module's own `attend`.
        query: `[..., D]`.
    """
    params, method = _table(module, config, matrix)
    return attended_by(method, config, params, call, query, param(module, matrix.array))


def _table(module: nn.Module, config: Any, matrix: Matrix) -> tuple[Arrays, type[LoRA]]:
    method = check_config(config)
    if not method.on_embeddings:
        raise ValueError(
            f"{title(module)} is an embedding, for which {method.method} has no form; leave it out of targets"
        )
    assert issubclass(method, LoRA), "the methods that have a form on embeddings"
    return _arrays(module, config, matrix), method
