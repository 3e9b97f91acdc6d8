"""Sources of a model's tensors, read one at a time: a checkpoint's files, or a seed."""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from labkit.common.errors import LoadError
from labkit.models.experts import is_unfused
from labkit.models.stored import StoredTensor

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
    """The tensors of a transformers checkpoint.

    The constructor checks all names and shapes against the files' headers, before any weight is read.

    Args:
        skeleton: the model on the meta device.
        stored: the checkpoint's tensors (`labkit.models.stored`).
        name: the model's name, for messages.
        unlisted: names of tensors in the files that the checkpoint's index does not list.

    Raises:
        LoadError: tensors are missing, differ in shape from the configuration's, or contradict each other.
    """

    def __init__(
        self,
        skeleton: nn.Module,
        stored: Mapping[str, StoredTensor],
        name: str,
        unlisted: Collection[str] = (),
    ) -> None:
        places = dict(skeleton.state_dict(keep_vars=True))
        names = stored_names(skeleton, stored, name)
        copies = copies_of_ties(skeleton, stored, name)
        self._tensors = {key: stored[names[key]] for key in names if key not in copies}
        for key, tensor in self._tensors.items():
            if tensor.shape != tuple(places[key].shape):
                raise LoadError(
                    f"the weights of {name} cannot be loaded: {names[key]} is {tensor.shape}, "
                    f"and its configuration says {tuple(places[key].shape)}"
                )
            if tensor.is_integer and places[key].is_floating_point():
                raise LoadError(
                    f"the weights of {name} cannot be loaded: {names[key]} holds integers "
                    f"({tensor.header.dtype}), and its config.json does not say how they are quantized"
                )
        used = set(names.values())
        unused = [*unlisted, *(other for other in stored if other not in used)]
        check_unused(skeleton, unused, used, name)
        if missing := _missing(skeleton, places, self._tensors):
            others = f"; not used are {len(unused)}, such as {unused[0]}" if unused else ""
            raise LoadError(
                f"the weights of {name} lack {len(missing)} tensors of its configuration: "
                + ", ".join(missing[:5])
                + others
            )
        if unused:
            logger.warning("%s: %d tensors were not used, such as %s", name, len(unused), unused[0])
        self.largest_bytes = max((tensor.bytes for tensor in self._tensors.values()), default=0)

    def shards(self) -> Iterator[list[str]]:
        """See `Source`."""
        by_path: dict[Path, list[str]] = {}
        for key, tensor in self._tensors.items():
            by_path.setdefault(tensor.path, []).append(key)
        for path, keys in by_path.items():
            with self._tensors[keys[0]].files.opened(path):
                yield keys

    def read(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """See `Source`. Opens the file for this tensor if it is not open."""
        tensor = self._tensors[name].read(device)
        # a copy: the tensor lies in the file's memory map and would keep the whole map in memory
        moved = tensor.to(dtype=dtype or tensor.dtype)
        mapped = self._tensors[name].layout is None and tensor.device.type == "cpu"
        return moved.clone() if mapped and moved.data_ptr() == tensor.data_ptr() else moved


def stored_names(skeleton: nn.Module, stored: Iterable[str], model: str) -> dict[str, str]:
    """Name of a tensor in the model -> its stored name, for every stored tensor that the model has a place for.

    Raises:
        LoadError: two stored tensors are for one place.
    """
    places = dict(skeleton.state_dict(keep_vars=True))
    rename = renamer(skeleton, places)
    names: dict[str, str] = {}
    for name in stored:
        key = rename(name)
        if key not in places:
            continue
        if key in names:
            raise LoadError(f"the weights of {model} hold {key} twice: as {names[key]} and as {name}")
        names[key] = name
    return names


def copies_of_ties(skeleton: nn.Module, stored: Mapping[str, StoredTensor], model: str) -> set[str]:
    """Names of tensors that the configuration ties to another one that is stored too, with equal values.

    Raises:
        LoadError: their values differ. Readers disagree on what is meant, so the lab does not choose.
    """
    places = dict(skeleton.state_dict(keep_vars=True))
    count = Counter(id(place) for place in places.values())
    tied = {key: place for key, place in places.items() if count[id(place)] > 1}
    rename = renamer(skeleton, places)
    first: dict[int, tuple[str, str]] = {}
    copies = set()
    for name in stored if tied else ():
        if (key := rename(name)) not in tied:
            continue
        original, original_name = first.setdefault(id(places[key]), (key, name))
        if original == key:
            continue
        left, right = stored[original_name].read(), stored[name].read()
        if left.shape != right.shape or not torch.equal(left.to(right.dtype), right):
            raise LoadError(
                f"the configuration of {model} ties {key} and {original}, and its files hold two different tensors: "
                "set tie_word_embeddings to false in its config.json to use both, or remove one of them"
            )
        copies.add(key)
    return copies


def check_unused(skeleton: nn.Module, unused: Iterable[str], used: Collection[str], model: str) -> None:
    """Refuse a stored tensor that is not used although it belongs to a weight that is, such as its scale.

    Raises:
        LoadError: without the tensor the weight is not what its maker stored.
    """
    ignored = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
    computed = {
        key for module in skeleton.modules() for key in module._non_persistent_buffers_set
    }  # stored by older versions of transformers, and computed by newer ones
    for name in unused:
        if name.rpartition(".")[2] in computed or any(re.search(pattern, name) for pattern in ignored):
            continue
        modules = [name[: match.start()] for match in re.finditer(r"\.", name)]
        leaf = name.rpartition(".")[2]
        weights = [name.removesuffix(leaf) + leaf[: match.start()] for match in re.finditer("_", leaf)]
        owners = (*weights, *modules, *(f"{module}.weight" for module in modules))
        if (owner := next((owner for owner in owners if owner in used), None)) is not None:
            raise LoadError(
                f"the weights of {model} hold {name}, which belongs to {owner} and has no place in the model: "
                "without it the answers would be wrong. Does its config.json lack its quantization_config?"
            )


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
