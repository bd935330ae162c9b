"""Base weights that an adapter trains too: biases beside adapters, and modules that are trained whole.

An adapter here holds the change of a bias; files hold the bias. Modules that are trained whole are masters in the place
of the base's own parameters, whose names in files the layout of the decoder knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.host import host
from mora_jax.adapters.targets import Place
from mora_jax.adapters.variables import FullParam
from mora_jax.errors import InputError
from mora_jax.interop.layout import tensor_plan
from mora_jax.models.decoder import Decoder


def base_bias(place: Place, layer: int) -> np.ndarray:
    """The bias of the base at one path of a place, float32 `[out]`; zeros where it has none."""
    bias = place.bias()
    if bias is None:
        return np.zeros(place.out_features, np.float32)
    return host(bias[place.index(layer)]).astype(np.float32, copy=False)


def trained_weights(model: nnx.Module) -> Iterator[tuple[str, np.ndarray]]:
    """Names in files and values of the base tensors that are trained whole, one parameter at a time.

    Raises:
        InputError: the model is somebody else's, whose names in files are not known.
    """
    if not isinstance(model, Decoder):
        if any(isinstance(node, FullParam) for _, node in nnx.iter_graph(model)):
            raise InputError("modules_to_save have no names in files for models other than this library's decoder")
        return
    for entry in tensor_plan(model):
        if isinstance(entry.parameter, FullParam):
            values = host(entry.parameter[...])
            for piece in entry.pieces:
                yield piece.name, piece.take(values)


def base_names(model: nnx.Module) -> list[str]:
    """Names in files of all base tensors of a decoder; none for other models."""
    return [piece.name for entry in tensor_plan(model) for piece in entry.pieces] if isinstance(model, Decoder) else []


def put_trained_weights(model: Decoder, values: Mapping[str, np.ndarray]) -> None:
    """Gives the modules of a model that are trained whole their values, by name in files."""
    for entry in tensor_plan(model):
        pieces = [piece for piece in entry.pieces if piece.name in values]
        if pieces:
            buffer = np.array(entry.parameter[...])
            for piece in pieces:
                piece.put(buffer, values[piece.name])
            entry.parameter.set_value(jnp.asarray(buffer))
