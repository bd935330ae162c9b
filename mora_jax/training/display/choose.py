"""Which display suits the place where a run is started."""

from importlib.util import find_spec

from mora_jax.display.progress import in_notebook, is_live
from mora_jax.training.display.plain import Display


def make_display() -> Display:
    """Returns the display that suits stderr: live on a terminal and in a notebook, plain elsewhere."""
    if in_notebook() and find_spec("ipywidgets"):
        from rich.console import Console

        from mora_jax.training.display.live import LiveDisplay

        return LiveDisplay(Console(highlight=False))
    if is_live():
        from mora_jax.training.display.live import LiveDisplay

        return LiveDisplay()
    return Display()
