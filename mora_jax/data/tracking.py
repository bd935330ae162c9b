"""Where the words of each message stand in what a tokenizer's own chat template renders.

A template is a program: it may strip, reorder, merge or drop what it is given. It is therefore never parsed,
and its markers are never searched for. It is run on stand-ins, and what it does to them is compared with what
it does to the real messages: as a whole first (`layout.py`), character by character where that does not
explain the rendering (`tracing.py`). If neither does, the template cannot be tracked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mora_jax.data.layout import Layout, find_layout, match_layout
from mora_jax.data.spans import RenderContents, Span
from mora_jax.data.tracing import trace

_MAX_LAYOUTS = 4096


class Tracker:
    """Locates messages in renderings of one template; remembers its layouts, one a sequence of roles."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[Any, ...], Layout] = {}

    def locate(
        self, render: RenderContents, roles: Sequence[str], contents: Sequence[str], text: str, program: str
    ) -> list[Span]:
        """Where each content stands.

        Args:
          render: runs the template on these roles with other contents.
          roles: of the messages.
          contents: of the messages.
          text: what the template made of them.
          program: the template's source.

        Returns:
          Spans in the order of the text.

        Raises:
          Untrackable: if the rendering cannot be explained.
        """
        first: dict[tuple[str, str], int] = {}
        groups = [first.setdefault(turn, i) for i, turn in enumerate(zip(roles, contents, strict=True))]
        # Templates may leave out a turn that says nothing, so blank contents are tried as they are too.
        blank = [not content.strip() for content in contents]
        for keep in [[False] * len(roles), blank] if any(blank) else [blank]:
            for layout in self._find(render, roles, contents, groups, keep):
                spans = match_layout(layout, contents, text)
                if spans is not None:
                    return spans
        return trace(render, contents, groups, text, program)

    def _find(
        self,
        render: RenderContents,
        roles: Sequence[str],
        contents: Sequence[str],
        groups: Sequence[int],
        keep: Sequence[bool],
    ) -> Iterator[Layout]:
        """The layout as remembered, then a new one: templates can write the time."""
        kept = (content for content, is_kept in zip(contents, keep, strict=True) if is_kept)
        key = (*roles, *groups, *keep, *kept)
        if key in self._layouts:
            yield self._layouts[key]
        if len(self._layouts) >= _MAX_LAYOUTS:
            self._layouts.clear()
        self._layouts[key] = find_layout(render, contents, groups, keep)
        yield self._layouts[key]
