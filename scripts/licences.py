"""The licences of what mora-jax depends on, as a table in Markdown.

    python scripts/licences.py > docs/licences.md

Of the packages that are installed in this environment: those of `dependencies`, and what they need themselves. A
licence is what a package says of itself: its expression, its classifiers, or the field that came before both.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

HEAD = """# Licences of dependencies

mora-jax is under Apache-2.0. What `pip install mora-jax` brings along, direct dependencies first, each with the
licence that it states. The accelerators' wheels are not in it: libtpu and NVIDIA's libraries have terms of their own.
Written by `scripts/licences.py`.

| package | licence | needed |
| --- | --- | --- |
"""


def needed(name: str) -> list[str]:
    """What a package needs here, without its extras."""
    requirements = map(Requirement, importlib.metadata.requires(name) or ())
    return [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]


def licence(name: str) -> str:
    """What a package says of its licence, in a few words."""
    metadata = importlib.metadata.metadata(name)
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = [text.rpartition(" :: ")[2] for text in metadata.get_all("Classifier") or () if "License ::" in text]
    field = (metadata.get("License") or "").strip().splitlines()
    return ", ".join(classifiers) or (field[0] if field and len(field[0]) < 60 else "see the package")


def main() -> None:
    """Prints the page."""
    project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
    direct = sorted({normal(Requirement(line).name) for line in project["dependencies"]})
    names, waiting = dict.fromkeys(direct, "directly"), list(direct)
    while waiting:
        user = waiting.pop(0)
        try:
            others = needed(user)
        except importlib.metadata.PackageNotFoundError:
            print(f"warning: {user} is not installed", file=sys.stderr)
            del names[user]
            continue
        for other in map(normal, others):
            if other not in names:
                names[other] = f"by {user}"
                waiting.append(other)
    lines = [f"| {name} | {licence(name)} | {why} |" for name, why in names.items()]
    print(HEAD + "\n".join(lines))


def normal(name: str) -> str:
    """A package's name as indexes compare them."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
