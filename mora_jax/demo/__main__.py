"""`python -m mora_jax.demo`."""

import sys

from mora_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
