"""The safetensors files of a checkpoint: the index that lists them, and their tensors by the names stored there."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from labkit.common.errors import HubError, LoadError
from labkit.models.hub import _first_line, model_file, read_json
from labkit.models.spec import ModelSpec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Header:
    """A stored tensor's file, shape and dtype (safetensors' name: ``BF16``, ``F8_E4M3``, ``I32``)."""

    path: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        digits = re.search(r"\d+", self.dtype)
        itemsize = int(digits[0]) // 8 if digits and self.dtype != "BOOL" else 1
        return math.prod(self.shape) * itemsize


class WeightFiles:
    """The tensors of several safetensors files; the constructor reads the files' headers only.

    Args:
        paths: the files, by the names that ``weight_map`` uses.
        weight_map: tensor name -> file name, of the checkpoint's index; None for a single file without an index.

    Attributes:
        headers: tensor name -> header. The index decides on a tensor that stands in several files.
        unlisted: names of tensors that the index does not list.

    Raises:
        LoadError: a file is missing or broken, or lacks a tensor that the index places there.
    """

    def __init__(self, paths: Mapping[str, Path], weight_map: Mapping[str, str] | None = None) -> None:
        from safetensors import SafetensorError, safe_open

        self.headers: dict[str, Header] = {}
        self.unlisted: list[str] = []
        self._open: dict[Path, Any] = {}
        self._lock = (
            threading.Lock()
        )  # transformers reads from several threads, and safetensors' files bear one
        for file_name, path in paths.items():
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - the file is not a dictionary
                        if weight_map is not None and name not in weight_map:
                            self.unlisted.append(name)
                        elif weight_map is None or weight_map[name] == file_name:
                            part = file.get_slice(name)
                            self.headers[name] = Header(path, tuple(part.get_shape()), part.get_dtype())
            except (SafetensorError, OSError) as error:
                raise LoadError(f"{path} is broken or cut off: {_first_line(error)}") from None
        if lacking := [name for name in weight_map or () if name not in self.headers]:
            raise LoadError(
                f"{paths[weight_map[lacking[0]]]} has no {lacking[0]}, which {INDEX} places there"
                + (f" ({len(lacking)} such tensors)" if len(lacking) > 1 else "")
            )

    def read(self, name: str) -> Tensor:
        """A tensor that lies in its file's memory map. Opens the file for this tensor if it is not open."""
        path = self.headers[name].path
        with self._lock, ExitStack() as stack:
            file = self._open.get(path) or stack.enter_context(self.opened(path))
            return file.get_tensor(name)

    def read_all(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Several tensors; each file is opened once."""
        by_path: dict[Path, list[str]] = {}
        for name in names:
            by_path.setdefault(self.headers[name].path, []).append(name)
        tensors = {}
        for path, group in by_path.items():
            with self.opened(path):
                tensors |= {name: self.read(name) for name in group}
        return tensors

    @contextmanager
    def opened(self, path: Path) -> Iterator[Any]:
        """Keep a file open, for reading several of its tensors."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                self._open[path] = file
                yield file
        except (SafetensorError, OSError) as error:
            raise LoadError(f"{path} is broken: {_first_line(error)}") from None
        finally:
            self._open.pop(path, None)


def weight_files(spec: ModelSpec) -> WeightFiles:
    """The files that hold a model's weights, from the index if there is one; those of the hub are downloaded.

    Raises:
        LoadError: a file is missing or broken, or it cannot be told which files are meant.
    """
    weight_map = _weight_map(spec)
    names = [SINGLE] if weight_map is None else sorted(set(weight_map.values()))
    if spec.folder is not None:
        _check_folder(spec.folder, names)
    return WeightFiles({name: model_file(spec, name) for name in names}, weight_map)


def _check_folder(folder: Path, names: list[str]) -> None:
    for name in names:
        if not (folder / name).is_file():
            pickles = sorted(path.name for path in folder.glob("*.bin"))
            others = sorted(path.name for path in folder.glob("*.safetensors"))
            hint = f" ({pickles[0]} is a pickle, which is never loaded: convert it)" if pickles else ""
            if others and name == SINGLE:
                hint = f" and no {INDEX}, only {', '.join(others[:3])}"
            raise LoadError(f"{folder} has no {name}{hint}: weights are read from safetensors only")
    if SINGLE not in names and (folder / SINGLE).is_file():
        raise LoadError(
            f"{folder} has {SINGLE} beside the files that its {INDEX} names: it cannot be told which are meant, "
            "remove what is not"
        )


def _weight_map(spec: ModelSpec) -> dict[str, str] | None:
    """Tensor name -> file name, from a checkpoint's index; None without one.

    Raises:
        LoadError: the index is broken, or names something other than safetensors files of the folder.
    """
    if spec.folder is not None and not (spec.folder / INDEX).is_file():
        return None
    try:
        weight_map = read_json(spec, INDEX).get("weight_map")
    except HubError:
        return None
    where = spec.folder / INDEX if spec.folder is not None else f"{INDEX} of {spec.source}"
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError(f"{where} is broken: weight_map must be an object, from tensor names to file names")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise LoadError(f"{where} is broken: {tensor} is in {name!r}, which is no .safetensors file")
        if not re.fullmatch(r"\w[\w.-]*(?:/\w[\w.-]*)*", name):
            raise LoadError(f"{where} is broken: {tensor} is in {name!r}, which is not in its folder")
    return weight_map
