"""Layers of classes that Flax does not have: one parameter, one equation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from mora_jax.adapters.layers import computes_other, random_values
from mora_jax.adapters.matrices import BIASES, FORMS, SCALED, LayerForm, Product, registered
from mora_jax.linen.matrices import KINDS, einsum_product


@dataclass(frozen=True)
class EinsumCall:
    """A call of a layer of a registered class.

    Attributes:
        form: of the class.
        array: the name of its parameter.
        equation: of the input and that.
        inputs: what the call was given.
        again: the call for another input.
    """

    form: LayerForm
    array: str
    equation: str
    inputs: Array
    again: Callable[[Array], Array]

    @classmethod
    def of(
        cls, form: LayerForm, module: nn.Module, call: Callable[..., Array], args: Sequence[Any], kwargs: Mapping
    ) -> EinsumCall:
        """That of a call with these arguments: the input is the first that isn't the equation."""
        bound = inspect.signature(type(module).__call__).bind(module, *args, **kwargs)
        _, *names = bound.arguments
        name = next(name for name in names if name != form.einsum)
        equation = form.equation(module) or str(bound.arguments.get(form.einsum, "")).replace(" ", "")
        array = getattr(module, form.kernel, None)
        inputs = bound.arguments[name]

        def again(x: Array) -> Array:
            bound.arguments[name] = x
            return call(*bound.args[1:], **bound.kwargs)

        return cls(form, array if isinstance(array, str) else form.kernel, equation, inputs, again)

    def product(self, module: nn.Module) -> Product | str:
        """How it is a product with the parameter that the module has by now; in words why it is none."""
        if self.form.scaled(module):
            return SCALED
        if not module.has_variable("params", self.array):
            return f"its call makes no parameter {self.array!r}"
        shape = nn.meta.unbox(module.get_variable("params", self.array)).shape
        return einsum_product(self.array, self.equation, shape, self.inputs)


def form_of(kind: type) -> tuple[type, LayerForm] | None:
    """The registered class that a class of layers is or extends, with its form; None where there is none."""
    return next(((base, form) for base in kind.__mro__ if (form := registered(base)) is not None), None)


def register_layer(
    cls: type[nn.Module],
    *,
    example: tuple[Any, ...],
    kernel: str = "kernel",
    einsum: str = "einsum_str",
    bias: str | None = None,
) -> None:
    """Makes the layers of a Linen class carry adapters, merge and be saved as `nn.Einsum` does.

    Called with an input, a layer has to compute the einsum of that input with its parameter, plus its bias, and nothing
    else. That is tried here, once, on random numbers in `example`. Subclasses whose call goes on to `super()` are
    covered too.

    Args:
        cls: a subclass of `flax.linen.Module`.
        example: a layer of the class, as small as you like, and the arguments of a call of it.
        kernel: the name of the parameter that is the matrix, or the attribute that holds this name. An adapter is at
            the module's path; where the parameter is not called `kernel`, `w`, `weight` or `embedding`, with its name
            behind it.
        einsum: the equation (`"...i,oi->...o"` for a matrix `[out, in]`), or the attribute or the argument of the call
            that holds it.
        bias: the name of the bias (`bias` or `b`), laid out as the output is; None for layers without.

    Raises:
        TypeError: `cls` is no subclass of `flax.linen.Module`, or a layer that is known already; `example` is none of
            it.
        ValueError: the example computes something else.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> import mora_jax as mj
        >>> from mora_jax.linen import adapted, register_layer
        >>> class Contraction(nn.Module):
        ...     shape: tuple[int, ...]
        ...     @nn.compact
        ...     def __call__(self, equation, x):
        ...         return jnp.einsum(equation, x, self.param("w", nn.initializers.normal(), self.shape))
        >>> example = Contraction((2, 3)), "ti,io->to", jnp.ones((4, 2))
        >>> register_layer(Contraction, example=example, kernel="w", einsum="equation")
        >>> with adapted(mj.LoRAConfig(rank=2)) as report:
        ...     variables = Contraction((8, 6)).init(jax.random.key(0), "ti,io->to", jnp.ones((4, 8)))
        >>> jax.tree.map(jnp.shape, variables["adapters"])
        {'lora_a': (8, 2), 'lora_b': (2, 6)}
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_layer of mora_jax.linen takes a class of flax.linen.Module, not {cls!r}")
    if issubclass(cls, KINDS):
        raise TypeError(f"{cls.__name__} carries adapters already")
    if not isinstance(example, tuple) or type(example[0]) is not cls:
        raise TypeError(
            f"example must be a layer of the class {cls.__name__} and the arguments of its call, in a tuple"
        )
    if bias not in (None, *BIASES):
        raise ValueError(f"{cls.__name__} can't be registered: a bias is called {' or '.join(BIASES)}, not {bias!r}")
    form = LayerForm(kernel, einsum, bias)
    if differs := _difference(example, form):
        raise ValueError(f"{cls.__name__} can't be registered: {differs}")
    FORMS[cls] = form


def _difference(example: tuple[Any, ...], form: LayerForm) -> str:
    """What an example's call does that its form does not say; empty where the two agree on random numbers."""
    layer, *arguments = example
    variables = layer.init(jax.random.key(0), *arguments)
    keys = iter(jax.random.split(jax.random.key(0), 16))
    variables = jax.tree.map(lambda leaf: random_values(next(keys), leaf.shape, leaf.dtype), nn.meta.unbox(variables))

    def call(*args: Any, **kwargs: Any) -> Any:
        return layer.apply(variables, *args, **kwargs)

    one = EinsumCall.of(form, layer, call, arguments, {})
    params = variables.get("params", {})
    if one.array not in params or not one.equation:
        return f"a layer has no parameter {one.array} or no equation {form.einsum}"
    product = einsum_product(one.array, one.equation, params[one.array].shape, jnp.asarray(one.inputs))
    if isinstance(product, str):
        return product
    x = random_values(next(keys), jnp.shape(one.inputs), jnp.float32)
    return computes_other(one.again(x), one.equation, x, params[one.array], params.get(form.bias))
