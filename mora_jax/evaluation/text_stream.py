"""Token ids to text while they arrive, without ever showing half a character."""

from collections.abc import Iterable, Iterator
from typing import Any

REPLACEMENT = "\ufffd"


class TextStream:
    """Decodes tokens one by one.

    A token may be part of a character, and may be decoded differently at the start of a text. So each new
    token is decoded behind the ones before it, and text is given out only when it ends in a whole character.
    (`tokenizers.decoders.DecodeStream` raises on bytes that are no UTF-8, which a model with byte tokens may make.)
    """

    def __init__(self, tokenizer: Any) -> None:
        """Takes a transformers tokenizer; special tokens are left out of the text."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # tokens before are no longer needed as context
        self._given = 0  # tokens whose text was given out

    def push(self, token: int) -> str:
        """Adds a token and returns the text that is complete with it; may be empty."""
        self._ids.append(int(token))
        text = self._new_text()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._start, self._given = self._given, len(self._ids)
        return text

    def end(self) -> str:
        """Returns what was held back, without an unfinished character."""
        text = self._new_text().rstrip(REPLACEMENT)
        self._start = self._given = len(self._ids)
        return text

    def _new_text(self) -> str:
        known = self._decode(self._ids[self._start : self._given])
        whole = self._decode(self._ids[self._start :])
        return whole[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def decode_stream(tokenizer: Any, tokens: Iterable[int]) -> Iterator[str]:
    """Yields the text of tokens as they arrive, special tokens left out."""
    stream = TextStream(tokenizer)
    for token in tokens:
        if text := stream.push(token):
            yield text
    if text := stream.end():
        yield text
