"""The configuration of a training run: every key, with its type, default and range.

`Config` is what the code reads; `configs/*.py` and `--config.section.key=value` (load.py) fill it.
"""

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mora_jax.adapters.config.common import MethodConfig, Pattern, Targets
from mora_jax.adapters.methods.registry import CONFIGS
from mora_jax.data.examples import TRUNCATIONS
from mora_jax.data.formats.load import ON_ERROR
from mora_jax.data.formats.registry import FORMATS
from mora_jax.data.loss_weights import DIVISORS, ENDS, HEADERS, MODES, LossWeights
from mora_jax.data.sources import Source
from mora_jax.data.templates.builtin import TEMPLATES
from mora_jax.errors import InputError, refused
from mora_jax.losses.preference import OBJECTIVES, Objective, Settings
from mora_jax.training.config.key import TEXTS, Key, key, key_of, meant
from mora_jax.training.update_rules import OBJECT, RULES

# What says which adapter a run starts from; methods know nothing of it.
START = frozenset({"path", "strict"})
# The keys of the section that each method reads. One that changes the base starts from no adapter.
METHOD_KEYS: Mapping[str, frozenset[str]] = {
    name: frozenset(config.settings()) | (frozenset() if config.changes_base else START)
    for name, config in CONFIGS.items()
}
_FEW = 3  # methods that a key's description names


def _declared() -> Iterator[tuple[str, Any, Any]]:
    """The keys of all methods, in order: name, type and field."""
    holders: dict[str, dict[str, type[MethodConfig]]] = {}
    for method, config in CONFIGS.items():
        for name in config.settings():
            holders.setdefault(name, {})[method] = config
    for name, configs in holders.items():
        first = next(iter(configs.values()))
        defaults = {method: config.field(name).default for method, config in configs.items()}
        metadata = first.field(name).metadata
        usual, *others = dict.fromkeys(defaults.values())
        unset = f"the method's own, {_defaults_text(defaults)}" if others else metadata.get("unset")
        default = None if unset or usual == () else usual
        kind = _type(typing.get_type_hints(first)[name])
        described = next((text for config in configs.values() if (text := config.described(name))), "")
        doc = _sentence(described, list(configs), name)
        doc = f"{doc[:-1]}; none: {unset}." if unset else doc
        choices = metadata.get("run_choices", metadata.get("choices")) if kind is str else None
        limits = first.limits(name)
        bounds = limits.bounds if limits is not None else {}
        yield name, kind | None if default is None else kind, key(default, doc, choices=choices, **bounds)


def _type(annotation: Any) -> Any:
    """The type of a key for a setting of this type."""
    if annotation == Pattern:
        return TEXTS
    if isinstance(annotation, types.UnionType) and annotation != Targets:
        return next(kind for kind in typing.get_args(annotation) if kind is not types.NoneType)
    return annotation


def _sentence(described: str, methods: list[str], name: str) -> str:
    """A setting's description as one sentence, with the methods that have it where they are few."""
    sentence = re.sub(r"[,;]? \(?see `mora_jax[\w.]+`\)?", "", described).replace("`", "").rstrip(".")
    sentence = f"{', '.join(methods)}: {sentence}" if len(methods) <= _FEW else sentence[:1].upper() + sentence[1:]
    shape = f"; given as REGEX={name.removesuffix('_pattern').upper()}" if name.endswith("_pattern") else ""
    return f"{sentence}{shape}."


def _defaults_text(defaults: Mapping[str, Any]) -> str:
    """Defaults that differ: the commonest, then the others with their methods."""
    values = list(defaults.values())
    usual = max(values, key=values.count)
    others = [f"{method} {_shown(value)}" for method, value in defaults.items() if value != usual]
    return f"{_shown(usual)} ({', '.join(others)})"


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)


# Typed as Any, for its attributes are known only here.
_Settings: Any = dataclasses.make_dataclass(
    "_Settings",
    [("method", str, key("lora", "The fine-tuning method.", choices=tuple(CONFIGS))), *_declared()],
    frozen=True,
)


