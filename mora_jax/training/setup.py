"""From a configuration to everything that a training loop needs, checked before anything is written."""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from mora_jax.adapters.attach import AttachReport, adapters_of, attach, report_of, report_of_trained
from mora_jax.adapters.base import AdapterParam, FullParam
from mora_jax.data import BatchPlan, EncodedDataset, describe_example, split_rows
from mora_jax.data.inspect.report import CAUSES
from mora_jax.data.loss_weights import DIVISORS, LossWeights
from mora_jax.data.pipeline import BatchSource
from mora_jax.data.preferences import PreferenceDataset, refuse_preferences, split_preferences
from mora_jax.data.tokens.store import TokenStore
from mora_jax.errors import InputError, refused
from mora_jax.evaluation.tasks.run import NamedTask, read_tasks
from mora_jax.interop import load_adapter, load_pretrained
from mora_jax.interop.fingerprint import arrays_hash
from mora_jax.interop.hub import load_tokenizer
from mora_jax.interop.peft.save import refuse_tied_magnitude
from mora_jax.models.decoder import Decoder
from mora_jax.models.own import language_model
from mora_jax.training.adalora import reschedule
from mora_jax.training.config.load import check_warmup
from mora_jax.training.config.schema import METHOD_KEYS, Config, LossConfig, adapter_config
from mora_jax.training.display import RunInfo
from mora_jax.training.optimizer import check_named
from mora_jax.training.preferences import reference_of
from mora_jax.training.sharding.mesh import make_mesh, mesh_shape
from mora_jax.training.sharding.rules import base_shardings

#: From which share of padding on other ways are looked at, and on how many rows.
MUCH_PADDING = 0.4
PADDING_SAMPLE = 20_000


