"""Which tensor of a file is where in a model's parameters, stacked and fused as they may be, for both ways."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.base import AdapterParam, FullParam, host
from mora_jax.adapters.expert_projection import ExpertProjection
from mora_jax.adapters.products.quantization import QuantizedKernel
from mora_jax.adapters.projection import Projection
from mora_jax.adapters.sites import Site, sites
from mora_jax.adapters.trainable_base import TrainableBase
from mora_jax.errors import InputError
from mora_jax.models.block import MLP, Attention, Block
from mora_jax.models.config import DecoderConfig
from mora_jax.models.decoder import Decoder
from mora_jax.models.experts import Experts, ExpertsBeside
from mora_jax.models.norms import Norm

# Flax calls `scale` what torch calls `weight`.
_NORMS = (nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm)


@dataclasses.dataclass(frozen=True)
class TensorRegion:
    """One tensor of a file and its region of a parameter.

    Attributes:
        name: the tensor's name in files.
        index: the region, as an index into the parameter.
        region: the region's shape.
        shape: the tensor's shape in files.
        matrix: whether it is a matrix, `[out, in]` in files and `[in, ...out]` in the parameter, or those of all
            experts, whose axis is the first of both.
    """

    name: str
    index: tuple[int | slice, ...]
    region: tuple[int, ...]
    shape: tuple[int, ...]
    matrix: bool = False

    def put(self, parameter: np.ndarray, tensor: np.ndarray) -> None:
        """Copies a tensor of a file into its region, casting to the parameter's dtype."""
        parameter[self.index] = (transposed(tensor) if self.matrix else tensor).reshape(self.region)

    def take(self, parameter: np.ndarray) -> np.ndarray:
        """The tensor as files have it."""
        part = parameter[self.index]
        turned = (*self.shape[:-2], *self.shape[:-3:-1])
        return transposed(part.reshape(turned)) if self.matrix else part.reshape(self.shape)


def transposed(matrix: np.ndarray) -> np.ndarray:
    """`matrix.T`, or that of each of several, in memory of its own, in strips: from numpy's own order a large one takes
    four times as long."""
    out = np.empty((*matrix.shape[:-2], *matrix.shape[:-3:-1]), matrix.dtype)
    for where in np.ndindex(matrix.shape[:-2]):
        for start in range(0, matrix.shape[-2], 128):
            out[where][:, start : start + 128] = matrix[where][start : start + 128].T
    return out


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter (or the quantised kernel in its place) and the tensors that make it up.

    Attributes:
        module, attribute: what holds it, and under which name.
        pieces: the tensors.
        axes: the shape that they are regions of; () for that of the parameter. A kernel may be stored as matrices.
    """

    module: nnx.Module
    attribute: str
    pieces: tuple[TensorRegion, ...]
    axes: tuple[int, ...] = ()

    @property
    def parameter(self) -> Any:
        """As it is stored."""
        return getattr(self.module, self.attribute)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the pieces are regions of."""
        return self.axes or tuple(self.parameter.shape)

    def put(self, read: Callable[[str], np.ndarray], buffer: np.ndarray | None = None) -> None:
        """Gives the parameter the tensors that `read` finds by name; what `buffer` has elsewhere stays."""
        values = np.empty(self.shape, self.parameter.dtype) if buffer is None else buffer
        for piece in self.pieces:
            piece.put(values, read(piece.name))
        self.parameter.set_value(jnp.asarray(values.reshape(self.parameter.shape)))


