"""The formats by name, and what each of them provides."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from labkit.loading.export import compressed_tensors, gptq
from labkit.loading.export.integers import AffineLinear, Integers, Kind
from labkit.loading.export.llama_cpp import rules as gguf
from labkit.loading.export.refusal import Refusal

GGUF = "gguf"


class Format(Protocol):
    """A module of this folder that writes one format. ``kinds``: Linear -> kind, of all that are written quantized.

    Attributes:
        NEAREST: scheme -> in words, the nearest schemes that the format can express; ``*`` for any other.
        EMBEDDINGS: whether the format holds an embedding of 8 bits.
    """

    NEAREST: Mapping[str, str]
    EMBEDDINGS: bool

    def cannot_hold(self, name: str, role: str, module: AffineLinear) -> Refusal | None:
        """Why the format cannot store this Linear; None if it can."""

    def notes(self, kinds: Mapping[str, Kind]) -> list[str]:
        """Notes for the readers of this export, in sentences."""


class FolderFormat(Format, Protocol):
    """A format that is a folder in transformers' layout."""

    def written_names(self, name: str) -> tuple[str, ...]:
        """The Linears into which the Linear ``name`` is split, by equal shares of its output."""

    def tensors_of(self, integers: Integers, kinds: Mapping[str, Kind]) -> dict[str, Tensor]:
        """The format's tensors for one weight, by their names in the module."""

    def configuration(self, kinds: Mapping[str, Kind], ignore: list[str]) -> dict[str, Any]:
        """``quantization_config`` of ``config.json``; ``ignore``: the Linears that are not quantized."""

    def files(self, config: dict[str, Any]) -> dict[str, Any]:
        """Further JSON files of the format, by name."""


FOLDER_FORMATS: dict[str, FolderFormat] = {"compressed-tensors": compressed_tensors, "gptq": gptq}
FORMATS: dict[str, Format] = {**FOLDER_FORMATS, GGUF: gguf}