@dataclass(frozen=True)
class Setup:
    """A run, ready to start.

    Attributes:
        config: its configuration.
        model, tokenizer: the base with fresh (or loaded) adapters.
        attached: what is trained.
        train, evaluation: the encoded data; `evaluation` is None without evaluation data.
        plan: which examples make up which batch.
        mesh: the devices along `data`, `fsdp`, `tensor` and `context`.
        tasks: those that are evaluated with the evaluation data.
        loaded: whether the model was loaded for this run, and is as its files are.
        optimizer: of optax, in place of what the configuration names.
        start: the hash of the adapters that training goes on with, where they are part of a cached reference.
        method: the method with its settings, in a few words.
    """

    config: Config
    model: Any
    tokenizer: Any
    attached: AttachReport
    train: EncodedDataset | PreferenceDataset
    evaluation: EncodedDataset | PreferenceDataset | None
    plan: BatchPlan
    mesh: Mesh
    tasks: tuple[NamedTask, ...] = ()
    loaded: bool = True
    optimizer: Any = None
    start: str | None = None
    method: str = ""

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate on."""
        return self.evaluation is not None or bool(self.tasks)

    @property
    def micro_batch(self) -> int:
        """Rows computed at once."""
        return self.config.train.micro_batch

    @property
    def batches(self) -> BatchSource:
        """The batches by step."""
        loss = self.config.loss
        kind = {"response": "trained", "prompt": "prompt"}[loss.kl_tokens]
        extra = {"kl_weights": kind} if loss.kl_weight else None
        return BatchSource(self.train, self.plan, self.micro_batch, loss.divided_by, extra)

    @property
    def task_rows(self) -> str | None:
        """A digest of the tasks' rows; None without tasks."""
        ids = [f"{task.task.name} {one.id}" for task in self.tasks for one in task.examples]
        return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16] if ids else None

    def identity(self) -> dict[str, str]:
        """What all processes of a run must have alike, by what it is, in words."""
        packages = ("mora-jax", "jax", "jaxlib", "flax", "optax")
        versions = [[one.version for one in importlib.metadata.distributions(name=name)] for name in packages]
        return {
            "its configuration": json.dumps(self.config.to_dict(), sort_keys=True),
            "its versions": f"{versions}",
            "the number of its devices": f"{jax.local_device_count()}",
            "its training data": f"{self.train.fingerprint()} in {self.plan}",
            "its evaluation data": "" if self.evaluation is None else self.evaluation.fingerprint(),
            "its evaluation tasks": f"{self.task_rows}",
            "its base model": f"{language_model(self.model).config}",
        }

    def padding_advice(self) -> str | None:
        """What would leave less padding, where there is much: each way with the share that it would leave."""
        data, share = self.config.data, self.plan.padding(self.batches.length)
        if share < MUCH_PADDING:
            return None
        lengths = self.train.lengths
        if len(lengths) > PADDING_SAMPLE:
            lengths = np.random.default_rng(0).choice(lengths, PADDING_SAMPLE, replace=False)
        ways = {"bucketing": "", "packing": ", and train.batch_size would count packed rows"}
        advice = []
        for name, remark in ways.items():
            if data.packing or getattr(data, name):
                continue
            size, packing = self.config.train.batch_size, name == "packing"
            way: dict[str, Any] = {"max_length": data.max_length, "packing": packing, "bucketing": not packing}
            plan = BatchPlan(lengths, size, self.config.seed, **way)
            left = plan.padding(data.max_length if packing else self.train.batch_length)
            if left < share - 0.1:
                advice.append(f"--config.data.{name}=true would leave {left:.0%}{remark}")
        return f"{share:.0%} of the tokens are padding; {'; '.join(advice)}" if advice else None

    def info(self, first_step: int, out: str, attention: str) -> RunInfo:
        """What is shown before the first step.

        Args:
            first_step: steps that are done already.
            out: the run directory.
            attention: what computes attention, in words.
        """
        config, report, attached = self.config, self.train.report, self.attached
        model = language_model(self.model)
        matched = sum(match.layers for match in attached.matches)
        layers = f" on {matched:,} layers" if matched else ""
        stored = "" if model.quantize == "none" else f", layers held in {model.quantize}"
        padding, resumed = self.plan.padding(self.batches.length), f", continuing after step {first_step:,}"
        facts = {
            "model": f"{config.model.path} ({model.dtype.name}{stored}, attention by {attention})",
            "method": f"{self.method}{layers}",
            "trained": f"{attached.trainable:,} of {attached.total:,} parameters "
            f"({attached.trainable / attached.total:.2%})",
            "loss": f"{describe_loss(config.loss)}: {report.trained_fraction:.1%} of the tokens carry loss",
            "data": f"{len(self.train):,} examples, {self.plan.steps:,} steps, {padding:.1%} padding"
            f"{resumed if first_step else ''}",
            "out": out,
        }
        shown = describe_example(self.train[int(self.plan.indices(0)[0])], self.tokenizer)
        example = [(text, weight) for text, weight, _ in shown]
        return RunInfo(facts, self.plan.steps, first_step, example, self._notes(first_step))

    def _notes(self, first_step: int) -> list[str]:
        """Remarks, such as rows that were dropped."""
        report = self.train.report
        notes = [*report.notes, *self.attached.warnings]
        if report.dropped:
            causes = ", ".join(f"{CAUSES[cause]} ({count})" for cause, count in report.dropped.items())
            notes.append(f"{sum(report.dropped.values())} of {report.rows} rows dropped: {causes}")
        if report.truncated:
            notes.append(f"{report.truncated} rows were truncated to {self.train.max_length} tokens")
        if report.split:
            notes.append(f"{report.split} rows were split into examples of {self.train.max_length} tokens or fewer")
        if first_step == 0 and (advice := self.padding_advice()) is not None:
            notes.append(advice)
        sizes = dict(self.mesh.shape)
        rows = sizes["data"] * sizes["fsdp"] * sizes["expert"]
        if rows > 1:
            notes.append(f"{rows} devices share each micro-batch of {self.micro_batch} rows")
        if sizes["context"] > 1:
            notes.append(f"{sizes['context']} devices share each row along its length")
        copy = self.mesh.size // sizes.pop("data")
        if copy > 1:
            axes = " × ".join(f"{axis} {n}" for axis, n in sizes.items() if n > 1 or axis in ("fsdp", "tensor"))
            notes.append(f"{copy} devices hold one copy of the weights ({axes})")
        return notes


def describe_method(name: str, method: Any) -> str:
    """A method with its settings, in a few words."""
    kind = f" {method.kind}" if "kind" in METHOD_KEYS[name] else ""
    sizes = [f"{size} {getattr(method, size):g}" for size in ("rank", "alpha") if hasattr(method, size)]
    return ", ".join((f"{name}{kind}", *sizes, *method.details))


