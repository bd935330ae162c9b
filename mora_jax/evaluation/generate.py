"""Token ids in, token ids out: greedy and sampled generation with the decoder's key/value cache.

Prompts are padded to a multiple of `BUCKET` tokens (of `SHORT`, where they have fewer), caches to one of `BUCKET`, so
that functions are compiled once for all prompts and answers of about the same length: `_begin`, which reads the
prompts, and `_proceed`, which makes tokens in a loop and writes the cache in place. `Generator.batch` has all tokens
made by one call, `Generator.stream` one a call. With layers apart (`UnstackedLayers`) that are large the loop is
Python's.
"""

from __future__ import annotations

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
from mora_jax.models.decoder import Decoder, Head
from mora_jax.models.kv_cache import Cache
from mora_jax.models.unstacked import Structure, UnstackedLayers, looked_up

BUCKET, SHORT = 64, 16
LOOKED_AT = 16  # tokens that are made between two looks at the answers
COPIED = 4 * 2**30  # bytes of layers that a generator copies at most, to decode faster on a CPU
# Bytes of a layer from which a call of its own costs nothing; one of 0.3 MB takes three times as long.
LARGE = 8 * 2**20


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
        self._layers = UnstackedLayers.of(model) if _faster_apart(model) else None
        if self._layers is not None:
            leaves, tree = jax.tree.flatten(self._state)
            # A tuple, which JAX takes apart faster than a state.
            self._leaves = tuple(leaves)
            self._enter, self._leave = _token_programs(Structure(self._graphdef, tree))
            # An adapted head is made once, and not for each token.
            self._head = _head(self._graphdef, self._state) if model.has_adapted_head else None
            self._programs = self._enter, self._leave, self._layers.programs
            self._arrays = self._leaves, self._head, self._layers.table, self._layers.leaves
            self._large = sum(leaf.nbytes for leaf in jax.tree.leaves(self._layers.leaves[0])) >= LARGE

    def stream(self, prompt_ids: Sequence[int] | np.ndarray, max_new_tokens: int, number: int = 0) -> Iterator[int]:
        """Yields the answer's tokens one by one, up to a stop token or the end of the model's context.

        The next token is computed while one is looked at.

        Args:
            prompt_ids: int `[T]`.
            max_new_tokens: at most so many are made.
            number: the request's number, to which its draws belong.

        Raises:
            InputError: when the prompt is empty or leaves no room in the context.
        """
        proceed, answers = self._begin([prompt_ids], max_new_tokens, None, [number])
        limit = int(answers.limits[0])
        for step in range(1, limit + 1):
            token = int(answers.token[0])
            if token in self.stop_ids:
                return
            if step < limit:
                answers = proceed(answers, step)
            yield token

    def batch(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        max_new_tokens: int,
        adapter_ids: Any = None,
        ended: Callable[[np.ndarray], bool] | None = None,
        numbers: Sequence[int] | np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """Answers several prompts at once.

        Args:
            prompts: int `[T_i]` each.
            max_new_tokens: at most so many are made for each; fewer where a prompt leaves less room in the context.
            adapter_ids: int, one a prompt: which of several named adapters answers it, -1 for the base alone; None:
                the active one.
            ended: told an answer's tokens so far, from time to time, whether it goes on no further (a stop sequence
                is in its text); it may then be longer than needed.
            numbers: int, one a prompt: the request's number, to which its draws belong; None: its place here.

        Returns:
            int32 `[N_i]` each, without the stop token.

        Raises:
            InputError: when a prompt is empty or leaves no room in the context.
        """
        if not prompts:
            return []
        if adapter_ids is not None:
            adapter_ids = checked_ids(list(banks(self.model)), adapter_ids, len(prompts))
        proceed, answers = self._begin(prompts, max_new_tokens, adapter_ids, numbers)
        longest = int(answers.limits.max())
        if ended is not None:
            for until in range(LOOKED_AT, longest, LOOKED_AT):
                answers = proceed(answers, until)
                done = np.array(answers.done)
                done[: len(prompts)] |= [ended(tokens) for tokens in _rows(answers)[: len(prompts)]]
                answers = dataclasses.replace(answers, done=jnp.asarray(done))
                if done.all():
                    break
        answers = proceed(answers, longest)
        return _rows(answers)[: len(prompts)]

    def _begin(
        self, prompts: Sequence[Sequence[int] | np.ndarray], max_new_tokens: int, adapter_ids: Any, numbers: Any
    ) -> tuple[Callable[..., Answers], Answers]:
        """A function that proceeds with answers until so many tokens are made, and the answers with their first token
        drawn."""
        ids, segments, limits = self._pad(prompts, max_new_tokens)
        numbers = np.arange(len(prompts)) if numbers is None else np.asarray(numbers)
        if self._layers is not None and len(ids) == 1 and self.model.dtype == jnp.bfloat16:
            # XLA multiplies two bfloat16 rows in bfloat16, but widens the whole matrix for a single one.
            if all(bank.rows is None for bank in banks(self.model)):
                ids, segments, numbers = (array.repeat(2, axis=0) for array in (ids, segments, numbers))
                limits = np.append(limits, np.int32(0))
                adapter_ids = None if adapter_ids is None else jnp.repeat(adapter_ids, 2)
        request = Request(
            request_keys(jax.random.key(self.sampling.seed), jnp.asarray(numbers, jnp.uint32)),
            jnp.float32(self.sampling.temperature),
            jnp.float32(self.sampling.top_p),
            jnp.asarray(sorted(self.stop_ids) or [-1], jnp.int32),
            adapter_ids,
            self.sampling.temperature == 0,
        )
        room, apart = _round_up(int(limits.max())), self._layers is not None
        answers = _begin(self._graphdef, self._state, request, (ids, segments, limits), room, apart)
        if apart:
            return functools.partial(self._proceed_apart, request), answers
        return functools.partial(_proceed, self._graphdef, self._state, request), answers

    def _proceed_apart(self, request: Request, answers: Answers, until: int) -> Answers:
        """`_proceed` with layers apart: large ones by a compiled call each, small ones all in one."""
        if not self._large:
            return _proceed_apart(self._programs, self._arrays, request, answers, until)
        for _ in range(int(answers.made), until):
            if np.asarray(answers.done).all():
                break
            answers = _one_more(self._programs, self._arrays, request, answers)
        return answers

    def _pad(
        self, prompts: Sequence[Sequence[int] | np.ndarray], max_new_tokens: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and segments `[B, T]` of prompts, and the most tokens that each answer may have `[B]`, all int32."""
        lengths = np.array([len(prompt) for prompt in prompts])
        if lengths.min() == 0:
            raise InputError("the prompt has no tokens; give some text")
        longest, known = int(lengths.max()), self.model.config.vocab_size
        length = _round_up(longest, SHORT if longest < BUCKET else BUCKET)
        segments = (np.arange(length) < lengths[:, None]).astype(np.int32)
        ids = np.zeros_like(segments)
        ids[segments == 1] = np.concatenate(prompts)
        if ids.max() >= known:
            raise InputError(f"the prompt has token id {ids.max()}, but the model knows only {known} tokens")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        check_room(longest, self.model)
        return ids, segments, np.minimum(max_new_tokens, self.model.config.max_positions - lengths).astype(np.int32)


def check_room(tokens: int, model: Decoder) -> None:
    """Refuses a prompt of so many tokens where the model's context has no room for an answer."""
    if tokens >= (context := model.config.max_positions):
        raise InputError(f"the prompt has {tokens} tokens, the model's context {context}; shorten the prompt")


def _rows(answers: Any) -> list[np.ndarray]:
    """The tokens of each row; -1 follows its last one, and nothing else does."""
    return [row[row >= 0] for row in np.asarray(answers.tokens)]


def _faster_apart(model: Decoder) -> bool:
    """Whether to copy the layers: on a CPU, if they are of one kind and neither quantised nor sharded nor too large."""
    if model.config.differing or model.config.layer_input is not None:
        return False
    leaves = jax.tree.leaves(nnx.state(model.layers))
    if backend() != "cpu" or model.quantize != "none" or sum(leaf.nbytes for leaf in leaves) > COPIED:
        return False
    return all(isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) == 1 for leaf in leaves)


@jax.jit
def request_keys(key: jax.Array, numbers: jax.Array) -> jax.Array:
    """The keys of requests, `[B]` for their numbers `[B]`: whatever batch a request is in, its draws are the same."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)


def choose(logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array, greedy: bool) -> jax.Array:
    """Returns the next token of each row.

    Args:
        logits: float32 `[B, V]`.
        keys: for the draw of each row, `[B]`.
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
    in_nucleus = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
    lowest = jnp.min(jnp.where(in_nucleus, ordered, jnp.inf), axis=-1, keepdims=True)
    logits = jnp.where(logits >= lowest, logits, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _round_up(length: int, step: int = BUCKET) -> int:
    return -(-length // step) * step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for, the same for all tokens of some answers.

    Attributes:
        keys: `[B]`, of the draws of each answer.
        temperature, top_p, greedy: how tokens are drawn, see `choose`.
        stop_ids: int32 `[S]`, tokens that end an answer.
        adapter_ids: int32 `[B]`, which of several named adapters answers; None: the active one.
    """

    keys: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    stop_ids: jax.Array
    adapter_ids: jax.Array | None
    greedy: bool = dataclasses.field(metadata={"static": True})

    def draw(self, logits: jax.Array, step: jax.Array | int) -> jax.Array:
        """The token number `step` of each answer."""
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(self.keys, step)
        return choose(logits, keys, self.temperature, self.top_p, self.greedy)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
    """Answers so far.

    Attributes:
        made: int32 scalar, how many tokens of each answer are in `tokens` and in the cache.
        cache: of the prompts and those tokens.
        token: int32 `[B]`, the token after them.
        done: bool `[B]`, whether this is a stop token, comes after one or beyond the limit.
        tokens: int32 `[B, room]`: each row's answer, -1 from its stop token on.
        limits: int32 `[B]`, the most tokens of each answer.
    """

    made: jax.Array
    cache: Cache
    token: jax.Array
    done: jax.Array
    tokens: jax.Array
    limits: jax.Array

    def advanced(self, cache: Cache, logits: jax.Array, request: Request) -> Answers:
        """With `token` made and in the cache, and the next one drawn from its `logits [B, V]`."""
        tokens = self.tokens.at[:, self.made].set(jnp.where(self.done, -1, self.token))
        made = self.made + 1
        token = request.draw(logits, made)
        done = self.done | jnp.isin(token, request.stop_ids) | (made >= self.limits)
        return Answers(made, cache, token, done, tokens, self.limits)


def _one_more(programs: Any, arrays: Any, request: Request, answers: Answers) -> Answers:
    """The answers with one token more, by the programs of `_token_programs` and of layers apart; traced or called."""
    (enter, leave, layers), (leaves, head, table, states) = programs, arrays
    keys, values = list(answers.cache.keys), list(answers.cache.values)
    answers = _with_cache(answers, keys=(), values=())
    x, layout, answers = enter(leaves, table, answers, request.adapter_ids)
    for i, (layer, state) in enumerate(zip(layers, states, strict=True)):
        x, keys[i], values[i] = layer(state, x, keys[i], values[i], layout, answers.cache.length, request.adapter_ids)
    answers = leave(leaves, head, x, answers, request)
    return _with_cache(answers, keys=tuple(keys), values=tuple(values))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _proceed_apart(programs: Any, arrays: Any, request: Request, answers: Answers, until: jax.Array | int) -> Answers:
    """`_proceed` with layers apart, as one program."""
    one_more = functools.partial(_one_more, programs, arrays, request)
    return jax.lax.while_loop(functools.partial(_running, until), one_more, answers)


def _running(until: jax.Array | int, answers: Answers) -> jax.Array:
    return (answers.made < until) & ~jnp.all(answers.done)


def _with_cache(answers: Answers, **changes: Any) -> Answers:
    return dataclasses.replace(answers, cache=dataclasses.replace(answers.cache, **changes))


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _begin(graphdef: Any, state: Any, request: Request, padded: Any, room: int, apart: bool) -> Answers:
    """Reads prompts and draws the first tokens; `padded` are their ids and segments `[B, T]`, and the most tokens that
    each answer may have `[B]`."""
    ids, segments, limits = padded
    model = nnx.merge(graphdef, state)
    choose_rows(model, request.adapter_ids, len(ids))
    cache = model.init_cache(len(ids), _round_up(ids.shape[1]) + room)
    logits, cache = model.read(cache, ids, segment_ids=segments)
    token = request.draw(logits, 0)
    return Answers(
        made=jnp.int32(0),
        cache=cache.unstacked() if apart else cache,
        token=token,
        done=jnp.isin(token, request.stop_ids) | (limits == 0),
        tokens=jnp.full((len(ids), room), -1, jnp.int32),
        limits=limits,
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _proceed(graphdef: Any, state: Any, request: Request, answers: Answers, until: jax.Array | int) -> Answers:
    """The answers with `until` tokens made, or fewer where all are done."""
    model = nnx.merge(graphdef, state)
    choose_rows(model, request.adapter_ids, len(answers.token))
    head = model.head()

    def advance(answers: Answers) -> Answers:
        logits, cache = model.read(answers.cache, answers.token[:, None], head=head)
        return answers.advanced(cache, logits, request)

    return jax.lax.while_loop(functools.partial(_running, until), advance, answers)


@functools.lru_cache(maxsize=64)
def _token_programs(structure: Structure) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The compiled calls before and behind the layers of a token, on the arrays of a model."""

    @jax.jit
    def enter(
        leaves: Any, table: jax.Array | None, answers: Answers, adapter_ids: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any], Answers]:
        model = structure.merge(leaves)
        choose_rows(model, adapter_ids, len(answers.token))
        look_up = None if table is None else functools.partial(looked_up, table)
        x, layout, cache = model.enter(answers.cache, answers.token[:, None], look_up=look_up)
        return x, model.runner.shared(layout).arrays(), dataclasses.replace(answers, cache=cache)

    @jax.jit
    def leave(leaves: Any, head: Head | None, x: jax.Array, answers: Answers, request: Request) -> Answers:
        logits = structure.merge(leaves).leave(x, jnp.ones(x.shape[:2], jnp.int32), head)
        cache = dataclasses.replace(answers.cache, length=answers.cache.length + 1)
        return answers.advanced(cache, logits, request)

    return enter, leave


@functools.partial(jax.jit, static_argnums=0)
def _head(graphdef: Any, state: Any) -> Head:
    return nnx.merge(graphdef, state).head()
