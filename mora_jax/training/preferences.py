"""Preference losses in the training step: both answers of an example in one batch, the reference beside them.

Metrics of a step, means over its examples: `margin` and `reward_accuracy` of the rewards (β · log-ratio), the
log-probabilities `chosen_logp` and `rejected_logp` of answers, in nats, and where the reference runs in the step `kl`,
the divergence from it in nats a token, over the tokens of the answers. With labels the chosen answers are the wanted
ones, and `reference_point` is KTO's estimate over the step.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from mora_jax.adapters.base import FullParam
from mora_jax.errors import InputError
from mora_jax.losses.cross_entropy import next_token_targets
from mora_jax.losses.preference import Answers, Objective, Settings, example_metrics
from mora_jax.losses.token_nll import TokenNLL, token_nll
from mora_jax.training.config.schema import Config, adapter_config
from mora_jax.training.state import Arrays, Structure
from mora_jax.training.step import Keys, StepConfig, head_inputs, inverse, row_numbers


class PreferenceRows(NamedTuple):
    """The rows of a micro-batch: `[S · B, T]`, S sequences of each row's examples following each other.

    Attributes:
        input_ids, segment_ids, positions, targets: int `[S · B, T]`.
        answer_weights: float32 `[S · B, T]`, of each token in the log-probability of its answer, by target.
        sft_weights: the same, of the SFT term, divided by its normaliser.
        kl_weights: `answer_weights`, divided by their sum over the step.
        shares: `[B, K]`, what each example counts, divided by the sum over the step.
        chosen_shares, rejected_shares: the same among examples with such an answer.
        desired: `[B, K]`, see `PreferenceBatch`.
        reference: `[B, S, K]`, log-probabilities under the reference; None where it runs in the step.
        numbers: int `[S · B]`, of each row in the step; None where nothing is random.
        reference_point: scalar, KTO's; None without.
    """

    input_ids: Array
    segment_ids: Array
    positions: Array
    targets: Array
    answer_weights: Array
    sft_weights: Array
    kl_weights: Array
    shares: Array
    chosen_shares: Array
    rejected_shares: Array
    desired: Array
    reference: Array | None
    numbers: Array | None
    reference_point: Array | None = None


@dataclass(frozen=True)
class PreferenceLoss:
    """A preference objective as what a step minimises.

    Attributes:
        objective, settings: which one, and its numbers.
        sft_weight: of the weighted loss of the chosen answers, added to it.
        base: the model without its adapters, where that is the reference and runs in the step; None where the batch
            brings the reference's log-probabilities, or there is no reference.
    """

    objective: Objective
    settings: Settings
    sft_weight: float = 0.0
    base: Structure | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the metrics."""
        names: tuple[str, ...] = ("margin", "reward_accuracy", "chosen_logp", "rejected_logp")
        names += ("reference_point",) if self.objective.labelled else ()
        return names if self.base is None else (*names, "kl")

    def rows(
        self, config: StepConfig, structure: Structure, adapters: Arrays, frozen: Arrays, batch: Any
    ) -> tuple[PreferenceRows, Array, Array]:
        """See `StepLoss`; KTO's reference point is estimated here, for it is of the whole step."""
        examples = config.total(jnp.sum(batch["example_weights"]))
        if not self.objective.labelled:
            rows = self._rows(config, batch, slice(0, 2), examples)
        else:
            other = self._rows(config, batch, slice(1, 2), examples)

            def add_rows(total: Array, rows: PreferenceRows) -> tuple[Array, None]:
                answers, _ = self._answers(config, structure.model(adapters, frozen), frozen, rows, Keys(None, None))
                return total + jnp.sum(rows.shares * answers.ratio[:, 0]), None

            zero = jnp.zeros((), jnp.float32)
            if len(other.input_ids) == 1:
                mean, _ = add_rows(zero, jax.tree.map(lambda array: array[0], other))
            else:
                mean, _ = jax.lax.scan(add_rows, zero, other)
            point = jax.lax.stop_gradient(jnp.maximum(config.total(mean), 0.0))
            rows = self._rows(config, batch, slice(0, 1), examples)
            rows = rows._replace(reference_point=jnp.broadcast_to(point, len(rows.input_ids)))
        return rows, examples, config.total(jnp.sum(rows.answer_weights > 0))

    def _rows(self, config: StepConfig, batch: Any, sequences: slice, examples: Array) -> PreferenceRows:
        """Some of the sequences of all micro-batches."""

        def flat(name: str) -> Array:
            values = batch[name][:, :, sequences]
            return values.reshape(len(values), -1, values.shape[-1])

        ids, segments = flat("input_ids"), flat("segment_ids")
        targets, answers = next_token_targets(ids, flat("answer_weights"), segments)
        _, weights = next_token_targets(ids, flat("weights"), segments)
        shares, desired = batch["example_weights"], batch["desired"]
        paired = not self.objective.labelled
        wanted = shares if paired else shares * desired
        unwanted = shares if paired else shares - wanted
        reference = batch.get("reference_logps")
        return PreferenceRows(
            ids,
            segments,
            flat("positions"),
            targets,
            answers,
            weights * inverse(config.normalizer(batch["counts"])),
            answers * inverse(config.total(jnp.sum(answers))),
            shares * inverse(examples),
            # Undefined where there is no such answer in the whole step.
            wanted / config.total(jnp.sum(wanted)),
            unwanted / config.total(jnp.sum(unwanted)),
            desired,
            None if reference is None else reference[:, :, sequences],
            row_numbers(config, *ids.shape[:2]),
        )

    def __call__(
        self, config: StepConfig, model: Any, frozen: Arrays, rows: PreferenceRows, keys: Keys
    ) -> tuple[Array, dict[str, Array]]:
        answers, tokens = self._answers(config, model, frozen, rows, keys)
        loss = jnp.sum(jnp.where(rows.shares > 0, rows.shares * self.objective.loss(answers, self.settings), 0.0))
        if self.sft_weight:
            loss += self.sft_weight * jnp.sum(rows.sft_weights * tokens.nll)
        values = example_metrics(jax.lax.stop_gradient(answers), self.settings)
        other = values.get("other_logp", values["logp"]), values.get("other_reward", values["reward"])
        chosen, rejected = rows.chosen_shares, rows.rejected_shares
        metrics = {
            "margin": jnp.sum(chosen * values["reward"]) - jnp.sum(rejected * other[1]),
            "reward_accuracy": jnp.sum(rows.shares * values["right"]),
            "chosen_logp": jnp.sum(chosen * values["logp"]),
            "rejected_logp": jnp.sum(rejected * other[0]),
        }
        if rows.reference_point is not None:
            metrics["reference_point"] = rows.reference_point * jnp.sum(rows.shares)
        if tokens.kl is not None:
            metrics["kl"] = jnp.sum(rows.kl_weights * tokens.kl)
        return loss, metrics

    def _answers(
        self, config: StepConfig, model: Any, frozen: Arrays, rows: PreferenceRows, keys: Keys
    ) -> tuple[Answers, TokenNLL]:
        """The log-probabilities of the answers of one micro-batch, and what their tokens cost."""
        states, head, _ = head_inputs(config, model, rows, keys)
        fold = config.partitioner.fold if config.partitioner is not None else lambda x: x
        base = None
        if self.base is not None:
            base_states, base_head, _ = head_inputs(config, self.base.model(frozen), rows, Keys(None, None))
            base = fold(base_states), (base_head if getattr(model, "has_adapted_head", False) else head).kernel
        counted = (rows.answer_weights > 0) | (rows.sft_weights > 0)
        marks = fold(counted.astype(jnp.float32))
        shards = config.token_shards(len(states))
        tokens = token_nll(
            fold(states), head.kernel, fold(rows.targets), marks, base=base, softcap=head.softcap, shards=shards
        )
        if config.partitioner is not None:
            unfold = config.partitioner.unfold
            tokens = jax.tree.map(lambda array: unfold(array, *rows.targets.shape), tokens)
        examples, per_row = rows.shares.shape
        numbers = jnp.arange(len(rows.targets))[:, None] * per_row + jnp.maximum(rows.segment_ids - 1, 0)

        def by_answer(values: Array) -> Array:
            sums = jnp.zeros(len(rows.targets) * per_row, jnp.float32).at[numbers].add(values)
            return sums.reshape(examples, -1, per_row)

        reference = rows.reference
        if tokens.base_nll is not None:
            reference = by_answer(-rows.answer_weights * tokens.base_nll)
        logp, length = by_answer(-rows.answer_weights * tokens.nll), by_answer(rows.answer_weights)
        return Answers(logp, reference, length, rows.desired, rows.reference_point), tokens


