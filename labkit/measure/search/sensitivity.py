"""Sensitivity: the divergence that each Linear, and each part, causes when it alone is quantized."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from labkit.common.errors import Interrupted
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

    from labkit.loading.prepare import Prepared
    from labkit.quantization import Scheme

FP32_PARAMETERS = 2e9
"""Models up to this size are measured in fp32: rounding to bf16 alone diverges as much as a good scheme."""


@dataclass
class Sensitivity(Record):
    """What `labkit.measure_sensitivity` returns: plain records.

    Attributes:
        linears: ``linear, role, kind, depth, scheme, parameters, bytes, kl, agreement, sqnr_db, measure_s`` each, or
            ``unsupported`` in place of the last five.
        parts: ``part, scheme, bytes, kl, agreement`` each, and scores on validation items where there are any.
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

    The KL divergence is that of the model's distributions from the unquantized model's; the signal-to-noise ratio is
    that of the layer's output. Each record is stored as soon as it exists, so the same call continues.

    Args:
        model: a name from ``labkit models``, a checkpoint folder, or a hub id.
        schemes: candidates, as `labkit.quantization.shorthand` reads them.
        datasets: how many items, or which text (`labkit.loading.datasets`).
        parts: measure whole parts too, with their scores on validation items.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        jobs: processes side by side (default: one for every two cores; one on a GPU).
        threads: CPU threads of each (default: an equal share of the cores).
        output: a folder; measurements in it with the same settings are kept, and further candidates are added.
            Default: ``results/sensitivity-MODEL``.
        progress: show a progress bar.

    Raises:
        LabError: an argument is wrong, before anything is measured.
        Interrupted: Ctrl-C; the same call again continues.
    """
    from labkit.loading.prepare import Prepared, choose_device

    prepared = Prepared.of(model, choose_device(device), quantized="give the model that it was made of")
    datasets = datasets or Datasets()
    tasks = _tasks(prepared, parse_candidates(schemes), datasets, parts)
    output = Path(output or Path("results") / f"sensitivity-{Path(prepared.spec.name).name}")
    folder = RecordFolder(output, "sensitivities")
    folder.open(tasks.settings, grows="schemes")
    cores = usable_cores()
    jobs = (1 if tasks.settings["device"] != "cpu" else max(cores // 2, 1)) if jobs is None else jobs
    check_count("jobs", jobs)
    threads = max(cores // jobs, 1) if threads is None else threads
    check_count("threads", threads)
    _measure_missing(prepared, tasks, datasets, folder, jobs, threads, progress)
    records = [record for record in folder.records() if record["scheme"] in tasks.settings["schemes"]]
    order = {(name, label): i for i, (name, label) in enumerate(tasks.linears)}
    linears = sorted(
        (record for record in records if "linear" in record), key=lambda record: order[_key(record)]
    )
    parts_found = [record for record in records if "part" in record]
    result = Sensitivity(tasks.settings, linears, parts_found, environments=folder.environments())
    result.save(output)
    return result


@dataclass(frozen=True)
class _Tasks:
    """The measurements to make, after all checks: (Linear, scheme) and (part, scheme), under these settings."""

    settings: dict[str, Any]
    linears: list[tuple[str, str]]
    parts: list[tuple[str, str]]


def _tasks(prepared: Prepared, candidates: Mapping[str, Scheme], datasets: Datasets, parts: bool) -> _Tasks:
    """Check model, candidates and datasets, and list the measurements to make."""
    from labkit.measure.search.layerwise import can_store, measurable_linears, measurable_others
    from labkit.models.checkpoint import folder_fingerprint

    spec, device = prepared.spec, prepared.devices[0]
    for scheme in candidates.values():
        scheme.validate_environment(str(device))
    datasets.check(spec.name, prepared.modalities)
    prepared.check_files()
    skeleton, roles = prepared.skeleton, prepared.roles
    size = sum(parameter.numel() for parameter in skeleton.parameters())
    linears = measurable_linears(skeleton)
    settings = {
        "version": lab_version(),
        "model": spec.name,
        "model_fingerprint": folder_fingerprint(spec.folder) if spec.folder else None,
        "schemes": list(candidates),
        "material": datasets.settings(),
        "dtype": "fp32" if size <= FP32_PARAMETERS else "bf16",
        "device": device.type,
    }
    stored = [
        (name, label)
        for name in measurable_others(skeleton)
        for label, scheme in candidates.items()
        if can_store(scheme, skeleton.get_submodule(name))
    ]
    part_roles = dict.fromkeys(role for name in linears if (role := roles.get(name))) if parts else {}
    return _Tasks(
        settings,
        [(name, label) for name in linears for label in candidates] + stored,
        [(role, label) for role in part_roles for label in candidates],
    )


def _measure_missing(
    prepared: Prepared,
    all_tasks: _Tasks,
    datasets: Datasets,
    folder: RecordFolder,
    jobs: int,
    threads: int,
    progress: bool,
) -> None:
    from tqdm.auto import tqdm

    from labkit.loading.load import load

    spec, device, settings = prepared.spec, str(prepared.devices[0]), all_tasks.settings
    records = folder.records()
    done = {_key(record) for record in records if "linear" in record}
    tasks = [task for task in all_tasks.linears if task not in done]
    # apart from `done`: the part lm_head has the name of its Linear
    done_parts = {_key(record) for record in records if "part" in record}
    parts = [task for task in all_tasks.parts if task not in done_parts]
    total = len(all_tasks.linears) + len(all_tasks.parts)
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
                engine = load(spec, settings["dtype"], device, progress=False)
                probe_of(engine, datasets).save(probe)
                del engine
            if tasks or parts:
                from labkit.common.machine import environment_on

                folder.begin(environment_on(device))
            bar.set_description("Sensitivity")
            linears = list(dict.fromkeys(name for name, _ in tasks))
            requests = [
                {
                    "folder": str(folder.path),
                    "stream": number + 1,
                    "model_source": str(spec.folder or spec.source),
                    "device": device,
                    "threads": threads,
                    "dtype": settings["dtype"],
                    "candidates": settings["schemes"],
                    "material": asdict(datasets),
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
            measured = len(folder.records())
            raise Interrupted(
                f"interrupted: {measured} of {total} are measured; run the same again to continue"
            ) from None


def _share(tasks: Sequence[Any], number: int, jobs: int) -> list[Any]:
    """The ``number``-th of ``jobs`` nearly equal runs of tasks."""
    size = -(-len(tasks) // jobs)
    return list(tasks[number * size : (number + 1) * size])


def _key(record: Mapping[str, Any]) -> tuple[str, str]:
    return record.get("linear") or record["part"], record["scheme"]
