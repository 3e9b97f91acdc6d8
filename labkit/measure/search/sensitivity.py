"""Sensitivity: what each Linear, and each part, costs when it alone is quantized.

``labkit.measure_sensitivity("pocket")`` replaces every Linear alone by every candidate scheme and takes down the
KL divergence of the model's answers from the unquantized model's, and the signal-to-noise ratio of the layer's
output; then every part as a whole, with its taps. Resumable: each record is kept as soon as it exists.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from labkit.common.errors import Interrupted, LabError
from labkit.common.machine import usable_cores
from labkit.common.process import module_command, run_workers
from labkit.loading.datasets import Datasets
from labkit.measure.defaults import CANDIDATES
from labkit.measure.job import check_count, lab_version
from labkit.measure.probe import probe_of
from labkit.quantization.shorthand import parse_candidates
from labkit.results.folders import RecordFolder
from labkit.results.record import Record

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from labkit.models import ModelSpec

FP32_PARAMETERS = 2e9
"""Models up to this size are measured in fp32: rounding to bf16 alone diverges as much as a good scheme."""


@dataclass
class Sensitivity(Record):
    """What was measured, in plain records.

    Attributes:
        linears: ``linear, role, kind, depth, scheme, parameters, bytes, kl, agreement, sqnr_db, measure_s`` each, or
            ``unsupported`` in place of the last five.
        parts: ``part, scheme, bytes, kl, agreement`` each, and taps for models that see.
    """

    FILE: ClassVar[str] = "sensitivity.json"
    COMMAND: ClassVar[str] = "sensitivity"
    ALLOW_NAN: ClassVar[bool] = True

    settings: dict[str, Any]
    linears: list[dict[str, Any]] = field(repr=False)
    parts: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def table(self) -> pandas.DataFrame:
        """One row a Linear and scheme."""
        import pandas

        return pandas.DataFrame(self.linears)

    def parts_table(self) -> pandas.DataFrame:
        """One row a part and scheme."""
        import pandas

        return pandas.DataFrame(self.parts)

    def plot(self) -> plotly.graph_objects.Figure:
        """A heat map: kinds of Linears by layers, one scheme at a time."""
        from labkit.results.charts.methods import sensitivity_heat_map

        return sensitivity_heat_map(self.linears)


def measure_sensitivity(
    model: str | os.PathLike = "pocket",
    schemes: str | Sequence[str] = CANDIDATES,
    *,
    datasets: Datasets | None = None,
    parts: bool = True,
    device: str = "auto",
    jobs: int | None = None,
    threads: int | None = None,
    output: str | os.PathLike | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measure every Linear under every candidate scheme alone, then every part.

    Args:
        model: a name from ``labkit models``, a checkpoint folder, or a hub id.
        schemes: candidates, as `labkit.quantization.shorthand` reads them.
        datasets: how many items, or which text (`labkit.loading.datasets`).
        parts: measure whole parts too, with their taps.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        jobs: processes side by side (default: one for every two cores; one on a GPU).
        threads: CPU threads of each (default: the cores, shared out).
        output: a folder; what is measured there already with the same settings is kept, and further candidates
            are added to it. Default: ``results/sensitivity-MODEL``.
        progress: show a progress bar.

    Raises:
        LabError: whatever cannot work, before anything is measured.
        Interrupted: Ctrl-C; the same call again continues.
    """
    job = _prepare(model, schemes, datasets or Datasets(), parts, device)
    output = Path(output or Path("results") / f"sensitivity-{Path(job.spec.name).name}")
    folder = RecordFolder(output, "sensitivities")
    folder.open(job.settings, grows="schemes")
    cores = usable_cores()
    jobs = (1 if job.device != "cpu" else max(cores // 2, 1)) if jobs is None else jobs
    check_count("jobs", jobs)
    threads = max(cores // jobs, 1) if threads is None else threads
    check_count("threads", threads)
    _measure_missing(job, folder, jobs, threads, progress)
    records = [one for one in folder.records() if one["scheme"] in job.settings["schemes"]]
    order = {(name, label): i for i, (name, label) in enumerate(job.tasks)}
    linears = sorted((one for one in records if "linear" in one), key=lambda one: order[_key(one)])
    parts_found = [one for one in records if "part" in one]
    found = Sensitivity(job.settings, linears, parts_found, environments=folder.environments())
    found.save(output)
    return found


@dataclass(frozen=True)
class _Job:
    """A checked measurement: its settings and all its tasks, (Linear, scheme) and (part, scheme)."""

    spec: ModelSpec
    settings: dict[str, Any]
    device: str
    dtype: str
    datasets: Datasets
    tasks: list[tuple[str, str]]
    parts: list[tuple[str, str]]


def _prepare(
    model: str | os.PathLike, schemes: str | Sequence[str], datasets: Datasets, parts: bool, device: str
) -> _Job:
    from labkit.loading.prepare import choose_device
    from labkit.measure.search.layerwise import can_store, measurable_linears, measurable_others
    from labkit.models import find_roles, get_spec
    from labkit.models.checkpoint import Checkpoint, folder_fingerprint

    spec = get_spec(model)
    if spec.is_quantized:
        raise LabError(f"{spec.name} is quantized already: give the model that it was made of")
    candidates = parse_candidates(schemes)
    chosen = str(choose_device(device))
    for scheme in candidates.values():
        scheme.validate_environment(chosen)
    checkpoint = Checkpoint(spec)
    datasets.check(spec.name, checkpoint.family.modalities)
    checkpoint.check_weights()
    skeleton = checkpoint.skeleton()
    size = sum(parameter.numel() for parameter in skeleton.parameters())
    linears, roles = measurable_linears(skeleton), find_roles(skeleton)
    dtype = "fp32" if size <= FP32_PARAMETERS else "bf16"
    settings = {
        "version": lab_version(),
        "model": spec.name,
        "model_fingerprint": folder_fingerprint(spec.folder) if spec.folder else None,
        "schemes": list(candidates),
        "material": datasets.settings(),
        "dtype": dtype,
        "device": chosen.partition(":")[0],
    }
    stored = [
        (name, label)
        for name in measurable_others(skeleton)
        for label, scheme in candidates.items()
        if can_store(scheme, skeleton.get_submodule(name))
    ]
    wanted = dict.fromkeys(role for name in linears if (role := roles.get(name))) if parts else {}
    return _Job(
        spec,
        settings,
        chosen,
        dtype,
        datasets,
        [(name, label) for name in linears for label in candidates] + stored,
        [(role, label) for role in wanted for label in candidates],
    )


def _measure_missing(job: _Job, folder: RecordFolder, jobs: int, threads: int, progress: bool) -> None:
    from tqdm.auto import tqdm

    records = folder.records()
    done = {_key(one) for one in records if "linear" in one}
    tasks = [task for task in job.tasks if task not in done]
    done_parts = {
        _key(one) for one in records if "part" in one
    }  # the part lm_head is the Linear of that name
    parts = [task for task in job.parts if task not in done_parts]
    total = len(job.tasks) + len(job.parts)
    probe = folder.path / "probe.safetensors"  # records may have come from elsewhere, without it
    if not tasks and not parts and probe.is_file():
        return
    with tqdm(
        total=total, initial=total - len(tasks) - len(parts), desc="Sensitivity", unit=" measured",
        disable=not progress,
    ) as bar:  # fmt: skip
        try:
            if not probe.is_file():
                bar.set_description("Sensitivity: the unquantized model answers")
                _make_probe(job, folder)
            if tasks or parts:
                from labkit.common.machine import environment_on

                folder.begin(environment_on(job.device))
            bar.set_description("Sensitivity")
            linears = list(dict.fromkeys(name for name, _ in tasks))
            requests = [
                {
                    "folder": str(folder.path),
                    "stream": number + 1,
                    "model_source": str(job.spec.folder or job.spec.source),
                    "device": job.device,
                    "threads": threads,
                    "dtype": job.dtype,
                    "candidates": job.settings["schemes"],
                    "material": asdict(job.datasets),
                    "linears": _share(linears, number, jobs),
                    "parts": _share(parts, number, jobs),
                    "done": sorted(done),
                }
                for number in range(jobs)
            ]
            requests = [request for request in requests if request["linears"] or request["parts"]]
            run_workers(
                module_command("labkit.measure.search.sensitivity_worker"),
                {folder.path / f"worker-{request['stream']}.log": request for request in requests},
                lambda event: bar.update(),
                threads=threads,
            )
        except KeyboardInterrupt:
            kept = len(folder.records())
            raise Interrupted(
                f"interrupted: {kept} of {total} are measured; run the same again to continue"
            ) from None


def _make_probe(job: _Job, folder: RecordFolder) -> None:
    from labkit.loading.load import load

    engine = load(job.spec, job.dtype, job.device, progress=False)
    probe_of(engine, job.datasets).save(folder.path / "probe.safetensors")


def _share(tasks: Sequence[Any], number: int, jobs: int) -> list[Any]:
    """The ``number``-th of ``jobs`` nearly equal runs of tasks."""
    size = -(-len(tasks) // jobs)
    return list(tasks[number * size : (number + 1) * size])


def _key(record: Mapping[str, Any]) -> tuple[str, str]:
    return record.get("linear") or record["part"], record["scheme"]
