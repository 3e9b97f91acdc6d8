"""Checks the arguments of a comparison, and completes its settings, before anything is measured."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit import phonetap
from labkit.common.errors import LabError
from labkit.common.machine import environment, usable_cores
from labkit.measure.defaults import DEFAULT_PLANS, PROMPTS
from labkit.models import get_spec
from labkit.results.tables import UNQUANTIZED

if TYPE_CHECKING:
    from labkit.loading.prepare import Prepared
    from labkit.models import ModelSpec
    from labkit.plans.plan import QuantizationPlan


@dataclass(frozen=True)
class JobPlan:
    """One plan of a comparison: its definition, read once for measuring and for the record, and its model if that is
    not the job's."""

    definition: dict[str, Any]
    model_source: str | None = None


@dataclass(frozen=True)
class Job:
    """A checked comparison. All measurements in one folder have the same `settings`."""

    settings: dict[str, Any]
    model_source: str
    plans: dict[str, JobPlan]
    reference: str
    added_plan: str | None

    def request(self, plan: str, output: Path) -> dict[str, Any]:
        """The request for the process that measures `plan`; see `labkit.measure.compare_worker`."""
        names = ("device", "threads", "seed", "split", "items", "enable_thinking", "batch_size")
        return {
            "output": str(output),
            "model": self.settings["model"],
            "model_source": self.plans[plan].model_source or self.model_source,
            "plan": plan,
            "definition": self.plans[plan].definition,
            "weights": self.settings.get("weights"),
            **{name: self.settings[name] for name in names},
        }


def prepare(
    model: str | os.PathLike,
    plans: Sequence[str | os.PathLike | QuantizationPlan] | None,
    items: int,
    *,
    seed: int | None,
    split: str,
    device: str,
    threads: int | None,
    enable_thinking: bool,
    batch_size: int,
    weights: str | None = None,
) -> Job:
    """Check every argument of `labkit.compare` and fill in the defaults.

    Raises `LabError` with one line that names the fault and its remedy.
    """
    phonetap.splits_of(split)
    check_count("items", items)
    check_count("batch size", batch_size)
    if seed is not None and (type(seed) is not int or seed < 0):
        raise LabError(f"the seed must be a whole number from 0 on, not {seed!r}")
    if threads is None:
        threads = usable_cores()
    check_count("threads", threads)
    if isinstance(plans, str | os.PathLike):
        plans = [plans]
    if plans is None:
        plans = () if get_spec(model).is_quantized else DEFAULT_PLANS
    elif not plans:
        raise LabError("no plan given; `labkit plans` lists them")
    from labkit.loading.prepare import Prepared
    from labkit.models.checkpoint import folder_fingerprint
    from labkit.plans.plan import as_plan

    loaded = [as_plan(plan) for plan in plans]  # files are read here, once
    prepared = Prepared.of(model, device, weights=weights)
    spec, base, stored = prepared.spec, prepared, []
    if weights is not None:
        items = min(items, PROMPTS)
    if spec.is_quantized:
        base = Prepared.of(_base_of(spec, prepared.manifest.base), device)
        for plan in loaded:
            if plan.name not in UNQUANTIZED:
                prepared.choose_plan(plan)  # raises for any plan but the folder's own
        stored = [prepared.choose_plan()]
        loaded = [plan for plan in loaded if plan.name != stored[0].name]
    added = None
    if not any(plan.name in UNQUANTIZED for plan in (*loaded, *stored)):
        added = _unquantized_for(base)
        loaded.insert(0, as_plan(added))
    names = [plan.name for plan in (*loaded, *stored)]
    for name in names:
        if names.count(name) > 1:
            raise LabError(f"two plans are called {name!r}; every plan needs a name of its own")
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise LabError(f"the plan's name {name!r} must be made of letters, digits and . + - _ only")
    senses = prepared.modalities
    sees = "image" in senses or weights is None
    if "audio" not in senses and split == "all":
        split = "typed,hard"  # all that this model can take
    chosen = _check_items(split, items, seed, spec.name, senses) if sees else []
    _check_plans(base, loaded)
    if stored:
        _check_plans(prepared, stored)
    settings = {
        "version": lab_version(),
        "packages": environment()["packages"],
        "model": spec.name,
        "model_fingerprint": folder_fingerprint(spec.folder) if spec.folder else None,
        "items": items,
        "items_fingerprint": _hash(
            repr([(i.id, i.instruction, i.recording, i.box) for i in chosen]).encode()
        ),
        "split": split,
        "seed": seed,
        "device": ",".join(map(str, prepared.devices)),
        "threads": threads,
        "enable_thinking": bool(enable_thinking),
        "batch_size": batch_size,
        **({} if weights is None else {"weights": weights}),
    }
    return Job(
        settings=settings,
        model_source=spec.name
        if weights is not None and spec.published is not None
        else _source_of(base.spec),
        plans={
            **{plan.name: JobPlan(plan.to_dict()) for plan in loaded},
            **{plan.name: JobPlan(plan.to_dict(), _source_of(spec)) for plan in stored},
        },
        reference=next(name for name in UNQUANTIZED if name in names),
        added_plan=added,
    )


