"""Token ids in, token ids out: greedy and sampled generation with the decoder's key/value cache.

Prompts are padded to a multiple of `BUCKET` tokens (of `SHORT`, where they have fewer), caches to one of `BUCKET`, so
that functions are compiled once for all prompts and answers of about the same length: `_begin`, which reads the
prompts, and `_proceed`, which makes tokens in a loop and writes the cache in place. `Generator.batch` has all tokens
made by one call, `Generator.stream` one a call.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.slots import banks, checked_ids, choose_rows
from mora_jax.backend import backend
from mora_jax.errors import InputError
from mora_jax.models.decoder import Decoder
from mora_jax.models.kv_cache import Cache
from mora_jax.models.unstacked import UnstackedLayers

BUCKET, SHORT = 64, 16
LOOKED_AT = 16  # tokens that are made between two looks at the answers
COPIED = 4 * 2**30  # bytes of layers that a generator copies at most, to decode faster on a CPU


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

        On a CPU the layers are copied (up to `COPIED` bytes), laid out for one token at a time.

        Args:
            model: a decoder, with or without adapters.
            stop_ids: tokens that end an answer; they are not part of it.
            sampling: how tokens are drawn.
        """
        self.model = model
        self.stop_ids = frozenset(int(token) for token in stop_ids)
        self.sampling = sampling
        self._graphdef, self._state = nnx.split(model)
        self._layers = UnstackedLayers.of(model.layers, model.embed_tokens) if _faster_apart(model) else None

    def stream(self, prompt_ids: Sequence[int] | np.ndarray, max_new_tokens: int) -> Iterator[int]:
        """Yields the answer's tokens one by one, up to a stop token or the end of the model's context.

        The next token is in the making while one is looked at.

        Args:
            prompt_ids: int `[T]`.
            max_new_tokens: at most so many are made.

        Raises:
            InputError: when the prompt is empty or leaves no room in the context.
        """
        count = self._room([prompt_ids], max_new_tokens)
        proceed, answers = self._begin([prompt_ids], count, None)
        for made in range(1, count + 1):
            token = int(answers.token[0])
            if token in self.stop_ids:
                return
            if made < count:
                answers = proceed(answers, made)
            yield token

    def batch(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        max_new_tokens: int,
        adapter_ids: Any = None,
        ended: Callable[[np.ndarray], bool] | None = None,
    ) -> list[np.ndarray]:
        """Answers several prompts at once.

        Args:
            prompts: int `[T_i]` each.
            max_new_tokens: at most so many are made for each.
            adapter_ids: int, one a prompt: which of several named adapters answers it, -1 for the base alone; None:
                the active one.
            ended: told an answer's tokens so far, from time to time, whether it goes on no further (a stop sequence
                is in its text); it may then be longer than needed.

        Returns:
            int32 `[N_i]` each, without the stop token.

        Raises:
            InputError: when a prompt is empty or leaves no room in the context.
        """
        if not prompts:
            return []
        count = self._room(prompts, max_new_tokens)
        if adapter_ids is not None:
            adapter_ids = checked_ids(list(banks(self.model)), adapter_ids, len(prompts))
        proceed, answers = self._begin(prompts, count, adapter_ids)
        if ended is not None:
            for until in range(LOOKED_AT, count, LOOKED_AT):
                answers = proceed(answers, until)
                done = np.array(answers.done)
                done[: len(prompts)] |= [ended(tokens) for tokens in _rows(answers)[: len(prompts)]]
                answers = dataclasses.replace(answers, done=jnp.asarray(done))
                if done.all():
                    break
        answers = proceed(answers, count)
        return _rows(answers)[: len(prompts)]

    def _begin(self, prompts: Sequence[Sequence[int] | np.ndarray], count: int, adapter_ids: Any) -> Any:
        """A function that proceeds with answers until so many tokens are made, and the answers with their first token
        drawn."""
        ids, segments = self._pad(prompts)
        if self._layers is not None and len(ids) == 1 and self.model.dtype == jnp.bfloat16:
            # XLA multiplies two bfloat16 rows in bfloat16, but widens the whole matrix for a single one.
            if all(bank.rows is None for bank in banks(self.model)):
                ids, segments = ids.repeat(2, axis=0), segments.repeat(2, axis=0)
                adapter_ids = None if adapter_ids is None else jnp.repeat(adapter_ids, 2)
        real = np.arange(len(ids)) < len(prompts)
        stops = jnp.asarray(sorted(self.stop_ids) or [-1], jnp.int32)
        draw = Draw(
            jax.random.key(self.sampling.seed),
            jnp.float32(self.sampling.temperature),
            jnp.float32(self.sampling.top_p),
            self.sampling.temperature == 0,
        )
        options = (self._graphdef, self._state, stops, draw, adapter_ids)
        room = _round_up(count)
        answers = _begin(*options, ids, segments, real, room, self._layers is not None)
        return functools.partial(_proceed, *options, self._layers), answers

    def _pad(self, prompts: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        lengths = [len(prompt) for prompt in prompts]
        if min(lengths) == 0:
            raise InputError("the prompt has no tokens; give some text")
        longest = max(lengths)
        length = _round_up(longest, SHORT if longest < BUCKET else BUCKET)
        ids = np.zeros((len(prompts), length), np.int32)
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


def _rows(answers: Any) -> list[np.ndarray]:
    """The tokens of each row; -1 follows its last one, and nothing else does."""
    return [row[row >= 0] for row in np.asarray(answers.tokens)]


def _faster_apart(model: Decoder) -> bool:
    """Whether to copy the layers: on a CPU, for kernels that are neither quantised nor sharded nor too large."""
    leaves = jax.tree.leaves(nnx.state(model.layers))
    if backend() != "cpu" or model.quantize != "none" or sum(leaf.nbytes for leaf in leaves) > COPIED:
        return False
    return all(isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) == 1 for leaf in leaves)


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


