"""One configuration key: its type, its range, and how a value or a piece of text becomes one of its values.

A key is a dataclass field made with `key(default, doc, ...)`. The field's annotation is its type: `int`,
`float`, `bool`, `str`, `tuple[str, ...]`, `tuple[int, ...]`, any of them `| None`, or `str | tuple[str, ...]`.
"""

import dataclasses
import difflib
import numbers
import types
import typing
from collections.abc import Iterable
from typing import Any

from mora_jax.adapters.config.limits import Limits, number
from mora_jax.errors import InputError
from mora_jax.paths import expanded

NONE_WORDS = ("none", "null", "unset")
BOOL_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
TEXTS = tuple[str, ...]
INTS = tuple[int, ...]
TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    TEXTS: "a list of strings",
    INTS: "a list of integers",
}

#: What other libraries and habit call our keys; with a value where theirs says something else than ours.
ALIASES = {
    "adapter": "adapter.path",
    "base_model": "model.path",
    "batch": "train.batch_size",
    "bf16": "model.dtype=bfloat16",
    "chat_template": "data.template",
    "completion_only_loss": "loss.mode=masked",
    "cutoff_len": "data.max_length",
    "data": "data.train",
    "dataset": "data.train",
    "eval_data": "data.eval",
    "eval_steps": "train.eval_every",
    "finetuning_type": "adapter.method",
    "gradient_checkpointing": "model.remat=full",
    "grad_clip": "optimizer.clip_norm",
    "group_by_length": "data.bucketing",
    "load_in_4bit": "model.quantize=nf4",
    "load_in_8bit": "model.quantize=int8",
    "logging_steps": "train.log_every",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_r": "adapter.rank",
    "lora_target_modules": "adapter.targets",
    "loss": "loss.mode",
    "lr": "optimizer.learning_rate",
    "lr_scheduler_type": "optimizer.schedule",
    "mask_prompt": "loss.mode=masked",
    "max_grad_norm": "optimizer.clip_norm",
    "max_seq_length": "data.max_length",
    "max_steps": "train.steps",
    "model": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "neftune_noise_alpha": "train.neftune_alpha",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "optim": "optimizer.name",
    "optimizer": "optimizer.name",
    "output": "out",
    "output_dir": "out",
    "peft_type": "adapter.method",
    "r": "adapter.rank",
    "sample_packing": "data.packing",
    "save_dir": "out",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep",
    "scheduler": "optimizer.schedule",
    "seq_len": "data.max_length",
    "sequence_len": "data.max_length",
    "target_modules": "adapter.targets",
    "train_data": "data.train",
    "train_file": "data.train",
    "train_on_inputs": "loss.mode=unmasked",
    "validation_file": "data.eval",
    "val_set_size": "data.eval_fraction",
    "val_size": "data.eval_fraction",
    "wandb_project": "log.wandb",
    "warmup": "optimizer.warmup_steps",
}


@dataclasses.dataclass(frozen=True)
class Allowed(Limits):
    """What a key's value may be, beside its type: its range, and what stands here.

    Attributes:
        doc: one sentence for people.
        choices: the only values allowed.
        extra: one more value that is allowed although the range excludes it.
    """

    doc: str
    choices: tuple[Any, ...] | None = None
    extra: int | None = None

    def admits(self, value: Any) -> bool:
        """Says whether a value of the right type is in the range."""
        if self.choices is not None:
            return value in self.choices
        if isinstance(value, str):
            return bool(value.strip())
        if isinstance(value, tuple):
            return all(part.strip() if isinstance(part, str) else self.admits(part) for part in value)
        if self.extra is not None and value == self.extra:
            return True
        return self.holds(value)

    def describe(self) -> str:
        """Returns the range in words, empty when every value of the type will do."""
        if self.choices is not None:
            return ("one of " if len(self.choices) > 1 else "") + ", ".join(str(choice) for choice in self.choices)
        return self.words() + (f", or {self.extra}" if self.extra is not None else "")


def key(default: Any, doc: str, **limits: Any) -> Any:
    """Declares a configuration key: a dataclass field with a default, a sentence about it and its range.

    Args:
        default: value when neither the file nor the command line sets the key.
        doc: one sentence for people.
        **limits: fields of `Allowed`.
    """
    return dataclasses.field(default=default, metadata={"allowed": Allowed(doc, **limits)})


