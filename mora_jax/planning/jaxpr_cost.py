"""What one device computes and keeps in a step, read from the traced program: nothing is compiled, nothing runs.

Matrix products are counted as they stand in the program, those that remat repeats and the halves of attention that are
never computed included; what nothing uses, compilers drop, such as the product that ends a layer where remat repeats
it. Memory is followed through the program in its own order: results of matrix products, gathers, concatenations and
loops are held until their last use, and what is between them is fused into its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax.extend import core

#: Operations that compilers fuse into those around them; their results are never held.
_FUSED = frozenset(
    """
    abs add add_any and broadcast_in_dim clamp convert_element_type copy copy_p cos div eq erf exp exp2
    expand_dims ge gt integer_pow iota is_finite le log log1p logistic lt max min mul name ne neg not
    optimization_barrier or pad pow random_bits random_fold_in random_unwrap random_wrap rem reshape reshard
    rev rsqrt select_n sharding_constraint sign sin slice split sqrt square squeeze stop_gradient sub tanh
    transpose xor
    """.split()
)
_LOOPS = ("scan", "while")


@dataclass(frozen=True)
class Traced:
    """One device's share of a micro-batch.

    Attributes:
        flops: of its matrix products.
        bytes: operands and results of its matrix products.
        saved: bytes that the forward pass keeps for the backward pass, over all layers.
        uncut: those of them that no axis but those of rows shards: in arrays as wide as the residual stream, and in
            inputs that MoRA has put together in rows of its matrix's side.
        routed: those of them in the rows of experts, one for each expert of a token.
        layer: most bytes alive at once inside a layer, without the rows of experts.
        fullest: most bytes alive at once in the rows of experts, inside a layer.
        beside: bytes alive then in other arrays.
        head: most bytes alive at once in the vocabulary loss.
    """

    flops: float
    bytes: float
    saved: float
    uncut: float
    routed: float
    layer: float
    fullest: float
    beside: float
    head: float


def read_traced(
    program: core.ClosedJaxpr,
    layers: tuple[int, ...],
    chunks: int,
    width: int,
    sides: frozenset[int] = frozenset(),
    routed: frozenset[tuple[int, int]] = frozenset(),
) -> Traced:
    """What a traced step of one micro-batch on one device does.

    Args:
        program: the step.
        layers: turns of each loop over the model's layers, by which their scans are known.
        chunks: how often the loop of the vocabulary loss runs.
        width: of the residual stream.
        sides: of MoRA's matrices.
        routed: how many tokens go to experts, and to how many each.
    """

    def is_uncut(variable: Any) -> bool:
        shape = _aval(variable).shape
        return shape[-1:] == (width,) or (len(shape) == 3 and shape[-1] in sides)

    flops, bytes_moved = _products(program.jaxpr, chunks)
    layer, fullest, head = 0.0, (0.0, 0.0), 0.0
    saved: list[float] = []
    uncut: list[float] = []
    of_experts: list[float] = []
    for step in _used(program.jaxpr)[0]:
        if step.name == "scan" and (turns := step.equation.params["length"]) in layers:
            others, rows = _peak(step.inner[0], routed)
            layer, fullest = max(layer, others), max(fullest, rows)
            if not step.equation.params["reverse"]:
                stacked = _stacked(step, turns)
                saved.append(sum(map(_bytes, stacked)))
                rows_of = [array for array in stacked if _are_routed(_aval(array).shape[1:], routed)]
                of_experts.append(sum(map(_bytes, rows_of)))
                uncut.append(sum(_bytes(array) for array in stacked if is_uncut(array) and array not in rows_of))
        elif step.name == "while":
            head = max(head, sum(map(_bytes, step.equation.outvars)) + max(_peak(inner)[0] for inner in step.inner))
    all_saved, all_uncut, routed_too = (_fullest(sizes, len(layers)) for sizes in (saved, uncut, of_experts))
    return Traced(flops, bytes_moved, all_saved, all_uncut, routed_too, layer, *fullest, head)


def _are_routed(shape: tuple[int, ...], routed: frozenset[tuple[int, int]]) -> bool:
    """Whether an array is rows of experts, one for each expert of a token."""
    return any(shape[:1] == (tokens * each,) or shape[:2] == (tokens, each) for tokens, each in routed)


def _fullest(loops: list[float], count: int) -> float:
    """The most that the loops of one pass through the model keep together, `count` in each pass."""
    return max((sum(loops[i : i + count]) for i in range(0, len(loops), count)), default=0.0)


def _stacked(step: _Step, length: int) -> list[Any]:
    """The results of a scan that it puts together from all its turns, told by their shapes; the others it carries."""
    results = zip(step.equation.outvars, step.inner[0].outvars, strict=True)
    return [result for result, turn in results if _aval(result).shape == (length, *_aval(turn).shape)]


@dataclass(frozen=True)
class _Step:
    """An equation of a program whose calls are written out: operands and results as variables of the whole program."""

    name: str
    operands: tuple[Any, ...]
    results: tuple[Any, ...]
    equation: core.JaxprEqn
    inner: tuple[core.Jaxpr, ...]


def _flat(jaxpr: core.Jaxpr, names: dict[Any, Any]) -> Iterator[_Step]:
    """The equations of a program, with those of the functions that it calls in their place; loops stay loops. Fills
    `names`: the variable of the whole program for each of `jaxpr` that has another."""

    def named(variable: Any) -> Any:
        return None if isinstance(variable, core.Literal) else names.get(variable, variable)

    for equation in jaxpr.eqns:
        operands = tuple(named(variable) for variable in equation.invars)
        inner = tuple(_inner(equation))
        name = equation.primitive.name
        if len(inner) == 1 and name not in _LOOPS and len(inner[0].invars) == len(equation.invars):
            called: dict[Any, Any] = dict(zip(inner[0].invars, operands, strict=True))
            yield from _flat(inner[0], called)
            for outside, inside in zip(equation.outvars, inner[0].outvars, strict=True):
                names[outside] = None if isinstance(inside, core.Literal) else called.get(inside, inside)
        else:
            yield _Step(name, operands, tuple(equation.outvars), equation, inner)
    names.update({variable: named(variable) for variable in jaxpr.outvars if not isinstance(variable, core.Literal)})


def _used(jaxpr: core.Jaxpr) -> tuple[list[_Step], frozenset[Any]]:
    """The steps of a program whose results something uses, and the variables that are its results."""
    names: dict[Any, Any] = {}
    steps = list(_flat(jaxpr, names))
    results = frozenset(names.get(variable) for variable in jaxpr.outvars if not isinstance(variable, core.Literal))
    needed, used = set(results), []
    for step in reversed(steps):
        if step.equation.effects or not needed.isdisjoint(step.results):  # kernels write their results as an effect
            needed.update(step.operands)
            used.append(step)
    return used[::-1], results


def _inner(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def matrix_products(program: core.ClosedJaxpr) -> tuple[float, float]:
    """FLOPs and bytes of the matrix products of a program without a loop of unknown length besides attention's."""
    return _products(program.jaxpr, 1)


