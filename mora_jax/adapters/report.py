"""What a model carries: a report for people, with what was passed over and why, and one entry a layer for files."""

import dataclasses
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx

from mora_jax.adapters.base import Adapter, AdapterParam, host, known
from mora_jax.adapters.layers import ADAPTED, Adapted
from mora_jax.adapters.matrices import MASKED, NORMALISED, SCALED, TRANSPOSED, matrix_of, registered
from mora_jax.adapters.methods.bitfit import BitFit
from mora_jax.adapters.products.quantization import QuantizedParam, packed_sizes
from mora_jax.adapters.sites import Site, adapted_sites, sites
from mora_jax.adapters.slots import refuse_banks
from mora_jax.adapters.targets import Picker, aligned, star, summary, wrapped
from mora_jax.adapters.trainable_base import kept, named_modules

UNNAMED = "not among the targets"
LINEN = "a Linen module in nnx.bridge.ToNNX: put adapters on the Linen module, with mora_jax.linen.adapted"
VECTORS = ("bias", "scale", "mean", "var", "sinks")  # as Flax calls them; a stack of these is no matrix


@dataclass(frozen=True)
class Skipped:
    """Matrices without an adapter, for one reason.

    Attributes:
        paths: of their modules, `*` in place of numbers.
        kind: the class of the modules; empty for layers that could have been adapted.
        parameters: how many numbers they hold.
        reason: why they were passed over.
        asked: whether the targets name them all the same.
    """

    paths: tuple[str, ...]
    kind: str
    parameters: int
    reason: str
    asked: bool = False

    def __str__(self) -> str:
        kind = f" ({self.kind})" if self.kind else ""
        return f"not adapted: {summary(self.paths)}{kind}, {self.parameters:,} parameters: {self.reason}"


@dataclass(frozen=True)
class Match:
    """One line of a report: a matrix (or a stack of them), its sizes, and what is trained on it.

    For a module that is trained whole, `layers`, `in_features` and `out_features` are 0.

    Attributes:
        path: the path of the module, a `*` where several layers have the same sizes.
        layers: number of matrices, 1 where none are stacked.
        in_features: inputs of each.
        out_features: outputs of each.
        trainable: number of parameters that are trained on all of them.
    """

    path: str
    layers: int
    in_features: int
    out_features: int
    trainable: int


@dataclass(frozen=True)
class AttachReport:
    """What `attach` did; prints as a table.

    Attributes:
        method: name of the method.
        matches: the adapted layers, and the modules that are trained whole.
        trainable: number of parameters that are trained.
        total: number of parameters, those of adapters included.
        warnings: what a user should know, one sentence each.
        skipped: matrices without an adapter, those of one reason together.
        experts: numbers in the matrices of experts that carry adapters, and in all of them; None without experts.
        beyond: of `warnings` those on a rank that is higher than a layer can use.
    """

    method: str
    matches: tuple[Match, ...]
    trainable: int
    total: int
    warnings: tuple[str, ...] = field(default=())
    skipped: tuple[Skipped, ...] = field(default=())
    beyond: tuple[str, ...] = field(default=())
    experts: tuple[int, int] | None = None

    def warn(self, *, stacklevel: int) -> None:
        """Says as warnings what was asked for and isn't so: targets without a form, ranks that layers can't use."""
        for one in self.skipped:
            if one.asked:
                what = f"targets name what can't be adapted: {summary(one.paths)}, {one.reason}"
                warnings.warn(what, stacklevel=stacklevel)
        if self.without_experts:
            warnings.warn(self.without_experts, stacklevel=stacklevel)
        if self.beyond:
            more = f" (and {len(self.beyond) - 1} more layers)" if len(self.beyond) > 1 else ""
            warnings.warn(self.beyond[0] + more, stacklevel=stacklevel)

    @property
    def without_experts(self) -> str:
        """Says that all experts were passed over; empty where they weren't."""
        if self.experts is None or self.experts[0]:
            return ""
        share = 100 * self.experts[1] / max(self.total - self.trainable, 1)
        return (
            f"no expert carries an adapter, and experts hold {share:.0f} % of the model's parameters: add "
            "experts.gate_up_proj and experts.down_proj to targets, or say 'all-linear', if they should"
        )

    @property
    def percent(self) -> float:
        """`trainable` in percent of `total`."""
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        rows = [("layer", "layers", "in", "out", "trainable")]
        for m in self.matches:
            layers, inputs, outputs = (str(n) if m.layers else "" for n in (m.layers, m.in_features, m.out_features))
            rows.append((m.path, layers, inputs, outputs, f"{m.trainable:,}"))
        lines = aligned(rows)
        rule = "─" * max(len(line) for line in lines)
        lines = [lines[0], rule, *lines[1:], rule] if self.matches else []
        share = f"{self.trainable:,} of {self.total:,} parameters are trained ({self.percent:.3g} %)"
        lines.append(f"{self.method}: {share}")
        if self.experts is not None:
            adapted, held = self.experts
            lines += wrapped(
                f"experts: adapters on {adapted:,} of their {held:,} parameters ({100 * adapted / held:.3g} %)"
            )
        lines += [line for one in self.skipped for line in wrapped(str(one))]
        notes = (*self.warnings, *filter(None, [self.without_experts]))
        lines += [line for text in notes for line in wrapped(f"warning: {text}")]
        return "\n".join(lines)


