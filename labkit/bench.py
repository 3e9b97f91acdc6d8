"""One model on the bench: each Linear replaced alone, and what that does to the model's answers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from labkit.depth import kind_of, relative_depths
from labkit.divergence import Probe, divergence_of
from labkit.lockstep import run_model, to_device
from labkit.quantization import Scheme, SchemeError
from labkit.quantization.affine import sqnr_db
from labkit.quantization.statistics import InputStatistics
from labkit.replay import Replay
from labkit.resolution import replaceable_linears, tied_linears

SAMPLED_ROWS = 8  # input rows of a batch on which a layer's output is compared
STATISTICS_BYTES = 2 * 2**30  # what second moments may take at a time


class Bench:
    """An unquantized model whose Linears are replaced one at a time.

    Args:
        model: in evaluation mode.
        roles: module name -> role.
        probe: what its answers are compared on.
        calibration: batches for schemes that look at activations.
        linears: names of the Linears that will be measured (default: all that can be).
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
        self._replay = Replay(
            model, lambda index: probe.log_probs_of(model, index), len(probe.inputs), self.linears
        )

    @torch.no_grad()
    def measure(
        self, candidates: Mapping[str, Scheme], done: Iterable[tuple[str, str]] = ()
    ) -> Iterator[dict]:
        """One record for each Linear and candidate that is not ``done``, as they are found.

        A record holds ``linear, role, kind, depth, scheme, parameters, bytes, kl, agreement, sqnr_db, measure_s``,
        or ``unsupported`` with the reason in place of the last five.
        """
        done = set(done)
        waiting = [name for name in self.linears if any((name, label) not in done for label in candidates)]
        for chunk in _chunks(self.model, waiting):
            gathered = self._gather(chunk)
            for name in chunk:
                for label, scheme in candidates.items():
                    if (name, label) not in done:
                        yield self._record(name, label, scheme, *gathered[name])

    def _record(
        self, name: str, label: str, scheme: Scheme, statistics: InputStatistics, rows: list[Tensor]
    ) -> dict[str, Any]:
        linear = self.model.get_submodule(name)
        sizes = linear.out_features, linear.in_features, linear.bias is not None
        record = {
            "linear": name,
            "role": self.roles.get(name),
            "kind": kind_of(name),
            "depth": self.depths.get(name),
            "scheme": label,
            "parameters": linear.out_features * (linear.in_features + sizes[2]),
        }
        began = time.perf_counter()
        try:
            scheme.validate(linear.in_features, linear.out_features, linear.weight.device)
            if scheme.requires_calibration and not statistics.rows:
                raise SchemeError("no calibration item comes to it")
            module = scheme.quantize_linear(linear, statistics=statistics)
        except SchemeError as error:
            return {**record, "unsupported": str(error)}
        record["bytes"] = scheme.predict_bytes(*sizes)
        inputs = torch.cat(rows) if rows else linear.weight.new_zeros(1, linear.in_features)
        record["sqnr_db"] = round(min(sqnr_db(linear(inputs), module(inputs)), 999.0), 3)
        parent, _, own = name.rpartition(".")
        holder = self.model.get_submodule(parent)
        setattr(holder, own, module)
        try:
            with self._replay.before(name):
                found = divergence_of(self.probe, lambda index: self._log_probs(name, index))
        finally:
            setattr(holder, own, linear)
        seconds = round(time.perf_counter() - began, 3)
        return {**record, "kl": found.kl, "agreement": found.agreement, "measure_s": seconds}

    def _log_probs(self, name: str, index: int) -> Tensor | None:
        """None where the batch does not come to the Linear: nothing has changed."""
        return self._replay.run(index) if self._replay.comes_to(name, index) else None

    def _gather(self, names: Sequence[str]) -> dict[str, tuple[InputStatistics, list[Tensor]]]:
        """Second moments and sampled rows of the inputs of some Linears, with the model as it is."""
        device = next(self.model.parameters()).device
        gathered = {}
        handles = []
        for name in names:
            linear = self.model.get_submodule(name)
            gathered[name] = (InputStatistics(linear.in_features, device=device), [])
            handles.append(linear.register_forward_pre_hook(_gatherer(*gathered[name])))
        try:
            for batch in self.calibration:
                run_model(self.model, to_device(batch, device))
        finally:
            for handle in handles:
                handle.remove()
        return gathered


def measurable_linears(model: nn.Module) -> list[str]:
    """Names of the Linears that a plan can replace: not those tied to an embedding."""
    linears, _ = replaceable_linears(model)
    tied = tied_linears(model, linears)
    return [name for name in linears if name not in tied]


def _gatherer(statistics: InputStatistics, rows: list[Tensor]):
    def hook(_: nn.Module, arguments: tuple) -> None:
        inputs = arguments[0]
        statistics.add(inputs)
        flat = inputs.detach().reshape(-1, inputs.shape[-1])
        step = max(len(flat) // SAMPLED_ROWS, 1)
        rows.append(flat[::step][:SAMPLED_ROWS].clone())

    return hook


def _chunks(model: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """Runs of names whose second moments fit `STATISTICS_BYTES`, at least one each."""
    chunk: list[str] = []
    size = 0
    for name in names:
        needed = 4 * model.get_submodule(name).in_features ** 2
        if chunk and size + needed > STATISTICS_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(name)
        size += needed
    if chunk:
        yield chunk
