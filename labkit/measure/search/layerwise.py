"""Layerwise sensitivity: replaces one Linear at a time and compares the model's output distributions.

The same for embeddings and convolutions, for candidates that quantize them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labkit.measure.probe import Divergence, Probe, divergence_of
from labkit.measure.search.replay import Replay
from labkit.measure.trial import moment_bytes, replaced, try_scheme
from labkit.plans.calibrate import watch_inputs
from labkit.plans.resolve import replaceable_linears, replaceable_others, tied_linears
from labkit.plans.rule import kind_of, relative_depths
from labkit.quantization import Scheme, SchemeError
from labkit.quantization.int8_storage import KINDS, module_kind
from labkit.quantization.statistics import InputStatistics

SAMPLED_ROWS = 8  # input rows a batch for the comparison of a layer's outputs
STATISTICS_BYTES = 2 * 2**30  # limit for the second moments held at a time


@dataclass(frozen=True)
class LinearInputs:
    """The inputs of a Linear.

    Attributes:
        statistics: second moments.
        rows: some rows [M, K] of each batch.
    """

    statistics: InputStatistics
    rows: list[Tensor]


class LayerwiseEvaluator:
    """An unquantized model whose Linears are replaced one at a time.

    Args:
        model: in evaluation mode.
        roles: module name -> role.
        probe: the batches on which its distributions are compared.
        calibration: batches for schemes that calibrate.
        linears: names of the modules to measure (default: all Linears that a plan can replace).
    """

    def __init__(
        self,
        model: nn.Module,
        roles: Mapping[str, str],
        probe: Probe,
        calibration: Sequence[Any],
        linears: Sequence[str] | None = None,
    ) -> None:
        self.model, self.roles, self.probe, self.calibration = model, roles, probe, calibration
        self.depths = relative_depths(measurable_linears(model))
        self.linears = list(linears if linears is not None else measurable_linears(model))
        targets = [name for name in self.linears if self._is_linear(name)]
        self._replay = Replay(
            model, lambda index: probe.log_probs_of(model, index), len(probe.inputs), targets
        )

    @torch.no_grad()
    def measure(
        self, candidates: Mapping[str, Scheme], done: Iterable[tuple[str, str]] = ()
    ) -> Iterator[dict]:
        """Yields one record for each Linear and candidate that is not ``done``, as soon as it is measured.

        A record holds ``linear, module, role, kind, depth, scheme, parameters, bytes, kl, agreement, sqnr_db,
        measure_s``, or ``unsupported`` with the reason in place of the last five. ``module`` is its kind
        (`labkit.quantization.int8_storage.KINDS`). Modules other than Linears have no depth; only candidates that
        can store them are measured, and ``sqnr_db`` is that of their weight.
        """
        done = set(done)
        for name in self.linears:
            if not self._is_linear(name):
                for label, scheme in candidates.items():
                    if (name, label) not in done and can_store(scheme, self.model.get_submodule(name)):
                        yield self._record(name, label, scheme, None)
        waiting = [
            name
            for name in self.linears
            if self._is_linear(name) and any((name, label) not in done for label in candidates)
        ]
        for chunk in _chunks(self.model, waiting):
            gathered = self._gather(chunk)
            for name in chunk:
                for label, scheme in candidates.items():
                    if (name, label) not in done:
                        yield self._record(name, label, scheme, gathered[name])

    def _record(self, name: str, label: str, scheme: Scheme, inputs: LinearInputs | None) -> dict[str, Any]:
        """``inputs``: of a Linear; None for an embedding or convolution."""
        original = self.model.get_submodule(name)
        record = {
            "linear": name,
            "module": module_kind(original),
            "role": self.roles.get(name),
            "kind": kind_of(name),
            "depth": self.depths.get(name),
            "scheme": label,
            "parameters": sum(parameter.numel() for parameter in original.parameters()),
        }
        began = time.perf_counter()
        statistics = inputs.statistics if inputs else None
        try:
            scheme.validate_module(original, original.weight.device)
            if scheme.requires_calibration and not statistics.rows:
                raise SchemeError("no calibration item comes to it")
            result = try_scheme(original, scheme, statistics)
        except SchemeError as error:
            return {**record, "unsupported": str(error)}
        record["bytes"] = scheme.predict_module_bytes(original)
        if inputs is None:
            sqnr_db = result.sqnr_db
        else:
            rows = inputs.rows or [original.weight.new_zeros(1, original.in_features)]
            sqnr_db = result.output_sqnr_db(torch.cat(rows))
        record["sqnr_db"] = round(min(sqnr_db, 999.0), 3)
        with replaced(self.model, {name: result.module}):
            divergence = self._divergence(name, is_linear=inputs is not None)
        seconds = round(time.perf_counter() - began, 3)
        return {**record, "kl": divergence.kl, "agreement": divergence.agreement, "measure_s": seconds}

    def _divergence(self, name: str, is_linear: bool) -> Divergence:
        """The divergence of the model as it is now."""
        # a model may use the weight of an embedding or convolution without calling the module: run all of it
        if not is_linear:
            return divergence_of(self.probe, lambda index: self.probe.log_probs_of(self.model, index))
        with self._replay.before(name):
            return divergence_of(self.probe, lambda index: self._log_probs(name, index))

    def _is_linear(self, name: str) -> bool:
        return isinstance(self.model.get_submodule(name), nn.Linear)

    def _log_probs(self, name: str, index: int) -> Tensor | None:
        """None where the batch does not reach the Linear: its output has not changed."""
        return self._replay.run(index) if self._replay.comes_to(name, index) else None

    def _gather(self, names: Sequence[str]) -> dict[str, LinearInputs]:
        """Name -> inputs of the Linears on the calibration batches, in the unquantized model."""
        device = next(self.model.parameters()).device
        widths = {name: self.model.get_submodule(name).in_features for name in names}
        gathered = {
            name: LinearInputs(InputStatistics(width, device=device), []) for name, width in widths.items()
        }

        def see(name: str, _: int, inputs: Tensor) -> None:
            gathered[name].statistics.add(inputs)
            flat = inputs.detach().reshape(-1, inputs.shape[-1])
            step = max(len(flat) // SAMPLED_ROWS, 1)
            gathered[name].rows.append(flat[::step][:SAMPLED_ROWS].clone())

        watch_inputs(self.model, names, self.calibration, see)
        return gathered


def measurable_linears(model: nn.Module) -> list[str]:
    """Names of the Linears that a plan can replace: not those tied to an embedding."""
    linears, _ = replaceable_linears(model)
    tied = tied_linears(model, linears)
    return [name for name in linears if name not in tied]


def measurable_others(model: nn.Module) -> list[str]:
    """Names of the embeddings and convolutions that a scheme can replace and whose weight no other module shares."""
    others = replaceable_others(model, KINDS)
    tied = tied_linears(model, others)
    return [name for name in others if name not in tied]


def can_store(scheme: Scheme, module: nn.Module) -> bool:
    """Whether the scheme supports modules of this kind."""
    return module_kind(module) in scheme.module_kinds


def _chunks(model: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """Splits names into runs whose second moments fit in `STATISTICS_BYTES`; each run has at least one name."""
    chunk: list[str] = []
    size = 0
    for name in names:
        needed = moment_bytes(model.get_submodule(name))
        if chunk and size + needed > STATISTICS_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(name)
        size += needed
    if chunk:
        yield chunk
