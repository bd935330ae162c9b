"""Perplexity and next-token accuracy of a model on a data set.

Every token counts with its weight over the whole data set, never as a mean of batch means. The logits of a batch never
exist (see mora_jax/losses/chunked_sum.py). Instructions are scored beside the tokens that carry loss, whatever the
loss mode: only then do runs of different modes compare.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.batch import Batch
from mora_jax.data.dataset import EncodedDataset
from mora_jax.errors import InputError
from mora_jax.evaluation.metrics.estimate import Ratio
from mora_jax.losses.cross_entropy import next_token_targets
from mora_jax.losses.token_nll import TokenSums, token_sums
from mora_jax.models.decoder import Decoder
from mora_jax.models.own import language_model
from mora_jax.models.partitioning import Partitioner

SHORTEST = 64


@dataclasses.dataclass(frozen=True)
class DatasetScores:
    """Scores over the tokens of a data set that carry loss.

    Attributes:
        nll: weighted mean of the negative log-likelihood, in nats a token.
        accuracy: share of these tokens that were the likeliest next token.
        tokens: number of tokens whose weight is not 0.
        weight: sum of their weights.
        prompt_nll: mean negative log-likelihood of instruction tokens, in nats; None where there are none.
        prompt_tokens: number of instruction tokens, the first of an example left out.
        nll_stderr, accuracy_stderr: standard errors, over examples (never over tokens, which depend on each other);
            None for a single example.
        example_nll: mean over examples of their own mean, each by its row's weight, which training on means of
            examples lowers; None where no example has been looked at by itself.
    """

    nll: float
    accuracy: float
    tokens: int
    weight: float
    prompt_nll: float | None = None
    prompt_tokens: int = 0
    nll_stderr: float | None = None
    accuracy_stderr: float | None = None
    example_nll: float | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean, kept finite."""
        return math.exp(min(self.nll, 700.0))

    def to_dict(self) -> dict[str, float | int | None]:
        """All scores, ready for JSON."""
        return {"perplexity": self.perplexity, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        """One line for people."""
        of_nll = "" if self.nll_stderr is None else f" ± {self.nll_stderr:.4f}"
        of_accuracy = "" if self.accuracy_stderr is None else f" ± {self.accuracy_stderr:.2%}"
        text = (
            f"perplexity {self.perplexity:.4f}, nll {self.nll:.4f}{of_nll} nats a token, "
            f"accuracy {self.accuracy:.2%}{of_accuracy} on {self.tokens:,} tokens"
        )
        if self.prompt_nll is None:
            return text
        return f"{text}; instructions: nll {self.prompt_nll:.4f} on {self.prompt_tokens:,} tokens"


def score(
    model: Decoder,
    dataset: EncodedDataset,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    partitioner: Partitioner | None = None,
    each: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> DatasetScores:
    """Scores a model on every example of a data set.

    Args:
        model: a decoder, with or without adapters; dropout is off.
        dataset: encoded with the loss mode that says which tokens count.
        batch_size: rows computed at once; the result doesn't depend on it but for rounding.
        progress: called with (rows done, all rows) after each batch.
        partitioner: how the model's arrays are laid over devices; see `Decoder`.
        each: called after each batch with the numbers of its rows and, `[2, 4, rows]`, the `TokenSums` of their tokens
            that carry loss and of their instructions.

    Raises:
        InputError: the weights of a row add up to more than float32 holds, or those of all rows are 0.
    """
    graphdef, state = nnx.split(model)
    sums, order = list[np.ndarray](), list[int]()
    for rows, length in batches(dataset.lengths, batch_size, dataset.max_length):
        batch = dataset.batch(rows, batch_size, length, extra={"prompt_weights": "prompt"})
        sums.append(np.asarray(jax.device_get(_score(graphdef, partitioner, state, batch)))[..., : len(rows)])
        order += rows.tolist()
        if progress is not None:
            progress(len(order), len(dataset))
        if each is not None:
            each(rows, sums[-1])
    by_row = np.concatenate(sums, axis=-1).astype(np.float64)
    of_answers, of_prompts = (TokenSums(*row) for row in by_row.sum(axis=-1).tolist())
    # Divided by a sum of weights beyond float32 any loss is 0.
    if beyond := [row for row, weight in zip(order, by_row[0, 1], strict=True) if not math.isfinite(weight)]:
        where = dataset[min(beyond)].source
        raise InputError(f"{where}: the weights of its tokens add up to more than float32 holds; scale them down")
    if not of_answers.weight:
        raise InputError("no token carries loss: the weights of all rows are 0")
    # An example of no such token says nothing.
    scored = [(number, row) for number, row in zip(order, by_row[0].T.tolist(), strict=True) if row[3]]
    examples = [dict(zip(TokenSums._fields, row, strict=True)) for _, row in scored]
    means = [row["nll"] / row["weight"] for row in examples]
    return DatasetScores(
        nll=of_answers.nll / of_answers.weight,
        accuracy=of_answers.correct / of_answers.tokens,
        tokens=int(of_answers.tokens),
        weight=of_answers.weight,
        prompt_nll=of_prompts.nll / of_prompts.tokens if of_prompts.tokens else None,
        prompt_tokens=int(of_prompts.tokens),
        nll_stderr=Ratio("nll", "nll", "weight")(examples).stderr,
        accuracy_stderr=Ratio("accuracy", "correct", "tokens")(examples).stderr,
        example_nll=float(np.average(means, weights=[dataset[number].weight for number, _ in scored])),
    )


def batches(lengths: Sequence[int] | np.ndarray, batch_size: int, longest: int) -> Iterator[tuple[np.ndarray, int]]:
    """Groups rows of similar length into batches of few shapes.

    Lengths are 64, 128, 256 ...; what doesn't fill a batch of its length goes into the next longer one.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a batch.
        longest: no batch is longer.

    Yields:
        Row numbers, at most `batch_size`, and the length they are padded to.
    """
    order = np.argsort(lengths, kind="stable")
    start, length = 0, min(SHORTEST, longest)
    while start < len(order):
        fitting = int(np.searchsorted(np.sort(lengths)[start:], length, side="right"))
        last = start + fitting == len(order)
        full = fitting if last else fitting // batch_size * batch_size
        for first in range(start, start + full, batch_size):
            yield order[first : min(first + batch_size, start + full)], length
        start += full
        length = min(2 * length, longest)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(graphdef: Any, partitioner: Partitioner | None, state: Any, batch: Batch) -> jax.Array:
    """Sums over each row: of the tokens that carry loss, and of instructions; `[2, 4, B]`, on every device."""
    model = language_model(nnx.merge(graphdef, state))
    head = model.head(partitioner)
    ids, segments = batch["input_ids"], batch["segment_ids"]
    hidden = model.forward(ids, segments, batch["positions"], partitioner=partitioner)

    def sums(weights: jax.Array) -> TokenSums:
        targets = next_token_targets(ids, weights, segments)
        return token_sums(hidden, head.kernel, *targets, softcap=head.softcap)

    by_row = jnp.stack([jnp.stack(sums(batch["weights"])), jnp.stack(sums(batch["prompt_weights"]))])
    replicated = None if partitioner is None else partitioner.used((None, None, None), by_row.shape)
    return by_row if replicated is None else jax.lax.with_sharding_constraint(by_row, replicated)
