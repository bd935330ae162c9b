"""Task files: TOML that says how a row becomes a prompt, what is scored and which metrics are computed.

    type = "multiple_choice"                  # what is done with an example, see `FIELDS`
    metrics = ["acc", "acc_norm"]             # of those that the type has; left out: the type's own
    description = "Questions.\\n\\n"            # before the first shot, a template
    delimiter = " "                           # between prompt and answer
    group = "subject"                         # shots come from rows that agree in this column

    [[rows]]                                  # a shape of rows; the first whose columns are all there is taken
    prompt = "Question: {{ question }}\\nAnswer:"
    choices = "choices"
    answer = "label"

`prompt`, `description`, `target`, `continuation` and `text` are Jinja templates over a row's columns; `choices`,
`names`, `contexts` and `answer` are Jinja expressions, whose value is taken as it is. `labels` in them stands for all
answers of the file, sorted, unless rows have a column of that name. A null is false in them, and `is none`; a template
that would write it, or an expression that would compare it, refuses the row.
"""

import functools
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox

from mora_jax.data.read.validate import absent
from mora_jax.data.templates.jinja import REFUSALS
from mora_jax.errors import InputError
from mora_jax.paths import expanded

FOLDER = Path(__file__).parent
#: What a shape of rows says for each type of task; what stands behind the bar may be left out.
FIELDS = {
    "multiple_choice": (("prompt", "choices", "answer"), ("names",)),
    "partial": (("contexts", "continuation", "answer"), ()),
    "continuation": (("prompt", "target"), ()),
    "text": (("text",), ()),
    "generate": (("prompt", "answer"), ()),
}
TEMPLATES = ("prompt", "continuation", "target", "text")
LABELS = "labels"


class Null(jinja2.StrictUndefined):
    """A null in a row: false, and an error wherever a text or a number would be made of it."""

    def __bool__(self) -> bool:  # type: ignore[override]
        """False, as null is in Jinja."""
        return False

    def __repr__(self) -> str:
        """As in JSON."""
        return "null"


_ENVIRONMENT = jinja2.sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False
)
_ENVIRONMENT.tests["none"] = lambda value: value is None or isinstance(value, Null)


@dataclass(frozen=True)
class Shape:
    """How rows of some columns are read.

    Attributes:
        sources: the templates and expressions of `FIELDS`, by name.
        columns: those that they read.
        uses_labels: whether they ask for all answers of the file, where rows have no column of that name.
    """

    sources: Mapping[str, str]
    columns: frozenset[str]
    uses_labels: bool

    def read(self, name: str, row: Mapping[str, Any], where: str, labels: Collection[Any] = ()) -> Any:
        """A field's value for a row; text for templates.

        Raises:
            InputError: the row has nothing that its template or expression could use.
        """
        compiled = _compiled(self.sources[name], name in TEMPLATES)
        try:
            value = compiled({LABELS: list(labels), **{key: _nulls_named(value, key) for key, value in row.items()}})
        except REFUSALS as error:
            raise InputError(f"{where}: no {name} can be made of this row: {' '.join(str(error).split())}") from None
        if isinstance(value, jinja2.Undefined):
            lack = value._undefined_message if isinstance(value, Null) else f"{self.sources[name]} is not there"
            raise InputError(f"{where}: no {name} can be made of this row: {lack}")
        return value


@dataclass(frozen=True)
class Task:
    """What a task file says.

    Attributes:
        name: of the file.
        type: a name in `FIELDS`.
        shapes: of rows, in the order in which they are tried.
        metrics: names; () for those of the type.
        description: template of what stands before the first shot.
        delimiter: between prompt and answer.
        group: the column in which shots agree with the example; None: any row may be a shot.
        stop: texts that end a generated answer, and are no part of it.
        max_new_tokens: most tokens of a generated answer.
        chat: whether prompts are a user's message in the model's chat template.
        aliases: other names.
    """

    name: str
    type: str
    shapes: tuple[Shape, ...]
    metrics: tuple[str, ...] = ()
    description: str = ""
    delimiter: str = " "
    group: str | None = None
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    chat: bool = False
    aliases: tuple[str, ...] = ()

    def shape_of(self, row: Mapping[str, Any], where: str) -> Shape:
        """The first shape whose columns a row has, if possible without a null.

        Raises:
            InputError: it has none; names the columns.
        """
        fitting = [shape for shape in self.shapes if shape.columns <= row.keys()]
        if fitting:
            return min(fitting, key=lambda shape: any(absent(row[column]) for column in shape.columns))
        wanted = "; or ".join(dict.fromkeys(", ".join(sorted(shape.columns)) for shape in self.shapes))
        raise InputError(
            f"{where}: task {self.name} needs the columns {wanted}; this row has {', '.join(map(str, row))}"
        )

    def describe(self, row: Mapping[str, Any], where: str) -> str:
        """What stands before the first shot."""
        return Shape({"prompt": self.description}, frozenset(), False).read("prompt", row, where)


