"""Other names for columns and roles: what a user's data calls them, and what the formats call them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mora_jax.errors import InputError

#: Spellings of roles in the wild, in any case, and the four that the rest of the package knows. What a
#: `function_call` or `tool_call` turn says is a call in JSON.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}

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
        pairs: dict[str, str] = {}
        for text in columns:
            ours, theirs = _split(text, "data.columns", '"ours=theirs", such as "instruction=question"')
            _add(pairs, theirs, ours, "data.columns")
        names: dict[str, str] = {}
        for text in roles:
            theirs, ours = _split(text, "data.roles", '"theirs=ours", such as "bot=assistant"')
            _add(names, theirs, ours, "data.roles")
        return cls(pairs, names)

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


def _split(text: Any, setting: str, form: str) -> tuple[str, str]:
    if isinstance(text, str):
        # A column of the data may have "=" in its name, none of ours does; likewise the role on the left.
        left, sign, right = text.partition("=") if setting == "data.columns" else text.rpartition("=")
        if sign and left.strip() and right.strip():
            return left.strip(), right.strip()
    raise InputError(f"{setting}: {text!r} should read {form}")


def _add(pairs: dict[str, str], theirs: str, ours: str, setting: str) -> None:
    if theirs in pairs:
        raise InputError(f"{setting}: {theirs!r} is given twice, as {pairs[theirs]!r} and as {ours!r}; keep one")
    pairs[theirs] = ours
