"""An empty picture for plots of runs and sweeps."""

from __future__ import annotations

import functools
import io
from typing import Any

from mora_jax.errors import InputError


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
