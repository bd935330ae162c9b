"""The tensors of a PEFT folder, sorted by what their names say."""

import re
from dataclasses import dataclass, field

from mora_jax.errors import InputError
from mora_jax.interop.peft.config import FORMATS
from mora_jax.interop.peft.format import PREFIX
from mora_jax.interop.safetensors_io import TensorFiles

TIED_BY_NAME = "embed_tokens"  # a table called so is tied by ensure_weight_tying, without its head being named
TOKENS = ".token_adapter."  # where PEFT has the rows of single tokens
SHARED_PREFIX = "base_model."  # of what all modules share, which stands beside the model

# What all types' files call a value of an adapter, and what it is called here.
_KINDS = {
    name.removesuffix(".weight"): kind
    for form in FORMATS
    for table in (form.tensor_names, form.embedding_names)
    for kind, name in table.items()
}
_NAMES = sorted({name.removesuffix(".bias") for name in _KINDS})
_ADAPTER = r"(\.(?!(weight|bias)$)[^.]+)?"  # the adapter's name, as in PEFT's memory
_FACTOR = re.compile(rf"(?P<path>.+)\.(?P<name>{'|'.join(_NAMES)}){_ADAPTER}(\.(?P<leaf>weight|bias))?")
_SHARED_NAMES = sorted({name for form in FORMATS for name in form.shared_names})
_SHARED = re.compile(rf"((base_model\.)?(model\.)?)(?P<name>{'|'.join(_SHARED_NAMES)}){_ADAPTER}")
_BASE = re.compile(r"(?P<path>.+?)(?P<inner>\.base_layer)?\.(?P<leaf>weight|bias)")


@dataclass
class Stored:
    """The tensors of an adapter's file.

    Attributes:
        factors: for each module path, the file's names by the keys of `Format.tensor_names`.
        shared: the file's names of what all modules share, by `Format.shared_names`.
        biases: for each module path, the file's name of its bias.
        weights: for each module path, the file's name of its whole weight.
        frozen: as `weights`, for the copies of base weights that PEFT saves beside adapters on embeddings.
        tokens: for each module path, the file's name of the rows of single tokens.
        others: by module path and name in one, the file's name of what may be another parameter of a module.
    """

    factors: dict[str, dict[str, str]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    biases: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)


def stored_tensors(files: TensorFiles) -> Stored:
    """Sorts the tensors of a file by what they belong to; names may lack PEFT's prefix or carry an adapter's name.

    Raises:
        InputError: a name that is none of PEFT's, or two for one thing.
    """
    stored = Stored()
    for name in sorted(files.shapes):
        if (shared := _SHARED.fullmatch(name)) is not None:
            _put(stored.shared, shared["name"], name, files)
            continue
        group, path, kind = meaning(name)
        if group == "factors":
            _put(stored.factors.setdefault(path, {}), kind, name, files)
        elif not group:
            raise unknown(files, name)
        elif group == "others":
            _put(stored.others, f"{path}.{kind}", name, files)
        else:
            _put(getattr(stored, group), path, name, files)
    return stored


def meaning(name: str) -> tuple[str, str, str]:
    """What a tensor's name says: the attribute of `Stored`, the module path, and what it is of the module.

    The last is a factor's key in `Format.tensor_names`, or the name of another parameter, else empty. The first is
    empty for a name that is none of PEFT's.
    """
    name = name.replace("_orig_mod.", "")  # torch.compile's
    path, inner, rest = name.partition(TOKENS)
    if inner:
        group = "tokens" if rest == "trainable_tokens_delta" else "frozen" if rest == "base_layer.weight" else ""
        return group, path.removeprefix(PREFIX), ""
    factor, base = _FACTOR.fullmatch(name), _BASE.fullmatch(name)
    if factor is not None:
        kind = _KINDS.get(f"{factor['name']}.bias" if factor["leaf"] == "bias" else factor["name"])
        return ("", "", "") if kind is None else ("factors", factor["path"].removeprefix(PREFIX), kind)
    if base is None:
        path, dot, leaf = name.rpartition(".")
        return ("others", path.removeprefix(PREFIX), leaf) if dot else ("", "", "")
    group = "biases" if base["leaf"] == "bias" else "frozen" if base["inner"] else "weights"
    return group, base["path"].removeprefix(PREFIX), ""


def base_name(name: str) -> str:
    """What a file's tensor is called in base checkpoints; a factor's name means nothing there."""
    group, path, leaf = meaning(name)
    ends = {"weights": "weight", "biases": "bias"}
    return f"{path}.{ends.get(group, leaf)}"


def unknown(files: TensorFiles, name: str) -> InputError:
    """The error for a tensor that no adapter has."""
    return InputError(f"{files.folder}: tensor {name} is no part of an adapter of a known kind")


def _put(place: dict[str, str], key: str, name: str, files: TensorFiles) -> None:
    if key in place:
        raise InputError(f"{files.folder}: tensors {place[key]} and {name} are the same factor")
    place[key] = name