def describe_loss(loss: LossConfig) -> str:
    """What is minimised, in a few words."""
    tokens = f"{loss.weights.words}, divided by {DIVISORS[loss.divided_by]}"
    if loss.preference is None:
        return tokens
    objective = f"{loss.objective}, beta {loss.settings.beta:g}"
    objective += "" if loss.reference is None else f", reference {loss.reference}"
    return f"{objective}, SFT term {loss.sft_term:g} ({tokens})" if loss.sft_term else objective


@dataclass(frozen=True)
class InMemory:
    """What a program has in memory, in place of what the configuration names.

    Attributes:
        model: for `model.path`; one with adapters is trained as it is.
        tokenizer: for that of the model's folder.
        rows, eval_rows: dictionaries, for `data.train` and `data.eval`.
        optimizer: of optax, for the section `optimizer`.
    """

    model: nnx.Module | None = None
    tokenizer: Any = None
    rows: Any = None
    eval_rows: Any = None
    optimizer: Any = None


#: What a command has.
NOTHING_IN_MEMORY = InMemory()


DataSet = EncodedDataset | PreferenceDataset
Encode = Callable[[Config, Any, int, Any, Any], tuple[DataSet, DataSet | None]]


def load_base(config: Config, objects: InMemory = NOTHING_IN_MEMORY) -> tuple[Any, Any, Mesh]:
    """The model and its tokenizer, loaded or those given, and the mesh.

    Raises:
        InputError: they can't be loaded.
    """
    assert config.model.path is not None, "the configuration demands it"
    mesh = make_mesh(*mesh_shape(config.mesh, config.train.micro_batch))
    sharded = mesh.size > 1 and not config.mesh.pmap
    if objects.model is not None:
        model, tokenizer = objects.model, objects.tokenizer
        check_own(model, config)
        folder = getattr(model, "folder", None)
        if tokenizer is None and folder is not None:
            tokenizer = load_tokenizer(Path(folder))
            added = getattr(model, "added_tokens", ())
            known = added if tokenizer is None else tokenizer.get_vocab()
            if missing := [token for token in added if token not in known]:
                raise InputError(
                    f"the model has the added token {missing[0]!r}, which the tokenizer in {folder} would split: give "
                    "the one that was grown by tokenizer="
                )
    else:
        model, tokenizer = load_pretrained(
            config.model.path,
            dtype=config.model.dtype,
            remat=config.model.remat,
            quantize=config.model.quantize,
            attention=config.model.attention,
            shardings=partial(base_shardings, mesh) if sharded else None,
        )
        tokenizer = tokenizer if objects.tokenizer is None else objects.tokenizer
    if tokenizer is None:
        raise InputError(
            f"{config.model.path} has no tokenizer files; training on text needs them there, or tokenizer="
        )
    return model, tokenizer, mesh


def check_own(model: nnx.Module, config: Config) -> None:
    """Refuses what is asked of a user's own model and needs the decoder's parts.

    Raises:
        InputError: names the key.
    """
    if isinstance(model, Decoder):
        return
    mesh = config.mesh
    impossible = {
        f"mesh.tensor={mesh.tensor} shares matrices by the names of their axes": mesh.tensor != 1,
        f"mesh.context={mesh.context} shares rows along their length": mesh.context != 1,
        f"mesh.expert={mesh.expert} shares experts out": mesh.expert != 1,
        "train.neftune_alpha adds noise to embeddings": config.train.neftune_alpha,
    }
    for why, is_so in impossible.items():
        if is_so:
            raise InputError(f"config: {why}, which only a model of load_pretrained has; leave it out")


