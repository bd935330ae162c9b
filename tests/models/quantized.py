"""Decoders with quantised kernels made from dense ones, and the dense ones that compute the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from mora_jax.adapters.products.quantization import NF4, QuantizedKernel, quantize
from mora_jax.adapters.projection import Projection
from mora_jax.models.decoder import Decoder


def projections(model: Decoder) -> list[Projection]:
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, Projection)]


def quantized_copy(dense: Decoder, held: str) -> Decoder:
    """A decoder with the parameters of another that carries no adapters, its kernels quantised layer by layer."""
    model = Decoder(dense.config, dtype=dense.dtype, rngs=None, remat=dense.remat, quantize=held)
    theirs = dict(nnx.to_flat_state(nnx.state(dense)))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path in theirs:
            variable.set_value(theirs[path].get_value())
            nnx.update(model, nnx.from_flat_state({path: variable}))
    for ours, other in zip(projections(model), projections(dense), strict=True):
        if ours.quantized is None:  # of no layer
            continue
        kernel = np.asarray(other.kernel[...], np.float32)
        matrices = kernel.reshape(-1, *kernel.shape[len(other.stack) :])  # of layers, or of their experts
        values, scales = (np.stack(each) for each in zip(*(quantize(m, held) for m in matrices), strict=True))
        ours.kernel.values[...] = values.reshape(ours.kernel.values.shape)
        ours.kernel.scales[...] = scales.reshape(ours.kernel.scales.shape)
    return model


def rounded_copy(dense: Decoder, held: str) -> Decoder:
    """A decoder without quantised kernels, whose kernels have the values that quantised ones stand for."""
    graphdef, state = nnx.split(dense)
    model = nnx.merge(graphdef, state)
    for ours, other in zip(projections(model), projections(quantized_copy(dense, held)), strict=True):
        ours.kernel.set_value(other.kernel[...])
    return model


def by_loops(kernel: QuantizedKernel) -> np.ndarray:
    """`[*stack, in, out]`, input by input, as docs/quantized_base.md describes the formats."""
    lead = kernel.ndim - 1 - kernel.out_axes
    arrays = (np.asarray(variable[...]) for variable in (kernel.values, kernel.scales))
    values, scales = (array.reshape(*array.shape[: lead + 1], -1) for array in arrays)
    dense = np.zeros((*values.shape[:lead], kernel.in_features, values.shape[-1]), np.float32)
    for stack in np.ndindex(values.shape[:lead]):
        for i in range(kernel.in_features):
            block, j = divmod(i, 64)
            if kernel.format == "int8":
                units = values[stack][i].astype(np.float32)
            else:
                byte = values[stack][32 * block + j % 32]
                units = np.array(NF4, np.float32)[byte >> 4 if j >= 32 else byte & 15]
            dense[stack][i] = units * scales[stack][block]
    return dense


def rounded_files(base: Path, model: Decoder, folder: Path) -> Path:
    """A folder like `base`, whose kernels are those that a quantised model's codes and scales stand for."""
    tensors = load_file(base / "model.safetensors")

    def put(name: str, array: np.ndarray) -> None:
        assert tensors[name].shape == array.shape
        largest = np.abs(tensors[name]).max()
        assert 0 < np.abs(tensors[name] - array).max() < 0.2 * largest  # half of the widest gap of nf4 is 0.152
        tensors[name] = np.ascontiguousarray(array)

    for projection in projections(model):
        if projection.quantized is None:
            continue
        dense, layout = by_loops(projection.kernel), projection.layout
        for layer, *expert in np.ndindex(projection.stack):
            number = projection.numbers[layer] if projection.numbers else layer
            whole = f"model.layers.{number}.{getattr(projection, 'layer_path', '')}.{getattr(projection, 'whole', '')}"
            if whole in tensors:  # all experts of a layer, `[E, in, out]`
                if expert == [0]:
                    put(whole, dense[layer])
                continue
            kernel, start = dense[(layer, *expert)].reshape(-1, *layout.out_shape), 0
            for part in getattr(projection, "matrices", projection.parts):
                matrix = kernel.take(range(start, start + part.size), 1 + layout.part_axis)
                name = projection.path.format(layer=number, expert="".join(map(str, expert)), name=part.name)
                put(f"{name}.weight", matrix.reshape(len(matrix), -1).T)
                start += part.size
    folder.mkdir()
    (folder / "config.json").write_text((base / "config.json").read_text())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
