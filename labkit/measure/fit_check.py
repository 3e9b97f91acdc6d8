"""Compares the predictions of `labkit fit` with measurements: one plan in one process, with random weights.

``labkit fit --check`` starts ``python -m labkit.measure.fit_check``; requests and events: `labkit.common.process`.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labkit.common.errors import WorkerFailedError
from labkit.common.machine import environment, gpus, usable_cores
from labkit.common.process import module_command, run_workers, serve_request
from labkit.measure.options import FitOptions
from labkit.models.spec import get_spec
from labkit.plans.plan import QuantizationPlan, presets
from labkit.results.config import write_config
from labkit.results.fit import FitCheck


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors, on the CPU. Attributes: ``now_bytes``, ``peak_bytes``."""

    def __init__(self) -> None:
        super().__init__()
        self.now_bytes = self.peak_bytes = 0
        self._storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and not value.is_meta:
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.now_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.now_bytes -= size


NEW_TOKENS = 16
WEIGHTS_LIMIT, PEAK_LIMIT = 0.03, 0.10
"""Relative errors that predictions may have."""


def check_plan(
    model: str,
    plan: str,
    *,
    context: int,
    screen: tuple[int, int] | None,
    max_pixels: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Load ``model`` with random weights under ``plan``, answer one conversation, and compare with the prediction.

    The prompt is as long as the context allows. The peak is that of torch's allocator on a GPU, and that of live
    tensors on the CPU (`LiveBytes`).

    Args:
        model, plan: as for `labkit.load`.
        context: tokens of the conversation, prompt and answer.
        screen: pixels of the screenshot in the prompt; None for text alone.
        max_pixels: the image processor's limit.
        device: as for `labkit.load`.

    Returns:
        ``plan, device, context, image_tokens`` and for each of ``weights, cache, peak`` the bytes
        ``<name>_predicted`` and ``<name>_measured``, the relative error ``<name>_error`` and, for the first and
        the last, whether it is ``<name>_within`` `WEIGHTS_LIMIT` and `PEAK_LIMIT`; ``load_peak_measured``.
    """
    import torch

    from labkit.loading.load import load
    from labkit.measure.fit import LIBRARY_BYTES, needs
    from labkit.plans.quantize import weights_bytes

    engine = load(model, plan, device, weights="random", progress=False)
    on_gpu = engine.device.type == "cuda"
    gc.collect()
    load_peak = torch.cuda.max_memory_allocated(engine.device) if on_gpu else None
    weights = torch.cuda.memory_allocated(engine.device) if on_gpu else weights_bytes(engine.model)
    messages = _prompt(engine, context - NEW_TOKENS, screen, max_pixels)
    never = dict.fromkeys(engine.end_token_ids, -100.0)
    request = engine.request(messages, max_new_tokens=NEW_TOKENS, logit_bias=never)
    image_tokens = int(request.inputs.get("mm_token_type_ids", torch.zeros(1)).sum())
    batch = engine.batch(1)
    batch.add(request)
    engine.forward.way  # noqa: B018 - it is chosen by a trial, which is no part of an answer
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(engine.device)
    cache = length = 0
    with contextlib.nullcontext() if on_gpu else LiveBytes() as live:
        while batch.busy:
            batch.step()
            if batch.active:
                cache, length = batch.cache_bytes, batch.active[0].row.length
    peak = torch.cuda.max_memory_allocated(engine.device) if on_gpu else weights + live.peak_bytes
    (need,) = needs(model, [plan], context=length, screen=screen, max_pixels=max_pixels)
    library = 0 if on_gpu else LIBRARY_BYTES
    record = {
        "plan": need.plan,
        "model": engine.spec.name,
        "weights": engine.weights,
        "device": str(engine.device),
        "context": length,
        "image_tokens": image_tokens,
        "load_peak_measured": load_peak,
        "parts_predicted": {
            "weights": need.weights_bytes,
            "cache": need.cache_bytes,
            "activations": need.activation_bytes,
            "workspace": need.workspace_bytes - library,
        },
    }
    pairs = {
        "weights": (need.weights_bytes, weights),
        "cache": (need.cache_bytes, cache),
        "peak": (need.total_bytes - library, peak),
    }
    for name, (predicted, measured) in pairs.items():
        record |= {f"{name}_predicted": predicted, f"{name}_measured": measured}
        record[f"{name}_error"] = predicted / measured - 1
    record["weights_within"] = abs(record["weights_error"]) <= WEIGHTS_LIMIT
    record["peak_within"] = abs(record["peak_error"]) <= PEAK_LIMIT
    return record


def check_fit(
    model: str,
    plans: Sequence[str] | None = None,
    *,
    context: int = FitOptions.context,
    screen: tuple[int, int] | None,
    max_pixels: int | None = None,
    device: str = "auto",
    output: Path,
    say: Callable[[str], None] = print,
) -> FitCheck:
    """`check_plan` for each plan (None: all presets) in a process of its own; plans that calibrate are left out.

    Writes ``fit.json`` and ``config.yaml`` to the folder ``output``; ``say`` is called with each failure.
    """
    asked = {"context": context, "max_pixels": max_pixels, "device": device}
    pixels = "none" if screen is None else f"{screen[0]}x{screen[1]}"
    chosen = [
        name for name in plans or presets() if not QuantizationPlan.from_yaml(name).requires_calibration
    ]
    config = {"model": model, "plans": plans, **asked, "screen": pixels, "check": True, "output": output}
    write_config(output, "fit", config)
    records: list[dict[str, Any]] = []
    failures = {}
    for plan in chosen:
        try:
            run_workers(
                module_command("labkit.measure.fit_check"),
                {
                    output / "logs" / f"{Path(plan).stem}.log": {
                        "model": model,
                        "plan": plan,
                        "screen": screen,
                        **asked,
                    }
                },
                lambda event: records.append(event["record"]),
                threads=usable_cores(),
            )
        except WorkerFailedError as error:
            failures[plan] = str(error)
            say(f"{plan} could not be measured: {error}")
    on_gpu = any(record["device"].startswith("cuda") for record in records)
    check = FitCheck(
        {"weights": WEIGHTS_LIMIT, "peak": PEAK_LIMIT},
        records,
        failures,
        settings={"model": get_spec(model).name, "weights": "random", "context": context, "screen": screen},
        environment=environment(gpus()[0] if on_gpu else None),
    )
    check.save(output)
    return check


def _prompt(engine: Any, tokens: int, screen: tuple[int, int] | None, max_pixels: int | None) -> list[dict]:
    """One turn of about ``tokens`` tokens: filler and a grey screenshot."""
    from PIL import Image

    parts: list[dict[str, Any]] = []
    if screen is not None and "image" in engine.modalities:
        parts.append({"type": "image", "image": Image.new("RGB", screen, (128, 128, 128))})
        pixels = getattr(engine.processor, "image_processor", None)
        if max_pixels is not None and pixels is not None:
            pixels.size = {**dict(pixels.size), "longest_edge": max_pixels}

    def turn(count: int) -> list[dict]:
        takes_ids = getattr(engine.processor, "takes_ids", False)
        filler = engine.tokenizer.random_text(count) if takes_ids else "." * count
        return [{"role": "user", "content": [{"type": "text", "text": filler}, *parts]}]

    short, longer = (engine.prepare(turn(count))["input_ids"].shape[1] for count in (1, 65))
    return turn(max(1 + round((tokens - short) * 64 / (longer - short)), 1))


def main() -> int:
    """Read the request, and write the record or the error as an event."""
    return serve_request(_answer)


def _answer(request: Mapping[str, Any], emit: Callable[[dict[str, Any]], None]) -> None:
    screen = request["screen"]
    record = check_plan(**{**request, "screen": tuple(screen) if screen else None})
    emit({"event": "record", "record": record})
    emit({"event": "finished"})


if __name__ == "__main__":
    sys.exit(main())
