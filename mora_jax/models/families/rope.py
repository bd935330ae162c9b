"""Rotary settings in both spellings: `rope_scaling` with `rope_theta`, and the newer `rope_parameters`."""

from mora_jax.errors import InputError
from mora_jax.models.families.hf_config import Fields
from mora_jax.models.rope import KINDS, Rope, yarn_attention_factor


def read_rope(fields: Fields, default_theta: float = 10_000.0) -> Rope:
    """The one rotary table of a family without local layers."""
    table = fields.table("rope_scaling") or fields.table("rope_parameters") or Fields({}, fields.where)
    nested = [name for name, value in table.values.items() if isinstance(value, dict)]
    if nested:
        raise InputError(f"{table.where}: settings per layer type ({', '.join(nested)}) do not exist in this family")
    return rope_of(table, fields, fields.number("rope_theta", default_theta))


def rope_of(table: Fields, fields: Fields, theta: float) -> Rope:
    """A rotary table from its settings.

    Args:
        table: the rotary settings.
        fields: the whole config.
        theta: the base wavelength where the settings state none.

    Raises:
        InputError: for a kind that is not supported, or a setting that is missing or bad.
    """
    kind = table.text("rope_type", table.text("type", "default"))
    theta = table.number("rope_theta", theta)
    if kind not in KINDS:
        raise InputError(f"{table.where}: rope type {kind!r} is not supported; supported are {', '.join(KINDS)}")
    for place in (table, fields):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            raise InputError(f"{place.where}: partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, factor=table.number("factor"))
    original = table.integer("original_max_position_embeddings", fields.integer("max_position_embeddings"))
    original = fields.integer("original_max_position_embeddings", original)
    if kind == "llama3":
        low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
        if high <= low:
            raise table.bad("high_freq_factor", f"above low_freq_factor ({low})")
        return Rope(
            theta,
            kind,
            factor=table.number("factor"),
            original_positions=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    if "factor" not in table.values:
        raise InputError(f"{table.where}: factor is missing")
    factor = table.number("factor", fields.integer("max_position_embeddings") / original)
    implied = yarn_attention_factor(
        factor, table.nullable_number("mscale", None), table.nullable_number("mscale_all_dim", None)
    )
    return Rope(
        theta,
        kind,
        factor=factor,
        original_positions=original,
        beta_fast=table.number("beta_fast", 32.0),
        beta_slow=table.number("beta_slow", 1.0),
        truncate=table.flag("truncate", True),
        attention_factor=table.number("attention_factor", implied),
    )
