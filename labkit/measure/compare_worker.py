"""Measures one plan in a process of its own: ``python -m labkit.measure.compare_worker``, started by `labkit.compare`.

Standard input has the request, one JSON object; progress goes to standard output as JSON lines, and the output of
libraries to standard error. The worker writes the measurement to the run's folder, and before that the cost and every
answer as soon as they exist, from which an interrupted run continues.

Events: ``{"event": "stage", "stage": "loading" | "measuring" | "answering"}``,
``{"event": "answers", "done": n, "total": n, "hits": n}``, ``{"event": "finished"}`` and
``{"event": "error", "message": str, "known": bool}``.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from labkit.common.process import serve_request
from labkit.results.folders import RunFolder
from labkit.results.measurement import Measurement
from labkit.results.summary import summarize, summarize_groups


def run_plan(
    request: Mapping[str, Any],
    emit: Callable[[dict[str, Any]], None],
    *,
    load: Callable[..., Any],
    items: Callable[..., list],
    measure: Callable[..., dict[str, Any]],
    score: Callable[[Any, str], Any] | None = None,
) -> Measurement:
    """Load, measure and evaluate the plan that `request` describes, and save its measurement.

    `request`: ``output, model, model_source, plan, definition, device, seed, split, items,
    enable_thinking, batch_size``. Callers pass the functions that need a model:
    ``load(model_source, definition, device=…, work_folder=…, progress=False)``,
    ``items(split=…, count=…, seed=…, part="test")`` and ``measure(engine, items, …)``, which returns the fields of
    cost. Cost is measured before quality, so that batches do not raise the peak of memory. With ``weights`` in the
    request (``random``) quality is not evaluated.
    """
    from labkit.measure import quality

    folder, plan = RunFolder(request["output"]), request["plan"]
    state = folder.load_partial(plan, request["definition"])
    if not folder.partial_path(plan).exists():
        folder.append_partial(plan, "plan", request["definition"])
    test_items = items(split=request["split"], count=request["items"], seed=request["seed"], part="test")
    ids = {item.id for item in test_items}
    records = [record for record in state["records"] if record["id"] in ids]

    cost, weights = state["cost"], request.get("weights")
    if cost is None or (weights is None and len(records) < len(test_items)):
        emit({"event": "stage", "stage": "loading"})
        engine = load(
            request["model_source"],
            request["definition"],
            device=request["device"],
            work_folder=folder.work_path(plan),
            progress=False,
            **({"weights": weights} if weights else {}),
        )
        if cost is None:
            emit({"event": "stage", "stage": "measuring"})
            cost = measure(engine, test_items, enable_thinking=request["enable_thinking"])
            folder.append_partial(plan, "cost", cost)
    if weights is None and len(records) < len(test_items):
        emit({"event": "stage", "stage": "answering"})
        done, hits = len(records), sum(record["success"] for record in records)
        emit({"event": "answers", "done": done, "total": len(test_items), "hits": hits})

        def keep(record: dict[str, Any]) -> None:
            nonlocal done, hits
            folder.append_partial(plan, "record", record)
            done, hits = done + 1, hits + record["success"]
            emit({"event": "answers", "done": done, "total": len(test_items), "hits": hits})

        records = quality.evaluate(
            engine,
            test_items,
            batch_size=request["batch_size"],
            enable_thinking=request["enable_thinking"],
            done=records,
            on_record=keep,
            score=score,
        )
    cost = dict(cost)
    samples = {**cost.pop("samples", {}), "items": records}
    measurement = Measurement(
        model=request["model"],
        plan=plan,
        device=request["device"],
        plan_definition=dict(request["definition"]),
        weights=weights,
        seed=request["seed"],
        split=request["split"],
        enable_thinking=request["enable_thinking"],
        batch_size=request["batch_size"],
        samples=samples,
        splits=summarize_groups(records),
        **summarize(records),
        **cost,
    )
    folder.save_finished(measurement)
    emit({"event": "finished"})
    return measurement


def main() -> int:
    """Measure the plan that the request on standard input names."""
    return serve_request(lambda request, emit: run_plan(request, emit, **_real_parts(request)))


def _real_parts(request: Mapping[str, Any]) -> dict[str, Callable]:
    import torch

    from labkit import phonetap
    from labkit.loading.load import load
    from labkit.measure.cost import measure

    torch.set_num_threads(request["threads"])
    return {"load": load, "items": phonetap.items, "measure": measure}


if __name__ == "__main__":
    sys.exit(main())
