"""Web pages without scripts, which need nothing beside them."""

import os
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from mora_jax.errors import InputError
from mora_jax.paths import local_path, new_file


@cache
def page_template(name: str, folder: Path) -> Template:
    """A page's template in `folder`, on the base that all pages share: `base.html.jinja` beside this file.

    Whatever is put into it is escaped, and a name that it isn't given is an error.
    """
    environment = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["percent"] = lambda value: f"{value:.1%}"
    return environment.get_template(name)


def page_file(given: str) -> Path:
    """Where a command writes its page; refuses what can't be, before the work begins.

    Raises:
        InputError: it is a folder, or a file that is no web page, or its folder isn't there.
    """
    path = local_path(given)
    if path.is_dir():
        raise InputError(f"--html {path}: is a folder; name a file")
    if path.exists() and not path.read_bytes()[:100].lstrip().lower().startswith(b"<!doctype html"):
        raise InputError(f"--html {path}: is no web page, and would be lost; name another file")
    if not path.parent.is_dir():
        raise InputError(f"--html {path}: there is no folder {path.parent}; make it first")
    return path


def write_page(path: str | os.PathLike[str], page: str) -> None:
    """Writes a page, whole or not at all.

    Args:
      path: the file.
      page: HTML, such as `make_page` returns.

    Raises:
      InputError: the file can't be written.
    """
    with new_file(path) as file:
        file.write_text(page, encoding="utf-8")
