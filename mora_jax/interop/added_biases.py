"""Biases that a merged model has and its family's `config.json` does not imply: BitFit gives them to bare layers.

`transformers` leaves a tensor that the config does not announce unread, so a folder has to announce it, with zeros for
the biases that come along; where the family has no field for that, the model can't be written.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mora_jax.adapters.projection import Projection
from mora_jax.errors import InputError
from mora_jax.models.decoder import Decoder

# By family, the fields of its config that announce biases, and the parts of a block that each is about.
_FIELDS = {
    "llama": {"attention_bias": ("qkv", "out"), "mlp_bias": ("gate_up", "down")},
    "qwen3": {"attention_bias": ("qkv", "out")},
    "gemma2": {"attention_bias": ("qkv", "out")},
}


def bias_fields(model: Decoder) -> dict[str, bool]:
    """The fields of `config.json` that announce the biases that were added; empty where there are none.

    Raises:
        InputError: the family has no field for one of them.
    """
    added = [
        part for part, (projection, announced) in _parts(model).items() if projection.bias is not None and not announced
    ]
    fields = _FIELDS.get(model.config.family, {})
    found = {name: True for name, parts in fields.items() if set(parts) & set(added)}
    stray = [part for part in added if not any(part in fields[name] for name in found)]
    if stray:
        names = ", ".join(part.name for part in _parts(model)[stray[0]][0].parts)
        raise InputError(
            f"the adapter gave biases to {names}, for which {model.config.family} models have no place: use the "
            "adapter beside its base, without merging"
        )
    return found


def zero_biases(model: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """The biases that `bias_fields` announces beside those that the model has."""
    parts, fields = _parts(model), _FIELDS.get(model.config.family, {})
    for name in bias_fields(model):
        for projection in (parts[part][0] for part in fields[name]):
            if projection.bias is None:
                for layer in range(projection.num_layers or 0):
                    for part in projection.parts:
                        path = projection.module_path(part.name, layer)
                        yield f"{path}.bias", np.zeros(projection.part_features(part.name), np.float32)


def _parts(model: Decoder) -> dict[str, tuple[Projection, bool]]:
    """The projections of a block, and whether the config announces their biases."""
    block, config = model.layers, model.config
    return {
        "qkv": (block.self_attn.qkv_proj, config.qkv_bias),
        "out": (block.self_attn.o_proj, config.out_bias),
        "gate_up": (block.mlp.gate_up_proj, config.mlp_bias),
        "down": (block.mlp.down_proj, config.mlp_bias),
    }