def _products(jaxpr: core.Jaxpr, turns: float) -> tuple[float, float]:
    """FLOPs and bytes of the matrix products of a program, whose `while` loops run so many turns.

    One inside a scan goes over the tiles of keys that a tile of queries sees: half of them on average. One inside
    another doesn't run: it mends what hardly ever happens.
    """
    flops, bytes_moved = 0.0, 0.0
    for step in _used(jaxpr)[0]:
        if step.name == "pallas_call":
            kernel = _kernel(step)
            flops, bytes_moved = flops + kernel[0], bytes_moved + kernel[1]
        elif step.name == "dot_general":
            left, out = _aval(step.equation.invars[0]), _aval(step.equation.outvars[0])
            (contracted, _), _ = step.equation.params["dimension_numbers"]
            flops += 2 * math.prod(out.shape) * math.prod(left.shape[i] for i in contracted)
            bytes_moved += sum(map(_bytes, (*step.equation.invars, *step.equation.outvars)))
        elif step.name == "ragged_dot_general":  # each row is multiplied by the matrix of its group alone
            left, right = (_aval(variable) for variable in step.equation.invars[:2])
            numbers = step.equation.params["ragged_dot_dimension_numbers"]
            summed = {*numbers.dot_dimension_numbers[0][1], *numbers.rhs_group_dimensions}
            free = math.prod(size for i, size in enumerate(right.shape) if i not in summed)
            flops += 2 * math.prod(left.shape) * free
            bytes_moved += sum(map(_bytes, (*step.equation.invars[:2], *step.equation.outvars)))
        elif step.inner:
            length = step.equation.params.get("length", 1)
            inside = {"scan": (length + 1) / 2, "while": 0}.get(step.name, turns)
            parts = [_products(inner, inside) for inner in step.inner]
            times = {"scan": length, "while": turns}.get(step.name, 1)
            most = max(parts)
            flops, bytes_moved = flops + times * most[0], bytes_moved + times * most[1]
    return flops, bytes_moved