def report_of(model: nnx.Module, config: Any = None, places: Sequence[Site] | None = None) -> AttachReport:
    """The report on the adapters that `model` carries, wherever they came from.

    Args:
        model: with adapters.
        config: what they were attached with; with it the report says what was passed over.
        places: its sites, where they are known already.

    Raises:
        ValueError: it carries none.
    """
    places = list(sites(model)) if places is None else places
    carriers = [place for place in places if place.adapter is not None]
    if not carriers:
        raise ValueError("the model carries no adapter")
    adapted = [(_line_of(place), place.adapter.config) for place in carriers]
    seen: set[int] = set()
    trained_whole = []
    for paths, module, values in kept(model):
        masters = [getattr(module, name) for name in values]
        size = sum(master.get_value().size for master in masters if id(master) not in seen)
        seen.update(id(master) for master in masters)
        trained_whole.append(Match(", ".join(paths) or "(the model itself)", 0, 0, 0, size))
    passed_over = () if config is None else grouped(_matrices(model, config, places), Picker(config))
    held = sum(math.prod((*place.stack, place.in_features, place.out_features)) for place in places if place.of_experts)
    lines = [line for (line, _), place in zip(adapted, carriers, strict=True) if place.of_experts]
    experts = (sum(line.layers * line.in_features * line.out_features for line in lines), held) if held else None
    method = "+".join(dict.fromkeys(place.adapter.method for place in carriers))
    return report_on(method, adapted, passed_over, count(model, nnx.Not(AdapterParam)), trained_whole, experts)


def _line_of(place: Site) -> Match:
    """The line of an adapted place."""
    adapter = place.adapter
    # A bank has a scaling for each of its slots, too.
    active = int(np.count_nonzero(_used(adapter.scaling).reshape(*adapter.layers, -1).any(-1)))
    return Match(place.title, active, place.in_features, place.out_features, _trainable(adapter))


def report_on(
    method: str,
    adapted: Sequence[tuple[Match, Any]],
    skipped: tuple[Skipped, ...],
    base: int,
    trained_whole: Sequence[Match] = (),
    experts: tuple[int, int] | None = None,
) -> AttachReport:
    """A report from its lines.

    Args:
        method: its name.
        adapted: the line of each matrix, or stack of them, with its own configuration.
        skipped, experts: as in the report.
        base: how many numbers there are beside the trained ones.
        trained_whole: the lines of modules that are trained whole.
    """
    about = [(config, (line.path, line.in_features, line.out_features)) for line, config in adapted]
    notes = dict.fromkeys(note for config, layer in about for note in config.warnings(*layer))
    beyond = dict.fromkeys(config.beyond(*layer) for config, layer in about)
    matches = _by_path([*(line for line, _ in adapted), *trained_whole])
    trained = sum(match.trainable for match in matches)
    sentences = tuple(notes), skipped, tuple(filter(None, beyond))
    return AttachReport(method, matches, trained, base + trained, *sentences, experts)


def _by_path(matches: list[Match]) -> tuple[Match, ...]:
    """Those of one path and size as one: layers of several kinds are in stacks of their own."""
    sums: dict[tuple[str, int, int], Match] = {}
    for match in matches:
        key = match.path, match.in_features, match.out_features
        before = sums.get(key, dataclasses.replace(match, layers=0, trainable=0))
        total = before.layers + match.layers, before.trainable + match.trainable
        sums[key] = dataclasses.replace(match, layers=total[0], trainable=total[1])
    return tuple(sums.values())


