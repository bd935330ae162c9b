"""What every adapter method has in common: sizes, arrays, and the two ways to use them (as a path, as a weight)."""

import functools
import numbers
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental import multihost_utils

from mora_jax.adapters.products.matmul import Delta, Dot, FusedLayout, dot, widened

#: Arrays of one adapter by name, without layer axis where a product is made.
Params = dict[str, Array]


def as_rngs(rngs: Any) -> nnx.Rngs:
    """`rngs` itself, or those of a seed or a key.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(rngs, nnx.Rngs):
        return rngs
    if isinstance(rngs, numbers.Integral) and not isinstance(rngs, bool):
        return nnx.Rngs(int(rngs))
    if isinstance(rngs, jax.Array) and (jax.dtypes.issubdtype(rngs.dtype, jax.dtypes.prng_key) or rngs.shape == (2,)):
        return nnx.Rngs(rngs)
    raise TypeError(f"rngs must be nnx.Rngs, a seed or a key, such as nnx.Rngs(0), not {type(rngs).__name__}")


class Adapter(nnx.Module):
    """The arrays of one adapter on one matrix, or on a stack of matrices when they carry a leading layer axis.

    With it a matrix W computes `gain ⊙ (T(x) K(W) + delta(T(x))) + bias + added bias`. A method is a subclass that
    creates its `AdapterParam`s in `__init__` and says in pure functions of a dictionary of arrays without layer axis
    what they do: `delta` and `dense` where it adds to the kernel, `transform_input` (T), `transform_kernel` (K),
    `output_gain` and `added_bias` where it does that. What merging does to a kernel follows from these. They are class
    methods, never static ones: `nnx.tabulate` replaces the functions of a class for a while, and turns static methods
    into functions for good. Layers of a stack that are left out have scaling 0, for which each of these functions
    leaves things as they are.

    Attributes:
        in_features: inputs of the matrix.
        out_features: outputs of it.
        config: the method's frozen configuration.
        additive: whether the method adds to the kernel, so that it has `delta` and `dense`.
        by_products: whether `delta` looks at its input by `product` alone.
        transforms_kernel: whether it has `transform_kernel`.
        file_method: the method that it is in a file; empty for its own.
        vectors: its arrays that hold one number a feature; a stack's leading axis doesn't make matrices of them.
        scales_bias: whether it multiplies the layer's own bias.
        start_in_file: whether a file's factors hold the start that is subtracted again, as `in_file` puts it there.
        on_embeddings: whether the method has a form for embedding tables; it then has `for_embedding`.
        on_experts: whether it has one for experts, of which each row of the input has one; it then has `grouped`.
        scaling: float32 `[*layers]`; 0 for layers of a stack that are not adapted.
        bias: `[*layers, out]`, what is added to the layer's bias; only where biases are trained.
        magnitude: `[*layers, out]`, DoRA's; only where the configuration asks for it.
    """

    method: ClassVar[str]
    file_method: ClassVar[str] = ""
    start_in_file: ClassVar[bool] = False
    vectors: ClassVar[frozenset[str]] = frozenset({"bias", "magnitude"})
    scales_bias: ClassVar[bool] = False
    additive: ClassVar[bool] = True
    by_products: ClassVar[bool] = False
    transforms_kernel: ClassVar[bool] = False
    on_embeddings: ClassVar[bool] = False
    on_experts: ClassVar[bool] = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: Any,
        *,
        rngs: nnx.Rngs | None = None,
        stack: tuple[int, ...] = (),
        axes: tuple[str, str] = ("embed", "mlp"),
        stack_axes: tuple[str, ...] | None = None,
    ):
        """Makes the arrays.

        Args:
            in_features: inputs of the matrix.
            out_features: outputs of it.
            config: the method's configuration.
            rngs: keys, for methods that draw something.
            stack: lengths of the stack's axes; () for a single matrix.
            axes: logical names of the matrix's axes.
            stack_axes: those of the stack's; None where all of them are layers.
        """
        self.in_features = in_features
        self.out_features = out_features
        self.config = config
        self.axes = tuple(axes)
        self.stack_axes = ("layers",) * len(stack) if stack_axes is None else tuple(stack_axes)
        self.scaling = AdapterState(constant(np.full(stack, self.scale(config), np.float32)), axes=self.stack_axes)

    @property
    def layers(self) -> tuple[int, ...]:
        """The axes of the stack, as the arrays have them now: `()` inside a scan over it."""
        return tuple(self.scaling.shape)

    def stacked(self, *axes: str) -> tuple[str, ...]:
        """Logical axes of an array of this adapter: those given, behind that of the stack."""
        return (*self.stack_axes[len(self.stack_axes) - len(self.layers) :], *axes)

    def filled(self, value: float, shape: tuple[int, ...], *axes: str, dtype: Any = jnp.float32) -> "AdapterParam":
        """A trained array `[*layers, *shape]` that starts from one value; `axes` are the logical ones of `shape`."""
        return AdapterParam(jnp.full((*self.layers, *shape), value, dtype), axes=self.stacked(*axes))

    @classmethod
    def scale(cls, config: Any) -> float:
        """The factor on the update."""
        return 1.0

    @classmethod
    def check_embedding(cls, title: str) -> None:
        """Refuses an embedding table, which `title` names, where the method has no form for one."""
        if not cls.on_embeddings:
            raise ValueError(f"{title} is an embedding, for which {cls.method} has no form; leave it out of targets")

    @classmethod
    def configure_for_shapes(cls, config: Any, sizes: Iterable[tuple[int, int]]) -> Any:
        """The configuration for layers of these sizes `(in, out)`, for methods in which layers share something."""
        return config

    def init_from_kernel(self, kernel: Callable[[], Array]) -> None:
        """Takes from the base what the method starts from; `kernel()` is `[*layers, in, out]`."""
        if getattr(self.config, "use_dora", False):
            self.magnitude = AdapterParam(column_norms(kernel()), axes=self.stacked(self.axes[1]))

    def fit(self, dtype: Any) -> None:
        """Holds the arrays of a fresh adapter in float64 where the base has that, before it takes its start from it."""
        if dtype != jnp.float64:
            return
        for value in vars(self).values():
            if isinstance(value, nnx.Variable) and jnp.issubdtype(value.dtype, jnp.floating):
                value.set_value(value.get_value().astype(dtype))
        self.scaling.set_value(constant(np.full(self.layers, self.scale(self.config), dtype)))

    def train_bias(self) -> None:
        """Adds a trained bias that starts at zero."""
        self.bias = self.filled(0.0, (self.out_features,), self.axes[1], dtype=self.scaling.dtype)

    @classmethod
    def delta(cls, config: Any, out_features: int, x: Array, params: Params, product: Dot = dot) -> Array:
        """`x [N, in]` → the update, `[N, out]`.

        `product` multiplies features of tokens by a matrix, in the dtype of `x`: plainly in layers of users' models, in
        the decoder with the backward that its products have.
        """
        raise NotImplementedError  # abstract: each additive method's file defines it

    @classmethod
    def grouped(cls, config: Any, out_features: int, x: Array, params: Params, product: Dot) -> Array:
        """The update of rows `x [R, in]` sorted by expert, float32 `[R, out]`; `params` are those of all E experts.

        `product(x, w)` multiplies rows by their expert's matrix of `w [E, in, out]`. Several rows may stand for each of
        R, side by side.
        """
        raise NotImplementedError  # abstract: each method that has on_experts defines it

    @classmethod
    def dense(cls, config: Any, in_features: int, out_features: int, params: Params) -> Array:
        """The update as a float32 kernel `[in, out]`."""
        raise NotImplementedError  # abstract: each additive method's file defines it

    @classmethod
    def output_gain(cls, config: Any, params: Params, kernel: Callable[[], Array]) -> Array | None:
        """The factor on every output, float32 `[out]`, or None; `kernel()` is the base's `[in, out]`."""
        if "magnitude" not in params:
            return None
        base = kernel()
        gain = magnitude_gain(params["magnitude"], base, cls.dense(config, base.shape[0], base.shape[1], params))
        return jnp.where(params["scaling"] != 0, gain, 1.0)

    @classmethod
    def transform_input(cls, config: Any, params: Params, x: Array) -> Array | None:
        """What takes the place of `x [N, in]`, in its shape and dtype and linear in it; None where x stays."""
        return None

    @classmethod
    def transforms_input(cls, config: Any, params: dict[str, Any], in_features: int, depth: int = 0) -> bool:
        """Whether `transform_input` is anything; of `params`, with `depth` axes of a stack, shapes are enough."""
        x = jax.ShapeDtypeStruct((1, in_features), jnp.float32)
        shapes = {name: jax.ShapeDtypeStruct(value.shape[depth:], value.dtype) for name, value in params.items()}
        return jax.eval_shape(lambda p, x: cls.transform_input(config, p, x), shapes, x) is not None

    @classmethod
    def transform_kernel(cls, config: Any, params: Params, kernel: Array) -> Array:
        """What takes the place of the base's `kernel [in, out]`, float32; it is used in the dtype of the inputs."""
        raise NotImplementedError  # abstract: each method that has transforms_kernel defines it

    @classmethod
    def added_bias(cls, config: Any, params: Params, bias: Array | None) -> Array | None:
        """What is added to the layer's `bias [out]` (None: it has none), float32 `[out]`, or None."""
        added = params.get("bias")
        if added is None or config.bias == "all":  # then those of layers that are left out are trained, too
            return added
        return jnp.where(params["scaling"] != 0, added, 0.0)

    @classmethod
    def in_file(cls, config: Any, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The configuration and the arrays of one matrix in the form that files have; arrays as numpy."""
        return config, params

    @classmethod
    def low_rank(
        cls, config: Any, in_features: int, out_features: int, params: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        """Arrays `[in, k]` and `[k, out]` whose product times the scaling is the update whatever the values, as numpy.

        None where the update has full rank.
        """
        return None

    @classmethod
    def continues(cls, config: Any, given: Any) -> bool:
        """Whether an adapter of the configuration `given`, out of a file, can be trained on with this method."""
        return False

    @classmethod
    def fuse(cls, layout: FusedLayout, configs: tuple[Any | None, ...]) -> Delta | None:
        """A faster joint form for several matrices with one input, or None; `configs[i]` is None for a bare part."""
        return None

    @classmethod
    def merged_kernel(cls, config: Any, params: Params, kernel: Array) -> Array:
        """The kernel that does what the base's `kernel [in, out]` and the adapter do, float32."""
        with jax.default_matmul_precision("highest"):
            total = widened(kernel)
            if cls.transforms_kernel:
                total = cls.transform_kernel(config, params, total)
            if cls.additive:
                total = total + cls.dense(config, kernel.shape[0], kernel.shape[1], params)
            gain = cls.output_gain(config, params, lambda: kernel)
            total = total if gain is None else total * gain
            if not cls.transforms_input(config, params, kernel.shape[0]):
                return total
            # T(x) is x M for some M, so its transpose takes the rows of a Wᵀ to those of (M W)ᵀ.
            transform = functools.partial(cls.transform_input, config, params)
            (rows,) = jax.linear_transpose(transform, total.T)(total.T)
            return rows.T

    @property
    def only_adds(self) -> bool:
        """Whether the adapter adds to the kernel, without a trained magnitude or bias."""
        return self.additive and not hasattr(self, "magnitude") and not hasattr(self, "bias")

    @property
    def transforms(self) -> bool:
        """Whether it transforms inputs or the kernel, so that a merged kernel does not tell the base's."""
        shared = self.config, self.params(), self.in_features, len(self.layers)
        return self.transforms_kernel or self.transforms_input(*shared)

    def params(self) -> Params:
        """The arrays by name, `scaling` among them."""
        return params_of(self)

    def map_layers(self, one: Callable[..., Any], *arrays: Any) -> Any:
        """`one(params, *arrays)` for each layer of a stack, results stacked; once for a single matrix."""
        return over_layers(len(self.layers), one, (self.params(), *arrays))

    def _map_if_any(self, one: Callable[..., Array | None], *arrays: Any) -> Array | None:
        """`map_layers`; where `one` gives None, no loop is compiled to find that out."""
        depth = len(self.layers)
        if depth:
            single = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[depth:], a.dtype), (self.params(), *arrays))
            if jax.eval_shape(one, *single) is None:
                return None
        return self.map_layers(one, *arrays)

    def delta_weight(self) -> Array:
        """The update as float32 kernels `[*layers, in, out]`; zero for a method that adds nothing to the kernel."""
        if not self.additive:
            return jnp.zeros((*self.layers, self.in_features, self.out_features), jnp.float32)
        return self.map_layers(lambda p: self.dense(self.config, self.in_features, self.out_features, p))

    def bias_change(self, bias: Array | None) -> Array | None:
        """What merging adds to the layer's `bias [*layers, out]`, in that shape, or None."""
        return self._map_if_any(lambda p, bias: self.added_bias(self.config, p, bias), bias)

    def gain(self, kernel: Array) -> Array | None:
        """The factors on outputs `[*layers, out]` over the base's `[*layers, in, out]`, or None."""
        return self._map_if_any(lambda p, w: self.output_gain(self.config, p, lambda: w), kernel)

    def merged(self, kernel: Array) -> Array:
        """`merged_kernel` over the base's `[*layers, in, out]`, rounded to its dtype."""
        return self.map_layers(lambda p, w: self.merged_kernel(self.config, p, w).astype(w.dtype), kernel)

    def unmerged(self, kernel: Array, gain: Array | None) -> Array:
        """The inverse of `merged` up to rounding, without transforms; `gain` is what was merged, nowhere 0."""

        def one(p, w, gain):
            total = widened(w) if gain is None else widened(w) / gain
            if self.additive:
                total = total - self.dense(self.config, self.in_features, self.out_features, p)
            return total.astype(w.dtype)

        return self.map_layers(one, kernel, gain)