def tensor_plan(model: nnx.Module) -> list[Entry]:
    """Every base parameter of a model with its tensors.

    A decoder's have HuggingFace's names, and come in the order of the forward pass. Those of other models are called by
    module paths: the kernel of an `nnx.Linear` is `weight [out, in]`, the table of an `nnx.Embed` and the scale of a
    norm are `weight`, as torch has them; all else has its own name and shape.
    """
    if not isinstance(model, Decoder):
        return [Entry(module, name, (piece,)) for module, name, piece in _own_parameters(model)]
    config = model.config
    table = (config.vocab_size, config.hidden_size)
    entries = []
    inputs = model.layer_inputs
    for embed in (model.embed_tokens, model.embed_positions, None if inputs is None else inputs.table):
        if embed is not None:
            shape = tuple(embed.embedding.shape)
            entries.append(Entry(embed, "embedding", (TensorRegion(f"{embed.path}.weight", (), shape, shape),)))
    if inputs is not None:
        entries.extend((*_projection(inputs.projection, _matrices(inputs.projection)), *_norm(inputs.norm)))
    for stack, block in zip(itertools.chain(*config.runs), model.blocks, strict=True):
        entries.extend(_block(stack, block))
    entries.extend(_norm(model.norm))
    if model.lm_head is not None:
        head = TensorRegion(f"{config.names.head}.weight", (), table, table)
        entries.append(Entry(model.lm_head, "kernel", (head,)))
    return entries


def _block(config: DecoderConfig, block: Block) -> Iterator[Entry]:
    """A stack of layers."""
    mixer, mlp, layer = block.self_attn, block.mlp, config.names.layer
    attends = isinstance(mixer, Attention)
    inner = (mixer.q_norm, mixer.k_norm) if attends else (mixer.norm,)
    for norm in (block.attention_norm, *inner, block.post_attention_norm, block.mlp_norm, block.post_mlp_norm):
        if norm is not None:
            yield from _norm(norm)
    if not attends:
        path, (channels, window) = mixer.config.path, mixer.conv.shape[1:]
        yield _by_layer(mixer, "conv", f"{layer}.{path}.conv1d.weight", config.numbers, (channels, 1, window))
        yield _by_layer(mixer, "decay", f"{layer}.{path}.A_log", config.numbers)
        yield _by_layer(mixer, "step_bias", f"{layer}.{path}.dt_bias", config.numbers)
    elif mixer.sinks is not None:
        yield _by_layer(mixer, "sinks", f"{layer}.self_attn.sinks", config.numbers, (config.num_heads,))
    if block.layer_scale is not None:
        yield _by_layer(block, "layer_scale", f"{layer}.layer_scalar", config.numbers, (1,))
    projections = [mixer.qkv_proj, mixer.o_proj] if attends else [mixer.in_proj, mixer.out_proj]
    if isinstance(mlp, ExpertsBeside):
        for norm in (mlp.dense_norm, mlp.post_dense_norm, mlp.post_experts_norm):
            yield from _norm(norm)
    dense, experts = dense_and_experts(mlp)
    if experts is not None:
        yield from _experts(config, experts)
    if dense is not None:
        projections += [dense.gate_up_proj, dense.down_proj]
    if block.layer_input is not None:
        yield from _norm(block.layer_input.norm)
        projections += [block.layer_input.gate_proj, block.layer_input.out_proj]
    for projection in projections:
        yield from _projection(projection, _matrices(projection, turned=config.names.turned))


def dense_and_experts(mlp: Any) -> tuple[MLP | None, Experts | None]:
    """The dense MLP of a stack of layers and its experts; None for what it doesn't have."""
    if isinstance(mlp, ExpertsBeside):
        return mlp.dense, mlp.experts
    return (None, mlp) if isinstance(mlp, Experts) else (mlp, None)


def _by_layer(
    module: nnx.Module, name: str, path: str, numbers: Sequence[int], shape: tuple[int, ...] = (), matrix: bool = False
) -> Entry:
    """A parameter that is one tensor a layer.

    Args:
        module, name: what holds it `[L, …]`, and as which attribute.
        path: of the tensors, with `{layer}` in it.
        numbers: of the layers in the model; empty for all.
        shape: of a tensor where that isn't the shape of a layer.
        matrix: see `TensorRegion`.
    """
    count, *region = getattr(module, name).shape
    paths = [path.format(layer=number) for number in numbers or range(count)]
    tensors = (TensorRegion(tensor, (i,), (*region,), shape or (*region,), matrix) for i, tensor in enumerate(paths))
    return Entry(module, name, tuple(tensors))