@dataclasses.dataclass(frozen=True)
class AdapterConfig(_Settings):
    """Section `adapter`: what is trained. Its keys beside `method` and these are the settings of the methods."""

    path: str | None = key(None, "An adapter folder to start from; it says rank, targets and the rest.")
    strict: bool = key(
        False, "Whether an adapter.path that names another base model is refused; it is warned of otherwise."
    )

    @property
    def config_class(self) -> type[MethodConfig]:
        """The class of the method's own configuration, which says what is asked about the method."""
        return CONFIGS[self.method]


def adapter_config(section: AdapterConfig, steps: int | None = None) -> Any:
    """The section as the method's own configuration.

    Args:
        section: the section `adapter`.
        steps: of the run, for methods with a schedule; None where the schedule is no matter.

    Raises:
        InputError: a value that the method refuses.
    """
    config = section.config_class
    said = {name: getattr(section, name) for name in config.settings()}
    values: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    for name, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        if values.get(name):
            values[name] = tuple(_pair(text, name, kind) for text in values[name])
    with refused("config: adapter"):
        return config.for_run(values, steps)


def adapter_settings(config: Any) -> dict[str, Any]:
    """The other way: a method's own configuration as values of the section `adapter`, by key.

    Raises:
        InputError: it is no configuration of a method, or has a setting that the section has no key for.
    """
    method = next((name for name, config_class in CONFIGS.items() if config_class is type(config)), None)
    if method is None:
        raise InputError(
            f"the adapter's configuration should be one of a method, such as LoRAConfig(rank=8), and is "
            f"{type(config).__name__}"
        )
    known = config.settings()
    values: dict[str, Any] = {"method": method}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in known:
            if field.name.endswith("_pattern"):
                value = tuple(f"{pattern}={number:g}" for pattern, number in value) or None
            elif value == ():
                value = None
            values[field.name] = value
        elif field.name in config.derived_fields or "by_run" in field.metadata:
            continue  # the model or the run says it
        elif field.init and value != field.default:
            raise InputError(f"adapter: {type(config).__name__}({field.name}={value!r}) can't be set for a run")
    return values


def _pair(text: str, name: str, kind: type) -> tuple[str, Any]:
    """One entry of a pattern: a regular expression may hold "=", its value can't."""
    pattern, _, value = text.rpartition("=")
    try:
        return pattern, kind(value)
    except ValueError:
        example = r"q_proj=16" if kind is int else r"q_proj=32.0"
        raise InputError(f'adapter.{name}: {text!r} should read "REGEX=NUMBER", such as "{example}"') from None


