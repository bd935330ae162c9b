"""Log-likelihoods of continuations given a context, and of whole texts: what multiple choice and perplexity rest on.

The conventions are those of EleutherAI's lm-evaluation-harness (`lm_eval/api/model.py`, `lm_eval/utils.py` and
`lm_eval/models/huggingface.py` of 0.4), so that numbers compare:

- White space at the end of a context belongs to the continuation. Context and continuation are encoded together, the
  context alone as well; the tokens beyond the length of the latter are the continuation's. Tokens that the tokenizer
  merges across the border thereby count as the context's.
- A continuation without a context follows the beginning-of-sequence token, or the end-of-sequence token where there
  is none. Otherwise a beginning-of-sequence token is there where the tokenizer adds one by itself, and never twice.
- What is too long loses its beginning: the last `max_length` + 1 tokens stay, of which the last is only predicted.

Every distinct input is computed once: choices of one token share theirs. Inputs are padded on the right to one of few
lengths, so a score depends neither on its neighbours nor on the batch size, but for rounding. The logits of a batch
never exist (see mora_jax/losses/chunked_sum.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.data.tokens.tokenize import adds_bos
from mora_jax.errors import InputError
from mora_jax.evaluation.perplexity import batches
from mora_jax.losses.token_nll import TokenScores, token_scores
from mora_jax.models.decoder import Decoder
from mora_jax.models.own import language_model
from mora_jax.models.partitioning import Partitioner
from mora_jax.models.segments import check_token_ids

Progress = Callable[[int, int], None]
Ids = Sequence[int]


class Loglikelihood(NamedTuple):
    """The score of a continuation, or of a text.

    Attributes:
        logprob: Σ log p(token | the tokens before it), in nats.
        is_greedy: whether each of its tokens is the likeliest one after the tokens before it.
        tokens: how many tokens these are.
        correct: how many of them are the likeliest.
    """

    logprob: float
    is_greedy: bool
    tokens: int
    correct: int


class LoglikelihoodScorer:
    """Scores texts with one model, as it is when the scorer is made; later changes don't show.

    Attributes:
        model, tokenizer: those it scores with.
        batch_size: inputs computed at once.
        max_length: most tokens of an input.
        prefix_id: the token before a text that has no context.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Any,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        partitioner: Partitioner | None = None,
    ) -> None:
        """Takes the model apart for the compiled function.

        Args:
            model: a decoder, with or without adapters; dropout is off.
            tokenizer: its transformers tokenizer.
            batch_size: inputs computed at once; scores don't depend on it but for rounding.
            max_length: most tokens of an input; None: the model's context.
            partitioner: how the model's arrays are laid over devices; see `Decoder`.

        Raises:
            ValueError: `batch_size` or `max_length` is below 1, or `max_length` is beyond the model's context.
        """
        config = language_model(model).config
        context = config.max_positions
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if max_length is not None and not 1 <= max_length <= context:
            raise ValueError(f"max_length must be from 1 to the model's context of {context} tokens, got {max_length}")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_length = batch_size, max_length or context
        self._partitioner, self._vocab_size = partitioner, config.vocab_size
        self._graphdef, self._state = nnx.split(model)
        self._bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
        first, other = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.prefix_id: int | None = other if first is None else first

    def loglikelihood(self, pairs: Sequence[tuple[str, str]], progress: Progress | None = None) -> list[Loglikelihood]:
        """Scores continuations.

        Args:
            pairs: (context, continuation); a space between them belongs to the continuation.
            progress: called with (pairs done, all pairs) after each batch.

        Raises:
            InputError: a continuation has no tokens, or more than `max_length`.
        """
        return self.score(self.encode_pairs(pairs), progress)

    def loglikelihood_rolling(
        self, texts: Sequence[str], progress: Progress | None = None, *, context: int = 1
    ) -> list[Loglikelihood]:
        """Scores whole texts, however long: every token once, in windows of `max_length` tokens.

        Args:
            texts: each is scored for itself; one without tokens has a log-likelihood of 0.
            progress: called with (windows done, all windows) after each batch.
            context: fewest tokens before each that is scored, but for the first window; see `windows`.
        """
        cut = [windows(ids, self._prefix(), self.max_length, context) for ids in self.encode(texts, plain=True)]
        scores = iter(self.score([window for one in cut for window in one], progress))
        return [_total([next(scores) for _ in one]) for one in cut]

    def encode(self, texts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
        """The tokens of texts, with a beginning-of-sequence token where the tokenizer adds one, unless `plain`."""
        if not texts:
            return []
        tokens = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        head = [] if plain or self._bos is None else [self._bos]
        return [ids if ids[:1] == head else [*head, *ids] for ids in tokens]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """The tokens of contexts and continuations, by the conventions above."""
        texts: list[str] = []
        for context, continuation in pairs:
            stripped = context.rstrip()
            texts += (stripped, context + continuation)
        encoded = self.encode(texts)
        pairs_of_tokens = []
        for (context, _), before, both in zip(pairs, encoded[::2], encoded[1::2], strict=True):
            if context.strip():
                pairs_of_tokens.append((before, both[len(before) :]))
            elif both[:1] == [self._prefix()]:
                pairs_of_tokens.append((both[:1], both[1:]))
            else:
                pairs_of_tokens.append(([self._prefix()], both))
        return pairs_of_tokens

    def score(self, requests: Sequence[tuple[Ids, Ids]], progress: Progress | None = None) -> list[Loglikelihood]:
        """Scores continuations that are tokens already.

        Args:
            requests: (context, continuation), neither of them empty.
            progress: called with (requests done, all requests) after each batch.

        Raises:
            InputError: a continuation has no tokens or more than `max_length`, a context has none, or a token is
                unknown to the model.
        """
        rows = self._rows(requests)
        totals, correct = np.zeros(len(requests)), np.zeros(len(requests), int)
        shards = 1 if self._partitioner is None else self._partitioner.row_shards
        size = -(-min(self.batch_size, len(rows)) // shards) * shards
        done = 0
        for numbers, length in batches([row.size for row in rows], size, self.max_length):
            here = [rows[number] for number in numbers]
            scores = _score(self._graphdef, self._partitioner, self._state, _batch(here, size, length))
            nll, right = (np.asarray(array) for array in jax.device_get(scores))
            for place, row in enumerate(here):
                for request, columns in row.requests:
                    totals[request] = -nll[place, columns].sum(dtype=np.float64)
                    correct[request] = right[place, columns].sum()
                done += len(row.requests)
            if progress is not None:
                progress(done, len(requests))
        return [
            Loglikelihood(float(total), bool(right == len(ids)), len(ids), int(right))
            for total, right, (_, ids) in zip(totals, correct, requests, strict=True)
        ]

    def refusal(self, request: tuple[Ids, Ids]) -> str | None:
        """Why `score` can't score a request; None where it can."""
        for name, tokens in zip(("context", "continuation"), request, strict=True):
            if not len(tokens):
                return f"the {name} has no tokens, so there is nothing to score"
        if len(request[1]) > self.max_length:
            return f"the continuation has {len(request[1])} tokens, an input at most {self.max_length}"
        return None

    def _prefix(self) -> int:
        if self.prefix_id is None:
            raise InputError("the tokenizer has neither a bos_token nor an eos_token to stand before a text")
        return self.prefix_id

    def _rows(self, requests: Sequence[tuple[Ids, Ids]]) -> list[_Row]:
        """The distinct inputs, each with the tokens to score."""
        by_input: dict[tuple[int, ...], _Row] = {}
        rows: list[_Row] = []
        for number, (context, continuation) in enumerate(requests):
            if (reason := self.refusal((context, continuation))) is not None:
                raise InputError(f"request {number}: {reason}")
            ids = tuple([*context, *continuation][-self.max_length - 1 :])
            row = by_input.get(ids[:-1])
            if row is None or row.size + len(continuation) > self.max_length:
                row = by_input[ids[:-1]] = _Row(ids[:-1])
                rows.append(row)
            row.add(number, ids[-len(continuation) :])
        if rows:
            check_token_ids(np.array([max(*row.ids, *row.targets) for row in rows]), self._vocab_size)
        return rows


def windows(tokens: Ids, prefix: int, length: int, context: int = 1) -> list[tuple[list[int], list[int]]]:
    """Cuts a long text into windows in which every token is predicted once.

    The first window predicts `length` tokens after the prefix. Each later one predicts at most `length` - `context` + 1
    new ones and begins so early that its input is full. A stride of s, as others say, is a context of `length` - s + 1.

    Args:
        tokens: of the text.
        prefix: the token before it.
        length: tokens of an input.
        context: fewest tokens before a new one, from 1 to `length`.

    Returns:
        (context, continuation) pairs; none for a text without tokens.

    >>> windows(range(6), -1, 4)
    [([-1], [0, 1, 2, 3]), ([1, 2, 3], [4, 5])]
    """
    if not 1 <= context <= length:
        raise ValueError(f"context must be from 1 to the length {length} of a window, got {context}")
    tokens = [int(token) for token in tokens]
    if not tokens:
        return []
    cut = [([prefix], tokens[:length])]
    done = length
    while done < len(tokens):
        end = min(done + length - context + 1, len(tokens))
        cut.append((tokens[end - length - 1 : done], tokens[done:end]))
        done = end
    return cut


class _Row:
    """An input, and which of the tokens after its places are scored for which request."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids = ids
        self.places: list[int] = []
        self.targets: list[int] = []
        self.requests: list[tuple[int, list[int]]] = []  # with the columns of `places` and `targets`
        self._columns: dict[tuple[int, int], int] = {}

    @property
    def size(self) -> int:
        """Tokens of the input, or scored ones where these are more."""
        return max(len(self.ids), len(self.targets))

    def add(self, request: int, continuation: Sequence[int]) -> None:
        """Adds a request whose continuation ends one token behind the input."""
        columns = []
        for place, target in enumerate(continuation, len(self.ids) - len(continuation)):
            column = self._columns.setdefault((place, target), len(self.targets))
            if column == len(self.targets):
                self.places.append(place)
                self.targets.append(target)
            columns.append(column)
        self.requests.append((request, columns))


def _batch(rows: Sequence[_Row], size: int, length: int) -> dict[str, np.ndarray]:
    """Arrays `[size, length]`; what is not filled is padding."""
    names = ("input_ids", "segment_ids", "places", "targets")
    batch = {name: np.zeros((size, length), np.int32) for name in names}
    weights = np.zeros((size, length), np.float32)
    for place, row in enumerate(rows):
        batch["input_ids"][place, : len(row.ids)] = row.ids
        batch["segment_ids"][place, : len(row.ids)] = 1
        batch["places"][place, : len(row.places)] = row.places
        batch["targets"][place, : len(row.targets)] = row.targets
        weights[place, : len(row.targets)] = 1
    return {**batch, "weights": weights}


def _total(parts: Sequence[Loglikelihood]) -> Loglikelihood:
    tokens, correct = sum(part.tokens for part in parts), sum(part.correct for part in parts)
    return Loglikelihood(sum(part.logprob for part in parts), tokens == correct, tokens, correct)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(graphdef: Any, partitioner: Partitioner | None, state: Any, batch: dict[str, Any]) -> TokenScores:
    """The scores of the wanted tokens of each row, by column; on every device."""
    model = language_model(nnx.merge(graphdef, state))
    hidden = model.forward(batch["input_ids"], batch["segment_ids"], partitioner=partitioner, packed=False)
    hidden = jnp.take_along_axis(hidden, batch["places"][..., None], axis=1)
    head = model.head(partitioner)
    targets, weights = batch["targets"], batch["weights"]
    if partitioner is None:
        return token_scores(hidden, head.kernel, targets, weights, softcap=head.softcap)
    hidden = partitioner.rows(hidden)
    scores = token_scores(hidden, head.kernel, targets, weights, softcap=head.softcap, shards=partitioner.row_shards)
    replicated = partitioner.used((None, None), weights.shape)
    return TokenScores(*(jax.lax.with_sharding_constraint(array, replicated) for array in scores))
