"""Measures a model at growing context, plan by plan: bytes of its KV cache, time, and quality."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from labkit import phonetap
from labkit.common.errors import LabError
from labkit.common.machine import environment, forget_models, gpus
from labkit.engine.engine import Engine
from labkit.engine.generation import Generation
from labkit.loading.load import load
from labkit.measure import quality
from labkit.measure.anatomy import Anatomy
from labkit.measure.cost import peak_memory, start_peak
from labkit.measure.job import check_count
from labkit.models import get_spec
from labkit.models.checkpoint import folder_fingerprint
from labkit.plans.plan import QuantizationPlan
from labkit.quantization.torch_state import guarded
from labkit.results import summary
from labkit.results.config import write_config
from labkit.results.context import ContextGrowth
from labkit.results.folders import RecordFolder

CONTEXTS = (160, 240, 320, 480, 720, 1440)
FILLER = "."
TRIED = 64  # fillers that measure how many tokens each one takes


@dataclass(frozen=True)
class LongItem(phonetap.Item):
    """A PhoneTap item with ``filler`` before its screen, where the history of a long conversation would be."""

    filler: str = ""

    def messages(self) -> list[dict[str, Any]]:
        """As `labkit.phonetap.Item.messages`."""
        (turn,) = super().messages()
        return [{**turn, "content": [{"type": "text", "text": self.filler}, *turn["content"]]}]


@dataclass(frozen=True)
class Timing:
    """The number of timed requests, ``prompts`` after ``warmup``, with ``new_tokens`` tokens each."""

    prompts: int = 4
    warmup: int = 1
    new_tokens: int = 24


@guarded
def measure_growth(
    model: str | os.PathLike,
    plans: Sequence[str | os.PathLike | QuantizationPlan],
    *,
    windows: Sequence[int] = (),
    contexts: Sequence[int] = CONTEXTS,
    items: int = 60,
    timing: Timing | None = None,
    weights: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    batch_size: int = 8,
    output: str | os.PathLike,
    progress: bool = True,
) -> ContextGrowth:
    """Measure every plan at every context; measurements that the folder ``output`` already has are kept.

        measure_growth("pocket", ["bf16", "int8-kv"], windows=(192,), contexts=(160, 320), output="results/context")

    Each request keeps its screen and instruction; a filler of dots before them grows. The answer depends on the last
    tokens, so a window that holds those can be right. The effect of the filler itself shows in a first plan with
    the whole, exact cache: the others are compared with it at every context, item by item.

    Args:
        model: a name, a folder or a hub id.
        plans: the others are compared with the first.
        windows: sliding windows; the first plan is measured once more with each.
        contexts: approximate tokens of the prompt; a request that is longer without filler stays as it is.
        items: typed PhoneTap test items to answer at each context; 0 measures cost alone.
        timing: number and length of the timed requests.
        weights: ``random`` measures cost alone (see `labkit.load`).
        device: as for `labkit.load`.
        threads: CPU threads (default: torch's).
        batch_size: answers at a time.
        output: the folder for ``context.json`` and the records from which an interrupted run continues.
        progress: show a progress bar.

    Raises:
        LabError: a plan, context or folder is wrong, before anything is measured.
    """
    arguments = {**locals(), "timing": None, "prompts": None if timing is None else timing.prompts}
    if threads is not None:
        check_count("threads", threads)
        torch.set_num_threads(threads)
    spec, timing = get_spec(model), timing or Timing()
    chosen = _plans(plans, windows)
    contexts = _contexts(contexts)
    items = 0 if weights else items
    folder = RecordFolder(output, "contexts")
    settings = {
        "model": spec.name,
        "model_fingerprint": folder_fingerprint(spec.folder) if spec.folder else None,
        "weights": weights,
        "device": str(device),
        "items": items,
        "timing": dataclasses.asdict(timing),
        "batch_size": batch_size,
        "reference": chosen[0].name,
    }
    folder.open(settings)
    write_config(folder.path, "context", arguments)
    done = {(record["plan"], record["context"]): record for record in folder.records()}
    for plan in chosen:
        missing = [context for context in contexts if (plan.name, context) not in done]
        if not missing:
            continue
        engine = load(spec, plan, device, weights=weights, progress=progress)
        for record in _measure(engine, missing, items, timing, batch_size, progress):
            folder.append(record)
            done[plan.name, record["context"]] = record
        del engine
        forget_models()
    records = [done[plan.name, context] for plan in chosen for context in contexts]
    _pair(records, chosen[0].name)
    result = ContextGrowth(records=records, settings=settings, environment=environment(_gpu(records)))
    result.save(output)
    return result


def _plans(
    plans: Sequence[str | os.PathLike | QuantizationPlan], windows: Sequence[int]
) -> list[QuantizationPlan]:
    """The plans, and the first one with each window."""
    resolved = [
        plan if isinstance(plan, QuantizationPlan) else QuantizationPlan.from_yaml(plan) for plan in plans
    ]
    if not resolved:
        raise LabError("no plan given; `labkit plans` lists them")
    first = resolved[0]
    for window in windows:
        runtime = dataclasses.replace(first.runtime, sliding_window=window)
        resolved.append(dataclasses.replace(first, name=f"{first.name}-window-{window}", runtime=runtime))
    names = [plan.name for plan in resolved]
    if len(set(names)) < len(names):
        raise LabError(f"two plans have the same name: {', '.join(names)}")
    return resolved


def _contexts(contexts: Sequence[int]) -> list[int]:
    if not contexts or any(type(tokens) is not int or tokens < 1 for tokens in contexts):
        raise LabError(f"contexts are whole numbers of tokens from 1 on, not {list(contexts)!r}")
    return sorted(set(contexts))


def _measure(
    engine: Engine, contexts: Sequence[int], items: int, timing: Timing, batch_size: int, progress: bool
) -> Iterator[dict[str, Any]]:
    """Yields a record for each context, as soon as it is measured."""
    from tqdm.auto import tqdm

    lengthen = _lengthener(engine)
    standard = phonetap.items(split="typed", count=max(items, timing.prompts), part="test")
    for context in tqdm(contexts, desc=engine.plan.name, unit="context", disable=not progress):
        if engine.max_length is not None and context + timing.new_tokens >= engine.max_length:
            raise LabError(
                f"{engine.spec.name} takes {engine.max_length} tokens, and the context is {context}"
            )
        record = {"plan": engine.plan.name, "context": context}
        longer = [lengthen(item, context) for item in standard]
        record |= _cost(engine, [item.messages() for item in longer[: timing.prompts]], timing)
        if items:
            records = quality.evaluate(engine, longer[:items], batch_size=batch_size)
            record |= {**summary.summarize(records), "answers": records}
        yield record


def _cost(engine: Engine, conversations: Sequence[Any], timing: Timing) -> dict[str, Any]:
    """Time, and bytes of the cache, one conversation at a time; all have the same number of tokens."""
    start_peak(engine)
    never = dict.fromkeys(engine.end_token_ids, -100.0)  # no end token, so all answers have the same length
    answers: list[Generation] = []
    most = predicted = 0
    anatomy = Anatomy(engine.spec, engine.model, engine.roles, engine.resolved)
    for index in range(timing.warmup + len(conversations)):
        messages = conversations[index % len(conversations)]
        request = engine.request(messages, max_new_tokens=timing.new_tokens, logit_bias=never)
        batch = engine.batch(1)
        batch.add(request)
        while batch.busy:
            batch.step()
            if batch.active:
                row = batch.active[0].row
                most = max(most, batch.cache_bytes)
                predicted = max(predicted, row.cache.room * anatomy.kv_cache_bytes_per_token())
        if index >= timing.warmup:
            answers.append(request.result())
    tokens = [seconds for answer in answers for seconds in answer.token_times_s[1:]]
    first = [answer.ttft_s for answer in answers]
    on_gpu = engine.device.type == "cuda"
    return {
        "weights": engine.weights,
        "device": str(engine.device),
        "prompt_tokens": median(answer.prompt_tokens for answer in answers),
        "cache_bytes": most,
        "predicted_cache_bytes": predicted,
        "weights_bytes": engine.resolved.predicted_bytes,
        "peak_memory_bytes": peak_memory(*engine.devices) if on_gpu else None,
        "ttft_s": median(first),
        "token_s": median(tokens) if tokens else None,
        "samples": {"ttft_s": first, "token_s": tokens},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _lengthener(engine: Engine) -> Callable[[phonetap.Item, int], Any]:
    """A function (item, tokens) -> the item with enough filler for about that many tokens."""
    if getattr(engine.processor, "takes_ids", False):
        return lambda item, context: _IdItem(engine, item, context)
    if "image" not in engine.modalities:
        raise LabError(f"{engine.spec.name} takes no images, and PhoneTap items are screens")

    def tokens(item: phonetap.Item) -> int:
        return engine.prepare(item.messages())["input_ids"].shape[1]

    def longer(item: phonetap.Item, count: int) -> phonetap.Item:
        fields = {field.name: getattr(item, field.name) for field in dataclasses.fields(phonetap.Item)}
        return LongItem(**fields, filler=FILLER * count) if count > 0 else item

    sample = phonetap.items(split="typed", count=1, part="test")[0]
    each = (tokens(longer(sample, TRIED)) - tokens(sample)) / TRIED
    return lambda item, context: longer(item, round((context - tokens(item)) / each))


@dataclass(frozen=True)
class _IdItem:
    """Random token ids before an item's screen, for a model without a tokenizer."""

    engine: Engine
    item: phonetap.Item
    context: int

    def messages(self) -> list[dict[str, Any]]:
        draw = self.engine.tokenizer.random_text
        parts = [{"type": "text", "text": draw(1)}]
        if "image" in self.engine.modalities:
            parts.insert(0, {"type": "image", "image": self.item.screen.image})
        own = self.engine.prepare([{"role": "user", "content": parts}])["input_ids"].shape[1]
        filler = {"type": "text", "text": draw(max(self.context - own, 0))}
        return [{"role": "user", "content": [filler, *parts]}]


def _pair(records: Sequence[dict[str, Any]], reference: str) -> None:
    """Differences to the reference plan at the same context, item by item."""
    answers = {record["context"]: record.get("answers") for record in records if record["plan"] == reference}
    for record in records:
        if record["plan"] != reference and record.get("answers"):
            record["paired"] = {
                "reference": reference,
                **summary.summarize_paired(record["answers"], answers[record["context"]]),
            }


def _gpu(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    on_gpu = any(record["device"].startswith("cuda") for record in records)
    return gpus()[0] if on_gpu and gpus() else None
