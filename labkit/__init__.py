"""Quantize, measure and serve a multimodal phone model.

``labkit.load(model, plan)`` gives an engine, ``labkit.quantize_(module, plan)`` quantizes any torch module in
place, ``labkit.quantize_to(model, plan, folder)`` and ``labkit.save(engine, folder)`` keep it for `load`,
``labkit.compare(model, plans)`` measures a model under many plans, and ``labkit.search_plan(model, memory=...)``
finds the best plan for a size. Names load on first use, so that
``import labkit`` is quick and imports no torch.
"""

import os
from importlib import import_module
from typing import Any

# Threads that wait for work sleep instead of spinning: with other work on the same cores, spinning makes an answer
# up to twenty times slower. OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

_HOME = {
    "Action": "labkit.common.actions",
    "Comparison": "labkit.results.comparison",
    "Engine": "labkit.engine.engine",
    "Generation": "labkit.engine.engine",
    "LabError": "labkit.common.errors",
    "Datasets": "labkit.loading.datasets",
    "Measurement": "labkit.results.measurement",
    "ModelSpec": "labkit.models.spec",
    "QuantizationPlan": "labkit.plans.plan",
    "compare": "labkit.measure.compare",
    "compare_perplexity": "labkit.measure.perplexity",
    "export": "labkit.loading.export",
    "get_spec": "labkit.models.spec",
    "list_models": "labkit.models.spec",
    "load": "labkit.loading.load",
    "measure_sensitivity": "labkit.measure.search.sensitivity",
    "parse_answer": "labkit.common.actions",
    "quantize_": "labkit.plans.quantize",
    "quantize_to": "labkit.loading.quantize_to",
    "save": "labkit.loading.save",
    "search_plan": "labkit.measure.search.search",
}

_MODULES = {
    "anatomy": "labkit.measure.anatomy",
    "chat": "labkit.interactive.chat",
    "course": "labkit.interactive.course",
    "launch": "labkit.client.launch",
    "show": "labkit.results.show",
    "widgets": "labkit.interactive.widgets",
}
"""Rooms within rooms that notebooks open by a short name: ``from labkit import anatomy``."""

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = import_module(_MODULES[name])
    elif name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    else:
        raise AttributeError(f"module 'labkit' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
