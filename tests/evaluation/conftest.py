"""The tiny model and tokenizer, and exact products."""

import jax
import pytest

from tests.evaluation import tiny


@pytest.fixture(scope="session")
def model():
    """A random decoder."""
    return tiny.make_model()


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer with a chat template."""
    return tiny.make_tokenizer()


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield
