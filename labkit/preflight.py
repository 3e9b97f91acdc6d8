"""What is checked, and settled, before a comparison measures anything."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit import phonetap
from labkit.errors import LabError
from labkit.models import get_spec
from labkit.results import environment
from labkit.tables import UNQUANTIZED

HASHED_BYTES = 1_000_000_000
"""Checkpoints up to this size are recognized by their content, larger ones by sizes and times of change."""


@dataclass(frozen=True)
class JobPlan:
    """One plan of a comparison: what `labkit.load` is given for it, and its content."""

    source: str
    definition: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A checked comparison. `settings` must be the same for every measurement in one folder."""

    settings: dict[str, Any]
    model_source: str
    plans: dict[str, JobPlan]
    reference: str
    added_plan: str | None

    def request(self, plan: str, output: Path) -> dict[str, Any]:
        """What the measuring process of `plan` is told; see `labkit._worker`."""
        names = ("device", "threads", "seed", "split", "items", "enable_thinking", "batch_size")
        return {
            "output": str(output),
            "model": self.settings["model"],
            "model_source": self.model_source,
            "plan": plan,
            "source": self.plans[plan].source,
            "definition": self.plans[plan].definition,
            **{name: self.settings[name] for name in names},
        }


def prepare(
    model: str | os.PathLike,
    plans: Sequence[str | os.PathLike],
    items: int,
    *,
    seed: int | None,
    split: str,
    device: str,
    threads: int | None,
    enable_thinking: bool,
    batch_size: int,
) -> Job:
    """Check every argument of `labkit.compare` and settle what is left open.

    Raises `LabError` with one line that names what is wrong and what would be right.
    """
    if split not in ("all", *phonetap.SPLITS):
        raise LabError(f"no split is called {split!r}; known are all, {', '.join(phonetap.SPLITS)}")
    check_count("items", items)
    check_count("batch size", batch_size)
    if seed is not None and (type(seed) is not int or seed < 0):
        raise LabError(f"the seed must be a whole number from 0 on, not {seed!r}")
    if threads is None:
        threads = usable_cores()
    check_count("threads", threads)
    if isinstance(plans, str | os.PathLike):
        plans = [plans]
    if not plans:
        raise LabError("no plan given; `labkit plans` lists them")
    spec = get_spec(model)
    loaded = [_load_plan(plan) for plan in plans]
    device = _settle_device(device)
    from labkit.models.checkpoint import Checkpoint

    added = None if any(plan.name in UNQUANTIZED for plan, _ in loaded) else _unquantized_for(spec, device)
    if added:
        loaded.insert(0, _load_plan(added))
    names = [plan.name for plan, _ in loaded]
    for name in names:
        if names.count(name) > 1:
            raise LabError(f"two plans are called {name!r}; every plan needs a name of its own")
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise LabError(f"the plan's name {name!r} must be made of letters, digits and . + - _ only")
    checkpoint = Checkpoint(spec)
    chosen = _check_items(split, items, seed, spec.name, checkpoint.family.modalities)
    _check_plans(checkpoint, spec, [plan for plan, _ in loaded], device)
    settings = {
        "version": lab_version(),
        "packages": environment()["packages"],
        "model": spec.name,
        "model_fingerprint": fingerprint(spec.folder),
        "items": items,
        "items_fingerprint": _hash(
            repr([(i.id, i.instruction, i.recording, i.box) for i in chosen]).encode()
        ),
        "split": split,
        "seed": seed,
        "device": device,
        "threads": threads,
        "enable_thinking": bool(enable_thinking),
        "batch_size": batch_size,
    }
    return Job(
        settings=settings,
        model_source=str(spec.folder or spec.source),
        plans={plan.name: JobPlan(source, plan.to_dict()) for plan, source in loaded},
        reference=next(name for name in UNQUANTIZED if name in names),
        added_plan=added,
    )


def predict_bytes(model: str | os.PathLike, plans: Sequence[Any]) -> list[int]:
    """Bytes of the whole model's weights under each plan, predicted from its skeleton; nothing is loaded."""
    from labkit.models import find_roles
    from labkit.models.checkpoint import Checkpoint

    skeleton = Checkpoint(get_spec(model)).skeleton()
    roles = find_roles(skeleton)
    return [plan.resolve(skeleton, roles=roles).predicted_bytes for plan in plans]


def check_senses(model: str | os.PathLike, kinds: Sequence[str]) -> None:
    """Raise `LabError` if the model takes no parts of one of these `kinds` (``image``, ``audio``)."""
    from labkit.models.checkpoint import Checkpoint

    spec = get_spec(model)
    senses = Checkpoint(spec).family.modalities
    for kind in kinds:
        if kind not in senses:
            raise LabError(f"{spec.name} takes no {kind}; it takes {', '.join(['text', *senses])}")


def check_count(what: str, value: Any) -> None:
    """Raise `LabError` unless `value` is a whole number of at least one."""
    if type(value) is not int or value < 1:
        raise LabError(f"{what} must be a whole number of at least 1, not {value!r}")


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load_plan(plan: Any) -> tuple[Any, str]:
    from labkit.plan import QuantizationPlan

    source = os.fspath(plan)
    loaded = QuantizationPlan.from_yaml(source)
    return loaded, str(Path(source).resolve()) if Path(source).is_file() else source


def _settle_device(device: str) -> str:
    from labkit.loading import choose_device

    return str(choose_device(device))


def _unquantized_for(spec: Any, device: str) -> str:
    """fp32, or bf16 where a GPU's memory would not hold the model in FP32."""
    if device == "cpu":
        return "fp32"
    import torch

    memory = torch.cuda.get_device_properties(device).total_memory
    return "fp32" if spec.parameters and spec.parameters * 4 < 0.8 * memory else "bf16"


def _check_plans(checkpoint: Any, spec: Any, plans: Sequence[Any], device: str) -> None:
    """Resolve every plan on the model's skeleton (meta device) for this device; look at the files."""
    import torch

    from labkit.loading import check_calibration, check_memory
    from labkit.models import find_roles

    checkpoint.check_weights()
    skeleton = checkpoint.skeleton()
    roles = find_roles(skeleton)
    for plan in plans:
        try:
            resolved = plan.resolve(skeleton, roles=roles, device=device)
        except LabError as error:
            known = "" if plan.name in str(error) else f"plan {plan.name}: "
            raise LabError(f"{known}{error}") from None
        check_calibration(resolved, None, checkpoint.family.modalities)
        check_memory(resolved.predicted_bytes, torch.device(device), spec, plan)


def _check_items(split: str, count: int, seed: int | None, model: str, modalities: Sequence[str]) -> list:
    if "image" not in modalities:
        raise LabError(f"{model} takes no images, and every PhoneTap item is a screenshot")
    chosen = phonetap.items(split=split, count=count, seed=seed, part="test")
    if len(chosen) != count:
        raise LabError(f"the split {split!r} has {len(chosen)} items, not {count}; ask for at most that many")
    if "audio" not in modalities and any(item.recording for item in chosen):
        raise LabError(f"{model} takes no audio, and the split {split!r} has spoken items; use --split typed")
    return chosen


def lab_version() -> str:
    """This lab's version, for settings."""
    from labkit import __version__

    return __version__


def fingerprint(folder: Path | None) -> str | None:
    """Hash of a checkpoint folder's content; None for a model on the hub."""
    if folder is None:
        return None
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    digest = hashlib.sha256()
    if sum(path.stat().st_size for path in files) > HASHED_BYTES:
        return _hash(repr([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]).encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
