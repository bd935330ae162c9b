"""What a user is told of rows that no format reads: what they are, or which format is nearest and what to map."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from mora_jax.data.formats.column_mapping import COLUMNS
from mora_jax.data.read.validate import shown

#: Formats, the most used first.
_USED = ("messages", "alpaca", "prompt_completion", "question_answer", "sharegpt")
_LIST = "docs/formats.md lists all formats"
#: Columns of a row that are named.
_NAMED = 8
#: What columns with a question and columns with its answer are called in public data.
_ASKED = (
    *("prompt", "question", "query", "instruction", "instructions", "input", "inputs", "problem", "request", "user"),
    *("human", "article", "document", "dialogue", "passage", "source_text", "src", "title", "context"),
)
_ANSWERED = (
    *("completion", "answer", "response", "output", "outputs", "targets", "target", "reply", "solution", "summary"),
    *("highlights", "assistant", "gpt", "generated_solution", "final_answer", "long_answer", "demonstration", "label"),
    "continuation",
)
_PLAIN = ("content", "body", "passage", "document", "article", "code")
#: What a text that a question is about is called, and the formats that have a place for it.
_PASSAGES = ("passage", "body", "article", "document", "paragraph", "background")
_WITH_PASSAGE = ("alpaca", "question_answer")
#: Keys of the objects in a list of turns.
_TURNS = (("role", "content"), ("from", "value"), ("input", "output"))
_SPEAKERS = ("role", "from", "speaker", "author", "sender", "who", "user", "name")
_WORDS = ("content", "value", "text", "message", "utterance", "words", "said", "body")
_CHATS = ("data", "dialog", "dialogue", "chat", "turns", "chat_history")


def refusal(row: Any) -> str | None:
    """Why a row should not be read although it has the keys of a format; None for other rows."""
    if not isinstance(row, dict):
        return None
    if {"message_id", "parent_id", "role", "text"} <= row.keys():
        return (
            "the row is one message of a tree (`message_id`, `parent_id`), as OpenAssistant publishes them: join each"
            " path from root to leaf into one row with `messages`, or set data.format=text to train on single messages"
        )
    return _CHOICES if isinstance(row.get("answer"), int) and _has_choices(row) else None


_CHOICES = (
    "the row is a question with `choices`, and says by a number or a letter which is right: write a row with"
    " `question` and the words of the right one as `answer`"
)


def _has_choices(row: dict[str, Any]) -> bool:
    return isinstance(row.get("choices"), list | dict)


def _public_data(row: dict[str, Any]) -> str | None:
    """What public data a row is of and what to do with it; None for other rows."""
    if len(have := [key for key in ("chosen", "rejected") if key in row]) == 1:
        other = "rejected" if have == ["chosen"] else "chosen"
        return f"the row has `{have[0]}` and no `{other}`: a pair of answers to prefer between has both"
    if "message_tree_id" in row and isinstance(row.get("prompt"), dict):
        return (
            "the row is a tree of messages (`message_tree_id`, `prompt` with `replies`), as OpenAssistant publishes"
            " them: join each path from root to leaf into one row with `messages`"
        )
    if isinstance(chat := row.get("chat"), str) and "ASSISTANT:" in chat:
        return (
            "`chat` holds a whole conversation as one text (USER: ..., ASSISTANT: ...), as Glaive publishes them: split"
            " it into `messages` (llamafactory/glaive_toolcall_en is such a copy), or set data.columns to text=chat to"
            " train on all of it"
        )
    answers = row.get("completions")
    if isinstance(answers, list) and any(isinstance(answer, dict) for answer in answers):
        return (
            "`completions` holds several answers to one instruction, as UltraFeedback publishes them: choose one of"
            " them, and write it beside the instruction as `output`"
        )
    if _has_choices(row):
        return _CHOICES
    for key, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and any(map(value[0].get, _ASKED + _LISTS)):
            if _chat_keys(key, value) is None:
                return f"the file holds one object, with the rows in its list {shown(key)}: write that list alone"
    return None


_LISTS = ("messages", "conversations", "text")


def no_format(row: dict[str, Any], formats: Iterable[tuple[str, frozenset[str]]]) -> str:
    """What to say of a row that is of no format.

    Args:
      row: its keys and values, under our names.
      formats: names of formats, each with the keys that it needs.

    Returns:
      What public data of this kind is and what to do with it; for other data the columns, the nearest format and the
      columns to map.
    """
    if known := _public_data(row):
        return known
    names = ", ".join(map(shown, list(row)[:_NAMED])) + (f" and {len(row) - _NAMED} more" if len(row) > _NAMED else "")
    intro = f"no format has the columns {names or '(none)'}"
    needs = dict(formats)
    nearest = _nearest(row, needs)
    if nearest is None:
        return f"{intro}: name those to read in data.columns, as in prompt=COLUMN,completion=COLUMN; {_LIST}"
    name, columns = nearest
    text = f"{intro}: nearest is `{name}`"
    if lacking := [key for key in sorted(needs[name]) if key not in row and key not in columns]:
        text += f", which needs {' and '.join(f'`{key}`' for key in lacking)} too"
    settings = ",".join(f"{ours}={theirs}" for ours, theirs in (columns | dict.fromkeys(lacking, "COLUMN")).items())
    return f"{text}; set data.columns to {settings}; {_LIST}"


def _nearest(row: dict[str, Any], needs: dict[str, frozenset[str]]) -> tuple[str, dict[str, str]] | None:
    """A format, and which columns should be mapped to its keys."""
    columns = {key.strip().lower(): key for key in row}
    for key, value in row.items():
        if (keys := _chat_keys(key, value)) is not None:
            return "messages", {"messages": key} | keys
    asked, answered = _first(columns, _ASKED), _first(columns, _ANSWERED)
    best, score = None, 0.0
    # The first of those that are equally near: the most used ones come first.
    for name in sorted(needs, key=lambda name: _USED.index(name) if name in _USED else len(_USED)):
        places = {ours: theirs for ours in sorted(needs[name]) if (theirs := _alike(columns, ours)) is not None}
        value = len(places) / len(needs[name]) + 0.01 * len(places)
        if value > score:
            mapping = {ours: theirs for ours, theirs in places.items() if ours != theirs}
            # Columns beside them that are called as ours but for case.
            mapping |= {ours: theirs for ours, theirs in columns.items() if ours in COLUMNS and ours != theirs}
            passage = _first(columns, _PASSAGES)
            if passage and name in _WITH_PASSAGE and "context" not in columns and passage not in places.values():
                mapping["context"] = passage
            best, score = (name, mapping), value
    if score < 1.0 and asked and answered and asked != answered:
        pair = {"prompt": asked, "completion": answered}
        return "prompt_completion", {ours: theirs for ours, theirs in pair.items() if ours != theirs}
    if best is None and (plain := _first(columns, _PLAIN)):
        return "text", {"text": plain}
    return best


def _first(keys: dict[str, str], names: Sequence[str]) -> str | None:
    return next((keys[name] for name in names if name in keys), None)


def _alike(columns: dict[str, str], ours: str) -> str | None:
    """The column that is called so but for case and a slip."""
    close = [ours] if ours in columns else difflib.get_close_matches(ours, columns, n=1, cutoff=0.8)
    return columns[close[0]] if close else None


def _chat_keys(key: str, value: Any) -> dict[str, str] | None:
    """For a column with the turns of a conversation, the keys of a turn that are to be mapped; else None."""
    if not isinstance(value, list) or not value:
        return None
    first = value[0]
    if isinstance(first, str):
        return {} if key.lower() in _CHATS else None
    if not isinstance(first, dict):
        return None
    if any({role, text} <= first.keys() for role, text in _TURNS):
        return {}
    keys = {key.lower(): key for key in first}
    speaker, content = _first(keys, _SPEAKERS), _first(keys, _WORDS)
    return {"role": speaker, "content": content} if speaker and content else None
