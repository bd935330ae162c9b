"""A look at a data set: which of its tokens carry loss, how long its rows are, and which loss mode suits it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mora_jax.data.conversation import Side
from mora_jax.data.dataset import EncodedDataset, Example
from mora_jax.data.inspect.advice import advise_on, advise_on_capacity
from mora_jax.data.inspect.report import NEAR_EMPTY, Report
from mora_jax.data.loss_weights import LossWeights, normalize
from mora_jax.data.segments import ANSWER, INSTRUCTION, Segment
from mora_jax.data.sources import Source
from mora_jax.paths import OFF

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


def first_examples(dataset: EncodedDataset, count: int) -> list[Example]:
    """The first examples of a data set; a pair is one, with both answers."""
    return dataset[: count * (2 if Side.CHOSEN in dataset.sides else 1)]


def training_weights(example: Example) -> np.ndarray:
    """The weights of an example's tokens as the normaliser `token` sums them: `[T]`, with the row's own weight.

    Of a judged answer those in its log-probability.
    """
    if example.answer_weights is not None:
        return example.answer_weights * np.float32(example.weight)
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


# Characters of a repeated prompt that are shown.
_SHOWN = 80


# What is told of a report under its own name.
_TOLD = (
    *("format", "files", "rows", "kept", "dropped", "truncated", "split", "tokens", "trained_tokens"),
    *("trained_fraction", "ratio", "max_length", "recommended_max_length", "seam_rows", "special_rows", "fell_back"),
    *("template", "mode", "notes"),
)


def inspect_data(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    tokenizer: Any,
    *,
    mode: str = "masked",
    prompt_weight: float = 0.0,
    max_length: int = 512,
    truncation: str = "right",
    examples: int = 0,
    **source: Any,
) -> dict[str, Any]:
    """Encodes data files and reports on them.

    Args:
      paths: one file or several.
      tokenizer: a fast `transformers` tokenizer.
      mode: a loss mode, see `MODES`.
      prompt_weight: weight of instruction tokens in `weighted` and `wit`.
      max_length: the most tokens of an example.
      truncation: see `TRUNCATIONS`.
      examples: how many encoded rows to give along.
      **source: see `Source`, such as `format` and `template`.

    Returns:
      See `inspect_dataset`.
    """
    names = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    settings: dict[str, Any] = {"cache": OFF, "workers": 1} | source
    where = Source(tuple(os.fspath(name) for name in names), **settings)
    loss = LossWeights(mode, prompt_weight)
    special = tokenizer.all_special_ids
    dataset = EncodedDataset(where.load(tokenizer), loss, max_length, truncation, special_ids=special)
    return inspect_dataset(dataset, examples)


def inspect_dataset(dataset: EncodedDataset, examples: int = 0) -> dict[str, Any]:
    """What there is to say of a data set.

    Args:
      dataset: the encoded rows.
      examples: how many of them to give along.

    Returns:
      An object that JSON can hold. Rows: `format`, `files`, `template`, `rows`, `kept`, `dropped` (by cause),
      `truncated`, `split`, `bad_rows` (what was wrong with the first of them). Loss: `mode`, `loss` (its settings),
      `tokens`, `trained_tokens`, `trained_fraction`, `segments` (tokens of each kind and their mean weight,
      before any cut), `ratio`
      (instruction tokens for each response token) and `ratio_median` (the median of the rows). Lengths: `lengths`,
      `histogram` (`from`: the classes' lower ends, and `rows`), `max_length`, `over_max_length` (rows),
      `lost_fraction` (of the trained tokens), `recommended_max_length`. What else to look at: `duplicates`,
      `near_empty`, `judged` (rows by how their answer is judged), `seam_rows`, `special_rows`, `fell_back`, `notes`,
      `advice` (one line that begins with the mode),
      `advice_details` and `capacity` (one line on the trained parameters that the data can need). Then
      `examples`: a list of `input_ids`, `weights` and `segments` (names), where `weights[i]` is the weight of
      predicting token i, with the row's own weight in it, and of a judged answer that in its log-probability.
    """
    report, advice = dataset.report, advise_on(dataset.report)
    starts, rows = report.histogram()
    return {name: getattr(report, name) for name in _TOLD} | {
        "bad_rows": report.reasons,
        "segments": {name: {"tokens": n, "mean_weight": weight} for name, n, weight in segment_table(report)},
        "ratio_median": report.median_ratio,
        "lengths": report.quantiles,
        "histogram": {"from": starts.tolist(), "rows": rows.tolist()},
        "over_max_length": report.over_length,
        "lost_fraction": report.lost_share,
        "duplicates": {"rows": report.duplicated, "fraction": report.duplicated_share},
        "near_empty": {"rows": report.near_empty, "at_most_tokens": NEAR_EMPTY},
        "judged": {side.name.lower(): int((report.sides == side).sum()) for side in Side if side in report.sides},
        "loss": asdict(dataset.loss) | {"roles": list(dataset.loss.roles)},
        "advice": advice.text,
        "advice_details": {
            "mode": advice.mode,
            "prompt_weight": advice.prompt_weight,
            "confidence": advice.confidence,
            "evidence": list(advice.evidence),
            "limits": list(advice.limits),
        },
        "capacity": advise_on_capacity(report.trained_tokens),
        "examples": [
            {
                "input_ids": example.input_ids.tolist(),
                "weights": training_weights(example).tolist(),
                "segments": [Segment(segment).label for segment in example.segments.tolist()],
            }
            for example in first_examples(dataset, examples)
        ],
    }


def segment_table(report: Report) -> list[tuple[str, int, float]]:
    """The kinds of tokens that occur, before any cut: name, tokens, and the mean of their weights."""
    counts: dict[str, int] = {}
    weights: dict[str, float] = {}
    for segment in Segment:
        if report.by_segment[segment]:
            name = segment.label
            counts[name] = counts.get(name, 0) + int(report.by_segment[segment])
            weights[name] = weights.get(name, 0.0) + float(report.weight_by_segment[segment])
    return [(name, count, weights[name] / count) for name, count in counts.items()]


def repeated_prompts(dataset: EncodedDataset, tokenizer: Any, most: int = 3) -> list[tuple[str, int]]:
    """The instructions that most rows share.

    Args:
      dataset: the encoded rows, all of their store.
      tokenizer: the tokenizer that encoded them.
      most: how many to give.

    Returns:
      The beginning of each instruction, and how many rows ask it; those that are asked more than once.
    """
    prompts = dataset.report.prompts
    values, first, counts = np.unique(prompts, return_index=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    chosen = [place for place in order.tolist() if values[place] and counts[place] > 1][:most]
    told = []
    for place in chosen:
        tokens = dataset.store[int(first[place])]
        answers = np.flatnonzero(np.isin(tokens.segments, ANSWER))
        before = slice(0, answers[0] if len(answers) else len(tokens))
        asked = tokens.input_ids[before][np.isin(tokens.segments[before], INSTRUCTION)]
        text = visible(" ".join(tokenizer.decode(asked[: 2 * _SHOWN].tolist()).split()))
        told.append((text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}...", int(counts[place])))
    return told
