"""Formats that say themselves what is trained: texts with labels, and token ids with labels or weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mora_jax.data.conversation import Passage, TokenRow
from mora_jax.data.formats.column_mapping import Mapping
from mora_jax.data.read.validate import (
    check_ids,
    check_length,
    check_list,
    check_numbers,
    check_object,
    check_text,
    check_weight,
    shown,
)
from mora_jax.errors import InputError

#: The label of a token that is not trained, as everywhere in this field.
IGNORED = -100


def read_segments(row: dict[str, Any], source: str, mapping: Mapping) -> Iterator[Passage]:
    """`segments`: a list of `{"text": ..., "label": ...}`; the label is true, false or a weight."""
    del mapping  # Applied to the row already; there are no roles here.
    parts = []
    for index, item in enumerate(check_list(row.get("segments"), "segments", source)):
        key = f"segments[{index}]"
        part = check_object(item, key, source, "`text` and `label`")
        text, label = check_text(part.get("text"), f"{key}.text", source), part.get("label")
        if isinstance(label, bool):
            parts.append((text, float(label)))
        elif label is None or isinstance(label, str):
            raise InputError(
                f"{source}: `{key}.label` is {'missing or null' if label is None else shown(label)};"
                " expected true, false or a weight"
            )
        else:
            parts.append((text, check_weight(label, f"{key}.label", source)))
    yield Passage(tuple(parts), source)


def read_tokens(row: dict[str, Any], source: str, mapping: Mapping) -> Iterator[TokenRow]:
    """`input_ids`, with `labels` or `weights` or neither; what `attention_mask` marks as padding is dropped."""
    del mapping
    ids = check_ids(row.get("input_ids"), "input_ids", source)
    labels, weights = row.get("labels"), row.get("weights")
    if labels is not None and weights is not None:
        raise InputError(f"{source}: the row has both `labels` and `weights`; keep one, or rename one in data.columns")
    counts: list[float] | None = None
    if labels is not None:
        counts = _from_labels(labels, ids, source)
    elif weights is not None:
        counts = _from_weights(weights, len(ids), source)
    tokens = _unpadded(row.get("attention_mask"), len(ids), source)
    yield TokenRow(tuple(ids[tokens]), None if counts is None else tuple(counts[tokens]), source)


def _from_labels(value: Any, ids: list[int], source: str) -> list[float]:
    labels = check_ids(value, "labels", source, lowest=IGNORED)
    check_length(labels, "labels", len(ids), source)
    for index, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (token, IGNORED):
            raise InputError(
                f"{source}: `labels[{index}]` is {label}; expected `input_ids[{index}]`, which is {token}, or {IGNORED}"
            )
    return [float(label != IGNORED) for label in labels]


def _from_weights(value: Any, length: int, source: str) -> list[float]:
    weights = check_numbers(value, "weights", source)
    check_length(weights, "weights", length, source)
    return [check_weight(weight, f"weights[{index}]", source) for index, weight in enumerate(weights)]


def _unpadded(value: Any, length: int, source: str) -> slice:
    """The tokens that are no padding: all but the zeros at either end of the mask."""
    if value is None:
        return slice(0, length)
    mask = check_numbers(value, "attention_mask", source)
    check_length(mask, "attention_mask", length, source)
    if 1 not in mask:
        raise InputError(f"{source}: `attention_mask` leaves no token; expected ones, and zeros for padding")
    start, stop = mask.index(1), length - mask[::-1].index(1)
    inside = set(mask[start:stop]) | set(mask[:start]) | set(mask[stop:])
    if not inside <= {0, 1} or 0 in mask[start:stop]:
        raise InputError(
            f"{source}: `attention_mask` should be ones with zeros at an end, for padding;"
            " give rows that were packed one by one"
        )
    return slice(start, stop)
