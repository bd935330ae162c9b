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
from mora_jax.adapters.products.around import beside
from mora_jax.adapters.products.explicit_mesh import placed_like
from mora_jax.functional.tree import Adapters, Arrays, Einsums, TreeKernel, is_array, matched

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
        site: what the tree says of it.
        stack, inputs, outputs: axes of `array`, in the order of the stack and of the matrix.
    """

    array: Array
    params: Arrays
    site: TreeKernel = field(metadata={"static": True})
    stack: tuple[int, ...] = field(metadata={"static": True})
    inputs: tuple[int, ...] = field(metadata={"static": True})
    outputs: tuple[int, ...] = field(metadata={"static": True})

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
        stack = len(self.stack)
        plain = replace(
            self.site,
            matrix=Matrix.plain(self.site.matrix.array, self.matrix().shape[stack:]),
            stack=self.sizes(self.stack),
        )
        total = plain.merged(self.matrix(), self.params).reshape(self.sizes(self.order))
        return total.transpose(np.argsort(self.order))

    def moved(self, array: Array, where: Callable[[int], int]) -> _Kernel:
        """The kernel after an axis `a` has become `where(a)`."""
        axes = (tuple(map(where, group)) for group in (self.stack, self.inputs, self.outputs))
        return _Kernel(array, self.params, self.site, *axes)

    def layer(self) -> _Kernel:
        """One layer of a stack, when `array` and `params` have lost their first axis."""
        later = replace(self, stack=self.stack[1:])
        return later.moved(self.array, lambda axis: axis - 1)


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
    pairs = matched(params, adapters, config, einsums)
    leaves, treedef = jax.tree.flatten(params)
    traced = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    given: list[Any] = list(leaves)
    for kernel, arrays in pairs:
        matrix, lead = kernel.matrix, len(kernel.stack)
        axes = (tuple(lead + axis for axis in group) for group in (matrix.contracted, matrix.free))
        leaf = jnp.asarray(leaves[kernel.leaf])
        given[kernel.leaf] = _Kernel(leaf, arrays, _one_layer(kernel), tuple(range(lead)), *axes)
        if kernel.bias is not None:
            given[kernel.bias] = kernel.merged_bias(jnp.asarray(leaves[kernel.bias]), arrays)

    def applied(*args: Any, **options: Any) -> Any:
        others, form = jax.tree.flatten((args, options))
        arrays = [i for i, value in enumerate(others) if isinstance(value, jax.Array | np.ndarray | np.generic)]

        def flat(values: list[Any], inputs: list[Any]) -> Any:
            tree, rest = list(leaves), list(others)
            for i, value in zip(traced, values, strict=True):
                tree[i] = value
            for i, value in zip(arrays, inputs, strict=True):
                rest[i] = value
            positional, named = jax.tree.unflatten(form, rest)
            return f(jax.tree.unflatten(treedef, tree), *positional, **named)

        inputs = [others[i] for i in arrays]
        program, shape = jax.make_jaxpr(flat, return_shape=True)([leaves[i] for i in traced], inputs)
        interpreter = _Interpreter(key)
        outputs = interpreter.run(program, [*(given[i] for i in traced), *inputs])
        results = [interpreter.plain(output, "the output") for output in outputs]
        interpreter.check([kernel.path for kernel, _ in pairs])
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return applied


def _one_layer(kernel: TreeKernel) -> TreeKernel:
    """What all layers of a kernel have in common, to be compared as static."""
    return replace(kernel, leaf=0, stack=(), bias=None)


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
        unused = {
            path: uses
            for path in paths
            if path not in self.served and (uses := self.others.get(path, set())) <= set(_NO_PRODUCT)
        }
        if unused:
            how = (
                f"{path} ({'used by ' + ', '.join(sorted(uses)) if uses else 'not used'})"
                for path, uses in unused.items()
            )
            raise ValueError(
                f"the function never uses as a product: {', '.join(how)}; leave that out of targets, or use "
                "mj.functional.merge"
            )
        if self.others:
            merged = (f"{path} ({', '.join(sorted(uses))})" for path, uses in self.others.items())
            warnings.warn(
                f"kernels that were merged where the update could not be put beside a product: {', '.join(merged)}",
                stacklevel=3,
            )

    def plain(self, value: Any, use: str) -> Any:
        """The value, a kernel merged."""
        if not isinstance(value, _Kernel):
            return value
        self.others.setdefault(value.site.path, set()).add(use)
        return value.merged()

    def run(self, program: Any, args: Sequence[Any], consts: Sequence[Any] = ()) -> list[Any]:
        """The outputs of a program, kernels among them where it hands them on."""
        jaxpr = getattr(program, "jaxpr", program)  # closed, or open
        values: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
        values |= zip(jaxpr.constvars, consts or getattr(program, "consts", ()), strict=True)

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
            return [operands[0].moved(array, lambda axis: axis)]
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
        return [operands[0].moved(operands[0].array.transpose(order), order.index)]

    def _reshape(self, equation: Any, operands: list[Any]) -> list[Any] | None:
        kernel, *rest = operands
        axes = None if rest else _reshaped(kernel, equation.params["new_sizes"])
        if axes is None:
            return None
        array = kernel.array.reshape(equation.params["new_sizes"])
        return [_Kernel(array, kernel.params, kernel.site, *axes)]

    def _squeeze(self, equation: Any, operands: list[Any]) -> list[Any] | None:
        kernel, dropped = operands[0], equation.params["dimensions"]
        if not set(dropped) <= set(kernel.stack):
            return None
        layers = tuple(i for i, axis in enumerate(kernel.stack) if axis in dropped)
        params = {name: value.squeeze(layers) for name, value in kernel.params.items()}
        stack = tuple(axis for axis in kernel.stack if axis not in dropped)
        kept = replace(kernel, params=params, stack=stack)
        return [kept.moved(kernel.array.squeeze(dropped), lambda axis: axis - sum(one < axis for one in dropped))]

    def _slice(self, equation: Any, operands: list[Any]) -> list[Any] | None:
        how = equation.params
        starts, strides = how["start_indices"], how["strides"] or (1,) * len(how["start_indices"])
        cuts = [slice(*cut) for cut in zip(starts, how["limit_indices"], strides, strict=True)]
        return self._part(equation, operands, lambda array, axis, cut: array[(slice(None),) * axis + (cut,)], cuts)

    def _dynamic_slice(self, equation: Any, operands: list[Any]) -> list[Any] | None:
        if any(isinstance(operand, _Kernel) for operand in operands[1:]):
            return None
        cuts = list(zip(operands[1:], equation.params["slice_sizes"], strict=True))

        def take(array: Array, axis: int, cut: Any) -> Array:
            start, size = cut
            return jax.lax.dynamic_slice_in_dim(array, start, size, axis)

        return self._part(equation, operands, take, cuts)

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
            params = {name: take(value, i, cuts[axis]) for name, value in params.items()}
        return [replace(kernel, array=array, params=params)]

    def _gather(self, equation: Any, operands: list[Any]) -> list[Any] | None:
        """Rows of an embedding table."""
        kernel, indices = operands
        how, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
        if not isinstance(kernel, _Kernel) or not kernel.site.matrix.is_embedding or kernel.stack:
            return None
        (row,), (feature,) = kernel.inputs, kernel.outputs
        shape = equation.outvars[0].aval.shape
        last = tuple(range(len(shape)))[len(shape) - len(how.offset_dims) :] == how.offset_dims
        if (
            row not in how.start_index_map
            or how.operand_batching_dims
            or not last
            or feature in how.collapsed_slice_dims
        ):
            return None
        if sizes[row] != 1 or sizes[feature] != kernel.array.shape[feature]:
            return None
        ids = indices[..., how.start_index_map.index(row)]
        if equation.params["mode"] == jax.lax.GatherScatterMode.CLIP:
            ids = jnp.clip(ids, 0, kernel.array.shape[row] - 1)
        site = kernel.site
        (plain_rows,) = self._bind(equation, [kernel.array, indices])
        self.served.add(site.path)

        def add(rows: Array, ids: Array, params: Arrays, table: Array) -> Array:
            total = rows + site.method.rows(ids, rows.dtype, params).reshape(rows.shape)
            gain = site.method.output_gain(site.config, params, lambda: table)
            return (total if gain is None else total * gain).astype(rows.dtype)

        return [placed_like(plain_rows, add, plain_rows, ids, kernel.params, kernel.matrix())]

    def _dot_general(self, equation: Any, operands: list[Any]) -> list[Any] | None:
        left = not isinstance(operands[1], _Kernel)  # of two kernels the first is an input
        kernel, x = operands[0 if left else 1], operands[1 if left else 0]
        contract, batch = (pair[:: 1 if left else -1] for pair in equation.params["dimension_numbers"])
        shape = x.array.shape if isinstance(x, _Kernel) else np.shape(x)
        form = _ProductForm.of(kernel, shape, contract, batch, left)
        if form is None:
            return None
        x = self.plain(x, "dot_general")
        self.served.add(kernel.site.path)
        params = kernel.params

        def bind(x: Array) -> Array:
            both = [kernel.array, x] if left else [x, kernel.array]
            return self._bind(equation, both)[0]

        if kernel.site.method.transforms_input(kernel.site.config, _single(params, len(kernel.stack)), form.features):
            x = placed_like(x, partial(form.transformed, kernel.site), x, params)
        y = bind(x)
        key = self._draw() if kernel.site.config.dropout else None
        return [placed_like(y, partial(form.beside, kernel.site), y, x, params, kernel.matrix(), key)]

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


def _single(params: Arrays, depth: int) -> dict[str, Any]:
    """The shapes of one layer's arrays."""
    return {name: jax.ShapeDtypeStruct(value.shape[depth:], value.dtype) for name, value in params.items()}


