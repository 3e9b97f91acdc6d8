"""Compares plans on a language model: perplexity of text, and divergence from the unquantized model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from labkit.common.errors import LabError
from labkit.common.files import user_path
from labkit.common.intervals import paired_difference
from labkit.common.machine import environment
from labkit.loading.datasets import Datasets
from labkit.measure.defaults import PERPLEXITY_PLANS
from labkit.measure.evaluator import PlanEvaluator
from labkit.measure.job import check_count, lab_version
from labkit.measure.probe import perplexity_change, probe_of
from labkit.models import get_spec
from labkit.plans.plan import PlanError, QuantizationPlan, Rule, presets
from labkit.quantization import DTYPES, get_scheme
from labkit.quantization.shorthand import label_of, parse_candidate, split_candidates
from labkit.quantization.torch_state import guarded, num_threads
from labkit.results.config import write_config
from labkit.results.folders import RecordFolder
from labkit.results.record import Record

if TYPE_CHECKING:
    import pandas


@dataclass
class Perplexities(Record):
    """What `compare_perplexity` returns.

    Attributes:
        records: one a plan, the unquantized model's first: ``plan, bytes, bits`` (a value of the Linears, on average,
            with scales), ``kl, agreement, perplexity, losses`` (of each sequence, in nats a token), ``definition``.
    """

    FILE: ClassVar[str] = "perplexity.json"
    COMMAND: ClassVar[str] = "perplexity"
    ALLOW_NAN: ClassVar[bool] = True

    settings: dict[str, Any]
    records: list[dict[str, Any]] = field(repr=False)

    def rows(self) -> list[dict[str, Any]]:
        """One entry a plan: ``plan, bytes, bits, kl, perplexity`` and ``change, low, high``, the perplexity as a share
        of the unquantized model's, less 1, with its 95 % interval (paired by sequence)."""
        reference = self.records[0]
        rows = []
        for record in self.records:
            difference = paired_difference(record["losses"], reference["losses"])
            change = {
                name: perplexity_change(value) for name, value in zip(("change", "low", "high"), difference)
            }
            rows.append(
                {**{name: record[name] for name in ("plan", "bytes", "bits", "kl", "perplexity")}, **change}
            )
        return rows

    def table(self) -> pandas.DataFrame:
        """`rows` as a DataFrame."""
        import pandas

        return pandas.DataFrame(self.rows()).set_index("plan")


@guarded
def compare_perplexity(
    model: str | os.PathLike,
    plans: str | Sequence[str | os.PathLike] = PERPLEXITY_PLANS,
    *,
    datasets: Datasets,
    dtype: str = "fp32",
    device: str = "auto",
    threads: int | None = None,
    output: str | os.PathLike | None = None,
    progress: bool = True,
) -> Perplexities:
    """Measure the perplexity of a model under plans that are all calibrated on the same text.

        compare_perplexity("./my-llama", "int4,gptq,awq", datasets=Datasets(text="book.txt"))

    Plans are calibrated on the first part of the text and measured on the last. Losses are compared sequence by
    sequence, so the difficulty of a sequence cancels out. Each record is stored as soon as it exists: the same call
    continues, and further plans are added.

    Args:
        model: a checkpoint's folder, or a hub id: any language model.
        plans: names of presets, plan files, or candidates such as ``gptq-3bit`` or ``gptq:dampening_frac=0.05`` for
            every Linear; a string with commas between them, or a list.
        datasets: the text and how much of it (`labkit.loading.datasets`); its ``seed`` draws other
            sequences to calibrate on.
        dtype: of what is not quantized, and of the unquantized model.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: CPU threads (default: torch's).
        output: a folder; measurements in it with the same settings are kept (default:
            ``results/perplexity-MODEL``).
        progress: report each step on standard error.

    Raises:
        LabError: no text, an unknown plan, or another wrong argument, before anything is measured.
    """
    arguments = {
        **locals(),
        "output": output,
        "plans": plans if isinstance(plans, str) else ";".join(map(str, plans)),
    }
    from labkit.loading.load import load

    if threads is not None:
        check_count("threads", threads)
    if datasets.text is None:
        raise LabError("perplexity is measured on text: give a file of plain text (--text)")
    if dtype not in DTYPES:
        raise LabError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    spec = get_spec(model)
    chosen = [replace(plan, default=dtype) for plan in plans_of(plans)]
    folder = RecordFolder(
        Path(output or Path("results") / f"perplexity-{Path(spec.name).name}"), "perplexities"
    )
    settings = {
        "version": lab_version(),
        "model": Path(spec.name).name,
        "dtype": dtype,
    }
    probe = folder.path / "probe.safetensors"
    evaluator = PlanEvaluator(spec, datasets, str(probe), device, folder, dtype)
    settings["material"] = evaluator.prepared.dataset_settings(datasets)
    settings["device"] = evaluator.device.type
    resolved = [evaluator.prepared.resolve(plan) for plan in chosen]  # raises before anything is measured
    folder.open(settings)
    write_config(folder.path, "perplexity", arguments)
    with num_threads(threads):
        if not probe.is_file():
            _say("the unquantized model answers", progress)
            probe_of(load(spec, dtype, device, progress=False), datasets).save(probe)
        records = [{**evaluator.reference(), "bits": 8.0 * DTYPES[dtype].itemsize}]
        for plan, laid in zip(chosen, resolved):
            _say(plan.name, progress)
            linears = [part for part in laid.parts if part.is_linear]
            bits = 8 * sum(part.bytes for part in linears) / sum(part.parameters for part in linears)
            records.append({**evaluator.measure(plan), "bits": bits})
        for record in records:
            for name in ("key", "searched", "judged", "predicted_kl"):
                record.pop(name)
        result = Perplexities(settings, records, environment=environment())
    result.save(folder.path)
    return result


def plans_of(plans: str | Sequence[str | os.PathLike]) -> list[QuantizationPlan]:
    """The plans that ``compare_perplexity`` measures.

    Raises:
        PlanError: an entry is neither a preset, nor a file, nor a candidate.
    """
    if isinstance(plans, str):
        plans = split_candidates(plans)
    return [_plan_of(str(entry)) for entry in plans]


def _plan_of(text: str) -> QuantizationPlan:
    if text in presets() or user_path(text).is_file():
        return QuantizationPlan.from_yaml(text)
    try:
        scheme = parse_candidate(text)
    except LabError as error:
        raise PlanError(
            f"{text!r} is no preset ({', '.join(presets())}), no plan file, and {error}"
        ) from None
    rule = Rule(scheme, match="re:.*", on_unsupported=get_scheme("int8"))
    return QuantizationPlan(label_of(scheme), (rule,), f"Every Linear {label_of(scheme)}.")


def _say(text: str, progress: bool) -> None:
    import sys

    if progress:
        print(f"perplexity: {text}", file=sys.stderr, flush=True)
