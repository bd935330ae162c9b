"""Other names for columns and roles: what a user's data calls them, and what the formats call them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mora_jax.errors import InputError

# The four roles that the rest of the package knows, and how they are spelled in the wild, in any case. What a
# `function_call` or `tool_call` turn says is a call in JSON.
_SPELLINGS = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "chatgpt", "bing", "bard", "function_call", "tool_call"),
    "tool": ("tool", "function", "observation", "tool_response", "ipython"),
}
#: Spelling of a role -> the role.
ROLES = {spelling: role for role, spellings in _SPELLINGS.items() for spelling in spellings}

#: Keys whose items are objects with keys of their own, and all keys that mean something.
NESTED = (
    *("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected"),
    *("segments", "instances"),
)
COLUMNS = (
    *NESTED,
    *("instruction", "input", "context", "output", "response", "system", "history", "question", "answer"),
    *("query", "text", "tools", "weight", "input_ids", "labels", "weights", "attention_mask"),
    *("role", "content", "from", "value", "name", "tool_calls", "reasoning_content", "train", "label"),
)
#: A column under this name is left out, as many as there are.
IGNORE = "ignore"


@dataclass(frozen=True)
class Mapping:
    """Names in the data, and ours for them.

    Attributes:
      columns: `{theirs: ours}` for the keys of rows and of the objects in them. Ours are those in `COLUMNS`, or
        `ignore`.
      roles: `{theirs: ours}`. Ours are those in `ROLES`.

    Raises:
      InputError: for a name of ours that does not exist, or one that is given twice.
    """

    columns: dict[str, str] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        seen: dict[str, str] = {}
        for theirs, ours in self.columns.items():
            if ours == IGNORE:
                continue
            if ours not in COLUMNS:
                raise InputError(
                    f"data.columns: no format has a column {ours!r} (for {theirs!r});"
                    f" choose one of {', '.join((*COLUMNS, IGNORE))}"
                )
            if ours in seen:
                raise InputError(
                    f"data.columns: {ours!r} is given twice, as {seen[ours]!r} and as {theirs!r}; keep one"
                )
            seen[ours] = theirs
        for theirs, ours in self.roles.items():
            if ours not in ROLES:
                raise InputError(
                    f"data.roles: unknown role {ours!r} (for {theirs!r}); choose one of {', '.join(ROLES)}"
                )

    @classmethod
    def parse(cls, columns: Iterable[str] = (), roles: Iterable[str] = ()) -> Mapping:
        """Reads texts as a configuration has them.

        Args:
          columns: texts "ours=theirs", such as "instruction=question".
          roles: texts "theirs=ours", such as "bot=assistant".

        Returns:
          The mapping.

        Raises:
          InputError: for a text of another form.
        """
        return cls(
            _parsed("data.columns", columns, '"ours=theirs", such as "instruction=question"', ours_first=True),
            _parsed("data.roles", roles, '"theirs=ours", such as "bot=assistant"', ours_first=False),
        )

    def __bool__(self) -> bool:
        return bool(self.columns or self.roles)

    def role(self, name: Any) -> str | None:
        """The role here for a role of the data.

        Args:
          name: what the data calls it.

        Returns:
          A key of `ROLES`; None if there is none.
        """
        if not isinstance(name, str):
            return None
        name = self.roles.get(name, name)
        return next((known for known in (name, name.lower()) if known in ROLES), None)

    def apply(self, row: Any) -> Any:
        """Renames the columns of a row.

        Args:
          row: as it was read.

        Returns:
          A copy under our names, or the row itself if nothing is mapped.
        """
        if not self.columns or not isinstance(row, dict):
            return row
        renamed = self._rename(row)
        for key in NESTED:
            if isinstance(items := renamed.get(key), list):
                renamed[key] = [self._rename(item) if isinstance(item, dict) else item for item in items]
        return renamed

    def _rename(self, row: dict[str, Any]) -> dict[str, Any]:
        mapped = {self.columns[key]: value for key, value in row.items() if key in self.columns}
        mapped.pop(IGNORE, None)
        # What the user maps to a name wins over a column that has the name already.
        return {key: value for key, value in row.items() if key not in self.columns} | mapped

    def explain(self, error: InputError) -> InputError:
        """An error with the data's own names of the columns that it names.

        Args:
          error: about a row whose columns were renamed.

        Returns:
          A new error, or the same one where no renamed column is named.
        """
        text = str(error)
        names = [f"`{ours}` is `{theirs}` in the data" for theirs, ours in self.columns.items() if f"`{ours}" in text]
        return InputError(f"{text} ({', '.join(names)})") if names else error


#: A mapping that leaves all names as they are.
NO_MAPPING = Mapping()


def _parsed(setting: str, texts: Iterable[Any], form: str, *, ours_first: bool) -> dict[str, str]:
    """`{theirs: ours}` from texts with "=" between the two; only a name of theirs may hold another "="."""
    names: dict[str, str] = {}
    for text in texts:
        parts = str(text).partition("=") if ours_first else str(text).rpartition("=")
        left, _, right = map(str.strip, parts)
        if not (left and right):
            raise InputError(f"{setting}: {text!r} should read {form}")
        theirs, ours = (right, left) if ours_first else (left, right)
        if theirs in names:
            raise InputError(f"{setting}: {theirs!r} is given twice, as {names[theirs]!r} and as {ours!r}; keep one")
        names[theirs] = ours
    return names
