"""How a layer's arrays are a matrix and its bias, in Flax NNX, in Linen and in the decoder's output head.

Layers made by `nnx.vmap`, `nn.scan` or `nn.vmap` hold their arrays stacked along axes in front, `[L, …]` or
`[L, M, …]`. Everything here takes and gives arrays with those axes, written `*stack`.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import Array

from mora_jax.adapters.products.explicit_mesh import whole


@dataclass(frozen=True)
class Matrix:
    """The matrix in a layer.

    Attributes:
        array: the name of the array that holds it, such as "kernel" or "embedding".
        shape: of that array, without axes of stacked layers in front.
        contracted, free: the array's axes that are summed over, and the others, in the order of the matrix.
        bias_axes: of the free axes, by number in `free`, which comes when in the bias.
        groups: of a convolution, whose matrix takes a window of the input to a place of the output: into how many parts
            channels are split, each with columns of its own. 0 for all other layers.

    Examples:
        >>> import jax.numpy as jnp
        >>> from mora_jax.adapters.matrices import Matrix
        >>> heads = Matrix.of_einsum("kernel", "btd,ndh->btnh", (2, 8, 4))  # 2 heads of 4 features, inputs of 8
        >>> heads.in_features, heads.out_features, heads.contracted, heads.free
        (8, 8, (1,), (0, 2))
        >>> heads.take(jnp.ones((3, 2, 8, 4))).shape  # of 3 stacked layers
        (3, 8, 8)
    """

    array: str
    shape: tuple[int, ...]
    contracted: tuple[int, ...]
    free: tuple[int, ...]
    bias_axes: tuple[int, ...]
    groups: int = 0

    @classmethod
    def plain(cls, array: str, shape: Sequence[int], inputs: int = 1) -> Matrix:
        """An array whose first `inputs` axes are contracted."""
        axes = tuple(range(len(shape)))
        return cls(array, tuple(shape), axes[:inputs], axes[inputs:], tuple(range(len(shape) - inputs)))

    @classmethod
    def of_einsum(cls, array: str, spec: str, shape: tuple[int, ...]) -> Matrix | None:
        """That of an einsum of the input with an array, or None where this is no product with one matrix."""
        operands, _, output = spec.replace(" ", "").partition("->")
        left, _, right = operands.partition(",")
        if "..." in right or len(set(right)) != len(right) or len(right) != len(shape):
            return None
        contracted = tuple(i for i, label in enumerate(right) if label in left and label not in output)
        free = tuple(i for i, label in enumerate(right) if label not in left and label in output)
        if len(contracted) + len(free) != len(right) or not contracted or not free:
            return None
        in_output = sorted(range(len(free)), key=lambda i: output.index(right[free[i]]))
        return cls(array, tuple(shape), contracted, free, tuple(in_output))

    @property
    def in_features(self) -> int:
        """Inputs of the layer, the contracted axes flattened."""
        return math.prod(self.shape[axis] for axis in self.contracted)

    @property
    def out_features(self) -> int:
        """Outputs of the layer, the other axes flattened."""
        return math.prod(self.shape[axis] for axis in self.free)

    @property
    def sizes(self) -> tuple[int, int]:
        """Inputs and outputs."""
        return self.in_features, self.out_features

    @property
    def is_embedding(self) -> bool:
        """Whether the matrix is an embedding table."""
        return self.array == "embedding"

    @property
    def kind(self) -> str:
        """What it is that `"all-linear"` doesn't mean, as in PEFT; empty for a linear layer."""
        return "an embedding" if self.is_embedding else "a convolution" if self.groups else ""

    @property
    def is_linear(self) -> bool:
        """Whether `"all-linear"` means it."""
        return not self.kind

    def take(self, array: Array) -> Array:
        """The layer's array `[*stack, *shape]` as matrices `[*stack, in, out]`."""
        order, lead = (*self.contracted, *self.free), array.ndim - len(self.shape)
        if order == (0, 1):
            return array
        shape = (*array.shape[:lead], self.in_features, self.out_features)
        return _transposed(whole(array), order).reshape(shape)

    def put(self, matrix: Array) -> Array:
        """The inverse of `take`."""
        order = (*self.contracted, *self.free)
        if order == (0, 1):
            return matrix
        shaped = matrix.reshape(*matrix.shape[:-2], *(self.shape[axis] for axis in order))
        return _transposed(shaped, np.argsort(order))

    def take_bias(self, bias: Array, lead: int = 0) -> Array:
        """The layer's bias with `lead` axes in front, as `[*stack, out]` in the order of the matrix."""
        stack = bias.shape[:lead]
        if len(self.free) == 1:
            return bias.reshape(*stack, self.out_features)  # Equinox's convolutions have [out, 1, 1]
        shaped = whole(bias).reshape(*stack, *(self.shape[self.free[axis]] for axis in self.bias_axes))
        return _transposed(shaped, np.argsort(self.bias_axes)).reshape(*stack, self.out_features)

    def put_bias(self, bias: Array) -> Array:
        """The inverse of `take_bias`: `[*stack, out]` with the axes of the layer's output."""
        shaped = bias.reshape(*bias.shape[:-1], *(self.shape[axis] for axis in self.free))
        return _transposed(shaped, self.bias_axes)


