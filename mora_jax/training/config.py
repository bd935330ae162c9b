"""The configuration of a training run: every key, with its type, default and range.

`Config` is what the code reads; `configs/*.py` and `--config.section.key=value` (config_file.py) fill it.
"""

import dataclasses
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mora_jax.errors import InputError
from mora_jax.training.config_key import Key, key, nearest

KINDS = ("sharing", "rotation", "grouped", "grouped_tile", "strided_interleave", "decouple", "truncation")
# Repeated from mora_jax.adapters and mora_jax.data, which import too much for a command's --help; a test compares.
FORMATS = ("alpaca", "messages", "sharegpt", "prompt_completion", "self_instruct", "question_answer", "text")
TEMPLATES = ("tokenizer", "alpaca", "plain", "chatml", "llama3", "tulu", "zephyr", "phi3", "gemma")
# The keys of the section `adapter` that each method reads.
METHOD_KEYS: Mapping[str, frozenset[str]] = {
    "lora": frozenset({"rank", "alpha", "dropout", "targets", "path"}),
    "mora": frozenset({"rank", "kind", "dropout", "targets", "path"}),
    "full": frozenset(),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Section `model`: the base model and how it is computed."""

    path: str | None = key(None, "Base model: a HuggingFace folder or a hub id. Required.")
    dtype: str | None = key(
        None,
        "Compute dtype and storage of frozen weights; none chooses by machine.",
        choices=("float32", "bfloat16"),
    )
    unroll: int | None = key(
        None, "Layers unrolled in one step of the layer scan; none chooses by backend.", at_least=1
    )
    remat: str = key("none", "What the backward pass computes again to save memory.", choices=("none", "dots", "full"))


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Section `adapter`: what is trained."""

    method: str = key("lora", "The fine-tuning method.", choices=tuple(METHOD_KEYS))
    rank: int = key(8, "LoRA rank r; MoRA gets the square matrix with about as many parameters.", at_least=1)
    alpha: float = key(16.0, "LoRA scaling: the update is multiplied by alpha / rank.", above=0)
    dropout: float = key(0.0, "Dropout on the adapter's input.", at_least=0, below=1)
    targets: str | tuple[str, ...] = key(
        "all-linear", "Layers to adapt: a list of names, one regex for the whole path, or all-linear."
    )
    kind: str = key("sharing", "How MoRA compresses and decompresses.", choices=KINDS)
    path: str | None = key(None, "An adapter folder to start from; it says rank, targets and the rest.")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Section `data`: the examples."""

    train: tuple[str, ...] | None = key(None, "Training file or files. Required.")
    eval: tuple[str, ...] | None = key(None, "Evaluation file or files.")
    eval_fraction: float = key(
        0.0, "Share of the training rows to hold out when data.eval isn't set.", at_least=0, below=1
    )
    format: str | None = key(
        None,
        "File format; none recognises it.",
        choices=FORMATS,
    )
    template: str | None = key(
        None,
        "Chat template; none takes the tokenizer's own, or alpaca where it has none.",
        choices=TEMPLATES,
    )
    max_length: int = key(512, "Longest example in tokens.", at_least=2)
    truncation: str = key("right", "What happens to longer examples.", choices=("right", "drop"))


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Section `loss`: which tokens carry loss."""

    mode: str = key(
        "masked",
        "masked: responses; unmasked: instructions too; full: every token; weighted: see prompt_weight.",
        choices=("masked", "unmasked", "full", "weighted"),
    )
    prompt_weight: float = key(0.1, "Weight of instruction tokens in mode weighted.", at_least=0, at_most=1)
    normalize: str = key(
        "token", "The loss is divided by the sum of the weights of the whole step.", choices=("token",)
    )


@dataclasses.dataclass(frozen=True)
class TrainSection:
    """Section `train`: how long, how many rows, and what is written when."""

    steps: int | None = key(None, "Optimiser steps; wins over epochs.", at_least=1)
    epochs: int = key(1, "Passes over the data when steps isn't set.", at_least=1)
    batch_size: int = key(4, "Rows an optimiser step, over all devices.", at_least=1)
    micro_batch_size: int | None = key(
        None, "Rows computed at once; divides batch_size; none means batch_size.", at_least=1
    )
    log_every: int = key(1, "Steps between logged rows.", at_least=1)
    eval_every: int = key(0, "Steps between evaluations; 0: only at the end.", at_least=0)
    save_every: int = key(0, "Steps between checkpoints; 0: none.", at_least=0)
    keep: int = key(2, "Checkpoints kept.", at_least=1)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Section `optimizer`."""

    name: str = key("adamw", "The optimizer.", choices=("adamw",))
    learning_rate: float = key(2e-4, "Peak learning rate.", above=0, at_most=10)
    schedule: str = key(
        "linear", "Course of the learning rate after warm-up.", choices=("constant", "linear", "cosine")
    )
    warmup_steps: int = key(0, "Steps over which the learning rate rises; at most the run's steps.", at_least=0)
    weight_decay: float = key(0.0, "Decoupled weight decay.", at_least=0)
    clip_norm: float | None = key(1.0, "Largest global gradient norm; none: no clipping.", above=0)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Section `mesh`: how the devices are used. Only data parallelism so far."""

    data: int = key(-1, "Devices along the data axis; -1: all of them.", at_least=1, extra=-1)
    fsdp: int = key(1, "Devices along the fsdp axis.", choices=(1,))
    tensor: int = key(1, "Devices along the tensor axis.", choices=(1,))
    context: int = key(1, "Devices along the context axis.", choices=(1,))
    pmap: bool = key(False, "Use jax.pmap instead of jax.jit over a mesh.")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. `Config()` holds the defaults; `lay_over` changes keys by name."""

    seed: int = key(0, "Seed of initial weights, data order and dropout.", at_least=0, at_most=2**31 - 1)
    out: str | None = key(None, "Run directory. Required.")
    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    train: TrainSection = TrainSection()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain values, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], origin: str = "config.json") -> "Config":
        """Reads what `to_dict` wrote (also after JSON made lists of tuples), checking every key again."""
        config = lay_over(cls(), [(name, value, origin) for name, value in flatten(values)])
        check_together(config)
        return config


def sections() -> dict[str, type]:
    """Returns the sections' names and dataclasses."""
    hints = typing.get_type_hints(Config).items()
    return {name: hint for name, hint in hints if isinstance(hint, type) and dataclasses.is_dataclass(hint)}


def keys() -> dict[str, Key]:
    """Returns every key by its dotted name, in the order of the documentation."""
    found = dict(_keys_of(Config, ""))
    for name, section in sections().items():
        found.update(_keys_of(section, f"{name}."))
    return found


def _keys_of(section: type, prefix: str) -> Iterator[tuple[str, Key]]:
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        if "allowed" in field.metadata:
            yield prefix + field.name, Key.of(prefix + field.name, hints[field.name], field)


def find_key(name: str, origin: str) -> Key:
    """Returns the key called `name`.

    Raises:
        InputError: when there is none; names the nearest.
    """
    known = keys()
    if name in known:
        return known[name]
    section, _, last = name.rpartition(".")
    if not section and last in sections():
        raise InputError(f"{origin}: {last} is a section, not a key; its keys are {_listed(last)}")
    elsewhere = [other for other in known if other.rpartition(".")[2] == last]
    if elsewhere:
        hint: str | None = elsewhere[0]
    elif section in sections():
        inner = nearest(last, (field.name for field in dataclasses.fields(sections()[section])))
        hint = f"{section}.{inner}" if inner else None
    else:
        hint = nearest(name, known)
    if hint:
        raise InputError(f"{origin}: unknown key {name!r}; did you mean {hint!r}?")
    if section in sections():
        raise InputError(f"{origin}: unknown key {name!r}; the keys of {section} are {_listed(section)}")
    raise InputError(f"{origin}: unknown key {name!r}; the sections are {', '.join(sections())}")


def _listed(section: str) -> str:
    return ", ".join(field.name for field in dataclasses.fields(sections()[section]))


def flatten(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields dotted names and values of nested mappings."""
    for name, value in values.items():
        if isinstance(value, Mapping) and str(name) in sections():
            yield from ((f"{name}.{inner}", leaf) for inner, leaf in value.items())
        else:
            yield str(name), value


def lay_over(config: Config, settings: Collection[tuple[str, Any, str]]) -> Config:
    """Returns `config` with keys changed.

    Args:
        config: where to start.
        settings: (dotted name, value, origin for the error message); later ones win.

    Raises:
        InputError: on an unknown key, a wrong type or a value out of range.
    """
    for name, value, origin in settings:
        checked = find_key(name, origin).check(value, origin)
        section, _, last = name.rpartition(".")
        if section:
            inner = dataclasses.replace(getattr(config, section), **{last: checked})
            config = dataclasses.replace(config, **{section: inner})
        else:
            config = dataclasses.replace(config, **{last: checked})
    return config


def check_together(config: Config) -> None:
    """Refuses values that are fine alone and impossible together, and missing required keys.

    Raises:
        InputError: naming the keys and what is allowed.
    """
    required = {"model.path": config.model.path, "data.train": config.data.train, "out": config.out}
    missing = [name for name, value in required.items() if value is None]
    if missing:
        flags = " ".join(f"--config.{name}=..." for name in missing)
        raise InputError(f"config: {', '.join(missing)} must be set, in the file or by {flags}")
    train = config.train
    micro = train.micro_batch_size
    if micro is not None and train.batch_size % micro:
        raise InputError(f"config: train.micro_batch_size={micro} must divide train.batch_size={train.batch_size}")
    if train.steps is not None:
        check_warmup(config, train.steps)


def check_warmup(config: Config, steps: int) -> None:
    """Refuses a warm-up longer than the run; for the caller who turned epochs into steps."""
    warmup = config.optimizer.warmup_steps
    if warmup > steps:
        raise InputError(f"config: optimizer.warmup_steps={warmup} must be at most the run's {steps} steps")


def unused(config: Config, given: Collection[str]) -> str | None:
    """Returns one line about keys that were given but that this run doesn't read, or None.

    Args:
        config: the whole configuration.
        given: dotted names that the file or the command line set.
    """
    method, groups = config.adapter.method, []
    unread = {field.name for field in dataclasses.fields(AdapterConfig)} - METHOD_KEYS[method] - {"method"}
    groups.append((f"adapter.method={method}", [f"adapter.{name}" for name in unread]))
    if config.adapter.path is not None and "path" in METHOD_KEYS[method]:
        # The adapter's folder says all this.
        said = METHOD_KEYS[method] - {"path"}
        groups.append(("adapter.path", [f"adapter.{name}" for name in said]))
    if config.loss.mode != "weighted":
        groups.append((f"loss.mode={config.loss.mode}", ["loss.prompt_weight"]))
    if config.train.steps is not None:
        groups.append(("train.steps", ["train.epochs"]))
    if config.data.eval is not None:
        groups.append(("data.eval", ["data.eval_fraction"]))
    elif config.data.eval_fraction == 0:
        groups.append(("no evaluation data", ["train.eval_every"]))
    order = list(keys())
    parts = []
    for reason, names in groups:
        ignored = sorted((name for name in names if name in given), key=order.index)
        if ignored:
            parts.append(f"{', '.join(ignored)} (not used with {reason})")
    return f"ignored: {'; '.join(parts)}" if parts else None
