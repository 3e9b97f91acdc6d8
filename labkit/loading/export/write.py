"""Exports a model: every check, the choice of what is written quantized, the format's files, the model card."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from labkit.common.errors import CheckpointError, LabError
from labkit.common.files import user_path
from labkit.loading.export import folder as folder_writer
from labkit.loading.export import readme
from labkit.loading.export.formats import FOLDER_FORMATS, FORMATS, GGUF
from labkit.loading.export.llama_cpp import files as llama_cpp
from labkit.loading.export.selection import AUTO, named_parts, select
from labkit.loading.load import load_prepared
from labkit.loading.manifest import NAME
from labkit.loading.prepare import Prepared
from labkit.loading.restore import restore
from labkit.loading.save import check_space, check_target, writing
from labkit.loading.tensors import SHARD_BYTES
from labkit.models.checkpoint import Checkpoint
from labkit.models.experts import is_unfused
from labkit.quantization.torch_state import guarded

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
        folder: a folder from ``labkit quantize`` or `labkit.save`; for ``gguf`` also an unquantized model.
        output: the folder to write (default: ``<folder>-<format>``); it appears whole or not at all.
        format: ``compressed-tensors``, ``gptq`` or ``gguf``.
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
    prepared = Prepared.of(folder, "cpu")
    spec, manifest = prepared.spec, prepared.manifest
    if manifest is None and format != GGUF:
        raise CheckpointError(f"{spec.folder or folder} has no {NAME}: it is no quantized checkpoint")
    base = Path(folder) if Path(folder).name else spec.folder
    output = user_path(output) if output is not None else base.with_name(f"{base.name}-{format}")
    check_target(output, force)
    if prepared.checkpoint.model_type.startswith("qwen2_5_omni"):
        raise LabError(
            "of Qwen2.5-Omni the lab quantizes the thinker alone, which is no model that others load"
        )
    if is_unfused(prepared.skeleton):
        raise LabError(
            f"{spec.name} has experts or transposed layers, which the lab quantizes as Linears of their own; other "
            "engines know them under other names, and no export writes these yet"
        )
    source = prepared.checkpoint
    if format == GGUF:
        llama_cpp.check(source)
    plan = prepared.choose_plan(_plan_of(source) if manifest is None else None)
    resolved = prepared.resolve(plan)
    chosen = named_parts(dequantize, resolved, prepared.roles)
    prepared.check_files()
    check_space(output, 2 * resolved.predicted_bytes)
    if manifest is None:
        model = load_prepared(prepared, *prepared.check(plan), progress=progress).model
    else:
        model = restore(source, manifest, resolved, prepared.skeleton, prepared.place(resolved), progress)

    selection = select(model, resolved, prepared.roles, chosen, format, replace=AUTO in dequantize)
    kinds = selection.kinds
    notes = readme.notes(source, resolved, selection, format) + FORMATS[format].notes(kinds)
    with writing(output) as temporary:
        if format == GGUF:
            written = llama_cpp.write(
                temporary, output.name, source, model, kinds, resolved.plan.dtype, progress
            )
            notes = written.notes() + notes
        else:
            folder_writer.write(
                temporary, source, model, resolved, selection, FOLDER_FORMATS[format], shard_bytes, progress
            )
        facts = (
            {"base": source.facts(), "plan": resolved.plan.to_dict()} if manifest is None else vars(manifest)
        )
        kept = ("base", "plan", "modules", "calibration", "made_with")
        record = {
            "format": format,
            "of": resolved.plan.name,
            "notes": notes,
            **{key: facts[key] for key in kept if key in facts},
        }
        folder_writer.write_json(temporary / RECORD, record)
        text = readme.text(
            output.name, format, facts["base"]["name"], resolved.plan.name, kinds, notes, RECORD
        )
        (temporary / "README.md").write_text(text, encoding="utf-8")
    return Exported(output, len(kinds), notes)


def _plan_of(source: Checkpoint) -> str:
    """The plan that keeps a model in the dtype in which it is stored."""
    plans = {"float32": "fp32", "float16": "fp16"}
    return plans.get(str(source.config.dtype).removeprefix("torch."), "bf16")
