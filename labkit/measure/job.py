"""What is checked, and settled, before a comparison measures anything."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit import phonetap
from labkit.common.errors import LabError
from labkit.common.machine import environment, usable_cores
from labkit.measure.defaults import DEFAULT_PLANS, PROMPTS
from labkit.models import get_spec
from labkit.results.tables import UNQUANTIZED


@dataclass(frozen=True)
class JobPlan:
    """One plan of a comparison: what `labkit.load` is given for it (None: a quantized folder's own plan), its
    content, and the model it is laid over if that is not the job's."""

    source: str | None
    definition: dict[str, Any]
    model_source: str | None = None


@dataclass(frozen=True)
class Job:
    """A checked comparison. `settings` must be the same for every measurement in one folder."""

    settings: dict[str, Any]
    model_source: str
    plans: dict[str, JobPlan]
    reference: str
    added_plan: str | None

    def request(self, plan: str, output: Path) -> dict[str, Any]:
        """What the measuring process of `plan` is told; see `labkit.measure.compare_worker`."""
        names = ("device", "threads", "seed", "split", "items", "enable_thinking", "batch_size")
        return {
            "output": str(output),
            "model": self.settings["model"],
            "model_source": self.plans[plan].model_source or self.model_source,
            "plan": plan,
            "source": self.plans[plan].source,
            "definition": self.plans[plan].definition,
            "weights": self.settings.get("weights"),
            **{name: self.settings[name] for name in names},
        }


def prepare(
    model: str | os.PathLike,
    plans: Sequence[str | os.PathLike] | None,
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
    if plans is None:
        plans = () if get_spec(model).is_quantized else DEFAULT_PLANS
    elif not plans:
        raise LabError("no plan given; `labkit plans` lists them")
    spec = get_spec(model)
    loaded = [_load_plan(plan) for plan in plans]
    device = _settle_device(device)
    if weights is not None:
        items = min(items, PROMPTS)
        _check_random(weights, spec, [plan for plan, _ in loaded])
    from labkit.models.checkpoint import Checkpoint, folder_fingerprint

    base, stored = spec, None
    if spec.is_quantized:
        base, stored = _base_of(spec), _stored_plan(spec, loaded)
        loaded = [one for one in loaded if one[0].name != stored.name]
    named = [plan.name for plan, _ in loaded] + ([stored.name] if stored else [])
    added = None if set(named) & set(UNQUANTIZED) else _unquantized_for(base, device)
    if added:
        loaded.insert(0, _load_plan(added))
    from_base = [plan for plan, _ in loaded]
    if stored is not None:
        loaded.append((stored, None))
    names = [plan.name for plan, _ in loaded]
    for name in names:
        if names.count(name) > 1:
            raise LabError(f"two plans are called {name!r}; every plan needs a name of its own")
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise LabError(f"the plan's name {name!r} must be made of letters, digits and . + - _ only")
    checkpoint = Checkpoint(spec, ask_hub=weights is None)
    senses = checkpoint.family.modalities
    sees = "image" in senses or weights is None
    if weights is not None and "audio" not in senses and split == "all":
        split = "typed"  # items are prompts alone
    chosen = _check_items(split, items, seed, spec.name, senses) if sees else []
    _check_plans(checkpoint if base is spec else Checkpoint(base), base, from_base, device, weights)
    if stored is not None:
        _check_stored(checkpoint, device)
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
        "device": device,
        "threads": threads,
        "enable_thinking": bool(enable_thinking),
        "batch_size": batch_size,
        **({} if weights is None else {"weights": weights}),
    }
    return Job(
        settings=settings,
        model_source=base.name if weights is not None and base.published is not None else _source_of(base),
        plans={
            plan.name: JobPlan(source, plan.to_dict(), _source_of(spec) if plan is stored else None)
            for plan, source in loaded
        },
        reference=next(name for name in UNQUANTIZED if name in names),
        added_plan=added,
    )


def predict_bytes(model: str | os.PathLike, plans: Sequence[Any]) -> list[int]:
    """Bytes of the whole model's weights under each plan, predicted from its skeleton; nothing is loaded.

    Raises `LabError` for a model that is quantized already.
    """
    from labkit.models import find_roles
    from labkit.models.checkpoint import Checkpoint

    spec = get_spec(model)
    if spec.is_quantized:
        raise LabError(f"{spec.name} is quantized already: `labkit models {spec.source}` says how")
    skeleton = Checkpoint(spec).skeleton()
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


def _load_plan(plan: Any) -> tuple[Any, str]:
    from labkit.plans.plan import QuantizationPlan

    source = os.fspath(plan)
    loaded = QuantizationPlan.from_yaml(source)
    return loaded, str(Path(source).resolve()) if Path(source).is_file() else source


def _source_of(spec: Any) -> str:
    return str(spec.folder or spec.source)


def _base_of(spec: Any) -> Any:
    """The unquantized model that a quantized folder was made of; every table needs its row."""
    from labkit.loading.manifest import Manifest
    from labkit.models.checkpoint import folder_fingerprint

    facts = Manifest.read(spec.folder).base
    needed = f"{spec.name} is compared with the unquantized {facts['name']}, which it was made of"
    try:
        base = get_spec(facts["source"])
    except LabError as error:
        raise LabError(f"{needed}: {error}") from None
    if base.folder and facts["fingerprint"] and folder_fingerprint(base.folder) != facts["fingerprint"]:
        raise LabError(f"{needed}: {base.source} has changed since then; quantize it anew")
    return base


def _stored_plan(spec: Any, asked: Sequence[tuple[Any, Any]]) -> Any:
    """The plan of a quantized folder; refuses others than it and the unquantized ones."""
    from labkit.loading.manifest import Manifest
    from labkit.loading.restore import check_stored_plan

    manifest = Manifest.read(spec.folder)
    for plan, _ in asked:
        if plan.name not in UNQUANTIZED:
            check_stored_plan(spec, manifest, plan)
    return check_stored_plan(spec, manifest)


def _check_stored(checkpoint: Any, device: str) -> None:
    """Look at the files of a quantized folder, and whether its schemes run on the device."""
    from labkit.loading.manifest import Manifest
    from labkit.loading.placement import check_placed_memory, placed_on
    from labkit.loading.prepare import choose_devices
    from labkit.loading.restore import resolve_stored

    spec = checkpoint.spec
    manifest = Manifest.read(spec.folder)
    manifest.check_sizes(spec.folder)
    devices, skeleton = choose_devices(device), checkpoint.skeleton()
    resolved, _ = resolve_stored(manifest, skeleton, devices[0], spec.folder)
    check_placed_memory(placed_on(skeleton, resolved, devices), resolved, spec)


def _settle_device(device: str) -> str:
    from labkit.loading.prepare import choose_devices

    return ",".join(map(str, choose_devices(device)))


def _check_random(weights: str, spec: Any, plans: Sequence[Any]) -> None:
    """Refuse what random weights cannot be."""
    if weights != "random":
        raise LabError(f"weights is {weights!r}; it is 'random', or not given")
    if spec.is_quantized:
        raise LabError(f"{spec.name} is quantized already and has its weights: name the model it is of")
    for plan in plans:
        if plan.requires_calibration:
            raise LabError(
                f"plan {plan.name} calibrates, which says nothing on random weights: int4 costs the same as gptq and awq"
            )


def _unquantized_for(spec: Any, device: str) -> str:
    """fp32, or bf16 where a GPU's memory would not hold the model in FP32."""
    if device == "cpu":
        return "fp32"
    import torch

    memory = sum(torch.cuda.get_device_properties(one).total_memory for one in device.split(","))
    return "fp32" if spec.parameters and spec.parameters * 4 < 0.8 * memory else "bf16"


def _check_plans(checkpoint: Any, spec: Any, plans: Sequence[Any], device: str, weights: str | None) -> None:
    """Resolve every plan on the model's skeleton (meta device) for this device; look at the files."""
    from labkit.loading.placement import check_placed_memory, placed_on
    from labkit.loading.prepare import check_calibration, check_runtime, choose_devices
    from labkit.models import find_roles

    if weights is None:
        checkpoint.check_weights()
    devices = choose_devices(device)
    skeleton = checkpoint.skeleton()
    roles = find_roles(skeleton)
    for plan in plans:
        try:
            check_runtime(checkpoint, plan)
            resolved = plan.resolve(skeleton, roles=roles, device=devices[0])
        except LabError as error:
            known = "" if plan.name in str(error) else f"plan {plan.name}: "
            raise LabError(f"{known}{error}") from None
        check_calibration(resolved, None, checkpoint.family.modalities)
        check_placed_memory(placed_on(skeleton, resolved, devices), resolved, spec)


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


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
