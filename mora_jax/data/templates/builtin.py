"""Built-in chat templates. Each gives the pieces of a conversation directly: nothing has to be searched for.

A template is one entry in `TEMPLATES`: most are headers and footers around each message (`TurnTemplate`). The
tokenizer adds its own beginning-of-sequence token; `eos` stands for its end-of-sequence text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mora_jax.data.conversation import Message
from mora_jax.data.segments import ROLE_SEGMENT, Piece, Segment


class Template(Protocol):
    """What a built-in template can do."""

    @property
    def writes_tool_calls(self) -> bool:
        """Whether an assistant's calls of tools are written; if not, rows that have some are refused."""
        ...

    def pieces(self, messages: Sequence[Message], eos: str, *, prompt: bool = False) -> Iterator[Piece]:
        """The stretches of a conversation; with `prompt` it goes on to where an answer begins."""
        ...


def _tool_call(call: Mapping[str, Any]) -> str:
    """A call as Hermes and Qwen write it."""
    function = call["function"]
    said = json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
    return f"<tool_call>\n{said}\n</tool_call>"


@dataclass(frozen=True)
class TurnTemplate:
    """A header and a footer around every message.

    Attributes:
      header: with `{role}`.
      footer: closes a turn; `{eos}` stands for the end-of-sequence text.
      gap: after the footer; it belongs to the next turn.
      answer_footer: closes an assistant's turn, and is trained with it; `footer` if None.
      names: roles under another name.
      strip: whether the template strips each content.
      final_gap: whether `gap` also follows the last message.
      system_joins_user: there is no system role: its text goes before the first user message.
      writes_tool_calls: whether calls of tools are written, one a line, after the words.
    """

    header: str
    footer: str
    gap: str = ""
    answer_footer: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    strip: bool = False
    final_gap: bool = True
    system_joins_user: bool = False
    writes_tool_calls: bool = False

    def _header(self, role: str) -> str:
        return self.header.replace("{role}", self.names.get(role, role))

    def pieces(self, messages: Sequence[Message], eos: str, *, prompt: bool = False) -> Iterator[Piece]:
        """See `Template`."""
        joins = self.system_joins_user and [message.role for message in messages[:2]] == ["system", "user"]
        gap = ""
        for turn, message in enumerate(messages):
            if joins and turn == 1:
                yield Piece("\n\n", Segment.HEADER, turn)
            else:
                as_user = self.system_joins_user and message.role == "system"
                header = self._header("user" if as_user else message.role)
                yield Piece(gap + header, Segment.HEADER, turn)
            text = message.text.strip() if self.strip else message.text
            yield Piece(text, ROLE_SEGMENT[message.role], turn)
            if joins and turn == 0:
                continue
            if message.role == "assistant":
                if message.tool_calls:
                    calls = "\n".join(map(_tool_call, message.tool_calls))
                    yield Piece(("\n" if text else "") + calls, Segment.TOOL_CALL, turn)
                answer_footer = self.footer if self.answer_footer is None else self.answer_footer
                yield Piece(answer_footer.replace("{eos}", eos), Segment.END_OF_TURN, turn)
            else:
                yield Piece(self.footer.replace("{eos}", eos), Segment.CLOSING, turn)
            gap = self.gap
        if prompt:
            yield Piece(gap + self._header("assistant"), Segment.HEADER, len(messages))
        elif self.final_gap:
            yield Piece(gap, Segment.TEMPLATE)


