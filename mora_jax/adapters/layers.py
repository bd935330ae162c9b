"""Flax NNX layers with an adapter beside their kernel.

Each is a subclass of the layer that it adapts and keeps that layer's variables, so state paths, checkpoints and
`isinstance` checks go on working; `attach` turns a layer into its adapted form in place. The layer's own call computes
`y = x W + b`; what the adapter adds is plain JAX around it (`products/around.py`).
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from mora_jax.adapters import compat
from mora_jax.adapters.base import Adapter, params_of
from mora_jax.adapters.matrices import FORMS, LayerForm, Matrix, bias_param, product_of, registered, stack_of, weight_of
from mora_jax.adapters.products.around import around, attended, embedded
from mora_jax.environment import check_versions

check_versions()  # every method's module comes this way
compat.complete()


_TOLERANCE = 0.05  # relative, in norm: a layer may round to bfloat16


class Adapted:
    """Mixin: an adapter, its dropout, and the way back to the plain layer.

    Attributes:
        adapter: the arrays of the update.
        adapter_dropout: rate and keys of what acts on the input of the adapter path only; None without dropout.
    """

    # A mixin without slots, listed after the plain class: the layouts agree, so a layer can change between the two.
    if not TYPE_CHECKING:
        __slots__ = ()
    adapter: Any  # an Adapter, with arrays named by its method
    adapter_dropout: Any  # an nnx.Dropout, or None

    def put_adapter(self, adapter: Adapter, rngs: nnx.Rngs | None) -> None:
        """Adds `adapter` to a layer that has none; dropout doesn't act on token ids."""
        self.adapter = adapter
        rate = 0.0 if isinstance(self, nnx.Embed) else adapter.config.dropout
        self.adapter_dropout = stacked_dropout(rate, rngs, stack_of(self)) if rate > 0 else None

    def take_adapter(self) -> Adapter:
        """Removes and returns the adapter; the layer is of its plain class again."""
        adapter = self.adapter
        del self.adapter, self.adapter_dropout
        plain: Any = next(base for base in type(self).__mro__ if not issubclass(base, Adapted))
        self.__class__ = plain
        return adapter

    @property
    def dropping(self) -> bool:
        """Whether the adapter has a dropout that is on."""
        return self.adapter_dropout is not None and not self.adapter_dropout.deterministic

    def _around(self, call: Callable[..., Array], inputs: Array, *args: Any, **options: Any) -> Array:
        """The adapter around `call`, the plain layer's, with whatever else that takes."""
        _refuse_stack(self)
        if jnp.issubdtype(inputs.dtype, jnp.complexfloating):
            raise TypeError(f"adapters have no complex form, and the input of an adapted layer is {inputs.dtype}")
        adapter, bias = self.adapter, bias_param(self)
        key = self.adapter_dropout.rngs() if self.dropping else None
        method = type(adapter), adapter.config, params_of(adapter)
        arrays = weight_of(self)[...], None if bias is None else bias[...]
        return around(*method, product_of(self, inputs), lambda x: call(x, *args, **options), inputs, *arrays, key)


def stacked_dropout(rate: float, rngs: nnx.Rngs | None, stack: tuple[int, ...]) -> nnx.Dropout:
    """Dropout for a layer of a stack, `()` for none: each layer draws from a key of its own."""
    dropout = nnx.Dropout(rate, rngs=rngs)
    if stack:
        stream: Any = dropout.rngs
        stream.key.set_value(jax.random.split(stream.key.get_value(), stack))
        stream.count.set_value(jnp.zeros(stack, stream.count.get_value().dtype))
    return dropout


def _refuse_stack(layer: Any) -> None:
    """Raises `ValueError` where a layer's arrays are those of several."""
    if stack := stack_of(layer):
        raise ValueError(f"this layer is a stack of {list(stack)} layers: call it inside nnx.scan or nnx.vmap")
    if stack := layer.adapter.layers:  # nnx.StateAxes may leave its scaling out, which would broadcast against outputs
        raise ValueError(f"the AdapterState is that of {list(stack)} layers: give nnx.StateAxes its axis, too")


class AdaptedLinear(nnx.Linear, Adapted):
    """`nnx.Linear` with an adapter: `y = x W + b + update(x)`."""

    def __call__(self, inputs: Array, *args: Any, **options: Any) -> Array:
        return self._around(super().__call__, inputs, *args, **options)


class AdaptedLinearGeneral(nnx.LinearGeneral, Adapted):
    """`nnx.LinearGeneral` with an adapter on the matrix that its contracted and its new axes form."""

    def __call__(self, inputs: Array, *args: Any, **options: Any) -> Array:
        return self._around(super().__call__, inputs, *args, **options)


