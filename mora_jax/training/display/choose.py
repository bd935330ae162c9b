"""Which display suits the place where a run is started."""

import os
import sys
from importlib.util import find_spec

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


def is_live() -> bool:
    """Whether stderr is a terminal on which lines can be redrawn."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def in_notebook() -> bool:
    """Whether this is the kernel of a Jupyter or Colab notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and ("google.colab" in str(type(shell)) or type(shell).__name__ == "ZMQInteractiveShell")
