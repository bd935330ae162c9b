"""Rendered text to tokens: one pass of the tokenizer, and a segment for every token from its offsets.

A tokenizer is loaded without the notices that `transformers` prints on import.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np

from mora_jax import environment
from mora_jax.data.segments import ANSWER, RESPONSE, Rendered, Segment, runs
from mora_jax.errors import InputError
from mora_jax.paths import expanded

#: Which segment a token with characters of several belongs to, highest first. An end-of-turn token that
#: swallows the space before it still ends the turn; an answer's first characters are trained even where the
#: tokenizer joins them to the header; words win over the template's text.
_PRECEDENCE = (
    Segment.END_OF_TURN,
    Segment.ASSISTANT,
    Segment.REASONING,
    Segment.TOOL_CALL,
    Segment.USER,
    Segment.SYSTEM,
    Segment.TOOL,
    Segment.CLOSING,
    Segment.HEADER,
    Segment.TEMPLATE,
)

# Ids of a stretch that are printed.
_SHOWN_IDS = 8


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one row, before any cut.

    Attributes:
      input_ids: `[T]` int32.
      segments: `[T]` int8, values of `Segment`.
      turns: `[T]` int16, the number of the message that a token says, opens or closes, from 0; -1 for none.
      seams: tokens that join an answer's characters with others. The ids of the prompt alone are then no
        beginning of these ids.
      turn_weights: for each message what it counts, NaN where the loss mode decides; empty if it always does.
      weights: `[T]` float32, the weights that the data gives each token; None if it gives none.
      weight: what the whole row counts beside the others.
      side, answer: see `Conversation`.
    """

    input_ids: np.ndarray
    segments: np.ndarray
    turns: np.ndarray
    seams: int = 0
    turn_weights: tuple[float, ...] = ()
    weights: np.ndarray | None = None
    weight: float = 1.0
    side: int = 0
    answer: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    def __str__(self) -> str:
        lines = [f"{len(self)} tokens"]
        for (segment, turn), part in runs(zip(self.segments.tolist(), self.turns.tolist(), strict=True)):
            ids = self.input_ids[part].tolist()
            shown = ", ".join(map(str, ids[:_SHOWN_IDS])) + (", ..." if len(ids) > _SHOWN_IDS else "")
            where = f"turn {turn}" if turn >= 0 else ""
            lines.append(f"{Segment(segment).name.lower():>12}  {where:7}  {len(ids):4} ids: {shown}")
        return "\n".join(lines)


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its beginning-of-sequence token before a text."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    return tokenizer("a")["input_ids"][:1] == [bos] != tokenizer("a", add_special_tokens=False)["input_ids"][:1]