def _trainable(adapter: Adapter) -> int:
    """Trained numbers that have an effect: none in layers that are left out, or beyond a layer's rank."""
    active = _used(adapter.scaling).reshape(-1)
    arrays = {name: value for name, value in vars(adapter).items() if isinstance(value, AdapterParam)}
    return sum(_used_of(name, value.get_value().size // len(active), adapter, active) for name, value in arrays.items())


def _used_of(name: str, size: int, adapter: Adapter, active: np.ndarray) -> int:
    if name == "bias" and adapter.config.bias == "all":
        return size * len(active)
    mask = getattr(adapter, "rank_mask", None)
    if mask is None or name not in ("lora_a", "lora_b"):
        return size * int(active.sum())
    ranks = _used(mask).sum(-1).reshape(-1)
    return int((ranks * active).sum()) * (size // mask.shape[-1])


def _used(state: nnx.Variable) -> np.ndarray:
    """Where a scaling or a mask is not zero; everywhere, where it was handed to a function that is being traced."""
    array = state.get_value()
    return np.asarray(array) != 0 if known(array) else np.ones(array.shape, bool)


def count(model: nnx.Module, *filters) -> int:
    """How many numbers the parameters of a model have; quantised ones count as what they stand for."""
    state = nnx.state(model, nnx.All(nnx.Param, *filters))
    kernels = nnx.state(model, nnx.All(QuantizedParam, *filters))
    packed = sum(packed_sizes(model).values()) if jax.tree.leaves(kernels) else 0
    return sum(leaf.size for leaf in jax.tree.leaves(state)) + packed


@dataclass(frozen=True)
class AdapterEntry:
    """One adapted matrix of one layer, without the stacking and fusing of memory.

    Attributes:
        path: module path; HuggingFace's for the decoder's layers.
        method: name of the method.
        config: the method's configuration, with the rank of this layer.
        in_features, out_features: sizes of the matrix.
        is_embedding: whether the matrix is an embedding table.
        params: arrays by name (`lora_a [in, r]`, `lora_b [r, out]`, `m [q, q]`, `scaling []`, `magnitude [out]`,
            `bias [out]`, …), as numpy.
    """

    path: str
    method: str
    config: Any
    in_features: int
    out_features: int
    is_embedding: bool
    params: dict[str, np.ndarray]


def adapters_of(model: nnx.Module) -> Iterator[AdapterEntry]:
    """Every adapted matrix of `model`, one entry a layer.

    Of layers that a stacked adapter leaves out only the biases occur that `bias="all"` trains there.

    Raises:
        ValueError: the model has several named adapters.
    """
    refuse_banks(model, "take")
    for place in adapted_sites(model):
        yield from entries_of(place)


def entries_of(place: Site) -> Iterator[AdapterEntry]:
    """The entries of one adapted place."""
    adapter = place.adapter
    # Through a copy: an array keeps what it once gathered from its devices for as long as it lives.
    arrays = {name: host(value.copy()) for name, value in adapter.params().items()}
    for i, path in enumerate(place.paths):
        params = {name: value[place.index(i)] for name, value in arrays.items()}
        config, sizes = adapter.config, (place.in_features, place.out_features)
        if params["scaling"] == 0:
            if config.bias == "all" and "bias" in params:
                alone = {"scaling": np.ones_like(params["scaling"]), "bias": params["bias"]}
                yield AdapterEntry(path, BitFit.method, BitFit.only(config), *sizes, place.is_embedding, alone)
            continue
        mask = params.pop("rank_mask", None)
        if mask is not None:
            rank = int(mask.sum())
            params |= {"lora_a": params["lora_a"][:, :rank], "lora_b": params["lora_b"][:rank]}
            config = dataclasses.replace(config, rank=rank)
        yield AdapterEntry(path, adapter.method, config, *sizes, place.is_embedding, params)


def grouped(matrices: Iterable[tuple[str, str, int, str]], picks: Picker) -> tuple[Skipped, ...]:
    """Puts matrices of one reason together: each is a path, a class, a size and a reason.

    The class is empty for a layer that could be adapted.
    """
    groups: dict[tuple[str, str, bool], tuple[list[str], int]] = {}
    for path, kind, size, reason in matrices:
        key = kind, reason, bool(kind) and picks.names(path)
        paths, total = groups.get(key, ([], 0))
        groups[key] = [*paths, path], total + size
    return tuple(
        Skipped(tuple(dict.fromkeys(map(star, paths))), kind, size, reason, asked)
        for (kind, reason, asked), (paths, size) in groups.items()
    )


def _matrices(model: nnx.Module, config: Any, places: Sequence[Site]) -> Iterator[tuple[str, str, int, str]]:
    """Path, class, size and reason of every matrix that is frozen and has no adapter; the model may be abstract."""
    picks = Picker(config)
    adapted = {key: place.title for place in places if place.adapter is not None for key in _params(place.layer)}
    seen: set[int] = set()
    for place in places:
        keys, left = _params(place.layer), _left_out(place, picks)
        if left and place.adapter is None and not place.part and keys & adapted.keys():
            title = adapted[next(iter(keys & adapted.keys()))]
            yield place.title, "", 0, f"their matrix is that of {title}, too"
        elif left and not _trained_whole(place.layer) and (place.part or not keys & seen):
            head = place.is_head
            names, linear = (left[0], *place.names_in(config.targets)), place.is_linear
            targeted = [name for name in names if picks.in_any_layer(name, is_linear=linear)]
            why = why_left(picks, (targeted or names)[0], kind="the output head" if head else place.kind)
            yield place.title, "", len(left) * place.in_features * place.out_features, why
        seen |= keys
    for path, module, size in unknown_matrices(model, {id(place.layer) for place in places}, seen):
        yield path, type(module).__name__, size, why_unknown(module)


def _params(module: nnx.Module) -> set[int]:
    """The identities of the base's parameters that a module holds itself."""
    return {id(value) for value in vars(module).values() if isinstance(value, nnx.Param)}


def _left_out(place: Site, picks: Picker) -> list[str]:
    """The paths of a place that carry no adapter."""
    adapter = place.adapter
    if adapter is None:
        return list(place.paths)
    if not place.stack:
        return []
    scaling = adapter.scaling.get_value()
    if not known(scaling):
        return [path for path in place.paths if not picks(path, is_linear=place.is_linear)]
    layers = np.asarray(scaling).reshape(len(place.paths), -1)
    return [path for path, values in zip(place.paths, layers, strict=True) if not values.any()]


def _trained_whole(layer: nnx.Module) -> bool:
    return any(isinstance(value, AdapterParam) for value in vars(layer).values())


def why_left(picks: Picker, path: str, *, kind: str = "") -> str:
    """Why a rule leaves out a layer that could be adapted; `kind` is what it is, where no linear layer."""
    if picks.everything and not kind and path.rpartition(".")[2] == "lm_head":
        kind = "the output head"
    if picks.everything and kind:
        return f"{kind}, which all-linear leaves out"
    layers = picks.config.layers_to_transform
    if layers is not None and picks.in_any_layer(path, is_linear=kind in ("", "the output head")):
        return "outside layers_to_transform"
    return UNNAMED


def unknown_matrices(
    model: nnx.Module, known: set[int], seen: set[int] | None = None
) -> Iterator[tuple[str, nnx.Module, int]]:
    """Path, module, and how many numbers are in its matrices.

    Args:
        model: of any kind.
        known: the identities of layers that could carry adapters.
        seen: those of parameters that are counted elsewhere; others are added.
    """
    seen = set() if seen is None else seen
    for paths, module in named_modules(model):
        if id(module) in known or isinstance(module, Adapter | Adapted):
            continue
        size = sum(math.prod(shape) for shape in _shapes(module, seen))
        if size:
            yield paths[0] or "(the model itself)", module, size


def _shapes(module: nnx.Module, seen: set[int]) -> Iterator[tuple[int, ...]]:
    """The shapes of the matrices that a module holds itself and that were not `seen`, whose ids it notes."""
    for name, value in vars(module).items():
        if not isinstance(value, nnx.Param) or isinstance(value, AdapterParam) or id(value) in seen:
            continue
        seen.add(id(value))
        stacked = (value.get_metadata().get("axes") or ("",))[0] == "layers"
        if name not in VECTORS and len(value.shape) - stacked > 1:
            yield value.shape


def why_unknown(layer: nnx.Module) -> str:
    """Why a layer with a matrix, for which there is no adapted form, has none."""
    kind = type(layer)
    if reason := getattr(layer, "left_out", ""):
        return reason
    if isinstance(layer, nnx.bridge.ToNNX):
        return LINEN
    if isinstance(layer, nnx.ConvTranspose):
        return TRANSPOSED
    if isinstance(layer, nnx.Conv) and layer.mask is not None:
        return MASKED
    base = next((one for one in kind.__mro__ if one in ADAPTED or registered(one) is not None), None)
    if base is None:
        return "a class without adapters, see mj.register_layer"
    if kind.__call__ is not base.__call__:
        return f"its class overrides the call of {base.__name__}" + (
            " and does not go on to super().__call__" if base.__module__.startswith("flax.") else ""
        )
    form = registered(base)
    if matrix_of(layer) is not None:
        return NORMALISED
    return SCALED if form is not None and form.scaled(layer) else "no product with one matrix"