def over_layers(depth: int, one: Callable[..., Any], operands: tuple[Any, ...]) -> Any:
    """`one(*operands)` for each index of their first `depth` axes, one after the other; results stacked."""
    if not depth:
        return one(*operands)
    return jax.lax.map(lambda layer: over_layers(depth - 1, one, layer), operands)


def params_of(adapter: Adapter) -> Params:
    """`adapter.params()` for the layers' own calls: a function, since `nnx.tabulate` gives every method call a row."""
    return {name: value.get_value() for name, value in vars(adapter).items() if isinstance(value, nnx.Variable)}


class AdapterParam(nnx.LoRAParam):
    """A trainable float32 array of an adapter.

    A subclass of `nnx.LoRAParam`, so code that filters on `nnx.LoRAParam` finds it too. `partition` puts exactly
    the variables of this type into the trainable tree.

    Examples:
        >>> import optax
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> model = nnx.Sequential(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
        >>> _ = mj.attach(model, mj.LoRAConfig(rank=2), rngs=1)
        >>> optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=mj.AdapterParam)
        >>> sorted(str(path[-1]) for path, _ in nnx.to_flat_state(nnx.state(model, mj.AdapterParam)))
        ['lora_a', 'lora_b']
    """


class FullParam(AdapterParam):
    """A base weight that is trained itself (full fine-tuning): a float32 master, cast to the compute dtype at use."""


