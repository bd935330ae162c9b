"""Figures of matplotlib: an empty one, the styles that lines take in turn, legends, and a figure as a file or SVG."""

import contextlib
import functools
import io
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mora_jax.errors import InputError
from mora_jax.paths import new_file

# Colours that stay apart for colour-blind readers (Okabe and Ito), with dashes and markers beside them.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D1F")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1)), (0, (4, 1, 1, 1)))
_MARKERS = "os^DvPX*"


def style(number: int) -> dict[str, Any]:
    """Colour, dash and marker of the line with this number, as arguments of `plot`.

    Neighbours differ in all three; no pair of lines has both colour and dash in common before the 33rd.
    """
    turn, place = divmod(number, len(_COLOURS))
    return {
        "color": _COLOURS[place],
        "linestyle": _DASHES[(place + turn) % len(_DASHES)],
        "marker": _MARKERS[(place + turn) % len(_MARKERS)],
    }


def new_figure(width: float, height: float) -> Any:
    """Returns an empty `matplotlib.figure.Figure`, which a notebook shows though pyplot hasn't been imported.

    Args:
        width, height: in inches.

    Raises:
        InputError: matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError("a plot needs matplotlib: pip install 'mora-jax[plots]'") from None
    figure: Any = Figure(figsize=(width, height), layout="constrained")
    # IPython knows how to show figures only after pyplot has been imported; until then it asks the object.
    figure._repr_png_ = functools.partial(_png, figure)
    return figure


def _png(figure: Any) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def legend(parent: Any, lines: Mapping[str, Any], **options: Any) -> None:
    """A legend of lines by name, whatever the names: matplotlib takes `$` for mathematics and hides a leading `_`.

    Args:
        parent: a figure or axes.
        lines: handles by the text beside them.
        options: of `legend`.
    """
    drawn = parent.legend(list(lines.values()), [str(place) for place in range(len(lines))], frameon=False, **options)
    for text, name in zip(drawn.get_texts(), lines, strict=True):
        text.set(text=name, parse_math=False)


def plain_log(panel: Any, which: str, subs: Sequence[float] = (1.0, 2.0, 5.0), ticks: Sequence[float] = ()) -> None:
    """Makes axis `x` or `y` logarithmic, in plain figures, at `ticks` where they are given."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    panel.set(**{f"{which}scale": "log"})
    axis = getattr(panel, f"{which}axis")
    axis.set_major_locator(FixedLocator(list(ticks)) if ticks else LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_minor_locator(NullLocator())


def write_figure(figure: Any, path: str | os.PathLike[str], dpi: int) -> None:
    """Writes a figure, whole or not at all; the ending of the path says the format, and equal figures give equal files.

    Raises:
        InputError: the file can't be written.
    """
    with _reproducible(), new_file(path) as file:
        metadata = {".svg": {"Date": None}, ".png": {"Software": None}}
        figure.savefig(file, dpi=dpi, metadata=metadata.get(file.suffix))


def as_svg(figure: Any) -> str:
    """A figure as the text of an `<svg>` element; equal figures give equal texts."""
    text = io.StringIO()
    with _reproducible():
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "mora-jax", "svg.fonttype": "none"}), warnings.catch_warnings():
        # The reader's browser draws the letters of an SVG, with fonts that have more of them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield
