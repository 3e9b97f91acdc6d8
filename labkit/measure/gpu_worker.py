"""Measures one plan on a GPU in a process of its own, started by `labkit bench-gpu`.

Standard input has the request, one JSON object; figures go to the plan's file as soon as they are measured. Events:
``{"event": "finished"}`` and ``{"event": "error", "message": str, "known": bool}``.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

from labkit.common.errors import ResultsError
from labkit.common.process import serve_request
from labkit.plans.plan import QuantizationPlan
from labkit.quantization import get_scheme
from labkit.results.gpu import GpuRecord


def main() -> int:
    """Measure what the request on standard input names."""
    return serve_request(run)


def run(request: Mapping[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    """``request``: ``record`` (the fields of a `GpuRecord`), ``source`` (a plan's name or file), ``folder``, and the
    arguments of `GpuBench.run`: ``batches, contexts, prompts, screenshot``."""
    from labkit.common.machine import environment, gpus
    from labkit.loading.load import load
    from labkit.measure.gpu import GpuBench
    from labkit.plans.plan import as_plan

    record = GpuRecord(**request["record"])
    path = f"{request['folder']}/{record.plan}.json"
    try:
        record = GpuRecord.load(path)
    except ResultsError:
        record.environment = environment(gpus()[0] if gpus() else None)
    plan = as_plan(request["source"])
    options = {}
    if record.weights:
        options["weights"] = record.weights
        plan, notes = uncalibrated(plan)
        record.notes = list(dict.fromkeys([*record.notes, *notes]))
    engine = load(record.model, plan, device="cuda", progress=False, **options)
    bench = GpuBench(engine, record, lambda: record.save(request["folder"]))
    bench.run(request["batches"], request["contexts"], request["prompts"], request["screenshot"])
    emit({"event": "finished"})


def uncalibrated(plan: QuantizationPlan) -> tuple[QuantizationPlan, list[str]]:
    """The plan with each scheme that calibrates replaced by one with the same storage and product, and notes on it."""
    rules, notes = [], []
    for rule in plan.rules:
        scheme = rule.scheme
        if scheme.requires_calibration:
            options = scheme.options()
            if scheme.name == "int8-dynamic":
                stand_in = get_scheme("int8-dynamic")
            else:
                stand_in = get_scheme(
                    "int4", **{name: options[name] for name in ("num_bits", "group_size", "symmetric")}
                )
            notes.append(
                f"{stand_in.name} stands for {scheme.name}, which calibrates: same bytes, same products"
            )
            rule = dataclasses.replace(rule, scheme=stand_in)
        rules.append(rule)
    return dataclasses.replace(plan, rules=tuple(rules)), notes


if __name__ == "__main__":
    sys.exit(main())
