"""Reading the tensors of a folder of safetensors files, single or sharded."""

import json
import re
import reprlib
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mora_jax.errors import InputError
from mora_jax.models.init import read_json

_READABLE = ("F32", "F16", "BF16", "F64")
#: Tables and masks that older files hold beside the weights; models compute them.
_BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias)")


class TensorFiles:
    """The tensors of one or several safetensors files by name, read one at a time.

    Attributes:
        folder: where they lie.
        shapes: the shape of every tensor.
    """

    def __init__(self, folder: Path, files: list[Path]):
        """Opens `files` and reads their headers."""
        self.folder = folder
        self._handles: dict[str, tuple[Any, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in files:
            handle = _open(file)
            for name in handle.keys():
                if _BUFFERS.fullmatch(name):
                    continue
                if name in self._handles:
                    raise InputError(f"{file}: tensor {name} is also in another file of the folder")
                piece = handle.get_slice(name)
                packed = piece.get_dtype() == "U8" and name.endswith(("_blocks", "_scales"))  # see mxfp4.py
                if piece.get_dtype() not in _READABLE and not packed:
                    raise InputError(
                        f"{file}: tensor {name} has dtype {piece.get_dtype()}; only checkpoints in float32, "
                        "float16 or bfloat16 can be read"
                    )
                self._handles[name] = handle, name
                self.shapes[name] = tuple(piece.get_shape())

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype of the file."""
        handle, stored = self._handles[name]
        return handle.get_tensor(stored)

    def read_wide(self, name: str) -> np.ndarray:
        """One tensor in float64 where the file has that, else in float32."""
        tensor = self.read(name)
        return tensor.astype(np.result_type(tensor, np.float32) if tensor.dtype.kind == "f" else np.float32)

    def read_part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of a tensor, one slice (of step 1) an axis; nothing else of the file is read."""
        handle, stored = self._handles[name]
        return handle.get_slice(stored)[index]

    def rename(self, new: Callable[[str], str]) -> None:
        """Calls every tensor by a new name, in place; an `InputError` where two would have the same."""
        seen: dict[str, str] = {}
        for name in sorted(self.shapes):
            if (other := seen.setdefault(new(name), name)) != name:
                what = "are the same one by an older and a new name"
                raise InputError(f"{self.folder}: tensors {other} and {name} {what}")
        self._handles = {new(name): handle for name, handle in self._handles.items()}
        self.shapes = {new(name): shape for name, shape in self.shapes.items()}


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="np")
    except FileNotFoundError:
        raise InputError(f"{file} does not exist, but the index names it: download the folder again") from None
    except SafetensorError as error:
        reason = textwrap.shorten(str(error), 150, placeholder="...")
        raise InputError(f"{file} is not a complete safetensors file ({reason}): download it again") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error}") from None


def open_checkpoint(folder: Path, stem: str = "model") -> TensorFiles:
    """The weights of a HuggingFace model folder, or those of an adapter's, whose files begin with `adapter_model`.

    Raises:
        InputError: when there are none, or only pickled ones, or a shard is missing or broken.
    """
    files = TensorFiles(folder, checkpoint_files(folder, stem))
    absent = [name for name in _weight_map(folder, stem) if name not in files]
    if absent:
        raise InputError(f"{folder}: {len(absent)} tensors of the index are in no file: {', '.join(absent[:3])}")
    return files


def checkpoint_files(folder: Path, stem: str = "model") -> list[Path]:
    """The files that hold the weights of a folder, as for `open_checkpoint`.

    Raises:
        InputError: when there are none, or only pickled ones.
    """
    if (folder / f"{stem}.safetensors").exists():
        return [folder / f"{stem}.safetensors"]
    if (folder / f"{stem}.safetensors.index.json").exists():
        return [folder / file for file in sorted(set(_weight_map(folder, stem).values()))]
    package, patterns = ("transformers", ("*.bin", "*.pt", "*.pth")) if stem == "model" else ("peft", (f"{stem}*.bin",))
    pickled = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
    if pickled:
        raise InputError(
            f"{folder} has only pickled weights ({', '.join(pickled[:3])}), which can run code when loaded: "
            f"convert them to safetensors first (load with {package}, then save_pretrained)"
        )
    raise InputError(f"{folder} has no {stem}.safetensors, nor {stem}.safetensors.index.json")


def weight_bytes(folder: Path) -> int:
    """The size of the safetensors files in a folder of a model or an adapter."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _weight_map(folder: Path, stem: str) -> dict[str, str]:
    """The index's table of tensor names to files; empty where one file holds all."""
    index = folder / f"{stem}.safetensors.index.json"
    if (folder / f"{stem}.safetensors").exists() or not index.exists():
        return {}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index} has no weight_map of tensor names to files")
    outside = sorted({file for file in weight_map.values() if Path(file).name != file or not file or len(file) > 255})
    if outside:
        raise InputError(f"{index} names what is no file of the folder: {', '.join(map(reprlib.repr, outside[:3]))}")
    return weight_map


_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: np.dtype | type = np.float32,
) -> None:
    """Writes tensors of one dtype as a safetensors file that torch's tools read.

    Args:
        path: the file.
        shapes: of every tensor, by name, in the order in which they are written.
        tensors: names and arrays in the same order; each is taken only when the one before is on the disk.
        dtype: float64, float32, float16 or bfloat16; arrays are cast to it.
    """
    dtype = np.dtype(dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": _NAMES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    expected = iter(shapes.items())
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, array in tensors:
            assert (name, array.shape) == next(expected), f"{name} is not what the header says"
            # As bytes: numpy's buffers know no bfloat16.
            file.write(np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data)
        assert next(expected, None) is None, "the header promises more tensors"
