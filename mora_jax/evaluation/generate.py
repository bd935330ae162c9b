"""Token ids in, token ids out: greedy and sampled generation with the decoder's key/value cache.

Prompts are padded to a multiple of `BUCKET` tokens, so that a function is compiled once for all prompts of
about the same length. `Generator.stream` gives one row's tokens as they come; `Generator.batch` runs a whole
batch inside one compiled loop.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.slots import banks, checked_ids, choose_rows
from mora_jax.errors import InputError
from mora_jax.models.decoder import Decoder
from mora_jax.models.kv_cache import Cache

BUCKET = 64


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the likeliest token; otherwise logits are divided by it before drawing.
        top_p: draws only from the likeliest tokens whose probabilities reach this sum.
        seed: equal seeds give equal draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


GREEDY = Sampling()


class Generator:
    """Generates with one model, as it is when the generator is made; later changes don't show."""

    def __init__(self, model: Decoder, stop_ids: Iterable[int] = (), sampling: Sampling = GREEDY) -> None:
        """Takes the model apart for the compiled functions.

        Args:
            model: a decoder, with or without adapters.
            stop_ids: tokens that end an answer; they are not part of it.
            sampling: how tokens are drawn.
        """
        self.model = model
        self.stop_ids = frozenset(int(token) for token in stop_ids)
        self.sampling = sampling
        self._graphdef, self._state = nnx.split(model)

    def stream(self, prompt_ids: Sequence[int] | np.ndarray, max_new_tokens: int) -> Iterator[int]:
        """Yields the answer's tokens one by one, up to a stop token or the end of the model's context.

        Args:
            prompt_ids: int `[T]`.
            max_new_tokens: at most so many are made.

        Raises:
            InputError: when the prompt is empty or leaves no room in the context.
        """
        ids, segments = self._pad([prompt_ids])
        count = self._room([prompt_ids], max_new_tokens)
        cache = self.model.init_cache(1, ids.shape[1] + _round_up(count))
        key = jax.random.key(self.sampling.seed)
        draw = (jnp.float32(self.sampling.temperature), jnp.float32(self.sampling.top_p))
        token: Any = jnp.asarray(ids)
        mask: Any = jnp.asarray(segments)
        greedy = self.sampling.temperature == 0
        for step in range(count):
            now = jax.random.fold_in(key, step)
            token, cache = _next(self._graphdef, self._state, cache, token, mask, now, *draw, greedy)
            number = int(token[0])
            if number in self.stop_ids:
                return
            yield number
            token, mask = token[:, None], None

    def batch(
        self, prompts: Sequence[Sequence[int] | np.ndarray], max_new_tokens: int, adapter_ids: Any = None
    ) -> list[np.ndarray]:
        """Answers several prompts at once.

        Args:
            prompts: int `[T_i]` each.
            max_new_tokens: at most so many are made for each.
            adapter_ids: int, one a prompt: which of several named adapters answers it, -1 for the base alone; None:
                the active one.

        Returns:
            int32 `[N_i]` each, without the stop token.

        Raises:
            InputError: when a prompt is empty or leaves no room in the context.
        """
        if not prompts:
            return []
        ids, segments = self._pad(prompts)
        count = self._room(prompts, max_new_tokens)
        stops = jnp.asarray(sorted(self.stop_ids) or [-1], jnp.int32)
        draw = (jnp.float32(self.sampling.temperature), jnp.float32(self.sampling.top_p))
        key = jax.random.key(self.sampling.seed)
        greedy = self.sampling.temperature == 0
        model = (self._graphdef, self._state)
        if adapter_ids is not None:
            adapter_ids = checked_ids(list(banks(self.model)), adapter_ids, len(prompts))
        tokens = _complete(*model, ids, segments, stops, key, *draw, greedy, count, adapter_ids)
        # -1 follows a row's last token, and nothing else does.
        return [row[row >= 0] for row in np.asarray(tokens)]

    def _pad(self, prompts: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        lengths = [len(prompt) for prompt in prompts]
        if min(lengths) == 0:
            raise InputError("the prompt has no tokens; give some text")
        ids = np.zeros((len(prompts), _round_up(max(lengths))), np.int32)
        segments = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
            segments[row, : len(prompt)] = 1
        known = self.model.config.vocab_size
        if ids.max() >= known:
            raise InputError(f"the prompt has token id {ids.max()}, but the model knows only {known} tokens")
        return ids, segments

    def _room(self, prompts: Sequence[Sequence[int] | np.ndarray], wanted: int) -> int:
        if wanted < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {wanted}")
        context, longest = self.model.config.max_positions, max(len(prompt) for prompt in prompts)
        if longest >= context:
            raise InputError(f"the prompt has {longest} tokens, the model's context {context}; shorten the prompt")
        return min(wanted, context - longest)


def choose(logits: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array, greedy: bool) -> jax.Array:
    """Returns the next token of each row.

    Args:
        logits: float32 `[B, V]`.
        key: for the draw.
        temperature: scalar, above 0 unless greedy.
        top_p: scalar in (0, 1].
        greedy: takes the likeliest token; the other arguments then don't matter.

    Returns:
        int32 `[B]`.
    """
    if greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    # A token stays when the likelier ones don't reach top_p yet; the first always does.
    kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
    lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jax.random.categorical(key, jnp.where(logits >= lowest, logits, -jnp.inf)).astype(jnp.int32)


def _round_up(length: int) -> int:
    return -(-length // BUCKET) * BUCKET


@functools.partial(jax.jit, static_argnums=(0, 8), donate_argnums=2)
def _next(
    graphdef: Any,
    state: Any,
    cache: Cache,
    ids: jax.Array,
    segments: jax.Array | None,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    greedy: bool,
) -> tuple[jax.Array, Cache]:
    """Reads `ids [B, T]` and returns the next token `[B]` with the cache after them."""
    logits, cache = nnx.merge(graphdef, state).extend(cache, ids, segment_ids=segments)
    return choose(logits, key, temperature, top_p, greedy), cache


@functools.partial(jax.jit, static_argnums=(0, 8, 9))
def _complete(
    graphdef: Any,
    state: Any,
    ids: jax.Array,
    segments: jax.Array,
    stop_ids: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    greedy: bool,
    count: int,
    adapter_ids: jax.Array | None,
) -> jax.Array:
    """Returns int32 `[B, count]`: each row's answer, then -1 from its stop token on."""
    model = nnx.merge(graphdef, state)
    choose_rows(model, adapter_ids, len(ids))
    batch, length = ids.shape

    def draw(logits: jax.Array, step: jax.Array | int) -> jax.Array:
        return choose(logits, jax.random.fold_in(key, step), temperature, top_p, greedy)

    def running(carry: Any) -> jax.Array:
        step, _, _, done, _ = carry
        return (step < count) & ~jnp.all(done)

    def advance(carry: Any) -> Any:
        step, cache, token, done, tokens = carry
        tokens = tokens.at[:, step].set(jnp.where(done, -1, token))
        logits, cache = model.extend(cache, token[:, None])
        token = draw(logits, step + 1)
        return step + 1, cache, token, done | jnp.isin(token, stop_ids), tokens

    cache = model.init_cache(batch, length + _round_up(count))
    logits, cache = model.extend(cache, ids, segment_ids=segments)
    token = draw(logits, 0)
    tokens = jnp.full((batch, count), -1, jnp.int32)
    carry = (jnp.int32(0), cache, token, jnp.isin(token, stop_ids), tokens)
    return jax.lax.while_loop(running, advance, carry)[-1]
