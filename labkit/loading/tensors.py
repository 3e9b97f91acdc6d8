"""Writes a model's tensors to safetensors files and reads them back: packed as in memory, in plain byte order.

All parameters and buffers are stored, computed buffers (rotary frequencies) too; a shared tensor is stored once.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from labkit.common.errors import CheckpointError
from labkit.quantization import QuantizedLinear
from labkit.quantization.int8_storage import StoredInt8
from labkit.quantization.module_tensors import assign_tensors, module_tensors

SHARD_BYTES = 2_000_000_000
STEM = "packed"  # not "model", so that libraries that cannot read packed tensors find no weights


@dataclass(frozen=True)
class Entry:
    """One tensor of a model: the module that holds it, and its name there."""

    module: nn.Module
    prefix: str
    attribute: str

    @property
    def key(self) -> str:
        return self.prefix + self.attribute

    @property
    def tensor(self) -> Tensor:
        return getattr(self.module, self.attribute)

    @property
    def bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


def tensor_entries(model: nn.Module) -> tuple[list[Entry], dict[str, str]]:
    """Every parameter and buffer of ``model`` once, and the other names of those held in several places."""
    entries: list[Entry] = []
    ties: dict[str, str] = {}
    first: dict[int, str] = {}
    for entry in _places(model):
        key = first.setdefault(id(entry.tensor), entry.key)
        if key == entry.key:
            entries.append(entry)
        else:
            ties[entry.key] = key
    return entries, ties


def write_tensors(
    model: nn.Module, folder: Path, *, shard_bytes: int = SHARD_BYTES, progress: bool = True
) -> dict[str, str]:
    """Write all tensors of ``model`` into ``folder``, about ``shard_bytes`` per file at most; returns the ties.

    Memory holds the copy of one shard at a time.
    """
    entries, ties = tensor_entries(model)
    shards = _plan_shards(entries, shard_bytes)
    names = shard_names(len(shards), STEM)
    for name, shard in tqdm(
        zip(names, shards), desc="Writing", unit="file", total=len(names), disable=not progress
    ):
        tensors: dict[str, Tensor] = {}
        stored: dict[str, Tensor] = {}
        holder = None
        for entry in shard:
            if entry.module is not holder:
                holder, stored = entry.module, module_tensors(entry.module)
            tensors[entry.key] = stored[entry.attribute]
        save_file(tensors, folder / name, metadata={"format": "pt"})
    return ties


def shard_names(count: int, stem: str) -> list[str]:
    """``model.safetensors``, or ``model-00001-of-00003.safetensors`` and so on, for the stem ``model``."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def read_tensors(
    model: nn.Module,
    folder: Path,
    names: Iterable[str],
    ties: Mapping[str, str],
    place: Callable[[str], torch.device],
    progress: bool = True,
) -> None:
    """Fill ``model``, whose tensors may be on the meta device, from the safetensors files ``names``.

    Each tensor gets its own memory on the device that ``place`` names for its module, with torch's alignment: kernels
    run as they do after quantizing, and later changes of the files have no effect.

    Raises:
        CheckpointError: a tensor is missing, unknown, or differs in shape or dtype from its module's.
    """
    missing = {entry.key: entry for entry in _places(model)}
    modules: dict[int, tuple[nn.Module, dict[str, Tensor]]] = {}
    for name in tqdm(list(names), desc="Reading", unit="file", disable=not progress):
        try:
            with safe_open(folder / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - no dictionary
                    entry = missing.pop(key, None)
                    if entry is None:
                        raise CheckpointError(
                            f"{folder / name} holds {key}, which the model has no place for"
                        )
                    tensor = file.get_tensor(key)
                    _check_fits(entry, tensor, folder / name)
                    device = place(entry.prefix.removesuffix("."))
                    copied = tensor.to(device) if device.type != "cpu" else tensor.clone()
                    modules.setdefault(id(entry.module), (entry.module, {}))[1][entry.attribute] = copied
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{folder / name} is broken: {error}") from None
        for module, tensors in modules.values():
            assign_tensors(module, tensors)
        modules.clear()
    if lacking := [key for key in missing if key not in ties]:
        raise CheckpointError(f"{folder} lacks {len(lacking)} tensors of its model: {', '.join(lacking[:5])}")
    for alias, key in ties.items():
        _tie(model, alias, key)


def _places(model: nn.Module) -> list[Entry]:
    """Every place of a parameter or buffer."""
    return [
        Entry(module, f"{name}." if name else "", attribute)
        for name, module in model.named_modules()
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    ]


def _plan_shards(entries: list[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    return shards


def _check_fits(entry: Entry, tensor: Tensor, path: Path) -> None:
    place = entry.tensor
    quantized = isinstance(entry.module, (QuantizedLinear, StoredInt8))
    if tensor.shape != place.shape or (quantized and tensor.dtype != place.dtype):
        raise CheckpointError(
            f"{path}: {entry.key} is {tuple(tensor.shape)} {tensor.dtype}, "
            f"its place is {tuple(place.shape)} {place.dtype}"
        )


def _tie(model: nn.Module, alias: str, key: str) -> None:
    """Make ``alias`` the same tensor as ``key``."""
    (owner, name), (holder, stored) = (_holder(model, place) for place in (alias, key))
    if stored in holder._parameters:
        owner._parameters[name] = holder._parameters[stored]
    else:
        owner._buffers[name] = holder._buffers[stored]


def _holder(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    module, _, attribute = key.rpartition(".")
    return model.get_submodule(module), attribute