class AdaptedEinsum(nnx.Einsum, Adapted):
    """`nnx.Einsum` with an adapter, where the einsum is a product with a matrix."""

    def __call__(self, inputs: Array, einsum_str: str | None = None, *args: Any, **options: Any) -> Array:
        spec = self.einsum_str.replace(" ", "")
        if einsum_str is not None and einsum_str.replace(" ", "") != spec:
            raise ValueError(
                f"the adapter on this nnx.Einsum is for {spec!r}, and merges for it; with {einsum_str!r}, given at the "
                "call, it would be another"
            )
        return self._around(super().__call__, inputs, None, *args, **options)


class AdaptedConv(nnx.Conv, Adapted):
    """`nnx.Conv` with an adapter on the matrix `[window · channels / groups, out]` of its kernel."""

    def __call__(self, inputs: Array, *args: Any, **options: Any) -> Array:
        return self._around(super().__call__, inputs, *args, **options)


class AdaptedEmbed(nnx.Embed, Adapted):
    """`nnx.Embed` with an adapter: row v of the table becomes `gain ⊙ (E[v] + update[v])`.

    As in PEFT, LoRA's A starts at zero and its B is normal, and dropout does not act on token ids. `attend` (a tied
    output head) uses the adapted table too, so that lookup, head and a merged table agree.
    """

    def __call__(self, inputs: Array, *args: Any, **options: Any) -> Array:
        plain = super().__call__
        return self._run(embedded, lambda ids: plain(ids, *args, **options), inputs)

    def attend(self, query: Array, *args: Any, **options: Any) -> Array:
        """The table as an output head: `[..., features]` → `[..., num_embeddings]`."""
        plain = super().attend
        return self._run(attended, lambda query: plain(query, *args, **options), query)

    def _run(self, run: Callable[..., Array], call: Callable[[Array], Array], x: Array) -> Array:
        _refuse_stack(self)
        adapter = self.adapter
        return run(type(adapter), adapter.config, params_of(adapter), call, x, self.embedding[...])

    def table(self) -> Array:
        """The adapted table, float32 `[V, D]`."""
        return self.adapter.merged_kernel(self.adapter.config, params_of(self.adapter), self.embedding[...])


ADAPTED: dict[type, type] = {
    nnx.Linear: AdaptedLinear,
    nnx.LinearGeneral: AdaptedLinearGeneral,
    nnx.Einsum: AdaptedEinsum,
    nnx.Conv: AdaptedConv,
    nnx.Embed: AdaptedEmbed,
}


def adapted_class(plain: Any) -> type | None:
    """The adapted form of a layer class, or None.

    A subclass of one of Flax's layers has one where its own call, if it has any, goes on to `super().__call__`: the
    adapter then stands beside the product in there, as a merged kernel would. One that computes the product itself
    would pass the adapter by; so would a subclass of a registered class with a call of its own.
    """
    if issubclass(plain, Adapted):
        return None
    base = next((one for one in plain.__mro__ if one in ADAPTED or registered(one) is not None), None)
    if base is None or (base not in ADAPTED and plain.__call__ is not base.__call__):
        return None
    if base in ADAPTED and base is not nnx.Embed:
        between = plain.__mro__[: plain.__mro__.index(base)]
        if not all(_goes_on(vars(one)["__call__"]) for one in between if "__call__" in vars(one)):
            return None
    return _form(plain, base)


@functools.cache
def _form(plain: Any, base: type) -> type:
    """The class of adapted layers of the class `plain`; as every function of its arguments alone it is made once."""
    if plain in ADAPTED:
        return ADAPTED[plain]
    name = f"Adapted{plain.__name__}"
    if base is nnx.Embed:
        return types.new_class(name, (AdaptedEmbed, plain))
    if base in ADAPTED:
        return types.new_class(name, (plain, ADAPTED[base]))

    def call(self: Any, inputs: Array, *args: Any, **options: Any) -> Array:
        return self._around(functools.partial(plain.__call__, self), inputs, *args, **options)

    return types.new_class(name, (plain, Adapted), exec_body=lambda names: names.update(__call__=call))


def _goes_on(call: Any) -> bool:
    """Whether a method's code names `super` and `__call__`; it can't be run here to see."""
    code = getattr(inspect.unwrap(call), "__code__", None)
    return code is not None and {"super", "__call__"} <= set(code.co_names)


def to_adapted_class(layer: Any) -> None:
    """Makes a plain layer, in place, one of the adapted class, which is still to be given its adapter."""
    kind: Any = type(layer)
    form = adapted_class(kind)
    if form is None:
        raise TypeError(f"{kind.__name__} has no adapted form")
    layer.__class__ = form


