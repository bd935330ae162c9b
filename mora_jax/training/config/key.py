"""One configuration key: its type, its range, and how a value or a piece of text becomes one of its values.

A key is a dataclass field made with `key(default, doc, ...)`. The field's annotation is its type: `int`,
`float`, `bool`, `str`, `tuple[str, ...]`, `tuple[int, ...]`, any of them `| None`, or `str | tuple[str, ...]`.
"""

import contextlib
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
_OTHER_NAMES = {
    "adapter.path": ("adapter",),
    "model.path": ("base_model", "model", "model_name", "model_name_or_path"),
    "train.batch_size": ("batch",),
    "model.dtype=bfloat16": ("bf16",),
    "data.template": ("chat_template",),
    "loss.mode=masked": ("completion_only_loss", "mask_prompt"),
    "data.max_length": ("cutoff_len", "max_seq_length", "seq_len", "sequence_len"),
    "data.train": ("data", "dataset", "train_data", "train_file"),
    "data.eval": ("eval_data", "validation_file"),
    "train.eval_every": ("eval_steps",),
    "adapter.method": ("finetuning_type", "peft_type"),
    "model.remat=full": ("gradient_checkpointing",),
    "optimizer.clip_norm": ("grad_clip", "max_grad_norm"),
    "data.bucketing": ("group_by_length",),
    "model.quantize=nf4": ("load_in_4bit",),
    "model.quantize=int8": ("load_in_8bit",),
    "train.log_every": ("logging_steps",),
    "adapter.alpha": ("lora_alpha",),
    "adapter.dropout": ("lora_dropout",),
    "adapter.rank": ("lora_r", "r"),
    "adapter.targets": ("lora_target_modules", "target_modules"),
    "loss.mode": ("loss",),
    "optimizer.learning_rate": ("lr",),
    "optimizer.schedule": ("lr_scheduler_type", "scheduler"),
    "train.steps": ("max_steps",),
    "train.neftune_alpha": ("neftune_noise_alpha",),
    "train.epochs": ("num_epochs", "num_train_epochs"),
    "optimizer.name": ("optim", "optimizer"),
    "out": ("output", "output_dir", "save_dir"),
    "data.packing": ("sample_packing",),
    "train.save_every": ("save_steps",),
    "train.keep": ("save_total_limit",),
    "loss.mode=unmasked": ("train_on_inputs",),
    "data.eval_fraction": ("val_set_size", "val_size"),
    "log.wandb": ("wandb_project",),
    "optimizer.warmup_steps": ("warmup",),
}
ALIASES = {alias: key for key, aliases in _OTHER_NAMES.items() for alias in aliases}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Key(Limits):
    """A key: its default, its range, and once its section is known, its full name and type.

    Attributes:
        default: value when neither the file nor the command line sets the key.
        doc: one sentence for people.
        choices: the only values allowed.
        extra: one more value that is allowed although the range excludes it.
        name: with its section, `train.steps`.
        types: those that its annotation admits.
    """

    default: Any
    doc: str
    choices: tuple[Any, ...] | None = None
    extra: int | None = None
    name: str = ""
    types: tuple[Any, ...] = ()

    @property
    def may_be_none(self) -> bool:
        """Whether the key can be left undecided."""
        return type(None) in self.types

    @property
    def none_word(self) -> str:
        """What stands for no value: "unset" where "none" is one of the values."""
        return "unset" if "none" in (self.choices or ()) else "none"

    def show(self, value: Any) -> str:
        """A value as it is written on the command line."""
        if value is None:
            return self.none_word
        if isinstance(value, bool):
            return str(value).lower()
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    def describe(self) -> str:
        """Returns what the key accepts, in words: "an integer, at least 1, or none"."""
        if self.choices is not None:
            text = ("one of " if len(self.choices) > 1 else "") + ", ".join(map(str, self.choices))
        else:
            names = " or ".join(TYPE_NAMES[option] for option in self.types if option is not type(None))
            extra = "" if self.extra is None else f"or {self.extra}"
            text = ", ".join(part for part in (names, self.words(), extra) if part)
        return text + (f", or {self.none_word}" if self.may_be_none else "")

    def check(self, value: Any, origin: str) -> Any:
        """Returns `value` as one of the key's types.

        Args:
            value: what a config file or a JSON file holds.
            origin: where it came from, for the error.

        Raises:
            InputError: on a wrong type or a value out of range.
        """
        if value is None and self.may_be_none:
            return None
        typed = self._typed(value)
        if typed is not None and self._admits(typed):
            return typed
        shown = repr(value) if isinstance(value, (str, numbers.Number, tuple, list)) else type(value).__name__
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        is_float = isinstance(value, numbers.Real) and not isinstance(value, bool) and float in self.types
        why = " (not finite)" if is_float and typed is None else ""
        hint = nearest(value, self.choices or ()) if isinstance(value, str) else None
        tail = f"; did you mean {hint!r}?" if hint else ""
        where = origin if origin.startswith("--") or origin == self.name else f"{origin}: {self.name}"
        raise InputError(f"{where} must be {self.describe()}; got {shown}{why}{tail}")

    def parse(self, text: str, origin: str) -> Any:
        """Returns the value that command-line text stands for; lists are comma-separated, unless that names a file.

        Raises:
            InputError: as `check`.
        """
        lowered = text.strip().lower()
        if self.may_be_none and lowered in NONE_WORDS and lowered not in (self.choices or ()):
            return None
        parts = (text,) if "," in text and expanded(text).exists() else split_list(text)
        value: Any = text
        with contextlib.suppress(ValueError, KeyError):  # a text that is none of these is refused as it stands
            if bool in self.types:
                value = BOOL_WORDS[lowered]
            elif int in self.types:
                value = int(text)
            elif float in self.types:
                value = float(text)
            elif INTS in self.types:
                value = tuple(map(int, parts))
            elif TEXTS in self.types and len(parts) > 1:
                value = parts
        return self.check(value, origin)

    def _typed(self, value: Any) -> Any:
        """`value` as one of the types, or None."""
        if isinstance(value, bool):
            return value if bool in self.types else None
        if int in self.types or float in self.types:
            return number(value, whole=int in self.types)
        if isinstance(value, str) and str in self.types:
            return value
        listed = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if INTS in self.types:
            listed = tuple(number(part, whole=True) for part in listed)
            return None if None in listed else listed or None
        return listed or None if TEXTS in self.types and all(isinstance(part, str) for part in listed) else None

    def _admits(self, value: Any) -> bool:
        """Whether a value of the right type is in the range."""
        if self.choices is not None:
            return value in self.choices
        if isinstance(value, str):
            return bool(value.strip())
        if isinstance(value, tuple):
            return all(map(self._admits, value))
        return value == self.extra or self.holds(value)


def key(default: Any, doc: str, **limits: Any) -> Any:
    """Declares a configuration key: a dataclass field with a default, a sentence about it and its range.

    Args:
        default, doc: see `Key`.
        **limits: its other fields.
    """
    return dataclasses.field(default=default, metadata={"key": Key(default=default, doc=doc, **limits)})


def key_of(field: dataclasses.Field, name: str, annotation: Any) -> Key:
    """The key of a dataclass field that `key` made, with its full name and the types of its annotation."""
    union = isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union
    options = typing.get_args(annotation) if union else (annotation,)
    return dataclasses.replace(field.metadata["key"], name=name, types=options)


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
    lasts = words_for(known)
    if last in lasts:
        return lasts[last]
    inside = [other for other in known if section and other.startswith(f"{section}.")]
    if inside:
        close = nearest(last, (other.rpartition(".")[2] for other in inside))
        return close and f"{section}.{close}"
    if section:
        return nearest(name, known)
    close = nearest(last, lasts)
    return None if close is None else lasts[close]