def task_names() -> list[str]:
    """The tasks that are there."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_task(name: str) -> Task:
    """Reads a task.

    Args:
        name: of a task that is there, one of its other names, or a path to a user's .toml file.

    Raises:
        InputError: there is none, or its file says something that isn't understood.
    """
    if name.endswith(".toml"):
        path = expanded(name)
        if not path.is_file():
            raise InputError(f"there is no task file {name}")
        return _read(path)
    tasks = {known: _read(FOLDER / f"{known}.toml") for known in task_names()}
    for task in tasks.values():
        if name in (task.name, *task.aliases):
            return task
    raise InputError(f"there is no task {name!r}; there are {', '.join(tasks)}, and task files NAME.toml")


@functools.cache
def _read(path: Path) -> Task:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} is no TOML file: {error}") from None
    rows = content.pop("rows", None)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or not rows:
        raise InputError(f"{path}: a task file needs at least one [[rows]] that says how rows are read")
    kind = content.get("type")
    if kind not in FIELDS:
        raise InputError(f"{path}: type must be one of {', '.join(FIELDS)}, found {kind!r}")
    settings: dict[str, Any] = {}
    for field in fields(Task):
        if field.name in ("name", "shapes") or field.name not in content:
            continue
        value = content.pop(field.name)
        if isinstance(field.default, tuple):
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise InputError(f"{path}: {field.name} must be a list of texts, found {value!r}")
            value = tuple(value)
        elif field.name not in ("type", "group") and type(value) is not type(field.default):
            raise InputError(f"{path}: {field.name} must be a {type(field.default).__name__}, found {value!r}")
        settings[field.name] = value
    if content:
        known = ", ".join(field.name for field in fields(Task) if field.name not in ("name", "shapes"))
        raise InputError(f"{path}: unknown key {', '.join(content)}; a task file has {known} and [[rows]]")
    if settings.get("max_new_tokens", 1) < 1:
        raise InputError(f"{path}: max_new_tokens must be at least 1")
    shapes = tuple(_shape(row, kind, path, settings) for row in rows)
    return Task(path.stem, shapes=shapes, **settings)


def _shape(row: dict[str, Any], kind: str, path: Path, settings: Mapping[str, Any]) -> Shape:
    needed, optional = FIELDS[kind]
    if missing := [name for name in needed if name not in row]:
        raise InputError(f"{path}: [[rows]] lacks {', '.join(missing)}; {kind} needs {', '.join(needed)}")
    if unknown := [name for name in row if name not in (*needed, *optional)]:
        raise InputError(f"{path}: [[rows]] has {', '.join(unknown)}; {kind} knows {', '.join((*needed, *optional))}")
    columns: set[str] = set()
    texts = [(name, text, name in TEMPLATES) for name, text in row.items()]
    texts.append(("description", settings.get("description", ""), True))
    for name, text, is_template in texts:
        if not isinstance(text, str):
            raise InputError(f"{path}: {name} must be a text, found {text!r}")
        try:
            _compiled(text, is_template)
            columns |= jinja2.meta.find_undeclared_variables(
                _ENVIRONMENT.parse(text if is_template else "{{ " + text + " }}")
            )
        except jinja2.TemplateSyntaxError as error:
            raise InputError(f"{path}: {name} is not understood by Jinja: {error.message}") from None
    if settings.get("group"):
        columns.add(settings["group"])
    return Shape(row, frozenset(columns - {LABELS}), LABELS in columns)


def _nulls_named(value: Any, name: str) -> Any:
    """A row's value with `Null`, which says where it stands, for each null in it."""
    if absent(value):
        return Null(hint=f"column {name} is null")
    if isinstance(value, Mapping):
        return {key: _nulls_named(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nulls_named(item, f"{name}[{number}]") for number, item in enumerate(value)]
    return value


@functools.cache
def _compiled(source: str, is_template: bool) -> Callable[[Mapping[str, Any]], Any]:
    if is_template:
        return _ENVIRONMENT.from_string(source).render
    return _ENVIRONMENT.compile_expression(source, undefined_to_none=False)