def possible_matrices(name: str, shape: tuple[int, ...]) -> list[Matrix]:
    """How an array may be a matrix: some axes in front, then those that are contracted, then the others."""
    if name == "embedding":
        return [Matrix.plain(name, shape[-2:])]
    return [
        Matrix.plain(name, shape[lead:], inputs)
        for lead in range(len(shape) - 1)
        for inputs in range(1, len(shape) - lead)
    ]


def _transposed(array: Array, order: Any) -> Array:
    """The last axes in another order."""
    lead = array.ndim - len(order)
    return array.transpose(*range(lead), *(lead + int(axis) for axis in order))


def _same(x: Array) -> Array:
    return x


@dataclass(frozen=True)
class Product:
    """One call of a layer, seen as a product with its matrix.

    Attributes:
        matrix: the layer's.
        flat: the call's input as `[..., in]`.
        unflat: the inverse of `flat`.
        shaped: `[..., out]`, in the order of the matrix, as the call's output.
        convolve: of a convolution: a call's output for an input and a kernel, without bias. An input is then no rows.
    """

    matrix: Matrix
    flat: Callable[[Array], Array] = _same
    unflat: Callable[[Array], Array] = _same
    shaped: Callable[[Array], Array] = _same
    convolve: Callable[[Array, Array], Array] | None = None

    @classmethod
    def of_convolution(cls, layer: Any, in_features: int, features: int) -> Product:
        """That of Flax's `Conv`, of NNX or Linen, with so many channels."""
        sizes = (layer.kernel_size,) if isinstance(layer.kernel_size, int) else tuple(layer.kernel_size)
        shape, groups = (*sizes, in_features // layer.feature_group_count, features), layer.feature_group_count
        axes = tuple(range(len(shape)))
        return cls(Matrix("kernel", shape, axes[:-1], axes[-1:], (0,), groups), convolve=partial(_convolved, layer))

    @classmethod
    def of_axes(cls, matrix: Matrix, inputs: Any, axes: Sequence[int], features: Sequence[int]) -> Product:
        """That of a layer which contracts some axes of its input and puts its `features` behind the others."""
        contracted = sorted(axis % inputs.ndim for axis in axes)  # as Flax does, whatever the order of `axes`
        uncontracted = [axis for axis in range(inputs.ndim) if axis not in contracted]
        return cls._of(matrix, inputs.shape, uncontracted, contracted, lambda y: y.reshape(*y.shape[:-1], *features))

    @classmethod
    def of_einsum(cls, matrix: Matrix | None, spec: str, inputs: Any) -> Product | None:
        """That of an einsum of `inputs` with the array; None where it is no product with one matrix."""
        operands, _, output = spec.replace(" ", "").partition("->")
        left, _, right = operands.partition(",")
        if "..." in left:
            # Stand-in labels for the axes under the ellipsis; upper code points can't collide with letters.
            hidden = "".join(chr(0x1000 + i) for i in range(inputs.ndim - len(left.replace("...", ""))))
            left, output = left.replace("...", hidden), output.replace("...", hidden)
        if matrix is None or len(left) != inputs.ndim or len(set(left)) != len(left):
            return None
        contracted, free = ([right[axis] for axis in axes] for axes in (matrix.contracted, matrix.free))
        uncontracted = [label for label in left if label not in contracted]
        if any(label not in output for label in uncontracted):
            return None
        sizes = [matrix.shape[axis] for axis in matrix.free]
        permutation = [(uncontracted + free).index(label) for label in output]

        def shaped(y: Array) -> Array:
            return y.reshape(*y.shape[:-1], *sizes).transpose(*permutation)

        return cls._of(matrix, inputs.shape, [*map(left.index, uncontracted)], [*map(left.index, contracted)], shaped)

    @classmethod
    def _of(cls, matrix: Matrix, shape: Any, uncontracted: list[int], contracted: list[int], shaped: Any) -> Product:
        """That of an input of a shape, by the axes that stay and those that are contracted."""
        order, inputs = [*uncontracted, *contracted], math.prod(shape[axis] for axis in contracted)
        permuted = [shape[axis] for axis in order]

        def flat(x: Array) -> Array:
            return x.transpose(*order).reshape(*permuted[: len(uncontracted)], inputs)

        return cls(matrix, flat, lambda x: x.reshape(permuted).transpose(*np.argsort(order)), shaped)


#: What libraries call a layer's own array, and its bias; the layer's path is then that of what holds them.
KERNELS = ("kernel", "w", "weight", "embedding", "embeddings")
BIASES = ("bias", "b")
#: Why these layers carry no adapter.
MASKED = "a mask on its kernel, which an update wouldn't have"
SCALED = "its kernel is multiplied with a factor before the product"
NORMALISED = "WeightNorm or SpectralNorm changes its kernel before the product, so an update wouldn't merge"
TRANSPOSED = "a transposed convolution, whose kernel is no matrix from inputs to outputs"
#: What of a layer says how it convolves; the rest of its call is dtypes and the bias.
_CONVOLUTION = ("strides", "padding", "input_dilation", "kernel_dilation", "feature_group_count", "precision")


def _convolved(layer: Any, x: Array, kernel: Array) -> Array:
    """`nnx.Conv`'s own call for another kernel, in the dtype of `x [..., channels]`."""
    call: Any = types.SimpleNamespace(
        **{name: getattr(layer, name) for name in _CONVOLUTION},
        in_features=x.shape[-1],
        kernel_size=kernel.shape[:-2],
        kernel_shape=kernel.shape,
        kernel=nnx.Param(kernel),
        bias=None,
        use_bias=False,
        mask=None,
        dtype=x.dtype,
        promote_dtype=promote_dtype,
        conv_general_dilated=jax.lax.conv_general_dilated,
        preferred_element_type=None,
    )
    return nnx.Conv.__call__(call, x)


@dataclass(frozen=True)
class LayerForm:
    """The names that a class of layers has for what `nnx.Einsum` calls `kernel`, `einsum_str` and `bias`.

    Attributes:
        kernel: the attribute that holds the matrix, an `nnx.Param`; of a Linen class the name of its parameter, or the
            attribute that holds this name.
        einsum: the equation of input and kernel (`"...i,io->...o"`), or the attribute that holds it; of a Linen class
            it can be an argument of the call, too.
        bias: the attribute that holds the bias, an `nnx.Param` laid out as the output is, or None.
        scale: the attribute that holds a factor of the kernel, with which a layer carries no adapter, or None.
    """

    kernel: str
    einsum: str
    bias: str | None = None
    scale: str | None = None

    def scaled(self, layer: Any) -> bool:
        """Whether one layer multiplies its kernel with something before the product."""
        return self.scale is not None and getattr(layer, self.scale, None) is not None

    def equation(self, layer: Any) -> str:
        """The equation of one layer; empty where it has none."""
        equation = self.einsum if "->" in self.einsum else getattr(layer, self.einsum, None)
        return equation.replace(" ", "") if isinstance(equation, str) else ""


EINSUM = LayerForm("kernel", "einsum_str", "bias")
#: The classes that `mj.register_layer` was called for.
FORMS: dict[type, LayerForm] = {}
#: Classes of libraries whose layers are einsums, by module and name: nothing of them is imported here.
SHIPPED: dict[str, LayerForm] = {
    f"tunix.models.{module}.Einsum": LayerForm("w", "einsum_str", scale="w_scale")
    for module in (
        "gemma.model",
        "gemma.gemma",
        "gemma3.model",
        "gemma4.model",
        "llama3.model",
        "qwen2.model",
        "qwen3.model",
    )
} | {
    f"gemma.gm.nn.{module}_layers.Einsum": LayerForm("weight_name", "eqn", scale="w_scale")
    for module in ("", "gemma3n.", "gemma4.")
}


def registered(cls: type) -> LayerForm | None:
    """The form of a registered class, its own or that of a library which is known here; None of another."""
    return FORMS.get(cls) or SHIPPED.get(f"{cls.__module__}.{cls.__qualname__}")


def form_of(layer: Any) -> LayerForm | None:
    """The form of an einsum's layer, Flax's or a registered one, adapted or not; None for another layer."""
    if isinstance(layer, nnx.Einsum):
        return EINSUM
    return next((form for base in type(layer).__mro__ if (form := registered(base)) is not None), None)


def matrix_of(layer: Any) -> Matrix | None:
    """The matrix in an NNX layer, adapted or not; None where it holds no single one."""
    if isinstance(layer, nnx.Linear):
        return Matrix.plain("kernel", (layer.in_features, layer.out_features))
    if isinstance(layer, nnx.Embed):
        return Matrix.plain("embedding", (layer.num_embeddings, layer.features))
    if isinstance(layer, nnx.LinearGeneral):
        if layer.batch_axis:
            return None
        return Matrix.plain("kernel", (*layer.in_features, *layer.out_features), len(layer.in_features))
    if isinstance(layer, nnx.Conv):
        product = Product.of_convolution(layer, layer.in_features, layer.out_features)
        return None if layer.mask is not None else product.matrix
    form = form_of(layer)
    if form is None or form.scaled(layer):
        return None
    spec, shape = form.equation(layer), tuple(getattr(layer, form.kernel).shape)
    return Matrix.of_einsum(form.kernel, spec, shape[-len(spec.partition("->")[0].partition(",")[2]) :])


def product_of(layer: Any, inputs: Any) -> Product:
    """How the call of an NNX layer with `inputs` is a product.

    Raises:
        ValueError: an einsum that is none for such inputs.
    """
    matrix = matrix_of(layer)
    assert matrix is not None, "only products with a matrix get adapters"
    if isinstance(layer, nnx.LinearGeneral):
        return Product.of_axes(matrix, inputs, layer.axis, layer.out_features)
    if isinstance(layer, nnx.Conv):
        return Product.of_convolution(layer, layer.in_features, layer.out_features)
    form = form_of(layer)
    if form is None:
        return Product(matrix)
    product = Product.of_einsum(matrix, form.equation(layer), inputs)
    if product is None:
        raise ValueError(f"einsum {form.equation(layer)!r} takes no input with {inputs.ndim} axes")
    return product


def weight_of(layer: Any) -> nnx.Variable:
    """The variable that holds the matrix of a layer which has one."""
    form = form_of(layer)
    plain = "embedding" if isinstance(layer, nnx.Embed) else "kernel"
    return getattr(layer, plain if form is None else form.kernel)


def bias_param(layer: Any) -> nnx.Variable | None:
    """The parameter that holds the bias of a layer, or None."""
    form = form_of(layer)
    name = "bias" if form is None else form.bias
    return None if name is None else getattr(layer, name, None)


def stack_of(layer: Any) -> tuple[int, ...]:
    """The axes in front of the kernel that `nnx.vmap` made, `()` without any."""
    matrix, shape = matrix_of(layer), tuple(weight_of(layer).shape)
    return () if matrix is None else shape[: max(0, len(shape) - len(matrix.shape))]
