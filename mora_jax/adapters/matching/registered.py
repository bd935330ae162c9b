"""Layers of other people's classes: einsums under names of their own, such as those of model libraries for JAX.

A class can be registered by its names; a layer with one matrix and one equation needs no registering. What a layer is
said to compute is tried on random numbers before an adapter stands beside it.
"""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.layers import ADAPTED, Adapted, adapted_class, plain_class, refuse_stack
from mora_jax.adapters.matching.forms import FORMS, LayerForm, equation_of, kernel_of
from mora_jax.adapters.matrices import bias_of, einsum_axes, einsum_matrix, matrix_of
from mora_jax.adapters.products.around import view_by_axes
from mora_jax.adapters.products.explicit_mesh import explicit_axes

Array = jax.Array

_TOLERANCE = 0.05  # relative, in norm: a layer may round to bfloat16
_declared: set[type] = set()
_tried: dict[Any, str] = {}


def register_layer(cls: type, *, kernel: str = "kernel", einsum: str = "einsum_str", bias: str | None = None) -> None:
    """Makes the layers of a class carry adapters, merge and be saved as `nnx.Einsum` does.

    Called with an input, a layer has to compute the einsum of that input with its kernel, plus its bias, and nothing
    else; `attach` tries it. Subclasses that don't override the call are covered too.

    Args:
        cls: a subclass of `nnx.Module`.
        kernel: the attribute that holds the matrix, an `nnx.Param`.
        einsum: the equation (`"...i,oi->...o"` for a matrix `[out, in]`), or the attribute that holds it.
        bias: the attribute that holds the bias, an `nnx.Param` laid out as the output is; None for layers without.

    Raises:
        TypeError: `cls` is no subclass of `nnx.Module`, or a layer that is known already.

    Examples:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> import mora_jax as mj
        >>> class Turned(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.weight = nnx.Param(nnx.initializers.normal()(rngs.params(), (3, 5)))
        ...     def __call__(self, x):
        ...         return x @ self.weight[...].T
        >>> mj.register_layer(Turned, kernel="weight", einsum="...i,oi->...o")
        >>> model = Turned(nnx.Rngs(0))
        >>> mj.attach(model, mj.LoRAConfig(rank=2), rngs=1).matches[0].in_features
        5
    """
    if not (isinstance(cls, type) and issubclass(cls, nnx.Module)):
        raise TypeError(f"register_layer takes a class of nnx.Module, not {cls!r}")
    if issubclass(cls, Adapted) or (adapted_class(cls) is not None and cls not in FORMS):
        raise TypeError(f"{cls.__name__} carries adapters already")
    _declared.add(cls)
    _register(cls, LayerForm(kernel, einsum, bias))


def _register(cls: type, form: LayerForm) -> None:
    if FORMS.get(cls) != form:
        FORMS[cls] = form
        ADAPTED.setdefault(cls, _adapted_form(cls))
        adapted_class.cache_clear()


def _adapted_form(cls: type) -> type:
    return types.new_class(f"Adapted{cls.__name__}", (cls, Adapted), exec_body=lambda ns: ns.update(__call__=_call))


def recognise(layer: nnx.Module) -> bool:
    """Whether a layer of a class that Flax does not have can carry an adapter; notes the class where it can.

    Raises:
        ValueError: its class is registered, but it computes something else.
    """
    kind = type(layer)
    base = next((one for one in kind.__mro__ if one in FORMS), None)
    if base is None:
        form = guess(layer)
        if form is None or difference(layer, form):
            return False
        _register(kind, form)
        return True
    if kind is not base and kind.__call__ is not base.__call__:
        return False
    differs = difference(layer, FORMS[base])
    if differs and base in _declared:
        raise ValueError(f"{kind.__name__} is registered, but {differs}")
    if not differs:
        _register(kind, FORMS[base])
    return not differs


def guess(layer: nnx.Module) -> LayerForm | None:
    """The form of a layer that holds one matrix, one equation, perhaps one bias, and no module."""
    values = vars(layer)
    equations = [name for name, value in values.items() if isinstance(value, str) and "->" in value and "," in value]
    params = {name: value for name, value in values.items() if isinstance(value, nnx.Variable)}
    if len(equations) != 1 or any(isinstance(value, nnx.Module) for value in values.values()):
        return None
    ranks = {name: _rank(value) for name, value in params.items() if isinstance(value, nnx.Param)}
    depth = _depth(values[equations[0]], max(ranks.values(), default=0))
    kernels = [name for name, rank in ranks.items() if rank > depth + 1]
    biases = [name for name in params if name not in kernels]
    if len(kernels) != 1 or len(biases) > 1:
        return None
    return LayerForm(kernels[0], equations[0], biases[0] if biases else None)