def prepare(config: Config, objects: InMemory = NOTHING_IN_MEMORY, encode: Encode | None = None) -> Setup:
    """Loads, encodes, attaches and checks; writes nothing.

    Args:
        config: the whole run.
        objects: what is in memory already.
        encode: in place of `encode_data`.

    Raises:
        InputError: whatever the user has to fix, in one line.
    """
    if objects.optimizer is None:
        check_named(config.optimizer)
    tasks = read_tasks(config.train.eval_tasks or (), "train.eval_tasks", config.train.eval_tasks_limit)
    model, tokenizer, mesh = load_base(config, objects)
    encode = encode_data if encode is None else encode
    vocab_size = language_model(model).config.vocab_size
    train, evaluation = encode(config, tokenizer, vocab_size, objects.rows, objects.eval_rows)
    plan = BatchPlan(
        train.lengths,
        config.train.batch_size,
        config.seed,
        steps=config.train.steps,
        epochs=config.train.epochs,
        max_length=config.data.max_length,
        packing=config.data.packing,
        bucketing=config.data.bucketing,
    )
    check_warmup(config, plan.steps)
    given = objects.model is not None and bool(jax.tree.leaves(nnx.state(model, AdapterParam)))
    if given:
        with refused("adapter"):
            reschedule(model, config.adapter, plan.steps)
        attached = report_of_trained(model)
    else:
        attached = put_adapter(model, config, plan.steps)
    if config.loss.kl_weight and jax.tree.leaves(nnx.state(model, FullParam)):
        raise InputError("config: loss.kl_weight needs a frozen base: train no biases and no adapter.modules_to_save")
    if config.loss.balance_weight and (not isinstance(model, Decoder) or model.config.experts is None):
        raise InputError("config: loss.balance_weight is of models with experts, and this one has none; set it to 0")
    reference = reference_of(config, model, given=given)
    config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, reference=reference))
    loaded, goes_on = objects.model is None, given or config.adapter.path is not None
    start = arrays_hash(model, AdapterParam) if reference == "cached" and goes_on else None
    # An adapter that training goes on with has settings of its own; entries that train biases alone stand beside it.
    held = [] if config.adapter.config_class.changes_base or not goes_on else [e.config for e in adapters_of(model)]
    settings = min(held, key=lambda each: each.biases_alone, default=adapter_config(config.adapter))
    method = describe_method(config.adapter.method, settings)
    parts = model, tokenizer, attached, train, evaluation, plan, mesh, tasks, loaded, objects.optimizer, start, method
    return Setup(config, *parts)


def put_adapter(model: nnx.Module, config: Config, steps: int) -> AttachReport:
    """Attaches what the configuration asks for, or loads the adapter that it starts from.

    Args:
        model: without adapters.
        config: the whole run.
        steps: of the run, for methods with a schedule.
    """
    section = config.adapter
    with refused("adapter"):
        method = adapter_config(section, steps)
        if section.path is None or section.config_class.changes_base:
            report = attach(model, method, rngs=nnx.Rngs(config.seed))
            refuse_tied_magnitude(model)
            return report
        load_adapter(model, section.path, strict=section.strict, method=method)
        reschedule(model, section, steps)
    entries = list(adapters_of(model))
    main = [entry for entry in entries if not entry.config.biases_alone]  # others train biases beside an adapter
    held = (main or entries)[0].method
    if held != section.method:
        raise InputError(
            f"{section.path} holds a {held} adapter, but adapter.method is {section.method}; set adapter.method={held}"
        )
    return report_of(model)


def encode_data(
    config: Config, tokenizer: Any, vocab_size: int, rows_given: Any = None, eval_rows: Any = None
) -> tuple[DataSet, DataSet | None]:
    """Training and evaluation data as tokens with weights.

    Evaluation always scores responses (the masked loss), so that runs of different loss modes compare; of preferences
    by their objective.

    Args:
        config: the whole run.
        tokenizer: of the model.
        vocab_size: the model's number of ids.
        rows_given: in place of what `data.train` names; None: read that.
        eval_rows: the same for `data.eval`.
    """
    data = config.data
    store = data.source(rows_given if rows_given is not None else data.train or (), data.split).load(tokenizer)
    rows, held_out, held_out_store = None, None, store
    if data.eval is not None:
        held_out_store = data.source(data.eval if eval_rows is None else eval_rows, data.eval_split).load(tokenizer)
    elif data.eval_fraction > 0:
        if config.loss.preference is None:
            rows, held_out = split_rows(len(store), data.eval_fraction, config.seed)
        else:
            rows, held_out = split_preferences(store, data.eval_fraction, config.seed)
    settings: dict[str, Any] = {
        "max_length": data.max_length,
        "truncation": data.truncation,
        "vocab_size": vocab_size,
        "special_ids": tokenizer.all_special_ids,
    }
    objective = config.loss.preference
    for one in (store, held_out_store) if objective is None else ():
        refuse_preferences(one)

    def dataset(store: TokenStore, loss: LossWeights, rows: Any) -> DataSet:
        encoded = EncodedDataset(store, loss, rows=rows, **settings)
        if objective is None:
            return encoded
        return PreferenceDataset(encoded, labelled=objective.labelled, packing=data.packing)

    train = dataset(store, config.loss.weights, rows)
    if data.eval is None and held_out is None:
        return train, None
    return train, dataset(held_out_store, LossWeights(), held_out)
