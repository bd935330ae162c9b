"""Where the words of each message stand in what a chat template renders.

A template is a program: it may strip, reorder, merge or drop what it is given. It is therefore never parsed,
and its markers are never searched for. It is run on stand-ins, and what it does to them is compared with what
it does to the real messages: as a whole first (`layout.py`), character by character where that does not
explain the rendering (`char_trace.py`). If neither does, the template cannot be tracked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mora_jax.data.templates.char_trace import trace
from mora_jax.data.templates.skeleton import TemplateLayout, find_layout, match_layout
from mora_jax.data.templates.spans import RenderContents, Span

_MAX_LAYOUTS = 1024


@dataclass(frozen=True, slots=True)
class Located:
    """Where contents stand.

    Attributes:
      spans: in the order of the text.
      groups: for each content the first one that equals it.
      layout: the template's own text around the contents; None if they were traced character by character.
      keep: which contents belong to the layout.
    """

    spans: list[Span]
    groups: list[int]
    layout: TemplateLayout | None
    keep: Sequence[bool] = ()


class Tracker:
    """Locates contents in renderings of one template; remembers its layouts, one a sequence of kinds."""

    def __init__(self) -> None:
        self._layouts: dict[tuple[Any, ...], TemplateLayout] = {}

    def locate(
        self,
        render: RenderContents,
        kinds: Sequence[str],
        contents: Sequence[str],
        text: str,
        program: str,
        extras: str | None = "",
    ) -> Located:
        """Where each content stands.

        Args:
          render: runs the template on these messages with other contents.
          kinds: of the contents: the role, and what they are of the message.
          contents: the texts.
          text: what the template made of them.
          program: the template's source.
          extras: what else the rendering depends on; None if that is nothing worth remembering.

        Raises:
          Untrackable: if the rendering cannot be explained.
        """
        first: dict[tuple[str, str], int] = {}
        groups = [first.setdefault(one, i) for i, one in enumerate(zip(kinds, contents, strict=True))]
        # Templates may leave out a turn that says nothing, so blank contents are tried as they are too.
        blank = [not content or content.isspace() for content in contents]
        for keep in [[False] * len(kinds), blank] if any(blank) else [blank]:
            kept = [content for content, is_kept in zip(contents, keep, strict=True) if is_kept]
            key = None if extras is None else (*kinds, *groups, *keep, *kept, extras)
            for layout in self._find(render, contents, groups, keep, key):
                spans = match_layout(layout, contents, text)
                if spans is not None:
                    return Located(spans, groups, layout, keep)
        return Located(trace(render, contents, groups, text, program), groups, None)

    def _find(
        self,
        render: RenderContents,
        contents: Sequence[str],
        groups: Sequence[int],
        keep: Sequence[bool],
        key: tuple[Any, ...] | None,
    ) -> Iterator[TemplateLayout]:
        """The layout as remembered, then a new one: templates can write the time."""
        if key is None:
            yield find_layout(render, contents, groups, keep)
            return
        if key in self._layouts:
            yield self._layouts[key]
        if len(self._layouts) >= _MAX_LAYOUTS:
            self._layouts.clear()
        self._layouts[key] = find_layout(render, contents, groups, keep)
        yield self._layouts[key]