class AdapterState(nnx.Variable):
    """An array that an adapter reads and the optimizer never sees: scalings and layer masks."""


def mutable_state(path: tuple[Any, ...], value: Any) -> bool:
    """A filter of Flax NNX: the variables that a model changes while it is called.

    These are the counters of random streams (dropout), batch statistics, caches, and every other `nnx.Variable` that is
    neither an `nnx.Param` nor a constant of an adapter. A compiled training step has to return them, or each
    step draws the same dropout mask and loses its statistics; the base weights don't need to be returned.

    Args:
        path: of the variable, as NNX gives it to a filter; not looked at.
        value: the variable, or its state.

    Returns:
        Whether it is one of these.

    Examples:
        >>> from flax import nnx
        >>> import mora_jax as mj
        >>> rngs = nnx.Rngs(0)
        >>> layers = nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)
        >>> model = nnx.Sequential(*layers)
        >>> _ = mj.attach(model, mj.LoRAConfig(rank=2), rngs=rngs)
        >>> graphdef, adapters, state, frozen = nnx.split(model, mj.AdapterParam, mj.mutable_state, ...)
        >>> [".".join(map(str, path[2:])) for path, _ in nnx.to_flat_state(state)]
        ['mean', 'var', 'rngs.count', 'rngs.key']
    """
    kind = getattr(value, "type", type(value))
    return issubclass(kind, nnx.Variable) and not issubclass(kind, nnx.Param | AdapterState)