def tokenize(rendered: Sequence[Rendered], tokenizer: Any) -> list[Tokens]:
    """Tokenises rendered conversations, each as one string.

    Special tokens in the text are recognised wherever they stand, as `apply_chat_template` does: in a user's
    words they get the special id too, and stay the user's in the segments. The beginning-of-sequence token is
    taken from the text if that begins with it, and put in front if not and the tokenizer adds one itself.

    Args:
      rendered: what `Renderer.render` gives.
      tokenizer: a fast `transformers` tokenizer.

    Returns:
      Tokens in the same order.

    Raises:
      InputError: for a tokenizer without character offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("the tokenizer is a slow one without character offsets: save it with its tokenizer.json")
    if not rendered:
        return []
    bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
    # Offsets are asked for row by row: as one list of tuples for all rows they would cost as much as the ids.
    batch = tokenizer(
        [item.text for item in rendered],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    rows = zip(rendered, batch["input_ids"], batch.encodings, strict=True)
    return [_label(item, ids, encoding.offsets, tokenizer, bos) for item, ids, encoding in rows]


def _label(item: Rendered, ids: list[int], offsets: list[tuple[int, int]], tokenizer: Any, bos: int | None) -> Tokens:
    input_ids = np.array(ids, np.int32)
    owners, seams = _owners(item, offsets)
    segments = np.array([piece.segment for piece in item.pieces], np.int8)[owners]
    turns = np.array([piece.turn for piece in item.pieces], np.int16)[owners]
    written = tokenizer.bos_token
    if written and item.text.startswith(written) and ids[0] == tokenizer.bos_token_id:
        segments[0], turns[0] = Segment.BOS, -1
    elif bos is not None:
        input_ids = np.concatenate([np.array([bos], np.int32), input_ids])
        segments = np.concatenate([np.array([Segment.BOS], np.int8), segments])
        turns = np.concatenate([np.array([-1], np.int16), turns])
    return Tokens(input_ids, segments, turns, seams)


def _owners(item: Rendered, offsets: list[tuple[int, int]]) -> tuple[np.ndarray, int]:
    """The piece that each token belongs to, and how many tokens join an answer to something else."""
    if not offsets:
        return np.zeros(0, np.intp), 0
    flat = np.fromiter(chain.from_iterable(offsets), np.int64, 2 * len(offsets))
    starts, stops = flat[::2], flat[1::2]
    # Tokenizers that trim offsets give tokens of mere space no width: they stand between their neighbours.
    empty = starts >= stops
    if empty.any():
        before = np.concatenate([[0], np.maximum.accumulate(stops)[:-1]])
        starts = np.where(empty, np.minimum(before, np.maximum(stops - 1, 0)), starts)
        stops = np.maximum(stops, starts + 1)
    edges = np.array(list(accumulate([len(piece.text) for piece in item.pieces])))
    last_piece = len(edges) - 1
    owners = np.minimum(np.searchsorted(edges, starts, side="right"), last_piece)
    last = np.minimum(np.searchsorted(edges, stops, side="left"), last_piece)
    seams = 0
    for token in np.flatnonzero(owners != last):
        owners[token], seam = _straddling(
            item, edges, int(owners[token]), int(last[token]), int(starts[token]), int(stops[token])
        )
        seams += seam
    return owners, seams


def _straddling(item: Rendered, edges: np.ndarray, first: int, last: int, start: int, stop: int) -> tuple[int, bool]:
    """The piece of a token over several: of its characters that are no space, if it has any."""
    inside: dict[int, str] = {}
    for index in range(first, last + 1):
        piece = item.pieces[index]
        left, right = max(start, int(edges[index]) - len(piece.text)), min(stop, int(edges[index]))
        inside[index] = item.text[left:right]
    candidates = [index for index, text in inside.items() if text.strip()] or list(inside)
    chosen = min(candidates, key=lambda index: _PRECEDENCE.index(item.pieces[index].segment))
    segments = {item.pieces[index].segment for index in inside}
    seam = not segments.isdisjoint(ANSWER) and not segments <= set(RESPONSE)
    return chosen, seam


_QUIET = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
#: Characters of another library's error that are shown.
_LONGEST = 240
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def load_tokenizer(path: str | Path) -> Any:
    """Loads the tokenizer of a model folder or hub id.

    Args:
      path: a HuggingFace folder with tokenizer files, or a hub id.

    Raises:
      InputError: if there is none that can be loaded.
    """
    folder = expanded(path)
    local = folder.exists()
    if local:
        _check_folder(folder)
    elif folder.is_absolute() or str(path).count("/") > 1:
        raise InputError(f"no such model folder: {path}")
    try:
        name = str(folder if local else path)
        tokenizer = _auto_tokenizer().from_pretrained(name, local_files_only=local, trust_remote_code=False)
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    except Exception as error:  # noqa: BLE001
        # What is wrong in a folder's files comes as whatever the code that meets it raises: bare Exceptions of the
        # tokenizers library, TypeErrors and AttributeErrors of transformers for a value of the wrong kind.
        raise InputError(_why(error, path)) from None
    if absent := [token for token, number in special.items() if number is None]:
        raise InputError(
            f"{path}: the tokenizer has no token {absent[0]!r}, which tokenizer_config.json names as a special one"
        )
    if not isinstance(tokenizer.model_max_length, int | float):
        raise InputError(
            f"{path}: tokenizer_config.json: model_max_length must be a number, found {tokenizer.model_max_length!r}"
        )
    return tokenizer


def _why(error: Exception, path: str | Path) -> str:
    from huggingface_hub.errors import StrictDataclassError

    reason = " ".join(str(error).split()).partition(". Errors:")[0] or type(error).__name__
    if isinstance(error, StrictDataclassError):
        return f"{path}: transformers, which reads config.json for the tokenizer, refuses it: {reason[:_LONGEST]}"
    if not isinstance(error, OSError | ValueError) and type(error) is not Exception:
        reason = f"{type(error).__name__}: {reason}"
    return f"cannot load a tokenizer from {path}: {reason[:_LONGEST]}"


def _check_folder(folder: Path) -> None:
    if not any((folder / name).exists() for name in VOCABULARIES):
        raise InputError(f"cannot load a tokenizer from {folder}: there is none of {', '.join(VOCABULARIES)}")
    file = folder / "tokenizer.json"
    if file.exists():
        # The tokenizers library raises a bare Exception for a file that was cut off.
        try:
            json.loads(file.read_bytes())
        except ValueError as error:
            raise InputError(f"{file} is broken JSON ({error}): get it again") from None


def _auto_tokenizer() -> Any:
    before = os.environ.get(_QUIET)
    os.environ[_QUIET] = "1"  # It would say that torch is missing, which nothing here needs.
    hides = not environment.torch_allowed and "torch" not in sys.modules
    if hides:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from transformers import AutoTokenizer
    finally:
        if before is None:
            del os.environ[_QUIET]
        else:
            os.environ[_QUIET] = before
        if hides:  # transformers remembers that there is none; scipy takes whatever is in `modules` for torch
            del sys.modules["torch"]
    return AutoTokenizer