def _kernel(step: _Step) -> tuple[float, float]:
    """FLOPs and bytes of a kernel. Each turn of its grid reads its tiles of the inputs; results are written once.

    A grid as wide as the row has tiles goes over all pairs of tiles, of which a causal mask leaves half.
    """
    grid = step.equation.params["grid_mapping"].grid
    turns = math.prod(grid) * ((grid[-1] + 1) / (2 * grid[-1]) if grid[-1] in grid[:-1] else 1)
    tiles = [tile for tile in step.inner[0].invars[: len(step.operands)] if len(_aval(tile).shape) == 2]
    bytes_moved = turns * sum(map(_bytes, tiles)) + sum(map(_bytes, step.results))
    return turns * _products(step.inner[0], 1)[0], bytes_moved


def _peak(jaxpr: core.Jaxpr, routed: frozenset[tuple[int, int]] = frozenset()) -> tuple[float, tuple[float, float]]:
    """Most bytes alive at once of the arrays that a program makes; those that it is given don't count.

    Returns:
        Of all but the rows of experts; and of these, with what else is alive then.
    """
    steps, outputs = _used(jaxpr)
    roots: dict[Any, frozenset[Any]] = {}  # what has to be held for a variable to be had
    last: dict[Any, int] = {}
    results_of: list[list[Any]] = []
    for i, step in enumerate(steps):
        needed = frozenset().union(*(roots.get(variable, frozenset()) for variable in step.operands))
        if step.name in _FUSED and not step.inner:
            roots.update(dict.fromkeys(step.results, needed))
            results_of.append([])
            continue
        last.update(dict.fromkeys(needed, i))
        roots.update({variable: frozenset([variable]) for variable in step.results})
        last.update(dict.fromkeys(step.results, i))
        results_of.append(list(step.results))
    for variable in outputs:
        last.update(dict.fromkeys(roots.get(variable, frozenset()), len(steps)))
    most, fullest = 0.0, (0.0, 0.0)
    rows = others = 0.0
    ends: dict[int, list[tuple[bool, float]]] = {}
    for i, results in enumerate(results_of):
        for variable in results:
            entry = _are_routed(_aval(variable).shape, routed), _bytes(variable)
            rows, others = rows + entry[0] * entry[1], others + (not entry[0]) * entry[1]
            ends.setdefault(last[variable], []).append(entry)
        inside = [_peak(inner, routed) for inner in steps[i].inner] or [(0.0, (0.0, 0.0))]
        most = max(most, others + max(inner for inner, _ in inside))
        fullest = max(fullest, *((rows + first, others + second) for _, (first, second) in inside))
        for routes, size in ends.pop(i, ()):
            rows, others = rows - routes * size, others - (not routes) * size
    return most, fullest


def _aval(variable: Any) -> Any:
    """Shape and dtype of a variable."""
    return variable.aval


def _bytes(variable: Any) -> float:
    aval = _aval(variable)
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 4)
