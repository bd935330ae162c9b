"""What a command line that isn't understood was probably meant to say."""

import argparse
import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import NoReturn

from mora_jax.cli.options import OVERRIDE, KeyAction
from mora_jax.errors import InputError
from mora_jax.training.config.key import meant, nearest, words_for

#: What commands of this kind are called elsewhere.
COMMAND_ALIASES = {
    "finetune": "train", "fine-tune": "train", "tune": "train", "fit": "train", "sft": "train", "resume": "train",
    "evaluate": "eval", "score": "eval", "test": "eval", "talk": "chat", "infer": "generate", "predict": "generate",
    "run": "generate", "export": "merge", "fold": "merge", "show": "inspect", "data": "inspect", "estimate": "plan",
}  # fmt: skip
#: Options of other commands than train that stand for these keys without being made of them.
PLAIN = {"model.path": "--model", "data.train": "--data", "adapter.path": "--adapter", "out": "--out"}
CONFIG_FILES = (".py", ".yaml", ".yml", ".json")
_KEY = re.compile(r"(?<![\w./-])[a-z]+\.[a-z_0-9]+\b")
_NUMBER = re.compile(r"-\d|-\.\d")


def refuse_command(word: str, commands: Sequence[str]) -> NoReturn:
    """Refuses a first word that is no command, with the nearest one.

    Raises:
        InputError: always.
    """
    if word.startswith("-"):
        raise InputError(f"{word} comes before the command: mora-jax COMMAND {word} ... (see mora-jax --help)")
    if word.endswith(CONFIG_FILES):
        raise InputError(f"{word} is no command; did you mean: mora-jax train --config {shlex.quote(word)}?")
    lowered = word.lower().replace("_", "-")
    hint = COMMAND_ALIASES.get(lowered) or nearest(lowered, commands)
    tail = f"did you mean {hint}? " if hint else ""
    raise InputError(f"there is no command {word!r}; {tail}The commands are {', '.join(commands)}")


def check_options(command: str, parser: argparse.ArgumentParser, words: Sequence[str], takes_keys: bool) -> None:
    """Refuses options that a command doesn't have, with what they were probably meant to be.

    Args:
        command: its name.
        parser: its parser.
        words: the arguments after its name.
        takes_keys: whether it takes `--config.KEY=VALUE`.

    Raises:
        InputError: naming all such options.
    """
    known = parser._option_string_actions
    unknown = [(name, values) for name, values in _options(words) if name not in known]
    if not unknown:
        return
    say = _key_words if takes_keys else _flag_words
    flags = {option[2:]: option for option in known if option.startswith("--") and option != "--help"}
    hints = {name: say(name.lstrip("-"), values, flags, known) for name, values in unknown}
    text = f"{command} has no option {', '.join(hints)}; "
    meaning = " ".join(hint for hint in hints.values() if hint)
    if meaning:
        text += f"did you mean {meaning}? "
    rest = [name for name, hint in hints.items() if not hint]
    if rest:
        text += f"mora-jax {command} --help lists what there is" + (f" for {', '.join(rest)}" if meaning else "")
    raise InputError(text.strip())


def refuse_words(command: str, words: Sequence[str], takes_file: bool) -> None:
    """Refuses words that belong to no option.

    Args:
        command: its name.
        words: those left over.
        takes_file: whether the command takes a config file.

    Raises:
        InputError: there are some.
    """
    if not words:
        return
    file = next((word for word in words if word.endswith(CONFIG_FILES)), None) if takes_file else None
    hint = f"did you mean --config {shlex.quote(file)}?" if file else f"see mora-jax {command} --help"
    raise InputError(f"{command} can't place {' '.join(map(shlex.quote, words))}; {hint}")


def flag_of(key: str, known: Mapping[str, argparse.Action]) -> str | None:
    """The option of a command that stands for a configuration key."""
    for option, action in known.items():
        if isinstance(action, KeyAction) and action.key.name == key:
            return option
    plain = PLAIN.get(key)
    return plain if plain in known else None


def with_options(text: str, parser: argparse.ArgumentParser) -> str:
    """A message with a command's own options in place of the configuration keys that it names."""
    return _KEY.sub(lambda key: flag_of(key[0], parser._option_string_actions) or key[0], text)


def _options(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Every option with the words that follow it, as argparse tells them apart."""
    options: list[tuple[str, list[str]]] = []
    for word in itertools.takewhile(lambda word: word != "--", words):
        if len(word) > 1 and word.startswith("-") and " " not in word and not _NUMBER.match(word):
            name, equals, value = word.partition("=")
            options.append((name, [value] if equals else []))
        elif options:
            options[-1][1].append(word)
    return options


def _key_words(
    word: str, values: Sequence[str], flags: Mapping[str, str], known: Mapping[str, argparse.Action]
) -> str | None:
    """An option of train, or a configuration key with its value."""
    from mora_jax.training.config.schema import keys

    if "." in word:
        key = meant(word, keys())
    else:
        table = {**flags, **{name.replace("_", "-"): key for name, key in words_for(keys()).items()}}
        closest = nearest(word.replace("_", "-"), table)
        key = closest and table[closest]
    if key is None or key in known:
        return key
    key, equals, value = key.partition("=")
    text = value if equals else ",".join(values)
    return f"{OVERRIDE}{key}={shlex.quote(text) if text else '...'}"


def _flag_words(
    word: str, values: Sequence[str], flags: Mapping[str, str], known: Mapping[str, argparse.Action]
) -> str | None:
    """An option of a command without configuration keys."""
    from mora_jax.training.config.schema import keys

    key = words_for(keys()).get(word.replace("-", "_"))
    flag = flag_of(key.partition("=")[0], known) if key else None
    close = nearest(word.replace("_", "-"), flags)
    return flag or (flags[close] if close else None)
