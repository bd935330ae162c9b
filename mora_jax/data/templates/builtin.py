"""Built-in chat templates. Each gives the pieces of a conversation directly: nothing has to be searched for.

A template is one entry in `TEMPLATES`: most are headers and footers around each message (`TurnTemplate`). The
tokenizer adds its own beginning-of-sequence token; `eos` stands for its end-of-sequence text.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mora_jax.data.conversation import Message
from mora_jax.data.segments import ROLE_SEGMENT, Piece, Segment


class Template:
    """A built-in template.

    Attributes:
      writes_tool_calls: whether an assistant's calls of tools are written; if not, rows that have some are refused.
    """

    writes_tool_calls = False

    def pieces(self, messages: Sequence[Message], eos: str) -> Iterator[Piece]:
        """The stretches of a conversation."""
        raise NotImplementedError  # abstract: every template has its own

    def prompt(self, messages: Sequence[Message], eos: str) -> str:
        """The text after which an answer begins: here that of the messages, as nothing stands before an answer."""
        return "".join(piece.text for piece in self.pieces(messages, eos))


def _tool_call(call: Mapping[str, Any]) -> str:
    """A call as Hermes and Qwen write it."""
    function = call["function"]
    said = json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)
    return f"<tool_call>\n{said}\n</tool_call>"


@dataclass(frozen=True)
class TurnTemplate(Template):
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

    def pieces(self, messages: Sequence[Message], eos: str) -> Iterator[Piece]:
        yield from self._turns(messages, eos)
        if messages and self.final_gap:
            yield Piece(self.gap, Segment.TEMPLATE)

    def prompt(self, messages: Sequence[Message], eos: str) -> str:
        texts = [piece.text for piece in self._turns(messages, eos)]
        return "".join((*texts, self.gap if messages else "", self._header("assistant")))

    def _header(self, role: str) -> str:
        return self.header.replace("{role}", self.names.get(role, role))

    def _turns(self, messages: Sequence[Message], eos: str) -> Iterator[Piece]:
        joins = self.system_joins_user and [message.role for message in messages[:2]] == ["system", "user"]
        for turn, message in enumerate(messages):
            as_user = self.system_joins_user and message.role == "system"
            header = (self.gap if turn else "") + self._header("user" if as_user else message.role)
            yield Piece("\n\n" if joins and turn == 1 else header, Segment.HEADER, turn)
            text = message.text.strip() if self.strip else message.text
            yield Piece(text, ROLE_SEGMENT[message.role], turn)
            if joins and turn == 0:
                continue
            if message.role != "assistant":
                yield Piece(self.footer.replace("{eos}", eos), Segment.CLOSING, turn)
                continue
            if message.tool_calls:
                calls = "\n".join(map(_tool_call, message.tool_calls))
                yield Piece(("\n" if text else "") + calls, Segment.TOOL_CALL, turn)
            footer = self.footer if self.answer_footer is None else self.answer_footer
            yield Piece(footer.replace("{eos}", eos), Segment.END_OF_TURN, turn)


@dataclass(frozen=True)
class InstructTemplate(Template):
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

    def pieces(self, messages: Sequence[Message], eos: str) -> Iterator[Piece]:
        joins = [message.role for message in messages[:2]] == ["system", "user"]
        for turn, message in enumerate(messages):
            text, joined = message.text, joins and turn == 1
            if message.role == "assistant":
                yield Piece(" " + (text.strip() if self.strip else text), Segment.ASSISTANT, turn)
                yield Piece(self.answer_space + eos, Segment.END_OF_TURN, turn)
                continue
            if not joined:
                opening = "[INST] " + (self.system_open if message.role == "system" else "")
                yield Piece(opening, Segment.HEADER, turn)
            if message.role == "system":
                yield Piece(text, Segment.SYSTEM, turn)
                # What is in the brackets is stripped as a whole, so this loses its end where no question follows.
                asked = messages[1].text.strip() if joins and turn == 0 else ""
                close = self.system_close.rstrip() if self.strip and not asked else self.system_close
                yield Piece(close, Segment.CLOSING, turn)
                if joins and turn == 0:
                    continue
            else:
                if self.strip:
                    text = text.rstrip() if joined and text.strip() else text.strip()
                yield Piece(text, ROLE_SEGMENT[message.role], turn)
            yield Piece(" [/INST]", Segment.CLOSING, turn)


class AlpacaTemplate(Template):
    """The prompt of Stanford's Alpaca, byte for byte; the answer follows "### Response:" at once, then EOS.

    A system message takes the place of the preamble. Further turns follow a blank line, without preamble.
    The heading of the answer belongs to the instruction: a prompt ends in it already.
    """

    PREAMBLE = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    PREAMBLE_WITH_INPUT = (
        "Below is an instruction that describes a task, paired with an input that provides further context."
        " Write a response that appropriately completes the request."
    )

    def pieces(self, messages: Sequence[Message], eos: str) -> Iterator[Piece]:
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


TEMPLATES: dict[str, Template] = {
    "alpaca": AlpacaTemplate(),
    # The messages one after the other with nothing between them.
    "plain": TurnTemplate("", "", answer_footer="{eos}"),
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
