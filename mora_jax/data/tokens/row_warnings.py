"""Conversations that can be trained on and yet look as if something went wrong on their way."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from mora_jax.data.conversation import Conversation, Row

#: What may be odd about a row, in words that follow a number of rows.
ODDITIES = {
    "unanswered": "rows do not end with an assistant's turn; what follows the last answer is not trained",
    "repeated_role": "rows have two turns of one role in a row",
    "late_system": "rows have a system message that is not the first",
    "empty_turn": "rows have a turn without a word",
    "tools": "rows have tool descriptions, which the template does not show",
    "reasoning": "rows have reasoning, which the template does not show",
    "chat_markup": "rows of plain text hold the markup of a chat and are trained whole, questions too; rows of"
    " `messages` train answers alone",
    "fell_back": "rows could not be tracked and were rendered by the fallback template",
}

#: How the turn of a user begins in texts that were rendered elsewhere.
_MARKUP = re.compile(
    r"<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?:user|prompter)\|>|\[INST\]|"
    r"### (?:Human|Instruction|User):"
)
#: Characters of a text in which it is looked for.
_BEGINNING = 4096


def oddities(row: Row) -> Iterator[str]:
    """The keys of `ODDITIES` that a row deserves by its own turns, each once."""
    if not isinstance(row, Conversation):
        return
    if row.text is not None:
        if _MARKUP.search(row.text, 0, _BEGINNING):
            yield "chat_markup"
        return
    roles = [message.role for message in row.messages]
    if "assistant" in roles and roles[-1] != "assistant":
        yield "unanswered"
    if any(one == other != "tool" for one, other in pairwise(roles)):
        yield "repeated_role"
    if "system" in roles[1:]:
        yield "late_system"
    if any(not (message.text.strip() or message.tool_calls) for message in row.messages):
        yield "empty_turn"


def notes(counts: dict[str, int]) -> list[str]:
    """One line for each kind of row that was counted."""
    return [f"{counts[name]} {words}" for name, words in ODDITIES.items() if counts.get(name)]
