"""Examples for the eye: the text, the weight and the segment of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mora_jax.data.dataset import Example
from mora_jax.data.loss_weights import normalize
from mora_jax.data.segments import Segment

_REPLACEMENT = "\ufffd"


def visible(text: str) -> str:
    """The text with a sign before each line's end, and control characters written out."""
    signs = {"\n": "↵\n", "\t": "⇥"}
    return "".join(char if char.isprintable() else signs.get(char, ascii(char)[1:-1]) for char in text)


def token_texts(input_ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text that each token adds; together they are the decoded text.

    A character whose bytes are spread over several tokens is given to the last of them, the others are empty.

    Args:
      input_ids: `[T]`.
      tokenizer: a `transformers` tokenizer.
    """
    ids = [int(token) for token in input_ids]

    def decode(start: int, stop: int) -> str:
        return tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    texts = []
    # Tokens before `done` are told; those from `context` on are decoded again for their spaces.
    context = done = 0
    for stop in range(1, len(ids) + 1):
        told, text = decode(context, done), decode(context, stop)
        if text.endswith(_REPLACEMENT) and stop < len(ids) and stop - done < 4:
            texts.append("")
            continue
        texts.append(text[len(told) :])
        context, done = done, stop
    return texts


def training_weights(example: Example) -> np.ndarray:
    """The weights of an example's tokens as the normaliser `token` sums them: `[T]`, with the row's own weight."""
    return normalize(example.weights, example.segments, example.weight, "token")[0]


def describe_example(example: Example, tokenizer: Any) -> list[tuple[str, float, str]]:
    """Tokens to be shown in colours.

    Args:
      example: an encoded row.
      tokenizer: the tokenizer that encoded it.

    Returns:
      For each token its text, the weight of predicting it (see `training_weights`), and the name of its segment.
    """
    texts = token_texts(example.input_ids.tolist(), tokenizer)
    names = [Segment(segment).label for segment in example.segments.tolist()]
    return list(zip(texts, training_weights(example).tolist(), names, strict=True))


def describe_batch(batch: Mapping[str, np.ndarray]) -> str:
    """A batch in words: its arrays, and what each row holds.

    Args:
      batch: what `EncodedDataset.batch` gives, or with a leading axis of micro-batches.
    """
    lines = [f"{name:>12}  {array.dtype.name:8} {list(array.shape)}" for name, array in batch.items()]
    length = batch["segment_ids"].shape[-1]
    rows = (batch[name].reshape(-1, length) for name in ("segment_ids", "weights"))
    for number, (segment_ids, weights) in enumerate(zip(*rows, strict=True)):
        padding, trained = int((segment_ids == 0).sum()), int(np.count_nonzero(weights))
        examples = f"{int(segment_ids.max(initial=0))} examples"
        lines.append(f"{f'row {number}':>12}  {examples}, {trained} of {length} tokens trained, {padding} padding")
    return "\n".join(lines)
