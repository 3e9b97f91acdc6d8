"""Formats of checkpoints that others have quantized: what ``quantization_config`` says of each weight's storage.

compressed-tensors and FP8 are read (`labkit.models.stored`); other formats are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.common.errors import LoadError

CONFIG_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files beside config.json in which GPTQ, AWQ and ModelOpt describe their weights."""
CONFIG_KEYS = ("quantization_config", "compression_config")
READABLE = "it reads compressed-tensors (pack-, int-, float- and naive-quantized) and FP8"


@dataclass(frozen=True)
class Layout:
    """How a weight [N, K] is stored: the width of its integers, and the block [rows, columns] that shares a scale
    (None where the scale's shape says it: one value, one per row); and whether it must have zero points, and an order
    of its inputs."""

    num_bits: int = 8
    block: tuple[int, int] | None = None
    zero_points: bool = False
    ordered: bool = False


@dataclass(frozen=True)
class SourceFormat:
    """The format of a quantized checkpoint.

    Attributes:
        name: for messages.
        layout_of: the layout of the weights of a module, by the module's stored name.
    """

    name: str
    layout_of: Callable[[str], Layout]


def source_format(config: Mapping[str, Any], folder: Path | None, model: str) -> SourceFormat | None:
    """The format in which a checkpoint's weights are quantized; None for an unquantized one.

    Args:
        config: its ``config.json``.
        folder: its folder, which may hold the format's own file.
        model: its name, for messages.

    Raises:
        LoadError: the lab does not read the format, or its description is malformed.
    """
    facts = quantization_facts(config)
    if facts is None:
        files = [name for name in CONFIG_FILES if folder is not None and (folder / name).is_file()]
        if files:
            raise LoadError(
                f"{model} is quantized by what its {files[0]} describes, which the lab does not read "
                f"({READABLE}): give the unquantized model"
            )
        return None
    if not isinstance(facts, Mapping):
        raise LoadError(f"the config.json of {model} is broken: quantization_config must be an object")
    method = facts.get("quant_method") or ("compressed-tensors" if "config_groups" in facts else None)
    if method == "labkit":
        raise LoadError(f"{model} is a folder that the lab quantized, without its labkit.json: get it again")
    reader = _READERS.get(str(method))
    if reader is None:
        named = f"by {method}" if method else "by a method that its quantization_config does not name"
        raise _refusal(model, named)
    return reader(facts, model)


def quantization_facts(config: Mapping[str, Any]) -> Any:
    """``quantization_config`` of a configuration or of one of its parts; None without one."""
    for part in (config, *(value for value in config.values() if isinstance(value, Mapping))):
        for key in CONFIG_KEYS:
            if part.get(key):
                return part[key]
    return None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the same model, unquantized."""
    return {
        key: without_quantization(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in CONFIG_KEYS
    }


def _refusal(model: str, what: str) -> LoadError:
    return LoadError(
        f"{model} is quantized {what}, which the lab does not read ({READABLE}): give the unquantized model"
    )


def _compressed_tensors(facts: Mapping[str, Any], model: str) -> SourceFormat:
    sparsity = facts.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise _refusal(model, f"by compressed-tensors, {sparsity['format']}")
    if (facts.get("transform_config") or {}).get("config_groups"):
        raise _refusal(model, "by compressed-tensors with transforms of its activations")
    layouts: dict[str, Layout] = {}
    formats: list[str] = []
    try:
        for group in facts["config_groups"].values():
            weights = group["weights"]
            if weights is None:
                continue
            formats.append(group.get("format") or facts["format"])
            if formats[-1] not in _COMPRESSED or weights["strategy"] not in _STRATEGIES:
                raise _refusal(model, f"by compressed-tensors, {formats[-1]}, {weights['strategy']}")
            layout = Layout(
                int(weights["num_bits"]),
                _STRATEGIES[weights["strategy"]](weights),
                zero_points=not weights.get("symmetric", True),
                ordered=weights.get("actorder") == "group",
            )
            layouts |= {str(target): layout for target in group["targets"]}
    except LoadError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LoadError(
            f"the config.json of {model} is broken: its quantization_config has no valid config_groups ({error!r})"
        ) from None

    def layout_of(module: str) -> Layout:
        # a module's name goes before its class; stored experts are Linears too, whatever class holds them here
        named = (layout for target, layout in layouts.items() if _names(target, module))
        layout = next(named, layouts.get("Linear"))
        if layout is None:
            raise LoadError(f"{model}: no group of its quantization_config covers {module}")
        return layout

    return SourceFormat(f"compressed-tensors ({', '.join(dict.fromkeys(formats))})", layout_of)


_COMPRESSED = ("dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_STRATEGIES: dict[str, Callable[[Mapping[str, Any]], tuple[int, int] | None]] = {
    "tensor": lambda weights: None,
    "channel": lambda weights: None,
    "group": lambda weights: (1, int(weights["group_size"])),
    "block": lambda weights: _block(weights["block_structure"]),
}


def _names(target: str, module: str) -> bool:
    """Whether a target names a module: its name, or ``re:`` and a pattern of its beginning."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


def _fp8(facts: Mapping[str, Any], model: str) -> SourceFormat:
    size = facts.get("weight_block_size")
    try:
        layout = Layout(8, None if size is None else _block(size))
    except (TypeError, ValueError):
        raise LoadError(
            f"the config.json of {model} is broken: weight_block_size is {size!r}, and not two numbers"
        ) from None
    return SourceFormat("FP8", lambda module: layout)


def _modelopt(facts: Mapping[str, Any], model: str) -> SourceFormat:
    algorithm = facts.get("quant_algo") or (facts.get("quantization") or {}).get("quant_algo")
    if algorithm != "FP8":
        raise _refusal(model, f"by ModelOpt, {algorithm}")
    return SourceFormat("ModelOpt FP8", lambda module: Layout())


_READERS: dict[str, Callable[[Mapping[str, Any], str], SourceFormat]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "modelopt": _modelopt,
}


def _block(size: Any) -> tuple[int, int]:
    rows, columns = size
    if min(int(rows), int(columns)) < 1:
        raise ValueError(f"a block of {size}")
    return int(rows), int(columns)
