"""A chat template written in Jinja, the tokenizer's own or a user's file, as something that renders text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from mora_jax.errors import InputError
from mora_jax.paths import expanded

#: Files with one of these endings are Jinja templates, also where there is no such file.
SUFFIXES = (".jinja", ".jinja2", ".j2")
#: What running somebody's template may raise.
_REFUSALS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class JinjaTemplate:
    """Renders messages as `tokenizer.apply_chat_template` does.

    Args:
      tokenizer: a `transformers` tokenizer.
      file: a user's template; None for the tokenizer's own.

    Attributes:
      tokenizer: as given.
      name: what to call it in messages to the user.

    Raises:
      InputError: for a file that cannot be read or has a syntax error.
    """

    def __init__(self, tokenizer: Any, file: str | None = None):
        self.tokenizer = tokenizer
        self.name = "the tokenizer's chat template" if file is None else f"the chat template {file}"
        self._program = None if file is None else _read(file)
        if file is not None:
            self._check_syntax(file)

    @property
    def program(self) -> str:
        """The template's source."""
        return str(self.tokenizer.chat_template) if self._program is None else self._program

    def _check_syntax(self, file: str) -> None:
        try:
            self._apply([{"role": "user", "content": "a"}], (), False)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{file}, line {error.lineno}: not a Jinja template: {error.message}") from None
        except _REFUSALS:
            return  # It may want other roles: rows that it refuses are reported as they come.

    def _apply(self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            tools=list(tools) or None,
            chat_template=self._program,
            tokenize=False,
            add_generation_prompt=prompt,
        )

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        prompt: bool = False,
        source: str = "",
    ) -> str:
        """The text of the messages; with `prompt` it ends where the answer begins.

        Args:
          messages: as `apply_chat_template` takes them.
          tools: descriptions of the tools that the assistant may call.
          prompt: whether an answer is to follow.
          source: file and row, for messages to the user.

        Raises:
          InputError: if the template refuses them, or has a syntax error.
        """
        try:
            return self._apply(messages, tools, prompt)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{self.name} has a syntax error, line {error.lineno}: {error.message}") from None
        except _REFUSALS as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(f"{at(source)}{self.name} refuses the roles {roles}: {reason}") from None


def _read(file: str) -> str:
    try:
        return expanded(file).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 at byte {error.start}: save the chat template as UTF-8") from None
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"cannot read the chat template {file}: {reason}") from None


def at(source: str) -> str:
    """The beginning of a message about a row."""
    return f"{source}: " if source else ""
