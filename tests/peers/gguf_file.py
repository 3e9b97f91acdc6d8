"""Reading GGUF, the file format of llama.cpp: its facts, and tensors of the types that small models come in.

Layout (version 3, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): the facts as key and value, a list of
tensors, then their bytes, each aligned. A tensor's sizes stand innermost first: ``[K, N]`` in the file is ``[N, K]``
here. Quantized types are rows of blocks of 32 values:

| type | bytes of a block | a value |
|---|---|---|
| Q4_0 | fp16 d, 16 bytes of codes | (code - 8) * d |
| Q4_1 | fp16 d, fp16 m, 16 bytes of codes | code * d + m |
| Q8_0 | fp16 d, 32 int8 | code * d |

Byte j of a block's codes holds value j in its low half, value j + 16 in its high half.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labkit.common.errors import LabError

BLOCK = 32
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TYPES = {
    0: ("F32", np.dtype("<f4"), 1),
    1: ("F16", np.dtype("<f2"), 1),
    2: ("Q4_0", np.dtype([("d", "<f2"), ("codes", "u1", 16)]), BLOCK),
    3: ("Q4_1", np.dtype([("d", "<f2"), ("m", "<f2"), ("codes", "u1", 16)]), BLOCK),
    8: ("Q8_0", np.dtype([("d", "<f2"), ("codes", "i1", 32)]), BLOCK),
}
"""Number -> name, one block, values in a block."""


class GGUFError(LabError):
    """A file that is no GGUF, damaged, or of a type that is not read here."""


@dataclass(frozen=True)
class Quantized:
    """codes [N, K] uint8, scale and offset [N, K/32] fp32: a value is ``code * scale + offset``."""

    codes: np.ndarray
    scale: np.ndarray
    offset: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """[N, K] fp32."""
        groups = self.codes.reshape(*self.scale.shape, BLOCK).astype(np.float32)
        return (groups * self.scale[..., None] + self.offset[..., None]).reshape(self.codes.shape)


class GGUF:
    """One file, mapped into memory.

    Attributes:
        facts: key -> number, string or list.
        types: tensor -> the name of its type.

    Raises:
        GGUFError: see there.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise GGUFError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:
            raise GGUFError(f"{path}: cannot be read ({error})") from None
        self._at = 0
        try:
            self._read_head()
        except struct.error:
            raise GGUFError(f"{path}: damaged: it ends within its head") from None

    def _read_head(self) -> None:
        if self._bytes[:4] != b"GGUF":
            raise GGUFError(f"{self.path}: no GGUF file: it does not begin with these letters")
        self._at = 4
        version = self._number("I")
        if version not in (2, 3):
            raise GGUFError(f"{self.path}: GGUF of version {version}; 2 and 3 are read here")
        tensors, facts = self._number("Q"), self._number("Q")
        self.facts = {self._string(): self._value(self._number("I")) for _ in range(facts)}
        self._places: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensors):
            name = self._string()
            sizes = tuple(self._number("Q") for _ in range(self._number("I")))[::-1]
            self._places[name] = (sizes, self._number("I"), self._number("Q"))
        step = self.facts.get("general.alignment", 32)
        self._start = -(-self._at // step) * step
        self.types = {
            name: _TYPES[number][0] if number in _TYPES else f"type {number}"
            for name, (_, number, _) in self._places.items()
        }

    def tensor(self, name: str) -> np.ndarray:
        """The tensor's values, fp32."""
        found = self._blocks(name)
        kind, sizes = self.types[name], self._places[name][0]
        if kind in ("F32", "F16"):
            return found.astype(np.float32).reshape(sizes)
        if kind == "Q8_0":
            scale = found["d"].astype(np.float32)[:, None]
            return (found["codes"].astype(np.float32) * scale).reshape(sizes)
        return self.quantized(name).values

    def quantized(self, name: str) -> Quantized:
        """The codes and scales of a tensor [N, K] of 4 bits. Raises `GGUFError` for one of another type."""
        found = self._blocks(name)
        if self.types[name] not in ("Q4_0", "Q4_1"):
            raise GGUFError(f"{self.path}: {name} is {self.types[name]}, not one of 4 bits")
        sizes = self._places[name][0]
        codes = np.concatenate((found["codes"] & 15, found["codes"] >> 4), axis=1)
        scale = found["d"].astype(np.float32).reshape(sizes[0], -1)
        offset = -8 * scale
        if self.types[name] == "Q4_1":
            offset = found["m"].astype(np.float32).reshape(sizes[0], -1)
        return Quantized(codes.reshape(sizes), scale, offset)

    def _blocks(self, name: str) -> np.ndarray:
        if name not in self._places:
            raise GGUFError(f"{self.path}: there is no tensor {name}")
        sizes, number, offset = self._places[name]
        if number not in _TYPES:
            known = ", ".join(kind for kind, _, _ in _TYPES.values())
            raise GGUFError(f"{self.path}: {name} is of {self.types[name]}; read here are {known}")
        _, block, values = _TYPES[number]
        count = int(np.prod(sizes)) // values
        try:
            return np.frombuffer(self._bytes, block, count, self._start + offset)
        except ValueError:
            raise GGUFError(f"{self.path}: damaged: it ends before {name} does") from None

    def _number(self, kind: str) -> Any:
        (value,) = struct.unpack_from("<" + kind, self._bytes, self._at)
        self._at += struct.calcsize("<" + kind)
        return value

    def _string(self) -> str:
        length = self._number("Q")
        if self._at + length > len(self._bytes):
            raise struct.error
        raw = self._bytes[self._at : self._at + length]
        self._at += length
        return raw.decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise GGUFError(f"{self.path}: damaged: a fact is of the unknown type {kind}")
        inner, count = self._number("I"), self._number("Q")
        return [self._value(inner) for _ in range(count)]
