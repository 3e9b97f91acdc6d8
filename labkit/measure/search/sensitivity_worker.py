"""Measures sensitivities in a process of its own: ``python -m labkit.measure.search.sensitivity_worker``.

Standard input has the request, one JSON object: ``folder, stream, model_source, device, threads, dtype, candidates,
material, linears, parts, done``. Each record is appended to the folder (`labkit.results.folders`), and an event
``{"event": "record"}`` goes to standard output; the last event is ``{"event": "finished"}``, or ``{"event": "error",
"message": str, "known": bool}``. What is in ``done`` is not measured again.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from labkit.common.process import serve_request
from labkit.results.folders import RecordFolder


def run_tasks(request: Mapping[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """Measure the Linears and the parts that the request names."""
    from labkit.common.machine import forget_models
    from labkit.loading.datasets import Datasets
    from labkit.loading.load import load
    from labkit.measure.probe import Probe
    from labkit.quantization.shorthand import parse_candidates

    folder = RecordFolder(request["folder"], "sensitivities")
    candidates = parse_candidates(request["candidates"])
    datasets = Datasets(**request["material"])
    probe = Probe.load(folder.path / "probe.safetensors")
    done = {tuple(key) for key in request["done"]}

    def keep(record: Mapping[str, Any]) -> None:
        folder.append(record, request["stream"])
        emit({"event": "record"})

    if request["linears"]:
        from labkit.measure.search.layerwise import LayerwiseEvaluator

        engine = load(request["model_source"], request["dtype"], request["device"], progress=False)
        batches = datasets.calibration_batches(engine.processor, engine.modalities, engine.model)
        evaluator = LayerwiseEvaluator(engine.model, engine.roles, probe, batches, request["linears"])
        for record in evaluator.measure(candidates, done):
            keep(record)
        del engine, evaluator
    for role, label in request["parts"]:
        forget_models()
        keep(measure_part(request, role, label, candidates[label], datasets, probe))


def measure_part(
    request: Mapping[str, Any], role: str, label: str, scheme: Any, datasets: Any, probe: Any
) -> dict[str, Any]:
    """A record of one whole part under one scheme: ``part, scheme, bytes, kl, agreement`` and, with validation items,
    ``items, click_accuracy, step_success_rate, parse_rate``."""
    from labkit.loading.load import load
    from labkit.measure.probe import divergence
    from labkit.measure.quality import evaluate
    from labkit.plans.plan import QuantizationPlan, Rule
    from labkit.quantization import get_scheme
    from labkit.results.summary import summarize

    rule = Rule(scheme, roles=(role,), on_unsupported=get_scheme("int8"))
    plan = QuantizationPlan(f"{role} {label}", (rule,), default=request["dtype"])
    calibration = None
    if plan.requires_calibration:
        from labkit.loading.prepare import Prepared

        calibration = Prepared.of(request["model_source"]).calibration_batches(datasets)
    engine = load(request["model_source"], plan, request["device"], calibration=calibration, progress=False)
    result = divergence(engine.model, probe)
    size = sum(part.bytes for part in engine.resolved.parts if part.role == role and part.is_linear)
    record = {"part": role, "scheme": label, "bytes": size, "kl": result.kl, "agreement": result.agreement}
    if datasets.text is None and datasets.validation:
        records = evaluate(engine, datasets.items("validation", engine.modalities))
        summary = summarize(records)
        names = ("items", "click_accuracy", "step_success_rate", "parse_rate")
        record |= {name: summary[name] for name in names}
    return record


def main() -> int:
    """Measure what the request on standard input names."""
    return serve_request(_run)


def _run(request: Mapping[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    import torch

    torch.set_num_threads(request["threads"])
    run_tasks(request, emit)
    emit({"event": "finished"})


if __name__ == "__main__":
    sys.exit(main())