def _reshaped(kernel: _Kernel, sizes: Sequence[int]) -> list[tuple[int, ...]] | None:
    """The axes of stack, inputs and outputs after a reshape; None where it mixes them."""
    groups = [list(kernel.stack), list(kernel.inputs), list(kernel.outputs)]
    result: list[list[int]] = [[], [], []]
    shape, old, new = kernel.array.shape, 0, 0
    placed: dict[int, list[int]] = {}  # by the first old axis of a run, its new axes
    runs: list[list[int]] = []
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
        runs.append(list(range(first, old)))
        placed[first] = list(range(start, new))
    if old < len(shape) or new < len(sizes):  # axes of size 1 at the end
        return None
    for group, axes in zip(groups, result, strict=True):
        rest = group
        while rest:
            run = next((run for run in runs if run == rest[: len(run)]), None)
            if run is None or (group is groups[0] and len(placed[run[0]]) + len(run) > 2):
                return None
            axes += placed[run[0]]
            rest = rest[len(run) :]
    return [tuple(axes) for axes in result]


@dataclass(frozen=True)
class _ProductForm:
    """How a `dot_general` of a kernel and an input `x` is a product of rows `[*stack, N, in]` with `[*stack, in, out]`.

    Attributes:
        depth: axes of the stack that the input has, too; 0 where it has none, and all layers take it.
        layers: sizes of the stack.
        order: of the input's axes: stack, rows, features.
        result: of the result's axes: stack, rows, outputs.
        rows: how many there are, N.
        features, outputs: of the input and of the result.
        back: whether it is a product with the transposed matrix.
    """

    depth: int
    layers: tuple[int, ...]
    order: tuple[int, ...]
    result: tuple[int, ...]
    rows: int
    features: int
    outputs: int
    back: bool

    @classmethod
    def of(
        cls,
        kernel: _Kernel,
        x_shape: tuple[int, ...],
        contract: tuple[Sequence[int], Sequence[int]],
        batch: tuple[Sequence[int], Sequence[int]],
        kernel_first: bool,
    ) -> _ProductForm | None:
        """That of a `dot_general`, or None; `contract` and `batch` are axes of the kernel, then of the input."""
        method, config, shared = kernel.site.method, kernel.site.config, set(batch[0])
        back = set(contract[0]) == set(kernel.outputs)
        contracted, outputs = (kernel.outputs, kernel.inputs) if back else (kernel.inputs, kernel.outputs)
        if set(contract[0]) != set(contracted) or shared not in (set(), set(kernel.stack)):
            return None
        features = math.prod(kernel.sizes(contracted))
        params = _single(kernel.params, len(kernel.stack))
        transforms = not back and method.transforms_input(config, params, features)
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
            math.prod(x_shape[axis] for axis in rows),
            features,
            math.prod(kernel.sizes(outputs)),
            back,
        )

    def _rows(self, x: Array) -> Array:
        """`x` as `[*stack, N, in]`, or `[N, in]` where it has no axis of the stack."""
        return x.transpose(self.order).reshape(*self.layers[: self.depth], self.rows, self.features)

    def _over_layers(self, one: Callable[..., Array], axes: tuple[int | None, ...]) -> Callable[..., Array]:
        for _ in self.layers:
            one = jax.vmap(one, axes)
        return one

    def transformed(self, site: TreeKernel, x: Array, params: Arrays) -> Array:
        """What the method makes of the input, laid out as that."""
        run = self._over_layers(lambda params, x: site.method.transform_input(site.config, params, x), (0, 0))
        order = self.order
        sizes = [x.shape[axis] for axis in order]
        return run(params, self._rows(x)).reshape(sizes).transpose(np.argsort(order))

    def beside(self, site: TreeKernel, y: Array, x: Array, params: Arrays, kernel: Array, key: Array | None) -> Array:
        """The product's own result `y` with what the adapter does to it."""

        def one(y: Array, x: Array, params: Arrays, kernel: Array, key: Array | None) -> Array:
            if not self.back:
                product = Product(Matrix.plain("kernel", kernel.shape))
                return beside(site.method, site.config, product, y, x, params, kernel, None, key)
            x = x.astype(y.dtype)
            rows = jax.ShapeDtypeStruct((len(x), self.outputs), x.dtype)
            update = partial(_update, site, self.features, params)
            (change,) = jax.linear_transpose(update, rows)(x.astype(jax.eval_shape(update, rows).dtype))
            return (y + change).astype(y.dtype)

        flat = y.transpose(self.result).reshape(*self.layers, self.rows, self.outputs)
        run = self._over_layers(one, (0, 0 if self.depth else None, 0, 0, None))
        total = run(flat, self._rows(x), params, kernel, key).reshape([y.shape[axis] for axis in self.result])
        return total.transpose(np.argsort(self.result))


def _update(site: TreeKernel, out_features: int, params: Arrays, x: Array) -> Array:
    return site.method.delta(site.config, out_features, x, params)
