"""Saves an engine's model to a folder, with everything needed to restore it; the folder appears whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from labkit.common.errors import CheckpointError
from labkit.common.files import atomic_folder, user_path
from labkit.common.machine import environment
from labkit.loading import readme
from labkit.loading.manifest import NAME, Manifest, file_facts
from labkit.loading.tensors import SHARD_BYTES, write_tensors
from labkit.models.checkpoint import Checkpoint
from labkit.models.source_formats import without_quantization
from labkit.plans.quantize import weights_bytes
from labkit.quantization.torch_state import guarded

QUANT_METHOD = "labkit"
MARKS = (NAME, "labkit-export.json")


@guarded
def save(
    engine: Any,
    folder: str | os.PathLike,
    *,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Write the engine's quantized model to ``folder``; ``labkit.load(folder)`` restores it bit for bit.

    The folder holds the packed tensors, configuration, tokenizer and processor files of the model, the plan,
    the calibration's fingerprint, versions and hashes. It appears whole or not at all.

    Args:
        engine: an engine from `labkit.load`.
        folder: the folder to write; missing parents are created.
        force: replace an existing quantized checkpoint or export. Other folders are never replaced.
        shard_bytes: the approximate largest size of a tensor file.
        progress: show a progress bar.

    Raises:
        CheckpointError: the folder cannot be written, or already exists.
    """
    folder = user_path(folder)
    check_target(folder, force)
    if engine.resolved is None or engine.plan is None:
        raise CheckpointError("only a model that labkit.load gave can be saved: this engine has no plan")
    if engine.weights is not None:
        raise CheckpointError(
            f"{engine.spec.name} has {engine.weights} weights here, which nobody needs to keep"
        )
    source = Checkpoint(engine.spec)
    check_space(folder, engine.resolved.predicted_bytes)
    with writing(folder) as temporary:
        for path in source.companions():
            shutil.copyfile(path, temporary / path.name)
        _mark_config(temporary / "config.json")
        text = yaml.safe_dump(engine.plan.to_dict(), sort_keys=False, allow_unicode=True)
        (temporary / "plan.yaml").write_text(text, encoding="utf-8")
        ties = write_tensors(engine.model, temporary, shard_bytes=shard_bytes, progress=progress)
        manifest = _manifest(engine, source, ties, temporary)
        manifest.write(temporary)
        (temporary / "README.md").write_text(readme.text(folder.name, engine, manifest), encoding="utf-8")
    return folder


def check_target(folder: Path, force: bool) -> None:
    """Refuse a target that holds something else.

    Raises:
        CheckpointError: the message says what is there, and what to pass instead.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CheckpointError(f"{folder} is a file or a link; give the name of a folder to make")
    for parent in folder.absolute().parents:
        if parent.exists():
            if not parent.is_dir() or not os.access(parent, os.W_OK):
                raise CheckpointError(f"{folder} cannot be made: {parent} is no folder that can be written")
            break
    if not folder.exists() or not any(folder.iterdir()):
        return
    ours = any((folder / name).is_file() for name in MARKS)
    if ours and force:
        return
    if ours:
        raise CheckpointError(f"{folder} is there already: give another folder, or --force to replace it")
    raise CheckpointError(
        f"{folder} holds other files, which are never deleted: give the name of a new folder"
    )


def check_space(folder: Path, needed: int) -> None:
    """Raise `CheckpointError` if the disk has fewer than ``needed`` bytes free."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"{folder} needs {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free there"
        )


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """`atomic_folder` that raises disk errors as `CheckpointError`."""
    try:
        with atomic_folder(folder) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{folder} cannot be written: {reason}") from error


def _mark_config(path: Path) -> None:
    """Mark a copied configuration, so that other libraries refuse the checkpoint."""
    facts = without_quantization(json.loads(path.read_text(encoding="utf-8")))
    facts["quantization_config"] = {"quant_method": QUANT_METHOD, "manifest": NAME}
    path.write_text(json.dumps(facts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _manifest(engine: Any, source: Checkpoint, ties: dict[str, str], folder: Path) -> Manifest:
    resolved, provenance = engine.resolved, engine.provenance
    base = provenance.get("base") or {**source.facts(), "parameters": resolved.parameters}
    modules = {
        name: {"scheme": scheme.name, "options": scheme.options(), "rule": resolved.rules[name]}
        for name, scheme in resolved.schemes.items()
    }
    return Manifest(
        base=base,
        plan=engine.plan.to_dict(),
        modules=modules,
        notes=list(resolved.notes),
        calibration=provenance.get("calibration"),
        ties=ties,
        weights_bytes=weights_bytes(engine.model),
        made_with=provenance.get("made_with") or made_with(engine.device),
        files=file_facts(folder),
    )


def made_with(device: torch.device) -> dict[str, Any]:
    """Time, versions and machine, for the manifest."""
    from labkit import __version__

    facts = environment()
    fact_names = ("time", "python", "platform", "cpu", "packages", "commit")
    return {"labkit": __version__, "device": str(device), **{name: facts[name] for name in fact_names}}
