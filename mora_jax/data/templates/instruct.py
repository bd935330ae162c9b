"""The manner of Llama 2 and Mistral: questions in brackets, and answers bare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mora_jax.data.conversation import Message
from mora_jax.data.segments import ROLE_SEGMENT, Piece, Segment


@dataclass(frozen=True)
class InstructTemplate:
    """`[INST] question [/INST] answer`; the system message stands inside the first question's brackets.

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
        """See `templates.Template`."""
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
