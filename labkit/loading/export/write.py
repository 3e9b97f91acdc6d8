"""Writes the folder of an export: tensors in the format's layout, configuration, tokenizer, model card."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from labkit.common.errors import CheckpointError, LabError
from labkit.common.files import user_path
from labkit.loading.export import readme
from labkit.loading.export.formats import FORMATS, Format
from labkit.loading.export.integers import Kind, integers_of
from labkit.loading.export.selection import AUTO, named_parts, select
from labkit.loading.manifest import NAME
from labkit.loading.prepare import Prepared
from labkit.loading.restore import restore
from labkit.loading.save import check_space, check_target, writing
from labkit.loading.tensors import SHARD_BYTES, shard_names, tensor_entries
from labkit.models.experts import is_unfused
from labkit.plans.resolved import ResolvedPlan
from labkit.quantization import QuantizedLinear
from labkit.quantization.int8_storage import StoredInt8
from labkit.quantization.module_tensors import module_tensors
from labkit.quantization.torch_state import guarded

DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
RECORD = "labkit-export.json"


@dataclass(frozen=True)
class Exported:
    """The result of `export`: the folder, its number of quantized Linears, and notes for its readers."""

    folder: Path
    quantized: int
    notes: list[str]


@guarded
def export(
    folder: str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    format: str = "compressed-tensors",
    dequantize: Sequence[str] = (),
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Exported:
    """Write a quantized checkpoint in a format that other engines load: the same integers and scales.

    Args:
        folder: a folder from ``labkit quantize`` or `labkit.save`.
        output: the folder to write (default: ``<folder>-<format>``); it appears whole or not at all.
        format: ``compressed-tensors`` or ``gptq``.
        dequantize: roles (``vision``) or names of Linears to write dequantized; ``auto``: all that the format cannot
            express is written as the nearest scheme that it can, or else dequantized.
        force: replace an earlier output of the lab.
        shard_bytes: the approximate largest size of a tensor file.
        progress: show progress bars.

    Raises:
        LabError: all schemes that the format cannot express, each with the nearest that it can; an unknown part.
        CheckpointError: the checkpoint is damaged, or the output cannot be written.
    """
    if format not in FORMATS:
        raise LabError(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    rules = FORMATS[format]
    prepared = Prepared.of(folder, "cpu")
    spec, manifest = prepared.spec, prepared.manifest
    if manifest is None:
        raise CheckpointError(f"{spec.folder or folder} has no {NAME}: it is no quantized checkpoint")
    base = Path(folder) if Path(folder).name else spec.folder
    output = user_path(output) if output is not None else base.with_name(f"{base.name}-{format}")
    check_target(output, force)
    if manifest.base["model_type"] == "qwen2_5_omni":
        raise LabError(
            "of Qwen2.5-Omni the lab quantizes the thinker alone, which is no model that others load"
        )
    if is_unfused(prepared.skeleton):
        raise LabError(
            f"{spec.name} has experts or transposed layers, which the lab quantizes as Linears of their own; other "
            "engines know them under other names, and no export writes these yet"
        )
    source, resolved = prepared.checkpoint, prepared.resolve(prepared.choose_plan())
    chosen = named_parts(dequantize, resolved, prepared.roles)
    prepared.check_files()
    check_space(output, 2 * resolved.predicted_bytes)
    model = restore(source, manifest, resolved, prepared.skeleton, prepared.place(resolved), progress)

    selection = select(model, resolved, prepared.roles, chosen, format, replace=AUTO in dequantize)
    kinds, unquantized = selection.kinds, selection.unquantized
    ignore = [name for name in _linears(model) if name not in kinds]
    config = rules.configuration(kinds, ignore)
    notes = readme.notes(source, resolved, kinds, unquantized) + selection.notes + rules.notes(kinds)
    with writing(output) as temporary:
        for path in source.companions():
            shutil.copyfile(path, temporary / path.name)
        _write_config(temporary / "config.json", config, resolved, kinds, unquantized)
        for name, body in rules.files(config).items():
            _write_json(temporary / name, body)
        parts = _parts(model, kinds, resolved, rules)
        _write_shards(parts, temporary, shard_bytes, progress)
        record = {
            "format": format,
            "of": manifest.plan["name"],
            "notes": notes,
            "base": manifest.base,
            "plan": manifest.plan,
            "modules": manifest.modules,
            "calibration": manifest.calibration,
            "made_with": manifest.made_with,
        }
        _write_json(temporary / RECORD, record)
        text = readme.text(output.name, format, manifest, kinds, notes, RECORD)
        (temporary / "README.md").write_text(text, encoding="utf-8")
    return Exported(output, len(kinds), notes)


def _linears(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, QuantizedLinear)):
            yield name


def _parts(
    model: nn.Module,
    kinds: Mapping[str, Kind],
    resolved: ResolvedPlan,
    rules: Format,
) -> Iterator[dict[str, Tensor]]:
    """The export's tensors, module by module, in model order; a shared tensor comes once."""
    entries, _ = tensor_entries(model)
    attributes_by_prefix: dict[str, set[str]] = {}
    for entry in entries:
        attributes_by_prefix.setdefault(entry.prefix, set()).add(entry.attribute)
    for prefix, attributes in attributes_by_prefix.items():
        name = prefix.removesuffix(".")
        module = model.get_submodule(name)
        names = rules.written_names(name) if isinstance(module, (nn.Linear, QuantizedLinear)) else (name,)
        if name in kinds:
            tensors = [rules.tensors_of(part, kinds) for part in integers_of(module).split(len(names))]
            if module.bias is not None:
                for part, bias in zip(tensors, module.bias.detach().chunk(len(names))):
                    part["bias"] = bias
        else:
            tensors = _split(_unquantized(module, attributes, resolved.plan.dtype), len(names))
        yield {
            f"{part}.{key}" if part else key: tensor.contiguous()
            for part, own in zip(names, tensors)
            for key, tensor in own.items()
        }


