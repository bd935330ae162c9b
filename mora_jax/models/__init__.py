"""The decoder and the model families it can be."""

from mora_jax.models.config import DecoderConfig
from mora_jax.models.decoder import Decoder, Head
from mora_jax.models.families import read_config
from mora_jax.models.init import init_decoder
from mora_jax.models.segments import check_token_ids, default_positions

__all__ = [
    "Decoder",
    "DecoderConfig",
    "Head",
    "check_token_ids",
    "default_positions",
    "init_decoder",
    "read_config",
]