QUANTIZE = ("none", "int8", "nf4")
REFERENCES = ("base", "cached")
ATTENTION = ("auto", "xla", "splash", "cudnn")


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
        None,
        "Ignored: layers always run in a loop, one a turn. The key will go.",
        at_least=1,
    )
    remat: str = key(
        "none",
        "What the backward pass computes again to save memory: nothing; all but the results of "
        "projections and attention (dots); everything; offload is full with the layers' inputs in the host's memory.",
        choices=("none", "dots", "full", "offload"),
    )
    quantize: str = key(
        "none",
        "How the layers' kernels are held: as they are, in 8 bits, or as 4-bit NormalFloat (QLoRA); for adapters on a "
        "base that stays frozen.",
        choices=QUANTIZE,
    )
    attention: str = key(
        "auto",
        "What computes attention: splash (a kernel for TPUs), cudnn (for NVIDIA GPUs), or blocks in plain XLA; auto "
        "takes splash where rows are long, and cudnn nowhere.",
        choices=ATTENTION,
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Section `data`: the examples."""

    train: tuple[str, ...] | None = key(
        None, "Training data: files, globs, a folder, or the id of a data set on the hub. Required."
    )
    eval: tuple[str, ...] | None = key(None, "Evaluation data, named in the same ways.")
    eval_fraction: float = key(
        0.0, "Share of the training rows to hold out when data.eval isn't set.", at_least=0, below=1
    )
    split: str = key("train", "Which split of a hub data set (or of a folder saved by datasets) is trained on.")
    eval_split: str = key("validation", "Which split data.eval means there.")
    subset: str | None = key(None, "Which subset (configuration) of a hub data set.")
    streaming: bool = key(False, "Read a hub data set without downloading it first.")
    max_rows: int | None = key(None, "Read no more than so many rows of each data set.", at_least=1)
    format: str | None = key(None, "Format of the rows; none recognises it.", choices=tuple(FORMATS))
    columns: tuple[str, ...] | None = key(
        None, "Keys under other names, as OURS=THEIRS: instruction=question,output=reply."
    )
    roles: tuple[str, ...] | None = key(None, "Roles under other names, as THEIRS=OURS: bot=assistant.")
    on_error: str = key("raise", "A row that breaks the format: stop, or count it and go on.", choices=ON_ERROR)
    template: str | None = key(
        None,
        f"Chat template: tokenizer (its own), {', '.join(TEMPLATES)}, or a Jinja file; none takes the tokenizer's own, "
        "or alpaca where it has none.",
    )
    fallback: str | None = key(
        None, "Built-in template for rows whose own one can't be tracked; none refuses them.", choices=tuple(TEMPLATES)
    )
    max_length: int = key(512, "Longest example in tokens.", at_least=2)
    truncation: str = key(
        "right",
        "Longer examples: right or left removes that end, prompt_first keeps the last answer, split makes several, "
        "drop leaves them out.",
        choices=tuple(TRUNCATIONS),
    )
    packing: bool = key(False, "Several examples in one row, each seeing only itself.")
    bucketing: bool = key(False, "Batches of examples of like length, padded to few lengths.")
    workers: int | None = key(None, "Processes that tokenise; none: one a core, up to 16.", at_least=1)
    cache: str | None = key(
        None, "Folder where tokens are kept between runs; none: the user's cache folder; off: nowhere."
    )

    def source(self, paths: Any, split: str) -> Source:
        """Where rows come from; `paths` and `split` are those of one of the two data sets."""
        shared = {field.name for field in dataclasses.fields(Source)} & vars(self).keys()
        settings = {name: getattr(self, name) for name in shared}
        return Source(paths, **settings | {"split": split, "columns": self.columns or (), "roles": self.roles or ()})


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Section `loss`: what is minimised, and which tokens carry it."""

    mode: str = key(
        "masked",
        f"{'; '.join(f'{name}: {mode.doc}' for name, mode in MODES.items())}.",
        choices=tuple(MODES),
    )
    prompt_weight: float = key(0.1, "Weight of instruction tokens in modes weighted and wit.", at_least=0, at_most=1)
    roles: tuple[str, ...] = key(("assistant",), "Whose turns masked and last_turn train.")
    end_of_turn: str | None = key(
        None,
        "Which ends of turns are trained: of trained turns, all, the last trained one, none; unset, as the mode says.",
        choices=ENDS,
    )
    headers: str | None = key(
        None,
        "Which headers of turns are trained: none, of trained turns, all; unset, as the mode says.",
        choices=HEADERS,
    )
    normalize: str | None = key(
        None,
        f"What the loss of a step is divided by: {'; '.join(f'{name}: {text}' for name, text in DIVISORS.items())}; "
        "unset: as the mode says (token; im_paper example; wit nonzero).",
        choices=tuple(DIVISORS),
    )
    constant: float | None = key(None, "The divisor of normalize=constant.", above=0)
    balance_weight: float = key(
        0.0,
        "Weight of the load-balancing loss of models with experts (transformers' router_aux_loss_coef).",
        at_least=0,
    )
    kl_weight: float = key(0.0, "Weight of the KL divergence from the frozen base.", at_least=0)
    kl_tokens: str = key("response", "The tokens on which it is taken.", choices=("response", "prompt"))
    objective: str = key(
        "sft",
        "What is minimised: sft, the loss of tokens; or from preferences "
        f"{'; '.join(f'{name}: {entry.doc}' for name, entry in OBJECTIVES.items())}.",
        choices=("sft", *OBJECTIVES),
    )
    beta: float | None = key(
        None,
        "How strongly differences of log-probabilities count in an objective of preferences; none: its own, "
        f"{', '.join(f'{name} {entry.beta:g}' for name, entry in OBJECTIVES.items())}.",
        above=0,
    )
    label_smoothing: float | None = key(
        None, "dpo, simpo, cpo: the probability that a pair is judged the wrong way; none: 0.", at_least=0, below=0.5
    )
    length_normalize: bool | None = key(
        None, "dpo, ipo: whether log-ratios are means over an answer's tokens; none: with ipo."
    )
    gamma: float | None = key(None, "simpo: the target margin of rewards; none: 0.5.", at_least=0)
    desirable_weight: float | None = key(None, "kto: what a wanted answer counts; none: 1.", at_least=0)
    undesirable_weight: float | None = key(None, "kto: what an unwanted answer counts; none: 1.", at_least=0)
    sft_weight: float | None = key(
        None,
        "Weight of the loss of the chosen answers' tokens, by loss.mode, beside preferences; none: 1 with orpo and "
        "cpo, else 0.",
        at_least=0,
    )
    reference: str | None = key(
        None,
        "dpo, ipo, kto: base is the model without its adapters, run in each step; cached are the log-probabilities of "
        "the model as training begins, computed once and kept with the tokens; none: base where that is the same.",
        choices=REFERENCES,
    )

    @property
    def preference(self) -> Objective | None:
        """The objective of preferences; None for `sft`."""
        return OBJECTIVES.get(self.objective)

    @property
    def sft_term(self) -> float:
        """The weight of the loss of tokens beside preferences."""
        usual = 0.0 if self.preference is None else self.preference.sft_weight
        return usual if self.sft_weight is None else self.sft_weight

    @property
    def settings(self) -> Settings:
        """The numbers of the objective of preferences."""
        assert self.preference is not None, "sft has none"
        usual = {"beta": self.preference.beta, "length_normalize": self.preference.length_normalize}
        given = {name: getattr(self, name) for name in Settings._fields if getattr(self, name) is not None}
        return Settings(**usual | given)

    @property
    def scored(self) -> str:
        """Of which objective of preferences, with its numbers, evaluation losses are; empty for the masked loss."""
        return "" if self.preference is None else f" {self.objective} {tuple(self.settings)}"

    @property
    def weights(self) -> LossWeights:
        """Which tokens carry loss, and how much."""
        weight = self.prompt_weight if MODES[self.mode].uses_prompt_weight else 0.0
        return LossWeights(self.mode, weight, self.roles, self.end_of_turn, self.headers)

    @property
    def divided_by(self) -> str:
        """The normaliser: the one asked for, else the loss mode's."""
        return self.normalize or MODES[self.mode].normalize


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
    eval_on_start: bool | None = key(
        None,
        "Evaluate before the first step too, which says what the base scores; none: where that is little work, of at "
        "most a quarter of the rows that are trained on.",
    )
    eval_tasks: tuple[str, ...] | None = key(
        None, "Tasks evaluated too, NAME=FILE each: names (or .toml files) and files as for mora-jax eval --task."
    )
    eval_tasks_limit: int | None = key(
        200, "Rows of each of eval_tasks, drawn with a fixed seed; none: all.", at_least=1
    )
    neftune_alpha: float = key(
        0.0, "NEFTune: noise on the embeddings in training, scaled by each example's length; 0: none.", at_least=0
    )
    save_every: int = key(0, "Steps between checkpoints; 0: none.", at_least=0)
    keep: int = key(2, "Newest checkpoints kept.", at_least=1)
    keep_best: int = key(
        0,
        "Checkpoints with the lowest evaluation loss that are kept in addition; the best one is exported.",
        at_least=0,
    )
    max_skipped: int = key(
        3,
        "Updates in a row left out for a loss or gradient that is not finite, at which the run stops.",
        at_least=1,
    )
    watchdog_seconds: float = key(
        900.0, "Seconds after which a step that has not ended is reported with all stacks; 0: never.", at_least=0
    )

    @property
    def micro_batch(self) -> int:
        """Rows computed at once, over all devices."""
        return self.micro_batch_size or self.batch_size


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Section `log`: what is recorded beside metrics.jsonl."""

    tensorboard: bool = key(False, "Write metrics for TensorBoard too, into the run directory.")
    wandb: str | None = key(None, "Project of Weights & Biases to log to; none: no logging there.")
    wandb_mode: str = key(
        "offline",
        "offline: into the run directory, for wandb sync; online: to the server at once.",
        choices=("offline", "online"),
    )
    compilation_cache: str | None = key(
        None,
        "Folder where compiled programs are kept between runs; none: in the user's cache folder; off: nowhere. "
        "A JAX_COMPILATION_CACHE_DIR of the environment wins.",
    )
    profile_steps: int = key(0, "Steps to trace for XProf, into the run directory; 0: none.", at_least=0)
    profile_first: int | None = key(
        None, "First step to trace; none: the third one of the process, after compiling and warming up.", at_least=1
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Section `optimizer`."""

    name: str = key(
        "adamw", "The optimizer, with optax's rule; object: the one that finetune was given.", choices=(*RULES, OBJECT)
    )
    learning_rate: float = key(2e-4, "Peak learning rate.", above=0, at_most=10)
    schedule: str = key(
        "linear", "Course of the learning rate after warm-up.", choices=("constant", "linear", "cosine")
    )
    min_ratio: float = key(0.0, "Share of the peak at which linear and cosine end.", at_least=0, at_most=1)
    warmup_steps: int = key(0, "Steps over which the learning rate rises; at most the run's steps.", at_least=0)
    weight_decay: float = key(0.0, "Decoupled weight decay.", at_least=0)
    b1: float | None = key(None, "Decay of Adam's and Lion's first moment; none: 0.9.", at_least=0, below=1)
    b2: float | None = key(
        None, "Decay of Adam's second moment and of Lion's momentum; none: 0.999, of lion 0.99.", at_least=0, below=1
    )
    eps: float | None = key(
        None, "Added to the root of Adam's second moment; none: 1e-8. Of adafactor to squares; none: 1e-30.", above=0
    )
    momentum: float | None = key(None, "Decay of the momentum of sgd (none: 0) and muon (0.95).", at_least=0, below=1)
    clip_norm: float | None = key(1.0, "Largest global gradient norm; none: no clipping.", above=0)
    offload: bool = key(False, "Keep AdamW's state in the host's memory; it comes to the device in each step.")

    @property
    def settings(self) -> dict[str, float]:
        """The keys that not all optimizers use, of those that this one uses."""
        given = {name: getattr(self, name) for name in RULES[self.name].settings}
        return dict(RULES[self.name].settings) | {name: value for name, value in given.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Section `mesh`: how the devices are used. Rows of a batch are shared by data × fsdp × expert devices."""

    data: int = key(-1, "Devices that share rows, each with its own weights; -1: the rest.", at_least=1, extra=-1)
    fsdp: int = key(1, "Devices that share rows and shard the weights; -1: the rest.", at_least=1, extra=-1)
    tensor: int = key(1, "Devices that shard heads, MLP and vocabulary; -1: the rest.", at_least=1, extra=-1)
    context: int = key(
        1, "Devices that share each row along its length, for long inputs; -1: the rest.", at_least=1, extra=-1
    )
    expert: int = key(1, "Devices that share rows and the experts of each layer; -1: the rest.", at_least=1, extra=-1)
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
    log: LogConfig = LogConfig()

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain values, ready for JSON."""
        return dataclasses.asdict(self)


@functools.cache
def sections() -> Mapping[str, type]:
    """Returns the sections' names and dataclasses."""
    hints = typing.get_type_hints(Config).items()
    return {name: hint for name, hint in hints if isinstance(hint, type) and dataclasses.is_dataclass(hint)}


@functools.cache
def keys() -> Mapping[str, Key]:
    """Returns every key by its dotted name, in the order of the documentation."""
    known = {}
    for prefix, section in {"": Config, **{f"{name}.": section for name, section in sections().items()}}.items():
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            if "key" in field.metadata:
                known[prefix + field.name] = key_of(field, prefix + field.name, hints[field.name])
    return known


def find_key(name: str, origin: str) -> Key:
    """Returns the key called `name`.

    Raises:
        InputError: when there is none; names the nearest.
    """
    known = keys()
    if name in known:
        return known[name]
    section, _, last = name.rpartition(".")
    hint = meant(name, known)
    if not section and last in sections():
        tail = f"did you mean {hint!r}? " if hint else ""
        raise InputError(f"{origin}: {last} is a section, not a key; {tail}its keys are {_listed(last)}")
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
        section, _, last = name.rpartition(".")
        changes: dict[str, Any] = {last: find_key(name, origin).check(value, origin)}
        if section:
            changes = {section: dataclasses.replace(getattr(config, section), **changes)}
        config = dataclasses.replace(config, **changes)
    return config


def unused(config: Config, given: Collection[str]) -> str | None:
    """Returns one line about keys that were given but that this run doesn't read, or None.

    Args:
        config: the whole configuration.
        given: dotted names that the file or the command line set.
    """
    adapter, loss, data, log = config.adapter, config.loss, config.data, config.log
    evaluates = data.eval is not None or data.eval_fraction > 0
    mode, known = MODES[loss.mode], METHOD_KEYS[adapter.method]
    others = {field.name for field in dataclasses.fields(AdapterConfig)} - known - {"method"}
    # The adapter's folder says all this, but not how to train.
    said = known - START - adapter.config_class.training_settings()
    # Whether, why, and the keys that are then not read.
    cases: list[tuple[bool, str, list[str]]] = [
        (True, "layers, which run in a loop", ["model.unroll"]),
        (True, f"adapter.method={adapter.method}", [f"adapter.{name}" for name in others]),
        (adapter.path is not None and "path" in known, "adapter.path", [f"adapter.{name}" for name in said]),
        (not mode.uses_prompt_weight, f"loss.mode={loss.mode}", ["loss.prompt_weight"]),
        (not mode.roles, f"loss.mode={loss.mode}", ["loss.roles"]),
        (loss.normalize != "constant", f"loss.normalize={loss.normalize or 'unset'}", ["loss.constant"]),
        (loss.kl_weight == 0, "loss.kl_weight=0", ["loss.kl_tokens"]),
        (
            loss.preference is not None and loss.sft_term == 0,
            "loss.sft_weight=0",
            [f"loss.{name}" for name in ("mode", "prompt_weight", "roles", "end_of_turn", "headers", "normalize")],
        ),
        (data.eval is None, "no data.eval", ["data.eval_split"]),
        (log.wandb is None, "no log.wandb", ["log.wandb_mode"]),
        (log.profile_steps == 0, "log.profile_steps=0", ["log.profile_first"]),
        (config.train.steps is not None, "train.steps", ["train.epochs"]),
        (data.eval is not None, "data.eval", ["data.eval_fraction"]),
        (not evaluates, "no evaluation data", ["train.keep_best"]),
        (
            not evaluates and not config.train.eval_tasks,
            "no evaluation data",
            ["train.eval_every", "train.eval_on_start"],
        ),
        (not config.train.eval_tasks, "no train.eval_tasks", ["train.eval_tasks_limit"]),
    ]
    order = list(keys())
    parts = []
    for applies, reason, names in cases:
        ignored = sorted((name for name in names if name in given), key=order.index)
        if applies and ignored:
            parts.append(f"{', '.join(ignored)} (not used with {reason})")
    return f"ignored: {'; '.join(parts)}" if parts else None
