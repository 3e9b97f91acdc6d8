"""Measures plans one by one for a search, and keeps the record of each on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import cached_property
from statistics import fmean
from typing import Any

from labkit.common.errors import LabError
from labkit.common.machine import environment_on, forget_models
from labkit.engine.engine import Engine
from labkit.loading.datasets import Datasets
from labkit.loading.load import load
from labkit.loading.prepare import Prepared, choose_device
from labkit.measure.probe import Probe, divergence, perplexity_change, perplexity_of, sequence_losses
from labkit.measure.quality import evaluate
from labkit.models import ModelSpec
from labkit.plans.plan import QuantizationPlan
from labkit.plans.quantize import weights_bytes
from labkit.results.folders import RecordFolder
from labkit.results.summary import summarize

KEPT = ("items", "click_accuracy", "step_success_rate", "parse_rate")


class PlanEvaluator:
    """Loads a model under a plan and measures its divergence and quality.

    Args:
        spec: the model.
        datasets: the data for calibration and validation.
        probe: the file with the unquantized model's distributions.
        device: as for `labkit.load`.
        folder: the folder of the records; those in it are not measured again.
        dtype: of the unquantized model.
    """

    def __init__(
        self, spec: ModelSpec, datasets: Datasets, probe: str, device: str, folder: RecordFolder, dtype: str
    ) -> None:
        self.spec, self.datasets, self.folder, self.dtype = spec, datasets, folder, dtype
        self._begun = False  # whether the folder has this run's environment
        self.prepared = Prepared.of(spec, choose_device(device))
        self.device = self.prepared.devices[0]
        self._probe_path = probe
        self._records = {record["key"]: record for record in folder.records()}

    @cached_property
    def probe(self) -> Probe:
        """The distributions that plans are compared with."""
        return Probe.load(self._probe_path)

    @cached_property
    def calibration(self) -> list[Any]:
        """Batches for plans that calibrate."""
        return self.prepared.calibration_batches(self.datasets)

    def measure(
        self, plan: QuantizationPlan, predicted: float | None = None, *, validated: bool = True
    ) -> dict[str, Any]:
        """The record of a plan; measures it unless the folder has it.

        ``plan, definition, searched, judged, bytes, predicted_kl, kl, agreement``; with ``validated`` also the
        scores on validation items, ``items, click_accuracy, step_success_rate, parse_rate`` and ``right`` (item ->
        whether the step was right), or ``perplexity`` and ``losses`` (of each sequence). ``predicted`` is the
        divergence that a search predicts.
        """
        key = hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode()).hexdigest()[:16]
        record = self._records.get(key)
        if record is None or (validated and not record["judged"]):
            record = self._measure(plan, key, predicted, validated)
            if not self._begun:
                self.folder.begin(environment_on(self.device))
                self._begun = True
            self.folder.append(record)
            self._records[key] = record
        return record

    def reference(self) -> dict[str, Any]:
        """The record of the unquantized model."""
        return self.measure(QuantizationPlan("unquantized", (), default=self.dtype))

    def loss_of(self, record: dict[str, Any]) -> float:
        """Points of right steps lost, or percent of perplexity gained, against the unquantized model.

        Raises:
            LabError: the record has no validation.
        """
        reference = self.reference()
        if "perplexity" in record:
            return 100 * perplexity_change(fmean(record["losses"]) - fmean(reference["losses"]))
        if "step_success_rate" not in record:
            raise LabError("a largest loss is measured on validation items: ask for at least one")
        return 100 * (reference["step_success_rate"] - record["step_success_rate"])

    def _measure(
        self, plan: QuantizationPlan, key: str, predicted: float | None, validated: bool
    ) -> dict[str, Any]:
        work = self.folder.path / "work" / key
        calibration = self.calibration if plan.requires_calibration else None
        engine = load(self.spec, plan, self.device, calibration=calibration, work_folder=work, progress=False)
        result = divergence(engine.model, self.probe)
        record = {
            "key": key,
            "plan": plan.name,
            "definition": plan.to_dict(),
            "searched": predicted is not None,
            "judged": validated,
            "bytes": weights_bytes(engine.model),
            "predicted_kl": predicted,
            "kl": result.kl,
            "agreement": result.agreement,
        }
        if validated:
            record |= self._validate(engine)
        shutil.rmtree(work, ignore_errors=True)
        del engine
        forget_models()
        return record

    def _validate(self, engine: Engine) -> dict[str, Any]:
        if self.datasets.text is not None:
            sequences = self.datasets.sequences(engine.tokenizer, "validation")
            losses = sequence_losses(engine.model, sequences)
            return {"perplexity": perplexity_of(losses), "losses": losses}
        items = self.datasets.items("validation", engine.modalities)
        if not items:
            return {}
        records = evaluate(engine, items)
        summary = summarize(records)
        return {
            **{name: summary[name] for name in KEPT},
            "right": {record["id"]: bool(record["success"]) for record in records},
        }
