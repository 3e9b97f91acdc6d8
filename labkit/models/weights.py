"""Sources of a model's tensors, read one at a time: the shards of a checkpoint, or a seed."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from labkit.common.errors import LoadError
from labkit.models.experts import is_unfused

logger = logging.getLogger(__name__)

RANDOM_STD = 0.02
"""Standard deviation of random weights: the one transformers initializes models with."""


class Source(Protocol):
    """Tensors by their names in the model."""

    largest_bytes: int
    """Size of the largest tensor, as stored."""

    def shards(self) -> Iterator[list[str]]:
        """The tensors' names, shard by shard; a shard's file stays open while the caller works through it."""

    def read(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """A tensor in its own memory, as stored or in ``dtype``."""


class ShardedSource:
    """The safetensors files of a transformers checkpoint.

    The constructor checks all names and shapes against the files' headers, before any weight is read.

    Args:
        skeleton: the model on the meta device.
        files: the checkpoint's safetensors files.
        name: the model's name, for messages.

    Raises:
        LoadError: tensors are missing, or their shapes differ from the configuration's.
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
                for stored in file.keys():  # noqa: SIM118 - the file is not a dictionary
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
        """See `Source`. Opens the file for this tensor if it is not open."""
        path, stored = self._where[name]
        with ExitStack() as stack:
            file = self._open.get(path) or stack.enter_context(self._opened(path))
            tensor = file.get_tensor(stored)
            # a copy: the tensor lies in the file's memory map and would keep the whole map in memory
            moved = tensor.to(device=device).to(dtype=dtype or tensor.dtype)
            return moved.clone() if moved.data_ptr() == tensor.data_ptr() else moved

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
    """Random weights: normal with standard deviation 0.02; norms have weight 1 and bias 0.

    Each tensor's own seed derives from ``seed`` and its name, so on one kind of device a tensor is the same in
    whatever order and however often it is read.
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
        """See `Source`: a single shard."""
        yield list(self._places)

    def read(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """See `Source`."""
        place = self._places[name]
        if not place.is_floating_point():
            return torch.zeros(place.shape, dtype=place.dtype, device=device)
        weight = torch.empty(place.shape, dtype=self._dtype, device=device)
        if name in self._norms:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            seed = hashlib.sha256(f"{self._seed} {name}".encode()).digest()[:8]
            generator = torch.Generator(weight.device).manual_seed(int.from_bytes(seed, "little") >> 1)
            weight.normal_(0.0, RANDOM_STD, generator=generator)
        return weight.to(dtype or self._dtype)


def has_plain_names(skeleton: nn.Module) -> bool:
    """Whether each stored tensor becomes exactly one tensor of the model. For some architectures, such as those
    with fused experts, transformers merges several stored tensors; then transformers itself must load them."""
    from transformers.core_model_loading import WeightRenaming

    return not is_unfused(skeleton) and all(
        isinstance(conversion, WeightRenaming) for conversion in _conversions(skeleton)
    )


def renamer(skeleton: nn.Module, places: Mapping[str, Any]):
    """A function from a stored name to the model's name, as transformers renames when it loads."""
    from transformers.core_model_loading import rename_source_key

    conversions = _conversions(skeleton)
    prefix = getattr(skeleton, "base_model_prefix", None) or None

    def rename(stored: str) -> str:
        return rename_source_key(stored, conversions, [], prefix, places)[0]

    return rename


def _conversions(skeleton: nn.Module) -> list[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(skeleton)


def _missing(skeleton: nn.Module, places: Mapping[str, Tensor], stored_names: Iterable[str]) -> list[str]:
    """Names of tensors that are neither stored nor tied to a stored tensor."""
    stored = {id(places[name]) for name in stored_names}
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