@dataclasses.dataclass(frozen=True)
class Key:
    """A key with its full name, the types that its annotation admits, and its range."""

    name: str
    types: tuple[Any, ...]
    default: Any
    allowed: Allowed

    @classmethod
    def of(cls, name: str, annotation: Any, field: dataclasses.Field) -> "Key":
        """Builds the key of a dataclass field."""
        union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
        options = typing.get_args(annotation) if union else (annotation,)
        return cls(name, options, field.default, field.metadata["allowed"])

    @property
    def may_be_none(self) -> bool:
        """Whether the key can be left undecided."""
        return type(None) in self.types

    @property
    def none_word(self) -> str:
        """What stands for no value: "unset" where "none" is one of the values."""
        return "unset" if "none" in (self.allowed.choices or ()) else "none"

    def show(self, value: Any) -> str:
        """A value as it is written on the command line."""
        if value is None:
            return self.none_word
        if isinstance(value, bool):
            return str(value).lower()
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    def describe(self) -> str:
        """Returns what the key accepts, in words: "an integer, at least 1, or none"."""
        if self.allowed.choices is not None:
            words = self.allowed.describe()
        else:
            names = " or ".join(TYPE_NAMES[option] for option in self.types if option is not type(None))
            words = ", ".join(part for part in (names, self.allowed.describe()) if part)
        return words + (f", or {self.none_word}" if self.may_be_none else "")

    def refuse(self, value: Any, origin: str, why: str = "") -> InputError:
        """Returns the error for a value that the key can't take."""
        shown = repr(value) if isinstance(value, (str, numbers.Number, tuple, list)) else type(value).__name__
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        hint = nearest(value, self.allowed.choices or ()) if isinstance(value, str) else None
        tail = f"; did you mean {hint!r}?" if hint else ""
        where = origin if origin.startswith("--") else f"{origin}: {self.name}"
        return InputError(f"{where} must be {self.describe()}; got {shown}{why}{tail}")

    def check(self, value: Any, origin: str) -> Any:
        """Returns `value` as one of the key's types.

        Args:
            value: what a config file or a JSON file holds.
            origin: where it came from, for the error.

        Raises:
            InputError: on a wrong type or a value out of range.
        """
        typed = self._typed(value, origin)
        if typed is not None and not self.allowed.admits(typed):
            raise self.refuse(value, origin)
        return typed

    def parse(self, text: str, origin: str) -> Any:
        """Returns the value that command-line text stands for; lists are comma-separated, unless that names a file."""
        lowered = text.strip().lower()
        if self.may_be_none and lowered in NONE_WORDS and lowered not in (self.allowed.choices or ()):
            return None
        for option in self.types:
            try:
                if option is bool:
                    return self.check(BOOL_WORDS[text.strip().lower()], origin)
                if option in (int, float):
                    return self.check(option(text), origin)
            except (ValueError, KeyError) as error:
                if isinstance(error, InputError):
                    raise
                raise self.refuse(text, origin) from None
        parts = (text,) if "," in text and expanded(text).exists() else split_list(text)
        if INTS in self.types:
            try:
                return self.check(tuple(int(part) for part in parts), origin)
            except ValueError as error:
                raise error if isinstance(error, InputError) else self.refuse(text, origin) from None
        return self.check(parts[0] if len(parts) == 1 else parts if TEXTS in self.types else text, origin)

    def _typed(self, value: Any, origin: str) -> Any:
        if value is None and self.may_be_none:
            return None
        if isinstance(value, bool):
            if bool in self.types:
                return value
        elif int in self.types and number(value, whole=True) is not None:
            return number(value, whole=True)
        elif INTS in self.types:
            listed = value if isinstance(value, (list, tuple)) else (value,)
            integers = tuple(number(part, whole=True) for part in listed)
            if integers and None not in integers:
                return integers
        elif isinstance(value, numbers.Real) and float in self.types:
            if number(value, whole=False) is None:
                raise self.refuse(value, origin, " (not finite)")
            return float(value)
        elif isinstance(value, str) and str in self.types:
            return value
        elif TEXTS in self.types:
            parts = (value,) if isinstance(value, str) else value
            if isinstance(parts, (list, tuple)) and parts and all(isinstance(part, str) for part in parts):
                return tuple(parts)
        raise self.refuse(value, origin)


def split_list(text: str) -> TEXTS:
    """Splits at commas outside brackets, so that a regex such as `layers.\\d{1,2}.` stays whole."""
    parts, depth, escaped = [""], 0, False
    for char in text:
        if char == "," and depth == 0 and not escaped:
            parts.append("")
            continue
        if not escaped:
            depth = max(0, depth + (char in "([{") - (char in ")]}"))
        escaped = char == "\\" and not escaped
        parts[-1] += char
    return tuple(parts)


def nearest(name: str, names: Iterable[Any]) -> str | None:
    """Returns the one of `names` that `name` was probably meant to be, or None."""
    lowered = {str(known).lower(): str(known) for known in names}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[close[0]] if close else None


def words_for(known: Iterable[str]) -> dict[str, str]:
    """What each key may be called without its section, with the key; aliases with a value as `KEY=VALUE`."""
    lasts: dict[str, str] = {}
    for name in known:
        lasts.setdefault(name.rpartition(".")[2], name)
    return lasts | ALIASES


def meant(name: str, known: Iterable[str]) -> str | None:
    """The key that somebody probably meant who wrote `name`.

    Args:
        name: dotted or not, with `-` or `_`.
        known: the dotted names of all keys.

    Returns:
        A key of that alias, perhaps with a value (`model.dtype=bfloat16`), or of that last part; else one that is
        spelt nearly so in the section named; else nearly so anywhere; else None.
    """
    name, known = name.replace("-", "_").lower(), list(known)
    section, _, last = name.rpartition(".")
    words = words_for(known)
    if last in words:
        return words[last]
    inside = [other for other in known if section and other.startswith(f"{section}.")]
    if inside:
        found = nearest(last, (other.rpartition(".")[2] for other in inside))
        return found and f"{section}.{found}"
    if section:
        return nearest(name, known)
    found = nearest(last, words)
    return None if found is None else words[found]