def _round_up(length: int, step: int = BUCKET) -> int:
    return -(-length // step) * step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draw:
    """How tokens are drawn, for a compiled function: see `choose`."""

    key: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    greedy: bool = dataclasses.field(metadata={"static": True})

    def __call__(self, logits: jax.Array, step: jax.Array | int) -> jax.Array:
        """The token number `step` of each answer."""
        return choose(logits, jax.random.fold_in(self.key, step), self.temperature, self.top_p, self.greedy)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers so far.

    Attributes:
        made: int32 scalar, how many tokens of each answer are in `tokens` and in the cache.
        cache: of the prompts and those tokens.
        token: int32 `[B]`, the token after them.
        done: bool `[B]`, whether this is a stop token, or came after one.
        tokens: int32 `[B, room]`: each row's answer, -1 from its stop token on.
    """

    made: jax.Array
    cache: Cache
    token: jax.Array
    done: jax.Array
    tokens: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 8, 9))
def _begin(
    graphdef: Any,
    state: Any,
    stop_ids: jax.Array,
    draw: Draw,
    adapter_ids: jax.Array | None,
    ids: jax.Array,
    segments: jax.Array,
    real: jax.Array,
    room: int,
    apart: bool,
) -> Answers:
    """Reads prompts `ids [B, T]` and draws the first tokens; answers of rows that are not `real [B]` are done."""
    model = nnx.merge(graphdef, state)
    choose_rows(model, adapter_ids, len(ids))
    if apart:
        model.unroll = 1  # is compiled sooner, and runs once
    cache = model.init_cache(len(ids), _round_up(ids.shape[1]) + room)
    logits, cache = model.read(cache, ids, segment_ids=segments)
    token = draw(logits, 0)
    return Answers(
        made=jnp.int32(0),
        cache=cache.unstacked() if apart else cache,
        token=token,
        done=jnp.isin(token, stop_ids) | ~real,
        tokens=jnp.full((len(ids), room), -1, jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=6)
def _proceed(
    graphdef: Any,
    state: Any,
    stop_ids: jax.Array,
    draw: Draw,
    adapter_ids: jax.Array | None,
    layers: UnstackedLayers | None,
    answers: Answers,
    until: jax.Array | int,
) -> Answers:
    """The answers with `until` tokens made, or fewer where all are done."""
    model = nnx.merge(graphdef, state)
    choose_rows(model, adapter_ids, len(answers.token))
    head = model.head()
    if layers is not None:
        layers = dataclasses.replace(layers, adapter_ids=adapter_ids)

    def running(answers: Answers) -> jax.Array:
        return (answers.made < until) & ~jnp.all(answers.done)

    def advance(answers: Answers) -> Answers:
        tokens = answers.tokens.at[:, answers.made].set(jnp.where(answers.done, -1, answers.token))
        logits, cache = model.read(answers.cache, answers.token[:, None], layers=layers, head=head)
        made = answers.made + 1
        token = draw(logits, made)
        return Answers(made, cache, token, answers.done | jnp.isin(token, stop_ids), tokens)

    return jax.lax.while_loop(running, advance, answers)