def check_senses(model: str | os.PathLike, kinds: Sequence[str]) -> None:
    """Raise `LabError` if the model does not take one of the input `kinds` (``image``, ``audio``)."""
    from labkit.loading.prepare import Prepared

    prepared = Prepared.of(model)
    for kind in kinds:
        if kind not in prepared.modalities:
            takes = ", ".join(["text", *prepared.modalities])
            raise LabError(f"{prepared.spec.name} takes no {kind}; it takes {takes}")


def check_count(what: str, value: Any) -> None:
    """Raise `LabError` unless `value` is a whole number of at least one."""
    if type(value) is not int or value < 1:
        raise LabError(f"{what} must be a whole number of at least 1, not {value!r}")


def _source_of(spec: ModelSpec) -> str:
    return str(spec.folder or spec.source)


def _base_of(spec: ModelSpec, facts: Mapping[str, Any]) -> ModelSpec:
    """The unquantized model of a quantized folder, from its manifest; every table needs its row."""
    from labkit.models.checkpoint import folder_fingerprint

    needed = f"{spec.name} is compared with the unquantized {facts['name']}, which it was made of"
    try:
        base = get_spec(facts["source"])
    except LabError as error:
        raise LabError(f"{needed}: {error}") from None
    if base.folder and facts["fingerprint"] and folder_fingerprint(base.folder) != facts["fingerprint"]:
        raise LabError(f"{needed}: {base.source} has changed since then; quantize it anew")
    return base


def _unquantized_for(prepared: Prepared) -> str:
    """fp32, or bf16 where the model in FP32 does not fit in a GPU's memory."""
    if prepared.devices[0].type == "cpu":
        return "fp32"
    import torch

    memory = sum(torch.cuda.get_device_properties(device).total_memory for device in prepared.devices)
    parameters = prepared.spec.parameters
    return "fp32" if parameters and parameters * 4 < 0.8 * memory else "bf16"


def _check_plans(prepared: Prepared, plans: Sequence[QuantizationPlan]) -> None:
    """Resolve every plan on the model, for its devices, and check the files."""
    prepared.check_files(contents=False)  # the measuring process compares their hashes
    for plan in plans:
        try:
            prepared.check(plan)
        except LabError as error:
            name = "" if plan.name in str(error) else f"plan {plan.name}: "
            raise LabError(f"{name}{error}") from None


def _check_items(split: str, count: int, seed: int | None, model: str, modalities: Sequence[str]) -> list:
    if "image" not in modalities:
        raise LabError(f"{model} takes no images, and every PhoneTap item is a screenshot")
    chosen = phonetap.items(split=split, count=count, seed=seed, part="test")
    if len(chosen) != count:
        raise LabError(f"the split {split!r} has {len(chosen)} items, not {count}; ask for at most that many")
    if "audio" not in modalities and any(item.recording for item in chosen):
        raise LabError(f"{model} takes no audio, and the split {split!r} has spoken items; use typed,hard")
    return chosen


def lab_version() -> str:
    """The version of labkit, for settings."""
    from labkit import __version__

    return __version__


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
