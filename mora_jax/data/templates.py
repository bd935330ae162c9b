"""Built-in chat templates. Each gives the pieces of a conversation directly: nothing has to be searched for.

A template is one entry in `TEMPLATES`: most are headers and footers around each message (`TurnTemplate`). The
tokenizer adds its own beginning-of-sequence token; `eos` stands for its end-of-sequence text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mora_jax.data.conversation import Message
from mora_jax.data.segments import ROLE_SEGMENT, Piece, Segment


class Template(Protocol):
    """What a built-in template can do."""

    def pieces(self, messages: Sequence[Message], eos: str, *, prompt: bool = False) -> Iterator[Piece]:
        """The stretches of a conversation; with `prompt` it goes on to where an answer begins."""
        ...


def _template(text: str) -> Piece:
    return Piece(text, Segment.TEMPLATE)


@dataclass(frozen=True)
class TurnTemplate:
    """A header and a footer around every message.

    Attributes:
      header: with `{role}`.
      footer: closes a turn; `{eos}` stands for the end-of-sequence text.
      gap: after the footer.
      answer_footer: closes an assistant's turn, and is trained with it; `footer` if None.
      names: roles under another name.
      strip: whether the template strips each content.
      final_gap: whether `gap` also follows the last message.
      system_joins_user: there is no system role: its text goes before the first user message.
    """

    header: str
    footer: str
    gap: str = ""
    answer_footer: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    strip: bool = False
    final_gap: bool = True
    system_joins_user: bool = False

    def _header(self, role: str) -> str:
        return self.header.replace("{role}", self.names.get(role, role))

    def pieces(self, messages: Sequence[Message], eos: str, *, prompt: bool = False) -> Iterator[Piece]:
        joins = self.system_joins_user and [message.role for message in messages[:2]] == ["system", "user"]
        for index, message in enumerate(messages):
            if not (joins and index == 1):
                as_user = self.system_joins_user and message.role == "system"
                yield _template(self._header("user" if as_user else message.role))
            text = message.text.strip() if self.strip else message.text
            yield Piece(text, ROLE_SEGMENT[message.role])
            if joins and index == 0:
                yield _template("\n\n")
                continue
            if message.role == "assistant":
                answer_footer = self.footer if self.answer_footer is None else self.answer_footer
                yield Piece(answer_footer.replace("{eos}", eos), Segment.END_OF_TURN)
            else:
                yield _template(self.footer.replace("{eos}", eos))
            if self.final_gap or prompt or index + 1 < len(messages):
                yield _template(self.gap)
        if prompt:
            yield _template(self._header("assistant"))


class AlpacaTemplate:
    """The prompt of Stanford's Alpaca, byte for byte; the answer follows "### Response:" at once, then EOS.

    A system message takes the place of the preamble. Further turns follow a blank line, without preamble.
    """

    PREAMBLE = (
        "Below is an instruction that describes a task."
        " Write a response that appropriately completes the request."
    )
    PREAMBLE_WITH_INPUT = (
        "Below is an instruction that describes a task, paired with an input that provides further context."
        " Write a response that appropriately completes the request."
    )

    def pieces(self, messages: Sequence[Message], eos: str, *, prompt: bool = False) -> Iterator[Piece]:
        del prompt  # The heading of the answer belongs to the instruction: a prompt ends in it already.
        started = False
        for index, message in enumerate(messages):
            if message.role == "assistant":
                yield Piece(message.content, Segment.ASSISTANT)
                yield Piece(eos, Segment.END_OF_TURN)
                if index + 1 < len(messages):
                    yield _template("\n\n")
                started = True
            elif message.role == "system":
                if message.text:
                    yield Piece(message.text, Segment.SYSTEM)
                    yield _template("\n\n")
                    started = True
            else:
                if not started:
                    yield _template((self.PREAMBLE_WITH_INPUT if message.context else self.PREAMBLE) + "\n\n")
                yield _template("### Instruction:\n")
                yield Piece(message.content, ROLE_SEGMENT[message.role])
                if message.context:
                    yield _template("\n\n### Input:\n")
                    yield Piece(message.context, ROLE_SEGMENT[message.role])
                yield _template("\n\n### Response:")
                started = True


class PlainTemplate:
    """The messages one after the other with nothing between them; EOS after each answer."""

    def pieces(self, messages: Sequence[Message], eos: str, *, prompt: bool = False) -> Iterator[Piece]:
        del prompt  # Nothing stands before an answer.
        for message in messages:
            yield Piece(message.text, ROLE_SEGMENT[message.role])
            if message.role == "assistant":
                yield Piece(eos, Segment.END_OF_TURN)


TEMPLATES: dict[str, Template] = {
    "alpaca": AlpacaTemplate(),
    "plain": PlainTemplate(),
    "chatml": TurnTemplate("<|im_start|>{role}\n", "<|im_end|>", "\n"),
    "llama3": TurnTemplate("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", strip=True),
    "tulu": TurnTemplate("<|{role}|>\n", "", "\n", answer_footer="{eos}", strip=True, final_gap=False),
    "zephyr": TurnTemplate("<|{role}|>\n", "{eos}", "\n"),
    "phi3": TurnTemplate("<|{role}|>\n", "<|end|>", "\n"),
    "gemma": TurnTemplate(
        "<start_of_turn>{role}\n",
        "<end_of_turn>",
        "\n",
        names={"assistant": "model"},
        strip=True,
        system_joins_user=True,
    ),
}
