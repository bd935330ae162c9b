"""The decoder and the model families it can be.

Names are imported when they are first used, so that the decoder's file doesn't bring every family along.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mora_jax.models.config import DecoderConfig as DecoderConfig
    from mora_jax.models.decoder import Decoder as Decoder, Head as Head
    from mora_jax.models.families import read_config as read_config
    from mora_jax.models.init import init_decoder as init_decoder
    from mora_jax.models.segments import check_token_ids as check_token_ids, default_positions as default_positions

_HOMES = {
    "Decoder": "decoder",
    "DecoderConfig": "config",
    "Head": "decoder",
    "check_token_ids": "segments",
    "default_positions": "segments",
    "init_decoder": "init",
    "read_config": "families",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
