"""The prompt of Stanford's Alpaca, which has headings in place of roles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mora_jax.data.conversation import Message
from mora_jax.data.segments import ROLE_SEGMENT, Piece, Segment


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
        """See `templates.Template`."""
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
