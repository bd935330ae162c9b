"""A decoder with random weights, from a config alone."""

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from mora_jax.backend import read_dtype
from mora_jax.errors import InputError
from mora_jax.models.attention.kernels import AttentionChoice
from mora_jax.models.config import DecoderConfig
from mora_jax.models.decoder import Decoder
from mora_jax.models.families import read_config
from mora_jax.paths import expanded


def init_decoder(
    config: DecoderConfig | dict[str, Any] | str | os.PathLike[str],
    rngs: nnx.Rngs,
    *,
    dtype: Any = jnp.float32,
    unroll: int | None = None,
    remat: str = "none",
    attention: str = "auto",
) -> Decoder:
    """Makes a decoder to pretrain.

    Args:
        config: a `DecoderConfig`, a HuggingFace config as a dict, or the path of a `config.json` or a folder.
        rngs: where the weights are drawn from.
        dtype: compute dtype and storage of the weights.
        unroll: ignored: layers run in a loop. It will go.
        remat: "none", "dots", "full" or "offload".
        attention: what computes attention: "auto", "xla", "splash" or "cudnn".
    """
    where = "config"
    if isinstance(config, (str, os.PathLike)):
        path = expanded(config)
        path = path / "config.json" if path.is_dir() else path
        config, where = read_json(path), str(path)
    if isinstance(config, dict):
        config = read_config(config, where)
    return Decoder(config, dtype=read_dtype(dtype), rngs=rngs, remat=remat, attention=AttentionChoice(attention))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or an InputError that names the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:  # Also a number of thousands of digits.
        raise InputError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a JSON object")
    return values