def column_norms(kernel: Array) -> Array:
    """Lengths of the columns of `kernel [..., in, out]`, float32 `[..., out]`."""
    return jnp.sqrt(jnp.sum(jnp.square(widened(kernel)), axis=-2))


def magnitude_gain(magnitude: Array, kernel: Array, delta: Array) -> Array:
    """`m / ‖W + ΔW‖` by output, the norm detached; 1 for a column of zeros, which has no direction.

    A gain within 64 units of rounding of 1 is 1, with the gradient that it has.

    Args:
        magnitude: `[out]`.
        kernel, delta: `[in, out]`.

    Returns:
        float32 `[out]`.
    """
    norms = jax.lax.stop_gradient(column_norms(widened(kernel) + delta))
    gain = jnp.where(norms > 0, magnitude / jnp.where(norms > 0, norms, 1.0), 1.0)
    # Two programs sum in two orders. A fresh magnitude is the norm up to that, and its gain is 1: in bfloat16 a gain
    # that is only nearly 1 rounds some outputs otherwise, and every layer behind them.
    near = jnp.abs(gain - 1.0) < 64 * jnp.finfo(gain.dtype).eps
    return gain + jax.lax.stop_gradient(jnp.where(near, 1.0 - gain, 0.0))


def constant(array: np.ndarray) -> Array:
    """An array with values that are known while a function around it is traced, too."""
    with jax.ensure_compile_time_eval():
        return jnp.asarray(array)


def known(array: Any) -> bool:
    """Whether an array has values, as under `nnx.jit` and in an abstract model few have."""
    return not isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct)


def host(array: Any) -> np.ndarray:
    """The whole array in this host's memory.

    Where other processes hold parts that this one lacks, they are gathered: then all processes have to call this, for
    the same arrays in the same order.
    """
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