@dataclass(frozen=True)
class InstructTemplate:
    """`[INST] question [/INST] answer`, as Llama 2 and Mistral have it; a system message is in the first brackets.

    A prompt ends in the bracket, so the space before an answer is the model's to produce: it is the answer's.
    The original of Llama 2 writes the beginning-of-sequence token before every question; here it comes once,
    from the tokenizer.

    Attributes:
      system_open: before the system message.
      system_close: after it.
      answer_space: between an answer and the end-of-sequence text.
      strip: whether the template strips each question and answer.
    """

    system_open: str
    system_close: str
    answer_space: str = ""
    strip: bool = False

    writes_tool_calls = False

    def pieces(self, messages: Sequence[Message], eos: str, *, prompt: bool = False) -> Iterator[Piece]:
        """See `Template`."""
        del prompt  # A prompt ends in "[/INST]" already.
        joins = [message.role for message in messages[:2]] == ["system", "user"]
        for turn, message in enumerate(messages):
            text = message.text
            if message.role == "assistant":
                yield Piece(" " + (text.strip() if self.strip else text), Segment.ASSISTANT, turn)
                yield Piece(self.answer_space + eos, Segment.END_OF_TURN, turn)
            elif message.role == "system":
                yield Piece("[INST] " + self.system_open, Segment.HEADER, turn)
                yield Piece(text, Segment.SYSTEM, turn)
                # What is in the brackets is stripped as a whole, so this loses its end where no question follows.
                asked = messages[1].text.strip() if joins and turn == 0 else ""
                close = self.system_close.rstrip() if self.strip and not asked else self.system_close
                yield Piece(close, Segment.CLOSING, turn)
                if not (joins and turn == 0):
                    yield Piece(" [/INST]", Segment.CLOSING, turn)
            else:
                joined = joins and turn == 1
                if not joined:
                    yield Piece("[INST] ", Segment.HEADER, turn)
                if self.strip:
                    text = text.strip() if not (joined and text.strip()) else text.rstrip()
                yield Piece(text, ROLE_SEGMENT[message.role], turn)
                yield Piece(" [/INST]", Segment.CLOSING, turn)


class AlpacaTemplate:
    """The prompt of Stanford's Alpaca, byte for byte; the answer follows "### Response:" at once, then EOS.

    A system message takes the place of the preamble. Further turns follow a blank line, without preamble.
    """

    writes_tool_calls = False

    PREAMBLE = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    PREAMBLE_WITH_INPUT = (
        "Below is an instruction that describes a task, paired with an input that provides further context."
        " Write a response that appropriately completes the request."
    )

    def pieces(self, messages: Sequence[Message], eos: str, *, prompt: bool = False) -> Iterator[Piece]:
        """See `Template`."""
        del prompt  # The heading of the answer belongs to the instruction: a prompt ends in it already.
        started = False
        for turn, message in enumerate(messages):
            if message.role == "assistant":
                yield Piece(message.content, Segment.ASSISTANT, turn)
                yield Piece(eos, Segment.END_OF_TURN, turn)
                if turn + 1 < len(messages):
                    yield Piece("\n\n", Segment.HEADER, turn + 1)
                started = True
            elif message.role == "system":
                if message.text:
                    yield Piece(message.text, Segment.SYSTEM, turn)
                    yield Piece("\n\n", Segment.HEADER, turn + 1)
                    started = True
            else:
                if not started:
                    preamble = self.PREAMBLE_WITH_INPUT if message.context else self.PREAMBLE
                    yield Piece(preamble + "\n\n", Segment.TEMPLATE)
                yield Piece("### Instruction:\n", Segment.HEADER, turn)
                yield Piece(message.content, ROLE_SEGMENT[message.role], turn)
                if message.context:
                    yield Piece("\n\n### Input:\n", Segment.HEADER, turn)
                    yield Piece(message.context, ROLE_SEGMENT[message.role], turn)
                yield Piece("\n\n### Response:", Segment.HEADER, turn + 1)
                started = True


class PlainTemplate:
    """The messages one after the other with nothing between them; EOS after each answer."""

    writes_tool_calls = False

    def pieces(self, messages: Sequence[Message], eos: str, *, prompt: bool = False) -> Iterator[Piece]:
        """See `Template`."""
        del prompt  # Nothing stands before an answer.
        for turn, message in enumerate(messages):
            yield Piece(message.text, ROLE_SEGMENT[message.role], turn)
            if message.role == "assistant":
                yield Piece(eos, Segment.END_OF_TURN, turn)


TEMPLATES: dict[str, Template] = {
    "alpaca": AlpacaTemplate(),
    "plain": PlainTemplate(),
    "chatml": TurnTemplate("<|im_start|>{role}\n", "<|im_end|>", "\n", writes_tool_calls=True),
    "llama2": InstructTemplate("<<SYS>>\n", "\n<</SYS>>\n\n", answer_space=" ", strip=True),
    "llama3": TurnTemplate("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", strip=True),
    "mistral": InstructTemplate("", "\n\n"),
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