def _depth(equation: str, rank: int) -> int:
    """How many axes of a kernel with `rank` axes stand for layers, since `nnx.vmap` made it."""
    right = equation.replace(" ", "").partition("->")[0].partition(",")[2]
    return max(0, rank - len(right))


def _rank(variable: nnx.Variable) -> int:
    return len(getattr(variable.get_value(), "shape", ()))


def difference(layer: nnx.Module, form: LayerForm) -> str:
    """What a layer's call does that its form does not say; empty where the two agree on random numbers."""
    equation = form.equation(layer)
    kernel = getattr(layer, form.kernel, None)
    if not isinstance(kernel, nnx.Param) or not isinstance(equation, str):
        return f"a layer has no nnx.Param {form.kernel} or no equation {form.einsum}"
    settings = {name: repr(value) for name, value in vars(layer).items() if not isinstance(value, nnx.Variable)}
    shapes = {name: value.shape for name, value in vars(layer).items() if isinstance(value, nnx.Variable)}
    key = type(layer), form, tuple(settings.items()), tuple(shapes.items())
    if key not in _tried:
        with jax.ensure_compile_time_eval():
            _tried[key] = _try(layer, form, equation.replace(" ", ""))
    return _tried[key]


def _try(layer: nnx.Module, form: LayerForm, equation: str) -> str:
    kernel = getattr(layer, form.kernel)
    depth = _depth(equation, len(kernel.shape))
    own = kernel.shape[depth:]  # of one layer, where several are stacked
    axes = einsum_axes(equation, own)
    if axes is None:
        return "its einsum is no product with one matrix"
    left, _, right = equation.partition("->")[0].partition(",")
    sizes = {right[axis]: own[axis] for axis in axes[0]}
    shape = [sizes.get(label, 2 + i) for i, label in enumerate(left.replace("...", ""))]
    keys = iter(jax.random.split(jax.random.key(0), 16))
    graphdef, state = nnx.split(layer)
    # Numbers of its own: the model's may be zeros, or abstract, or spread over devices.
    state = jax.tree.map(lambda leaf: _random(next(keys), leaf.shape[depth:], leaf.dtype), state)
    copy: Any = nnx.merge(graphdef, state)
    x = _random(next(keys), tuple(shape), jnp.float32)
    expected = jnp.einsum(equation, x, getattr(copy, form.kernel)[...].astype(jnp.float32))
    bias = None if form.bias is None else getattr(copy, form.bias, None)
    try:
        expected = expected if bias is None else expected + bias[...].astype(jnp.float32)
        y = copy(x)
    except Exception as error:  # noqa: BLE001 - it is somebody else's code
        return f"its call refused an input {list(shape)} ({type(error).__name__})"
    if getattr(y, "shape", None) != expected.shape:
        return f"its call gives no {list(expected.shape)} for an input {list(shape)}, as its einsum does"
    off, size = np.linalg.norm(np.asarray(y, np.float64) - expected), np.linalg.norm(expected)
    return "" if off <= _TOLERANCE * size else "its call computes something other than its einsum"


def _random(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros(shape, dtype)
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def _call(self: Any, inputs: Array, *args: Any, **options: Any) -> Array:
    """The call of an adapted layer: the plain one, and around it what the adapter does."""
    refuse_stack(self)
    kernel = kernel_of(self)
    called = plain_class(type(self)).__call__
    if explicit_axes(inputs, kernel[...]):
        return self._on_mesh(
            lambda x: called(self, x, *args, **options), lambda layer, x: _call(layer, x, *args, **options), inputs
        )
    found = einsum_matrix(equation_of(self) or "", kernel.shape, inputs.ndim)
    if found is None:
        raise ValueError(f"einsum {equation_of(self)!r} takes no input with {inputs.ndim} axes")
    to_in, (contracted, free), permutation = found
    sizes = [kernel.shape[a] for a in free]
    view = view_by_axes(inputs, to_in, inputs.ndim - len(contracted), sizes, permutation)
    bias = None if self.adapter.only_adds else bias_of(self)
    return self._around(view, lambda x: called(self, x, *args, **options), inputs, lambda: matrix_of(self), bias)
