"""Where a plan takes a model's shapes from."""

from __future__ import annotations

from typing import Any

from mora_jax.errors import InputError
from mora_jax.models.families import read_config
from mora_jax.models.init import read_json
from mora_jax.paths import expanded
from mora_jax.planning.published import PUBLISHED
from mora_jax.training.config_key import nearest


def read_model(name: str) -> dict[str, Any]:
    """The HuggingFace config of a model: a published one's name, a `config.json`, or a folder that holds one.

    Raises:
        InputError: there is none, or its architecture is not supported.
    """
    path = expanded(name)
    if name.lower() in PUBLISHED:
        values = PUBLISHED[name.lower()]
    elif path.is_dir() and not (path / "config.json").exists():
        raise InputError(
            f"--model {name}: that folder has no config.json; give a model's folder, or one of {', '.join(PUBLISHED)}"
        )
    elif path.exists():
        values = read_json(path / "config.json" if path.is_dir() else path)
    else:
        hint = nearest(name.rpartition("/")[2], PUBLISHED)
        meant = f"did you mean {hint}? " if hint else ""
        raise InputError(
            f"--model {name}: there is no such file; {meant}Give a folder with config.json, or one of "
            f"{', '.join(PUBLISHED)}"
        )
    read_config(values, name)
    return values
