"""Writes a folder in transformers' layout: tensors in the format's own, configuration, tokenizer."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from labkit.loading.export.formats import FolderFormat
from labkit.loading.export.integers import Kind, integers_of
from labkit.loading.export.parts import module_names, unquantized_tensors
from labkit.loading.export.selection import Selection
from labkit.loading.tensors import shard_names
from labkit.models.checkpoint import Checkpoint
from labkit.plans.resolved import ResolvedPlan
from labkit.quantization import QuantizedLinear

DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def write(
    folder: Path,
    source: Checkpoint,
    model: nn.Module,
    resolved: ResolvedPlan,
    selection: Selection,
    rules: FolderFormat,
    shard_bytes: int,
    progress: bool,
) -> None:
    """Write all files but the record and the model card."""
    kinds = selection.kinds
    ignore = [name for name in _linears(model) if name not in kinds]
    config = rules.configuration(kinds, ignore)
    for path in source.companions():
        shutil.copyfile(path, folder / path.name)
    _write_config(folder / "config.json", config, resolved, kinds, selection.unquantized)
    for name, body in rules.files(config).items():
        write_json(folder / name, body)
    _write_shards(_parts(model, kinds, resolved, rules), folder, shard_bytes, progress)


def write_json(path: Path, body: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(body, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _linears(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, QuantizedLinear)):
            yield name


def _parts(
    model: nn.Module,
    kinds: Mapping[str, Kind],
    resolved: ResolvedPlan,
    rules: FolderFormat,
) -> Iterator[dict[str, Tensor]]:
    """The export's tensors, module by module, in model order; a shared tensor comes once."""
    for name, attributes in module_names(model):
        module = model.get_submodule(name)
        names = rules.written_names(name) if isinstance(module, (nn.Linear, QuantizedLinear)) else (name,)
        if name in kinds:
            tensors = [rules.tensors_of(part, kinds) for part in integers_of(module).split(len(names))]
            if module.bias is not None:
                for part, bias in zip(tensors, module.bias.detach().chunk(len(names))):
                    part["bias"] = bias
        else:
            tensors = _split(unquantized_tensors(module, attributes, resolved.plan.dtype), len(names))
        yield {
            f"{part}.{key}" if part else key: tensor.contiguous()
            for part, own in zip(names, tensors)
            for key, tensor in own.items()
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
        write_json(folder / "model.safetensors.index.json", body)


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
    write_json(path, facts)
