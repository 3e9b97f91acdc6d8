"""``labkit quantize``: writes a quantized checkpoint, and continues an interrupted run.

Every check precedes reading weights: the plan on the model's skeleton, the output folder, the disk's space.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from labkit.common.errors import CheckpointError, Interrupted
from labkit.common.files import user_path
from labkit.loading.calibration import Fingerprinted, default_calibration
from labkit.loading.load import load_prepared
from labkit.loading.options import CalibrationOptions
from labkit.loading.prepare import Prepared, choose_device
from labkit.loading.save import check_space, check_target, save
from labkit.loading.text import Tokenizer, describe_start, text_sequences
from labkit.models.spec import ModelSpec
from labkit.plans.finished import WorkFolder
from labkit.plans.plan import QuantizationPlan, as_plan
from labkit.quantization.torch_state import guarded
from labkit.results.config import write_config

TEXT_TOKENS = 512  # length of a calibration sequence, unless the model's context is shorter


class CalibrationSettings(CalibrationOptions):
    """`CalibrationOptions` that draw their batches."""

    def batches(self, prepared: Prepared, dtype: torch.dtype) -> Fingerprinted:
        """The calibration batches for a model.

        Raises:
            LabError: the model takes no images and there is no text, or the text is too short.
        """
        checkpoint, device = prepared.checkpoint, prepared.devices[0]
        processor = checkpoint.processor(dtype)
        if self.text is not None:
            text_config = checkpoint.config.get_text_config(decoder=True)
            length = min(TEXT_TOKENS, getattr(text_config, "max_position_embeddings", None) or TEXT_TOKENS)
            sequences = text_batches(processor.tokenizer, self.text, self.items, length=length, device=device)
            start = describe_start(processor.tokenizer)
            source = f"{len(sequences)} sequences of {length} tokens of {Path(self.text).name}"
            source += f", each from {start} on" if start else ""
            return Fingerprinted(sequences, source)
        senses = prepared.modalities
        if "image" not in senses:
            raise CheckpointError(
                f"{checkpoint.spec.name} takes no images, and calibration items are screens: "
                "give --calibration-text FILE"
            )
        which = "standard set" if self.seed is None else f"seed {self.seed}"
        items = default_calibration(
            processor, senses, self.items, seed=self.seed, device=device, model=checkpoint.model_class
        )
        restriction = "" if "audio" in senses else ", none spoken"
        return Fingerprinted(
            items, f"{len(items)} PhoneTap calibration items with their answers{restriction}, {which}"
        )


@dataclass(frozen=True)
class Made:
    """The result of `quantize_to`: the folder, its engine, and the number of modules from an earlier run."""

    folder: Path
    engine: Any
    continued: int


@guarded
def quantize_to(
    model: str | Path | ModelSpec,
    plan: str | Path | QuantizationPlan,
    folder: str | os.PathLike,
    device: str = "auto",
    *,
    dtype: str | None = None,
    calibration: CalibrationSettings | None = None,
    force: bool = False,
    progress: bool = True,
) -> Made:
    """Quantize ``model`` by ``plan`` and write the result to ``folder``; `labkit.load` restores it.

    A stopped or killed process loses only its current module: each finished module is stored at once in
    ``<folder>.partial`` (`labkit.plans.finished`), and the same call continues from there. The folder appears whole at
    the end, which removes the partial folder.

    Args:
        model, plan, device, dtype: as for `labkit.load`.
        folder: the checkpoint's folder.
        calibration: the items for plans that calibrate.
        force: replace an existing checkpoint, and delete an unfinished checkpoint of another plan.
        progress: show progress bars.

    Raises:
        LabError: anything that cannot work, before weights are read.
        Interrupted: on Ctrl-C.
    """
    arguments = {**locals(), "output": folder, "folder": None, "calibration": None, "dtype": None}
    prepared = Prepared.of(model, choose_device(device), quantized="quantize the model that it was made of")
    folder = user_path(folder)
    check_target(folder, force)
    plan, settings = as_plan(plan, dtype), calibration or CalibrationSettings()
    prepared.check_files()
    resolved, place = prepared.check(plan, calibration=settings)
    check_space(folder, 2 * resolved.predicted_bytes)  # the finished modules, and the folder built from them
    calibrated = resolved.requires_calibration
    batches = settings.batches(prepared, plan.dtype) if calibrated else None
    run = {
        "model": prepared.checkpoint.facts(),
        "plan": plan.to_dict(),
        "calibration": dataclasses.asdict(settings) if calibrated else None,
        "device": place.first.type,
    }
    work = WorkFolder(folder.with_name(folder.name + ".partial"), run, force=force)
    try:
        engine = load_prepared(
            prepared, resolved, place, calibration=batches, work_folder=work, progress=progress
        )
        save(engine, folder, force=force, progress=progress)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted: {work.loaded + work.saved} of {len(resolved.schemes)} Linears are kept in {work.path}; "
            "run the same again to continue"
        ) from None
    finally:
        work.close()
    work.remove()
    if dtype is not None or not isinstance(arguments["plan"], str):
        arguments["plan"] = folder / "plan.yaml"
    for name, value in dataclasses.asdict(settings).items():
        arguments[f"calibration_{name}"] = value
    write_config(folder, "quantize", arguments)
    return Made(folder, engine, work.loaded)


@guarded
def text_batches(
    tokenizer: Tokenizer, path: str | Path, count: int = 32, *, length: int = 512, device: Any = "cpu"
) -> list[dict[str, torch.Tensor]]:
    """Model inputs for ``count`` sequences of ``length`` tokens from the beginning of a text file, or as many
    as it has: ``input_ids [1, length]``, for language models, from the token on that the tokenizer puts first.

    Raises:
        CheckpointError: the file is unreadable.
        LabError: it is shorter than a sequence.
    """
    try:
        text = user_path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    sequences = text_sequences(tokenizer, text, length, str(path))[:count].to(device)
    return [{"input_ids": sequence} for sequence in sequences.split(1)]
