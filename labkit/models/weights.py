"""Where a model's tensors come from, one at a time: the shards of a checkpoint, or a seed.

A source knows its tensors by the names they have in the model. Which names those are, and whether all are
there in the right shapes, is found out from the files' headers before a single weight is read.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from labkit.common.errors import LoadError

logger = logging.getLogger(__name__)

RANDOM_STD = 0.02
"""Standard deviation of random weights: what transformers starts training with."""


class Source(Protocol):
    """Tensors by their names in the model."""

    largest_bytes: int
    """Of one tensor, as stored."""

    def shards(self) -> Iterator[list[str]]:
        """The names, shard by shard; while one is being worked through, its file stays open."""

    def read(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """One tensor in memory of its own, as stored or in ``dtype``."""


class ShardedSource:
    """The safetensors files of a transformers checkpoint.

    Args:
        skeleton: the model on the meta device.
        files: its files.
        name: the model's, for messages.

    Raises:
        LoadError: tensors are missing, or of other shapes than the configuration says.
    """

    def __init__(self, skeleton: nn.Module, files: Sequence[Path], name: str) -> None:
        from safetensors import safe_open

        places = dict(skeleton.state_dict(keep_vars=True))
        rename = renamer(skeleton, places)
        self._files: dict[Path, list[str]] = {}
        self._where: dict[str, tuple[Path, str]] = {}
        self._open: dict[Path, Any] = {}
        self.largest_bytes = 0
        unused = 0
        for path in files:
            with safe_open(path, framework="pt") as file:
                for stored in file.keys():  # noqa: SIM118 - no dictionary
                    key = rename(stored)
                    if key not in places:
                        unused += 1
                        continue
                    shape = tuple(file.get_slice(stored).get_shape())
                    if shape != tuple(places[key].shape):
                        raise LoadError(
                            f"the weights of {name} cannot be loaded: {stored} is {shape}, "
                            f"and its configuration says {tuple(places[key].shape)}"
                        )
                    self._where[key] = path, stored
                    self._files.setdefault(path, []).append(key)
                    size = places[key].numel() * _itemsize(file.get_slice(stored).get_dtype())
                    self.largest_bytes = max(self.largest_bytes, size)
        if missing := _missing(skeleton, places, self._where):
            raise LoadError(
                f"the weights of {name} lack {len(missing)} tensors of its configuration: "
                + ", ".join(missing[:5])
            )
        if unused:
            logger.warning("%s: %d tensors were not used", name, unused)

    def shards(self) -> Iterator[list[str]]:
        """See `Source`."""
        for path, names in self._files.items():
            with self._opened(path):
                yield names

    def read(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """See `Source`. A file that is not open is opened for this one tensor."""
        path, stored = self._where[name]
        with ExitStack() as stack:
            file = self._open.get(path) or stack.enter_context(self._opened(path))
            found = file.get_tensor(stored)
            # a copy: what is read lies in the file's mapping and would keep all of that in memory
            moved = found.to(device=device).to(dtype=dtype or found.dtype)
            return moved.clone() if moved.data_ptr() == found.data_ptr() else moved

    @contextmanager
    def _opened(self, path: Path) -> Iterator[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                self._open[path] = file
                yield file
        except (SafetensorError, OSError) as error:
            raise LoadError(f"{path} is broken: {str(error).splitlines()[0]}") from None
        finally:
            self._open.pop(path, None)


class RandomSource:
    """Weights that no training has seen: normal with deviation 0.02, norms 1, biases of norms 0.

    Each tensor has a seed of its own, made of ``seed`` and its name: it is the same in whatever order, and
    however often, it is read on one kind of device.
    """

    def __init__(self, skeleton: nn.Module, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
        self._places = dict(skeleton.state_dict(keep_vars=True))
        self._seed, self._dtype = seed, dtype
        self._norms = {
            f"{name}.{own}"
            for name, module in skeleton.named_modules()
            if type(module).__name__.endswith("Norm")
            for own in ("weight", "bias")
        }
        self.largest_bytes = max(place.numel() for place in self._places.values()) * dtype.itemsize

    def shards(self) -> Iterator[list[str]]:
        """See `Source`: a single one."""
        yield list(self._places)

    def read(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """See `Source`."""
        place = self._places[name]
        if not place.is_floating_point():
            return torch.zeros(place.shape, dtype=place.dtype, device=device)
        made = torch.empty(place.shape, dtype=self._dtype, device=device)
        if name in self._norms:
            made.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            seed = hashlib.sha256(f"{self._seed} {name}".encode()).digest()[:8]
            generator = torch.Generator(made.device).manual_seed(int.from_bytes(seed, "little") >> 1)
            made.normal_(0.0, RANDOM_STD, generator=generator)
        return made.to(dtype or self._dtype)


def has_plain_names(skeleton: nn.Module) -> bool:
    """Whether each stored tensor is one of the model's. transformers makes the tensors of some architectures,
    such as fused experts, out of several stored ones; those are read by transformers itself."""
    from transformers.core_model_loading import WeightRenaming

    return all(isinstance(conversion, WeightRenaming) for conversion in _conversions(skeleton))


def renamer(skeleton: nn.Module, places: Mapping[str, Any]):
    """A function from a stored name to the model's, as transformers' own loading renames."""
    from transformers.core_model_loading import rename_source_key

    conversions = _conversions(skeleton)
    prefix = getattr(skeleton, "base_model_prefix", None) or None

    def rename(stored: str) -> str:
        return rename_source_key(stored, conversions, [], prefix, places)[0]

    return rename


def _conversions(skeleton: nn.Module) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(skeleton)


def _missing(skeleton: nn.Module, places: Mapping[str, Tensor], found: Mapping[str, Any]) -> list[str]:
    """Names that are neither stored nor tied to one that is."""
    stored = {id(places[name]) for name in found}
    ignored = getattr(skeleton, "_keys_to_ignore_on_load_missing", None) or ()
    return sorted(
        name
        for name, place in places.items()
        if id(place) not in stored and not any(re.search(pattern, name) for pattern in ignored)
    )


def _itemsize(safetensors_dtype: str) -> int:
    """``BF16`` -> 2."""
    digits = re.search(r"\d+", safetensors_dtype)
    return int(digits[0]) // 8 if digits and safetensors_dtype != "BOOL" else 1