def reference_of(config: Config, model: nnx.Module, *, given: bool = False) -> str | None:
    """Where the reference of a run comes from: `base` or `cached`; None for an objective without one.

    Args:
        config: the whole run.
        model: with its adapters; its arrays may be shapes alone.
        given: whether it came with adapters that training goes on with.

    Raises:
        InputError: the model without adapters is asked for, and training begins from another.
    """
    objective, asked = config.loss.preference, config.loss.reference
    if objective is None or not objective.referenced:
        return None
    reason = _why_not_base(config, model, given)
    if asked == "base" and reason is not None:
        raise InputError(
            f"config: loss.reference=base is the model without adapters, and {reason}, so that training begins from "
            "another; set loss.reference=cached"
        )
    return asked or ("base" if reason is None else "cached")


def _why_not_base(config: Config, model: nnx.Module, given: bool) -> str | None:
    """Why the model without adapters is not what training began from, or doesn't stay so; None where it is."""
    section = config.adapter
    if section.config_class.changes_base:
        return f"adapter.method={section.method} changes the base"
    if section.path is not None:
        return f"the run starts from the adapter {section.path}"
    if given:
        return "the run starts from the model's adapters"
    if adapter_config(section).starts_from_base:
        return f"adapter.init={section.init} moves a part of the base into the adapter"
    if jax.tree.leaves(nnx.state(model, FullParam)):
        return "modules of the base itself are trained (adapter.modules_to_save)"
    return None