def _norm(norm: Norm) -> Iterator[Entry]:
    *stack, size = norm.weight.shape
    for name in ("weight", "bias") if norm.bias is not None else ("weight",):
        if stack:
            yield _by_layer(norm, name, f"{norm.path}.{name}", norm.numbers)
        else:
            yield Entry(norm, name, (TensorRegion(f"{norm.path}.{name}", (), (size,), (size,)),))


Regions = list[tuple[TensorRegion, TensorRegion]]


def _projection(projection: Projection, regions: Regions) -> Iterator[Entry]:
    """The kernel and the bias of a projection, from those of its tensors."""
    axes = (*projection.stack, projection.in_features, *projection.layout.out_shape)
    yield Entry(projection, "kernel", tuple(kernel for kernel, _ in regions), axes)
    if projection.bias is not None:
        yield Entry(projection, "bias", tuple(bias for _, bias in regions))


def _matrices(projection: Projection, *, turned: bool = False) -> Regions:
    """Kernels and biases as files have them that hold a tensor for each matrix, of experts for each one's.

    A kernel is `[out, in]`, or where `turned` says so `[in, out]`.
    """
    if isinstance(projection, ExpertProjection):
        slices = projection.matrix_slices()
    else:
        slices = [(part, projection.part_slice(i)) for i, part in enumerate(projection.parts)]
    regions, inputs = [], projection.in_features
    for index in np.ndindex(*projection.stack):
        for matrix, where in slices:
            shape = list(projection.layout.out_shape)
            shape[projection.layout.part_axis] = matrix.size
            path, size = projection.module_path(matrix.name, *(index or (None,))), math.prod(shape)
            stored, place = (inputs, size) if turned else (size, inputs), (*index, slice(None), *where)
            kernel = TensorRegion(f"{path}.weight", place, (inputs, *shape), stored, matrix=not turned)
            regions.append((kernel, TensorRegion(f"{path}.bias", (*index, *where), tuple(shape), (size,))))
    return regions


def _experts(config: DecoderConfig, experts: Experts) -> Iterator[Entry]:
    router = experts.router
    _, inputs, count = router.kernel.shape
    numbers, layer = experts.gate_up_proj.numbers, config.names.layer
    yield _by_layer(router, "kernel", f"{router.path}.weight", numbers, (count, inputs), matrix=True)
    if router.bias is not None:
        yield _by_layer(router, "bias", f"{router.path}.bias", numbers)
    if router.norm is not None:
        yield _by_layer(router.norm, "weight", f"{layer}.router.scale", config.numbers)
        yield _by_layer(router, "scale", f"{layer}.router.per_expert_scale", config.numbers)
    if experts.norm is not None:
        yield from _norm(experts.norm)
    held = experts.config.fused
    for projection in (experts.gate_up_proj, experts.down_proj):
        regions = _fused_experts(projection, held == "stacked") if held else _matrices(projection)
        yield from _projection(projection, regions)


def _fused_experts(projection: ExpertProjection, matrix: bool) -> Regions:
    """Kernels and biases as files have them that hold all experts of a layer as one tensor `[E, in, out]`, or where
    `matrix` says so `[E, out, in]`."""
    (layers, count), inputs, out = projection.stack, projection.in_features, projection.layout.out_shape
    pieces = []
    for layer in range(layers):
        name = projection.module_path(projection.whole, layer, "*").replace(".*", "")
        shape = (math.prod(out), inputs) if matrix else (inputs, math.prod(out))
        kernel = TensorRegion(name, (layer,), (count, inputs, *out), (count, *shape), matrix)
        pieces.append((kernel, TensorRegion(f"{name}_bias", (layer,), (count, *out), (count, math.prod(out)))))
    return pieces


