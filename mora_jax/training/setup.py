"""From a configuration to everything that a training loop needs, checked before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flax import nnx

from mora_jax.adapters.attach import AttachReport, adapters_of, attach, report_of
from mora_jax.adapters.config import FullConfig, LoRAConfig, MoRAConfig
from mora_jax.data import BatchPlan, EncodedDataset, describe_example, load_rows, split_rows
from mora_jax.errors import InputError
from mora_jax.interop import load_adapter, load_pretrained
from mora_jax.models.decoder import Decoder
from mora_jax.training.config import AdapterConfig, Config, check_warmup
from mora_jax.training.display import RunInfo
from mora_jax.training.sharding import device_count


@dataclass(frozen=True)
class Setup:
    """A run, ready to start.

    Attributes:
        config: its configuration.
        model, tokenizer: the base with fresh (or loaded) adapters.
        attached: what is trained.
        train, evaluation: the encoded data; `evaluation` is None without evaluation data.
        plan: which examples make up which batch.
        devices: how many share a micro-batch.
    """

    config: Config
    model: Decoder
    tokenizer: Any
    attached: AttachReport
    train: EncodedDataset
    evaluation: EncodedDataset | None
    plan: BatchPlan
    devices: int

    @property
    def micro_batch(self) -> int:
        """Rows computed at once."""
        return self.config.train.micro_batch_size or self.config.train.batch_size

    @property
    def dropout(self) -> bool:
        return any(entry.config.dropout > 0 for entry in adapters_of(self.model))

    def info(self, first_step: int) -> RunInfo:
        """What is shown before the first step."""
        config, report = self.config, self.train.report
        notes = [*report.notes, *self.attached.warnings]
        if report.dropped:
            causes = ", ".join(f"{count} {cause.replace('_', ' ')}" for cause, count in report.dropped.items())
            notes.append(f"{report.rows - report.kept} of {report.rows} rows dropped: {causes}")
        if report.truncated:
            notes.append(f"{report.truncated} examples were cut to {self.train.max_length} tokens")
        if self.devices > 1:
            notes.append(f"{self.devices} devices share each micro-batch of {self.micro_batch} rows")
        shown = describe_example(self.train[int(self.plan.indices(0)[0])], self.tokenizer)
        return RunInfo(
            model=str(config.model.path),
            dtype=self.model.dtype.name,
            method=describe_method(config.adapter),
            matched=sum(match.layers for match in self.attached.matches),
            trainable=self.attached.trainable,
            total=self.attached.total,
            loss_mode=describe_mode(config),
            trained_fraction=report.trained_fraction,
            examples=len(self.train),
            steps=self.plan.steps,
            first_step=first_step,
            out=str(config.out),
            first_example=[(text, weight) for text, weight, _ in shown],
            notes=notes,
        )


def describe_method(config: AdapterConfig) -> str:
    """The method with its settings, in a few words."""
    if config.method == "lora":
        return f"lora, rank {config.rank}, alpha {config.alpha:g}"
    if config.method == "mora":
        return f"mora {config.kind}, rank {config.rank}"
    return config.method


def describe_mode(config: Config) -> str:
    """The loss mode with its weight where it has one."""
    if config.loss.mode == "weighted":
        return f"weighted (prompt {config.loss.prompt_weight:g})"
    return config.loss.mode


def adapter_config(config: AdapterConfig) -> LoRAConfig | MoRAConfig | FullConfig:
    """The section `adapter` as the method's own configuration."""
    if config.method == "lora":
        return LoRAConfig(config.rank, config.alpha, config.dropout, config.targets)
    if config.method == "mora":
        return MoRAConfig(config.rank, config.kind, config.dropout, config.targets)
    return FullConfig()


def prepare(config: Config) -> Setup:
    """Loads, encodes, attaches and checks; writes nothing.

    Raises:
        InputError: whatever the user has to mend, in one line.
    """
    assert config.model.path is not None, "the configuration demands it"
    model, tokenizer = load_pretrained(
        config.model.path, dtype=config.model.dtype, unroll=config.model.unroll, remat=config.model.remat
    )
    if tokenizer is None:
        raise InputError(
            f"{config.model.path} has no tokenizer files; training on text needs them in the model's folder"
        )
    train, evaluation = encode_data(config, tokenizer, model.config.vocab_size)
    attached = put_adapter(model, config)
    plan = BatchPlan(
        len(train), config.train.batch_size, config.seed, steps=config.train.steps, epochs=config.train.epochs
    )
    check_warmup(config, plan.steps)
    devices = device_count(config.mesh, config.train.micro_batch_size or config.train.batch_size)
    return Setup(config, model, tokenizer, attached, train, evaluation, plan, devices)


def put_adapter(model: Decoder, config: Config) -> AttachReport:
    """Attaches what the configuration asks for, or loads the adapter that it starts from."""
    section = config.adapter
    try:
        if section.path is None or section.method == "full":
            return attach(model, adapter_config(section), rngs=nnx.Rngs(config.seed))
        load_adapter(model, section.path)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"adapter: {error}") from None
    entries = list(adapters_of(model))
    if entries[0].method != section.method:
        raise InputError(
            f"{section.path} holds a {entries[0].method} adapter, but adapter.method is {section.method}; "
            f"set adapter.method={entries[0].method}"
        )
    return report_of(model)


def encode_data(config: Config, tokenizer: Any, vocab_size: int) -> tuple[EncodedDataset, EncodedDataset | None]:
    """Training and evaluation data as tokens with weights.

    Evaluation always scores responses (the masked loss), so that runs of different loss modes compare.
    """
    section, mode = config.data, config.loss
    rows = load_rows(section.train or (), section.format)
    held_out = None
    if section.eval is not None:
        held_out = load_rows(section.eval, section.format)
    elif section.eval_fraction > 0:
        rows, held_out = split_rows(rows, section.eval_fraction, config.seed)
    shared: dict[str, Any] = {
        "template": section.template,
        "max_length": section.max_length,
        "truncation": section.truncation,
        "vocab_size": vocab_size,
    }
    weight = mode.prompt_weight if mode.mode == "weighted" else 0.0
    train = EncodedDataset.build(rows, tokenizer, mode=mode.mode, prompt_weight=weight, **shared)
    evaluation = None
    if held_out is not None:
        evaluation = EncodedDataset.build(held_out, tokenizer, mode="masked", **shared)
    return train, evaluation
