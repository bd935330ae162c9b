"""A function of a tree of parameters, run with adapters beside its products.

The function is traced, and its program run again equation by equation. A value that is an adapted kernel, or one of its
layers, transposed, cast or reshaped, carries its adapter along, into the programs of `jit`, `scan`, `while`, `cond` and
`remat` too; where it meets a product, the update is added to that (`products/around.py`). Everything else is bound as
it is. All of it is plain JAX, so every transformation works around it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core

from mora_jax.adapters.matrices import Matrix, Product
from mora_jax.adapters.methods.registry import adapter_class
from mora_jax.adapters.products.around import beside, embedded
from mora_jax.adapters.products.explicit_mesh import placed_like
from mora_jax.functional.tree import Adapters, Einsums, adapted_sites, is_array
from mora_jax.linen.tree_sites import Arrays, merged_kernels

# Equations that leave a kernel what it is.
_SAME = ("convert_element_type", "copy", "copy_p", "name", "reduce_precision", "sharding_constraint")
_ONCE = ("closed_call", "core_call", "core_closed_call")
# Uses that read a kernel and are no product with it, nor part of one.
_NO_PRODUCT = ("broadcast_in_dim", "gather", "scatter", "reduce_sum", "the output")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Kernel:
    """An adapted kernel in the course of a program.

    Attributes:
        array: the base's kernel, its axes in any order.
        params: the adapter's arrays, `[*stack, …]`.
        name: its path in the tree, with dots.
        config: the method's.
        is_embedding: whether it is an embedding table.
        stack, inputs, outputs: axes of `array`, in the order of the stack and of the matrix.
    """

    array: Array
    params: Arrays
    name: str = field(metadata={"static": True})
    config: Any = field(metadata={"static": True})
    is_embedding: bool = field(metadata={"static": True})
    stack: tuple[int, ...] = field(metadata={"static": True})
    inputs: tuple[int, ...] = field(metadata={"static": True})
    outputs: tuple[int, ...] = field(metadata={"static": True})

    @property
    def method(self) -> Any:
        """The adapter's class."""
        return adapter_class(self.config)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes as a matrix has them."""
        return (*self.stack, *self.inputs, *self.outputs)

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        """Of these axes."""
        return tuple(self.array.shape[axis] for axis in axes)

    def matrix(self) -> Array:
        """`[*stack, in, out]`."""
        sizes = math.prod(self.sizes(self.inputs)), math.prod(self.sizes(self.outputs))
        return self.array.transpose(self.order).reshape(*self.sizes(self.stack), *sizes)

    def merged(self) -> Array:
        """The kernel with its adapter in it, laid out as the array."""
        total = merged_kernels(self.config, self.matrix(), self.params).reshape(self.sizes(self.order))
        return total.transpose(np.argsort(self.order))

    def with_axes(self, array: Array, where: Callable[[int], int]) -> _Kernel:
        """The kernel after an axis `a` has become `where(a)`."""
        axes = (tuple(map(where, group)) for group in (self.stack, self.inputs, self.outputs))
        return _Kernel(array, self.params, self.name, self.config, self.is_embedding, *axes)

    def layer(self) -> _Kernel:
        """One layer of a stack, when `array` and `params` have lost their first axis."""
        later = replace(self, stack=self.stack[1:])
        return later.with_axes(self.array, lambda axis: axis - 1)


def apply(
    f: Callable[..., Any],
    params: Any,
    adapters: Adapters,
    config: Any,
    *,
    einsums: Einsums | None = None,
    key: Array | None = None,
) -> Callable[..., Any]:
    """`f` of merged parameters, without a dense update: `apply(f, params, adapters, config)(x)`.

    It computes `f(merge(params, adapters, config), x)`, with the update beside each `dot_general` that takes an adapted
    kernel, and beside lookups in an adapted embedding. Where a kernel is used otherwise besides (inside a `custom_vjp`,
    in a convolution, carried by a loop), it is merged there, and a warning says so. What differentiates with respect
    to adapters or parameters stands around the call: `jax.grad(lambda a: loss(apply(f, params, a, config)(x)))`.

    Args:
        f: a function of the parameters and of anything else, as `jax.jit` could trace it; arrays among its arguments
            are traced, other values are what they are.
        params: its first argument.
        adapters: as for `merge`.
        config: as for `merge`.
        einsums: as for `init`.
        key: of the dropout on the adapters' inputs; None for none.

    Returns:
        The function of the other arguments.

    Raises:
        TypeError, ValueError: as `merge`; when called, a kernel that `f` never uses as a product.

    Warns:
        UserWarning: a kernel that could not be served in all of its uses.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import mora_jax as mj
        >>> params = {"mlp": {"kernel": jnp.ones((6, 4))}}
        >>> config = mj.LoRAConfig(rank=2)
        >>> adapters = mj.functional.init(params, config, rngs=0)
        >>> f = lambda params, x: x @ params["mlp"]["kernel"]
        >>> mj.functional.apply(f, params, adapters, config)(jnp.ones((1, 6))).shape
        (1, 4)
    """
    adapted = adapted_sites(params, adapters, config, einsums)
    leaves, treedef = jax.tree.flatten(params)
    traced = {i: leaf for i, leaf in enumerate(leaves) if is_array(leaf)}
    given: dict[int, Any] = dict(traced)
    for site, arrays in adapted:
        matrix, lead = site.matrix, len(site.stack)
        axes = (tuple(lead + axis for axis in group) for group in (matrix.contracted, matrix.free))
        given[site.key] = _Kernel(
            jnp.asarray(site.array), arrays, site.name, site.config, matrix.is_embedding, tuple(range(lead)), *axes
        )
        if site.bias is not None:
            given[site.bias_key] = site.merged_bias(arrays)

    def applied(*args: Any, **options: Any) -> Any:
        others, form = jax.tree.flatten((args, options))
        arrays = {i: x for i, x in enumerate(others) if isinstance(x, jax.Array | np.ndarray | np.generic)}

        def flat(traced: dict[int, Any], arrays: dict[int, Any]) -> Any:
            tree = jax.tree.unflatten(treedef, [traced.get(i, leaf) for i, leaf in enumerate(leaves)])
            positional, keywords = jax.tree.unflatten(form, [arrays.get(i, other) for i, other in enumerate(others)])
            return f(tree, *positional, **keywords)

        program, shape = jax.make_jaxpr(flat, return_shape=True)(traced, arrays)
        interpreter = _Interpreter(key)
        outputs = interpreter.run(program, [*given.values(), *arrays.values()])
        results = [interpreter.plain(output, "the output") for output in outputs]
        interpreter.check([site.name for site, _ in adapted])
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return applied


class _Interpreter:
    """Runs programs in which some values are kernels.

    Attributes:
        key: of dropout, or None.
        served: paths of kernels that got their update beside a product.
        others: by path, the equations that needed the kernel merged.
    """

    def __init__(self, key: Array | None):
        self.key = key
        self.draws = 0
        self.served: set[str] = set()
        self.others: dict[str, set[str]] = {}

    def check(self, paths: list[str]) -> None:
        """Refuses kernels that were in no product, and warns of those that were merged for some."""
        uses = {path: ", ".join(sorted(others)) for path, others in self.others.items()}
        merged = [path for path, others in self.others.items() if path in self.served or others - set(_NO_PRODUCT)]
        if unused := [path for path in paths if path not in self.served and path not in merged]:
            how = ", ".join(f"{path} ({f'used by {uses[path]}' if path in uses else 'not used'})" for path in unused)
            raise ValueError(
                f"the function never uses as a product: {how}; leave that out of targets, or use mj.functional.merge"
            )
        if uses:
            told = ", ".join(f"{path} ({names})" for path, names in uses.items())
            warnings.warn(
                f"kernels that were merged where the update could not be put beside a product: {told}", stacklevel=3
            )

    def plain(self, value: Any, use: str) -> Any:
        """The value, a kernel merged."""
        if not isinstance(value, _Kernel):
            return value
        self.others.setdefault(value.name, set()).add(use)
        return value.merged()

    def run(self, program: Any, args: Sequence[Any]) -> list[Any]:
        """The outputs of a program, kernels among them where it hands them on."""
        jaxpr = getattr(program, "jaxpr", program)  # closed, or open
        values: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
        values |= zip(jaxpr.constvars, getattr(program, "consts", ()), strict=True)

        def value(variable: Any) -> Any:
            return variable.val if isinstance(variable, core.Literal) else values[variable]

        for equation in jaxpr.eqns:
            outputs = self._outputs(equation, [value(variable) for variable in equation.invars])
            values |= zip(equation.outvars, outputs, strict=True)
        return [value(variable) for variable in jaxpr.outvars]

    def _outputs(self, equation: Any, operands: list[Any]) -> list[Any]:
        name = equation.primitive.name
        if not any(isinstance(operand, _Kernel) for operand in operands):
            return self._bind(equation, operands)
        rule = getattr(self, f"_{name}", None)
        if name in _SAME and len(operands) == 1:
            (array,) = self._bind(equation, [operands[0].array])
            return [operands[0].with_axes(array, lambda axis: axis)]
        if name in _ONCE:
            return self.run(equation.params["call_jaxpr"], operands)
        outputs = None if rule is None else rule(equation, operands)
        return self._bind(equation, [self.plain(operand, name) for operand in operands]) if outputs is None else outputs

    def _bind(self, equation: Any, operands: Sequence[Any]) -> list[Any]:
        params = equation.primitive.get_bind_params(equation.params)
        functions, params = params if isinstance(params, tuple) else ((), params)  # jax < 0.10 gives the former apart
        with equation.ctx.manager:
            outputs = equation.primitive.bind(*functions, *operands, **params)
        return list(outputs) if equation.primitive.multiple_results else [outputs]

    # Rules by the name of an equation: None where it needs its kernels merged.

    def _transpose(self, equation: Any, operands: list[Any]) -> list[Any]:
        order = equation.params["permutation"]
        return [operands[0].with_axes(operands[0].array.transpose(order), order.index)]

    def _reshape(self, equation: Any, operands: list[Any]) -> list[Any] | None:
        kernel, *rest = operands
        axes = None if rest else _reshaped(kernel, equation.params["new_sizes"])
        if axes is None:
            return None
        array = kernel.array.reshape(equation.params["new_sizes"])
        stack, inputs, outputs = axes
        return [replace(kernel, array=array, stack=stack, inputs=inputs, outputs=outputs)]

    def _squeeze(self, equation: Any, operands: list[Any]) -> list[Any] | None:
        kernel, dropped = operands[0], equation.params["dimensions"]
        if not set(dropped) <= set(kernel.stack):
            return None
        layers = tuple(i for i, axis in enumerate(kernel.stack) if axis in dropped)
        params = {name: value.squeeze(layers) for name, value in kernel.params.items()}
        stack = tuple(axis for axis in kernel.stack if axis not in dropped)
        squeezed = replace(kernel, params=params, stack=stack)
        return [
            squeezed.with_axes(kernel.array.squeeze(dropped), lambda axis: axis - sum(one < axis for one in dropped))
        ]

    def _slice(self, equation: Any, operands: list[Any]) -> list[Any] | None:
        how = equation.params
        strides = how["strides"] or (1,) * len(how["start_indices"])
        cuts = list(zip(how["start_indices"], how["limit_indices"], strides, strict=True))
        return self._part(equation, operands, jax.lax.slice_in_dim, cuts)

    def _dynamic_slice(self, equation: Any, operands: list[Any]) -> list[Any] | None:
        if any(isinstance(operand, _Kernel) for operand in operands[1:]):
            return None
        cuts = list(zip(operands[1:], equation.params["slice_sizes"], strict=True))
        return self._part(equation, operands, jax.lax.dynamic_slice_in_dim, cuts)

    def _part(
        self, equation: Any, operands: list[Any], take: Callable[..., Array], cuts: list[Any]
    ) -> list[Any] | None:
        """Some layers of a stack, of kernel and adapter alike."""
        kernel, shape = operands[0], equation.outvars[0].aval.shape
        others = (*kernel.inputs, *kernel.outputs)
        if kernel.sizes(others) != tuple(shape[axis] for axis in others):
            return None
        (array,) = self._bind(equation, [kernel.array, *operands[1:]])
        params = dict(kernel.params)
        for i, axis in enumerate(kernel.stack):
            params = {name: take(value, *cuts[axis], axis=i) for name, value in params.items()}
        return [replace(kernel, array=array, params=params)]

    def _gather(self, equation: Any, operands: list[Any]) -> list[Any] | None:
        """Rows of an embedding table."""
        kernel, indices = operands
        how, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
        if not isinstance(kernel, _Kernel) or not kernel.is_embedding or kernel.stack:
            return None
        (row,), (feature,) = kernel.inputs, kernel.outputs
        shape = equation.outvars[0].aval.shape
        last = tuple(range(len(shape)))[len(shape) - len(how.offset_dims) :] == how.offset_dims
        whole_rows = (
            row in how.start_index_map and feature not in how.collapsed_slice_dims and not how.operand_batching_dims
        )
        if not (last and whole_rows and sizes[row] == 1 and sizes[feature] == kernel.array.shape[feature]):
            return None
        ids = indices[..., how.start_index_map.index(row)]
        if equation.params["mode"] == jax.lax.GatherScatterMode.CLIP:
            ids = jnp.clip(ids, 0, kernel.array.shape[row] - 1)
        (rows,) = self._bind(equation, [kernel.array, indices])
        self.served.add(kernel.name)
        looked_up = rows.reshape(*ids.shape, -1)
        total = embedded(kernel.method, kernel.config, kernel.params, lambda _: looked_up, ids, kernel.matrix())
        return [total.reshape(rows.shape)]

    def _dot_general(self, equation: Any, operands: list[Any]) -> list[Any] | None:
        left = not isinstance(operands[1], _Kernel)  # of two kernels the first is an input
        kernel, x = operands[0 if left else 1], operands[1 if left else 0]
        axes = [pair[:: 1 if left else -1] for pair in equation.params["dimension_numbers"]]
        shape = x.array.shape if isinstance(x, _Kernel) else np.shape(x)
        form = _ProductForm.of(kernel, shape, axes, left)
        if form is None:
            return None
        x = self.plain(x, "dot_general")
        self.served.add(kernel.name)
        params = kernel.params

        def bind(x: Array) -> Array:
            both = [kernel.array, x] if left else [x, kernel.array]
            return self._bind(equation, both)[0]

        if kernel.method.transforms_input(kernel.config, params, form.features, len(kernel.stack)):
            x = placed_like(x, partial(form.transformed, kernel.config), x, params)
        y = bind(x)
        key = self._draw() if kernel.config.dropout else None
        return [placed_like(y, partial(form.beside, kernel.config), y, x, params, kernel.matrix(), key)]

    def _draw(self) -> Array | None:
        self.draws += 1
        return None if self.key is None else jax.random.fold_in(self.key, self.draws)

    def _jit(self, equation: Any, operands: list[Any]) -> list[Any]:
        def run(*operands: Any) -> list[Any]:
            return self.run(equation.params["jaxpr"], operands)

        run.__name__ = equation.params["name"]
        return jax.jit(run)(*operands)

    _pjit = _jit

    def _remat2(self, equation: Any, operands: list[Any]) -> list[Any]:
        how = {name: equation.params[name] for name in ("policy", "prevent_cse")}
        return jax.checkpoint(lambda *operands: self.run(equation.params["jaxpr"], operands), **how)(*operands)

    _checkpoint = _remat2

    def _cond(self, equation: Any, operands: list[Any]) -> list[Any]:
        index, *rest = operands

        def branch(program: Any) -> Callable[..., list[Any]]:
            return lambda *operands: self._results(program, operands)

        return jax.lax.switch(index, [branch(program) for program in equation.params["branches"]], *rest)

    def _while(self, equation: Any, operands: list[Any]) -> list[Any]:
        first, second = (equation.params[f"{part}_nconsts"] for part in ("cond", "body"))
        tested, used, start = operands[:first], operands[first : first + second], operands[first + second :]
        outer = self.key

        def body(carry: Any) -> Any:
            number, values = carry
            if outer is not None:
                self.key = jax.random.fold_in(outer, number)
            return number + 1, self._results(equation.params["body_jaxpr"], [*used, *values])

        def test(carry: Any) -> Array:
            return self._results(equation.params["cond_jaxpr"], [*tested, *carry[1]])[0]

        init = jnp.int32(0), [self.plain(value, "the carry of a loop") for value in start]
        _, values = jax.lax.while_loop(test, body, init)
        self.key = outer
        return values

    def _scan(self, equation: Any, operands: list[Any]) -> list[Any]:
        how = equation.params
        if "ft_in" in how:  # jax >= 0.12
            first, second = (len(part) for part in how["ft_in"].unpack()[:2])
        else:
            first, second = how["num_consts"], how["num_carry"]
        used, start, stacked = operands[:first], operands[first : first + second], operands[first + second :]
        stacked = [
            value if not isinstance(value, _Kernel) or value.stack[:1] == (0,) else self.plain(value, "scan")
            for value in stacked
        ]
        outer = self.key
        drawn = self._draw()
        keys = None if drawn is None else jax.random.split(drawn, how["length"])

        def body(carry: Any, step: Any) -> Any:
            self.key, values = step
            values = [value.layer() if isinstance(value, _Kernel) else value for value in values]
            results = self._results(how["jaxpr"], [*used, *carry, *values])
            return results[:second], results[second:]

        init = [self.plain(value, "the carry of a loop") for value in start]
        options = {name: how[name] for name in ("length", "reverse", "unroll")}
        carry, ys = jax.lax.scan(body, init, (keys, stacked), **options)
        self.key = outer
        return [*carry, *ys]

    def _results(self, program: Any, operands: Sequence[Any]) -> list[Any]:
        """The outputs of a program, no kernels among them."""
        return [self.plain(value, "the output of a loop or branch") for value in self.run(program, operands)]


def _reshaped(kernel: _Kernel, sizes: Sequence[int]) -> list[tuple[int, ...]] | None:
    """The axes of stack, inputs and outputs after a reshape; None where it mixes them."""
    shape, old, new = kernel.array.shape, 0, 0
    runs: dict[tuple[int, ...], range] = {}  # the fewest old axes that become new ones, and these
    while old < len(shape) and new < len(sizes):
        first, start, left, right = old, new, shape[old], sizes[new]
        while left != right:
            if left < right:
                old += 1
                left *= shape[old]
            else:
                new += 1
                right *= sizes[new]
        old, new = old + 1, new + 1
        runs[tuple(range(first, old))] = range(start, new)
    if old < len(shape) or new < len(sizes):  # axes of size 1 at the end
        return None
    groups = []
    for group in (kernel.stack, kernel.inputs, kernel.outputs):
        axes: list[int] = []
        rest = group
        while rest:
            run = next((run for run in runs if run == rest[: len(run)]), None)
            if run is None or (group is kernel.stack and len(runs[run]) + len(run) > 2):
                return None
            axes += runs[run]
            rest = rest[len(run) :]
        groups.append(tuple(axes))
    return groups


@dataclass(frozen=True)
class _ProductForm:
    """How a `dot_general` of a kernel and an input `x` is a product of rows `[*stack, N, in]` with `[*stack, in, out]`.

    Attributes:
        depth: axes of the stack that the input has, too; 0 where it has none, and all layers take it.
        layers: sizes of the stack.
        order: of the input's axes: stack, rows, features.
        result: of the result's axes: stack, rows, outputs.
        features, outputs: of the input and of the result.
        back: whether it is a product with the transposed matrix.
    """

    depth: int
    layers: tuple[int, ...]
    order: tuple[int, ...]
    result: tuple[int, ...]
    features: int
    outputs: int
    back: bool

    @classmethod
    def of(cls, kernel: _Kernel, x_shape: tuple[int, ...], axes: list[Any], kernel_first: bool) -> _ProductForm | None:
        """That of a `dot_general`, or None; `axes` are contracted and batch ones, of the kernel, then of the input."""
        contract, batch = axes
        method, config, shared = kernel.method, kernel.config, set(batch[0])
        back = set(contract[0]) == set(kernel.outputs)
        contracted, outputs = (kernel.outputs, kernel.inputs) if back else (kernel.inputs, kernel.outputs)
        if set(contract[0]) != set(contracted) or shared not in (set(), set(kernel.stack)):
            return None
        features = math.prod(kernel.sizes(contracted))
        transforms = not back and method.transforms_input(config, kernel.params, features, len(kernel.stack))
        changes = not method.additive or method.transforms_kernel or getattr(config, "use_dora", False)
        if (back and changes) or (transforms and kernel.stack and not shared):
            return None
        depth = len(kernel.stack) if shared else 0
        partner = dict(zip((*contract[0], *batch[0]), (*contract[1], *batch[1]), strict=True))
        rows = [axis for axis in range(len(x_shape)) if axis not in (*contract[1], *batch[1])]
        order = [*(partner[axis] for axis in kernel.stack[:depth]), *rows, *(partner[axis] for axis in contracted)]
        free = [("kernel", axis) for axis in range(kernel.array.ndim) if axis not in (*contract[0], *batch[0])]
        beside = [("x", axis) for axis in rows]
        result = [*(("kernel", axis) for axis in batch[0]), *(free + beside if kernel_first else beside + free)]
        wanted = [("kernel", axis) for axis in kernel.stack] + beside + [("kernel", axis) for axis in outputs]
        return cls(
            depth,
            kernel.sizes(kernel.stack),
            tuple(order),
            tuple(result.index(label) for label in wanted),
            features,
            math.prod(kernel.sizes(outputs)),
            back,
        )

    def _rows(self, x: Array) -> Array:
        """`x` as `[*stack, N, in]`, or `[N, in]` where it has no axis of the stack."""
        return x.transpose(self.order).reshape(*self.layers[: self.depth], -1, self.features)

    def _over_layers(self, one: Callable[..., Array], axes: tuple[int | None, ...]) -> Callable[..., Array]:
        for _ in self.layers:
            one = jax.vmap(one, axes)
        return one

    def transformed(self, config: Any, x: Array, params: Arrays) -> Array:
        """What the method makes of the input, laid out as that."""
        method: Any = adapter_class(config)
        run = self._over_layers(lambda params, x: method.transform_input(config, params, x), (0, 0))
        sizes = [x.shape[axis] for axis in self.order]
        return run(params, self._rows(x)).reshape(sizes).transpose(np.argsort(self.order))

    def beside(self, config: Any, y: Array, x: Array, params: Arrays, kernel: Array, key: Array | None) -> Array:
        """The product's own result `y` with what the adapter does to it."""

        def one(y: Array, x: Array, params: Arrays, kernel: Array, key: Array | None) -> Array:
            if not self.back:
                product = Product(Matrix.plain("kernel", kernel.shape))
                return beside(adapter_class(config), config, product, y, x, params, kernel, None, key)
            x = x.astype(y.dtype)
            rows = jax.ShapeDtypeStruct((len(x), self.outputs), x.dtype)
            update = partial(_update, config, self.features, params)
            (change,) = jax.linear_transpose(update, rows)(x.astype(jax.eval_shape(update, rows).dtype))
            return (y + change).astype(y.dtype)

        flat = y.transpose(self.result).reshape(*self.layers, -1, self.outputs)
        run = self._over_layers(one, (0, 0 if self.depth else None, 0, 0, None))
        total = run(flat, self._rows(x), params, kernel, key).reshape([y.shape[axis] for axis in self.result])
        return total.transpose(np.argsort(self.result))


def _update(config: Any, out_features: int, params: Arrays, x: Array) -> Array:
    return adapter_class(config).delta(config, out_features, x, params)