def _own_modules(model: nnx.Module) -> Iterator[tuple[str, nnx.Module]]:
    """The modules of somebody else's model with their paths; of what can carry adapters as adapters are called."""
    known = {id(place.layer): place.paths[0] for place in sites(model) if not place.part and not place.stack}
    for path, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Module):
            yield known.get(id(module), ".".join(map(str, path))), module


def _own_parameters(model: nnx.Module) -> Iterator[tuple[nnx.Module, str, TensorRegion]]:
    """The base's floating parameters of somebody else's model: the module, the attribute, and the tensor."""
    for path, module in _own_modules(model):
        for name, value in list(vars(module).items()):
            if not _is_base(value):
                continue
            shape = tuple(value.shape)
            matrix = isinstance(module, nnx.Linear) and name == "kernel" and len(shape) == 2
            table = isinstance(module, nnx.Embed) and name == "embedding"
            scale = isinstance(module, _NORMS) and name == "scale"
            leaf = "weight" if (matrix or table or scale) and not hasattr(module, "weight") else name
            yield module, name, TensorRegion(f"{path}.{leaf}", (), shape, shape[::-1] if matrix else shape, matrix)


def _is_base(value: Any) -> bool:
    """Whether a variable is a parameter of the base, trained or frozen."""
    if not isinstance(value, nnx.Param) or (isinstance(value, AdapterParam) and not isinstance(value, FullParam)):
        return False
    dtype = getattr(value, "dtype", None)  # quantised kernels have none
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def loose_biases(model: nnx.Module) -> set[str]:
    """Names in files of the biases of modules that can't carry adapters, which `bias="all"` trains, too."""
    if isinstance(model, Decoder):
        plan = (entry for entry in tensor_plan(model) if isinstance(entry.module, Norm) and entry.attribute == "bias")
        return {piece.name for entry in plan for piece in entry.pieces}
    held = {id(place.layer) for place in sites(model)}
    return {
        f"{path}.bias"
        for path, module in _own_modules(model)
        if id(module) not in held and _is_base(getattr(module, "bias", None))
    }


def base_bias(place: Site, layer: int) -> np.ndarray:
    """The bias of the base at one path of a place, float32 `[out]`; zeros where it has none."""
    bias = place.bias()
    if bias is None:
        return np.zeros(place.out_features, np.float32)
    return host(bias[place.index(layer)]).astype(np.float32, copy=False)


def trained_weights(model: nnx.Module) -> Iterator[tuple[str, np.ndarray]]:
    """Names in files and values of the base tensors that are trained whole, one parameter at a time."""
    for entry in tensor_plan(model):
        if isinstance(entry.parameter, FullParam):
            values = host(entry.parameter[...])
            for piece in entry.pieces:
                yield piece.name, piece.take(values)


def base_names(model: nnx.Module) -> list[str]:
    """Names in files of all base tensors of a model."""
    return [piece.name for entry in tensor_plan(model) for piece in entry.pieces]


def train_weights(model: nnx.Module, values: Mapping[str, np.ndarray]) -> None:
    """Makes base parameters trained ones, with these values by name in files; their frozen values are kept.

    Raises:
        InputError: one is quantised.
    """
    trainable = TrainableBase(keep=True)
    for entry in tensor_plan(model):
        pieces = tuple(piece for piece in entry.pieces if piece.name in values)
        if not pieces:
            continue
        if isinstance(entry.parameter, QuantizedKernel):
            held = entry.parameter.format
            raise InputError(f"{pieces[0].name} can't be trained whole: model.quantize={held} holds it quantised")
        trainable.train(entry.module, entry.attribute)
        buffer = np.array(entry.parameter[...]).reshape(entry.shape)
        dataclasses.replace(entry, pieces=pieces).put(values.__getitem__, buffer)
