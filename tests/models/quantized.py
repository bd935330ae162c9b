"""Decoders with quantised kernels made from dense ones, and the dense ones that compute the same."""

from __future__ import annotations

import numpy as np
from flax import nnx

from mora_jax.adapters.products.quantization import quantize
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