def _unquantized(module: nn.Module, attributes: set[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The module's own tensors by their names, a quantized weight dequantized."""
    if isinstance(module, (QuantizedLinear, StoredInt8)):
        weight = module.dequantize(dtype) if isinstance(module, QuantizedLinear) else module.weight.to(dtype)
        bias = module._parameters.get("bias")
        return {"weight": weight} if bias is None else {"weight": weight, "bias": bias.detach()}
    computed = module._non_persistent_buffers_set
    return {
        key: tensor
        for key, tensor in module_tensors(module).items()
        if key in attributes and key not in computed
    }


def _split(tensors: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Equal shares of the first dimension of every tensor."""
    chunks = {key: tensor.chunk(count) if count > 1 else (tensor,) for key, tensor in tensors.items()}
    return [{key: parts[number] for key, parts in chunks.items()} for number in range(count)]


def _write_shards(parts: Iterator[dict[str, Tensor]], folder: Path, shard_bytes: int, progress: bool) -> None:
    """Write tensors as they come into files of about ``shard_bytes``, and an index for several files."""
    shard: dict[str, Tensor] = {}
    shard_keys: list[list[str]] = []
    total = size = 0

    def close() -> None:
        save_file(shard, folder / f"part-{len(shard_keys)}.safetensors", metadata={"format": "pt"})
        shard_keys.append(list(shard))
        shard.clear()

    for tensors in tqdm(parts, desc="Writing", unit="module", disable=not progress):
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if shard and size + needed > shard_bytes:
            close()
            size = 0
        shard |= tensors
        size, total = size + needed, total + needed
    close()
    names = shard_names(len(shard_keys), "model")
    for number, name in enumerate(names):
        (folder / f"part-{number}.safetensors").rename(folder / name)
    if len(names) > 1:
        index = {key: name for name, keys in zip(names, shard_keys) for key in keys}
        body = {"metadata": {"total_size": total}, "weight_map": index}
        _write_json(folder / "model.safetensors.index.json", body)


def _write_config(
    path: Path, config: dict, resolved: ResolvedPlan, kinds: Mapping[str, Kind], unquantized: set[str]
) -> None:
    """Write the model's configuration with the format's, the dtype of unquantized tensors, and no broken tie."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["quantization_config"] = config
    for part in (facts, *(value for value in facts.values() if isinstance(value, dict))):
        if part is facts or "dtype" in part:
            part["dtype"] = DTYPE_NAMES[resolved.plan.default]
            part.pop("torch_dtype", None)
        if "lm_head" in resolved.schemes and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    if "lm_head" in resolved.schemes:
        facts["tie_word_embeddings"] = False
    _write_json(path, facts)


def _write_json(path: Path, body: Any) -> None:
    path.write_text(json.dumps(body, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
