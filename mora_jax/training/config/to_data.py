"""The sections `data` and `loss` of a configuration, as the data room takes them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mora_jax.data.loss_weights import MODES, LossWeights
from mora_jax.data.sources import Source
from mora_jax.training.config.schema import DataConfig, LossConfig


def data_source(section: DataConfig, paths: Any, split: str) -> Source:
    """Where rows come from, as the section `data` says."""
    shared = {field.name for field in fields(Source)} & {field.name for field in fields(DataConfig)}
    settings = {name: getattr(section, name) for name in shared}
    settings |= {"split": split, "columns": section.columns or (), "roles": section.roles or ()}
    return Source(paths, **settings)


def loss_weights(section: LossConfig) -> LossWeights:
    """Which tokens carry loss, as the section `loss` says."""
    weight = section.prompt_weight if MODES[section.mode].uses_prompt_weight else 0.0
    return LossWeights(section.mode, weight, section.roles, section.end_of_turn, section.headers)