def register_layer(
    cls: type, *, example: nnx.Module, kernel: str = "kernel", einsum: str = "einsum_str", bias: str | None = None
) -> None:
    """Makes the layers of a class carry adapters, merge and be saved as `nnx.Einsum` does.

    Called with an input, a layer has to compute the einsum of that input with its kernel, plus its bias, and nothing
    else. That is tried here, once, on random numbers in a copy of `example`; `attach` runs no layer. Subclasses that
    don't override the call are covered too.

    Args:
        cls: a subclass of `nnx.Module`.
        example: a layer of the class, as small as you like.
        kernel: the attribute that holds the matrix, an `nnx.Param`.
        einsum: the equation (`"...i,oi->...o"` for a matrix `[out, in]`), or the attribute that holds it.
        bias: the attribute that holds the bias, an `nnx.Param` laid out as the output is; None for layers without.

    Raises:
        TypeError: `cls` is no subclass of `nnx.Module`, or a layer that is known already; `example` is none of it.
        ValueError: the example computes something else.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> class Transposed(nnx.Module):
        ...     def __init__(self, inputs, outputs, rngs):
        ...         self.weight = nnx.Param(nnx.initializers.normal()(rngs.params(), (outputs, inputs)))
        ...     def __call__(self, x):
        ...         return x @ self.weight[...].T
        >>> example = Transposed(2, 3, nnx.Rngs(0))
        >>> mj.register_layer(Transposed, example=example, kernel="weight", einsum="...i,oi->...o")
        >>> mj.attach(Transposed(5, 3, nnx.Rngs(0)), mj.LoRAConfig(rank=2), rngs=1).matches[0].in_features
        5
    """
    if not (isinstance(cls, type) and issubclass(cls, nnx.Module)):
        linen = any(base.__module__ == "flax.linen.module" for base in getattr(cls, "__mro__", ()))
        other = "; classes of Linen go to mora_jax.linen.register_layer" if linen else ""
        raise TypeError(f"register_layer takes a class of nnx.Module, not {cls!r}{other}")
    if issubclass(cls, Adapted) or any(base in ADAPTED for base in cls.__mro__):
        raise TypeError(f"{cls.__name__} carries adapters already")
    if type(example) is not cls:
        raise TypeError(f"example must be a layer of the class {cls.__name__}, not {type(example).__name__}")
    form = LayerForm(kernel, einsum, bias)
    if differs := _difference(example, form):
        raise ValueError(f"{cls.__name__} can't be registered: {differs}")
    FORMS[cls] = form


def _difference(layer: nnx.Module, form: LayerForm) -> str:
    """What a layer's call does that its form does not say; empty where the two agree on random numbers."""
    equation, kernel = form.equation(layer), getattr(layer, form.kernel, None)
    if not isinstance(kernel, nnx.Param) or not equation:
        return f"a layer has no nnx.Param {form.kernel} or no equation {form.einsum}"
    matrix = Matrix.of_einsum(form.kernel, equation, kernel.shape)
    if matrix is None:
        return "its einsum is no product with one matrix"
    left, _, right = equation.partition("->")[0].partition(",")
    sizes = {right[axis]: kernel.shape[axis] for axis in matrix.contracted}
    shape = [sizes.get(label, 2 + i) for i, label in enumerate(left.replace("...", ""))]
    keys = iter(jax.random.split(jax.random.key(0), 16))
    graphdef, state = nnx.split(layer)
    # Numbers of its own: the example's may be zeros, or abstract.
    state = jax.tree.map(lambda leaf: random_values(next(keys), leaf.shape, leaf.dtype), state)
    copy: Any = nnx.merge(graphdef, state)
    x = random_values(next(keys), tuple(shape), jnp.float32)
    bias = None if form.bias is None else getattr(copy, form.bias, None)
    try:
        return computes_other(
            copy(x), equation, x, getattr(copy, form.kernel)[...], None if bias is None else bias[...]
        )
    except Exception as error:  # noqa: BLE001 - it is somebody else's code
        return f"its call refused an input {list(shape)} ({type(error).__name__})"


def computes_other(y: Any, equation: str, x: Array, kernel: Array, bias: Array | None) -> str:
    """In words what is wrong with an output `y` for an input; empty where it is the einsum with a kernel and a bias."""
    expected = jnp.einsum(equation, x, kernel.astype(jnp.float32))
    expected = expected if bias is None else expected + bias.astype(jnp.float32)
    if getattr(y, "shape", None) != expected.shape:
        return f"its call gives no {list(expected.shape)} for an input {list(x.shape)}, as its einsum does"
    off, size = np.linalg.norm(np.asarray(y, np.float64) - expected), np.linalg.norm(expected)
    return "" if off <= _TOLERANCE * size else "its call computes something other than its einsum"


def random_values(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Normal numbers; zeros where the dtype has none."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros(shape, dtype)
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)
