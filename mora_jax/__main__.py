"""`python -m mora_jax`, the same as the command `mora-jax`."""

import sys

from mora_jax.cli import start

if __name__ == "__main__":
    sys.exit(start())
