"""Preferences scored: log-probabilities of answers, and the metrics of their objective with standard errors."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mora_jax.adapters.attach import detach
from mora_jax.data.conversation import Side
from mora_jax.data.preferences import PreferenceDataset
from mora_jax.evaluation.metrics.estimate import Estimate, Ratio
from mora_jax.evaluation.perplexity import batches
from mora_jax.losses.cross_entropy import next_token_targets
from mora_jax.losses.preference import Answers, Objective, Settings, example_metrics
from mora_jax.losses.token_nll import token_nll
from mora_jax.models.decoder import Decoder
from mora_jax.models.own import language_model
from mora_jax.models.partitioning import Partitioner


class AnswerScores(NamedTuple):
    """What both answers of each example are given, float32 `[N, 2]`.

    Attributes:
        logp: log-probability, in nats.
        length: the sum of the weights of the tokens.
        reference: log-probability under the base; None where that wasn't run.
        kl: the sum over tokens of the divergence from the base; None likewise.
    """

    logp: np.ndarray
    length: np.ndarray
    reference: np.ndarray | None = None
    kl: np.ndarray | None = None


def answer_scores(
    model: Decoder,
    dataset: PreferenceDataset,
    *,
    batch_size: int = 8,
    base: bool = False,
    partitioner: Partitioner | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> AnswerScores:
    """Log-probabilities of all answers; dropout is off.

    Args:
        model: a decoder, with or without adapters.
        dataset: examples of preferences.
        batch_size: examples computed at once.
        base: whether the model without its adapters is run beside it.
        partitioner: how the model's arrays are laid over devices.
        progress: called with (examples done, all examples) after each batch.
    """
    graphdef, state = nnx.split(model)
    base_graphdef = base_state = None
    if base:
        bare = nnx.merge(graphdef, state)
        detach(bare)
        base_graphdef, base_state = nnx.split(bare)
    sums = np.zeros((4, len(dataset), 2), np.float32)
    done = 0
    for rows, length in batches(dataset.lengths, batch_size, dataset.max_length):
        batch = dataset.batch(rows, batch_size, length)
        arrays = {name: batch[name] for name in ("input_ids", "segment_ids", "positions", "answer_weights")}
        scores = _score(graphdef, base_graphdef, partitioner, state, base_state, arrays)
        sums[: len(scores), rows] = np.asarray(jax.device_get(scores))[:, : len(rows)]
        done += len(rows)
        if progress is not None:
            progress(done, len(dataset))
    return AnswerScores(*sums) if base else AnswerScores(*sums[:2])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _score(
    graphdef: Any, base_graphdef: Any, partitioner: Partitioner | None, state: Any, base_state: Any, batch: Any
) -> jax.Array:
    """The sums over each answer of `AnswerScores`, `[2 or 4, B, 2]`, on every device."""
    rows = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}
    inputs = rows["input_ids"], rows["segment_ids"], rows["positions"]
    targets, weights = next_token_targets(rows["input_ids"], rows["answer_weights"], rows["segment_ids"])

    def states_and_kernel(model: Any) -> Any:
        model = language_model(model)
        hidden = model.forward(*inputs, partitioner=partitioner, packed=False)
        return hidden if partitioner is None else partitioner.rows(hidden), model.head(partitioner)

    hidden, head = states_and_kernel(nnx.merge(graphdef, state))
    base = None
    if base_graphdef is not None:
        base_hidden, base_head = states_and_kernel(nnx.merge(base_graphdef, base_state))
        base = base_hidden, base_head.kernel
    shards = 1 if partitioner is None or len(targets) % partitioner.row_shards else partitioner.row_shards
    tokens = token_nll(hidden, head.kernel, targets, weights, base=base, softcap=head.softcap, shards=shards)
    values = [-weights * tokens.nll, weights]
    if tokens.base_nll is not None and tokens.kl is not None:
        values += [-weights * tokens.base_nll, weights * tokens.kl]
    sums = jnp.stack([jnp.sum(value, axis=-1) for value in values]).reshape(len(values), -1, 2)
    replicated = None if partitioner is None else partitioner.used((None, None, None), sums.shape)
    return sums if replicated is None else jax.lax.with_sharding_constraint(sums, replicated)


def preference_metrics(
    dataset: PreferenceDataset, scores: AnswerScores, objective: Objective, settings: Settings
) -> dict[str, Estimate]:
    """The metrics of an objective over a data set, each example by its weight.

    Args:
        dataset: the examples.
        scores: of the model; the reference is theirs, or that of the data set.
        objective, settings: which, and its numbers.

    Returns:
        `loss` (without an SFT term), `margin`, `reward_accuracy`, `chosen_logp`, `rejected_logp`, and where the base
        was run `kl`, in nats a token. With labels the chosen answers are the wanted ones, and kinds that do not occur
        are left out.
    """
    reference = None
    if objective.referenced:
        reference = dataset.reference if scores.reference is None else scores.reference
        assert reference is not None, "the base is run where the data set brings no reference"
    first = [dataset[i] for i in range(len(dataset))]
    weights = np.array([example.weight for example in first])
    desired = np.array([example.side in (Side.CHOSEN, Side.DESIRED) for example in first])
    used = slice(0, 1 if objective.labelled else 2)
    logp, length = (array[:, used, None] for array in (scores.logp, scores.length))
    point = None
    if objective.labelled and reference is not None:
        point = max(0.0, float(np.average(scores.logp[:, 1] - reference[:, 1], weights=weights)))
    of_reference = None if reference is None else jnp.asarray(reference[:, used, None])
    arrays = jnp.asarray(logp), of_reference, jnp.asarray(length), jnp.asarray(desired[:, None], jnp.float32)
    answers = Answers(*arrays, None if point is None else jnp.float32(point))
    values = {name: np.asarray(value)[:, 0] for name, value in example_metrics(answers, settings).items()}
    values["loss"] = np.asarray(objective.loss(answers, settings))[:, 0]

    def mean(values: np.ndarray, by: np.ndarray = weights, chosen: np.ndarray | slice = slice(None)) -> Estimate:
        pairs = zip((values * by)[chosen].tolist(), by[chosen].tolist(), strict=True)
        return Ratio("", "value", "weight")([{"value": value, "weight": weight} for value, weight in pairs])

    metrics = {"loss": mean(values["loss"]), "reward_accuracy": mean(values["right"])}
    if not objective.labelled:
        metrics |= {"margin": mean(values["reward"] - values["other_reward"])}
        metrics |= {"chosen_logp": mean(values["logp"]), "rejected_logp": mean(values["other_logp"])}
    else:
        sides = {name: chosen for name, chosen in (("chosen", desired), ("rejected", ~desired)) if chosen.any()}
        metrics |= {f"{name}_logp": mean(values["logp"], chosen=chosen) for name, chosen in sides.items()}
        if len(sides) == 2:
            one, other = (mean(values["reward"], chosen=chosen) for chosen in sides.values())
            error = None if None in (one.stderr, other.stderr) else math.hypot(one.stderr or 0, other.stderr or 0)
            metrics["margin"] = Estimate(one.value - other.value, error, len(first))
    if scores.kl is not None:
        tokens = scores.length[:, used].sum(axis=1)
        metrics["kl"] = mean(scores.kl[:, used].sum(axis=1) / tokens, by=tokens)
    return metrics
