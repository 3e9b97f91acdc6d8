"""One Linear of a model with its real inputs, to try schemes on and to inspect.

    trial = Trial.of(labkit.load("pocket", "fp32"), "model.language_model.layers.1.mlp.down_proj")
    trial.output_db("int8-dynamic"), trial.output_db("llm-int8")

The model stays unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from labkit.common.errors import LabError
from labkit.loading.calibration import default_calibration
from labkit.measure.trial import find_linear, try_scheme
from labkit.plans.calibrate import watch_inputs
from labkit.quantization import Scheme, affine, gptq
from labkit.quantization.gptq_steps import Step, watch
from labkit.quantization.statistics import InputStatistics
from labkit.quantization.torch_state import guarded

if TYPE_CHECKING:
    import numpy

KEPT_ROWS = 2048
HELD_OUT = 4  # every fourth item is held out: outputs are compared on it, and it does not calibrate


@dataclass(frozen=True)
class Trial:
    """One Linear and its inputs.

    Attributes:
        name: its name in the model.
        linear: a copy of the Linear, in fp32.
        inputs: [M, K] fp32, M at most `KEPT_ROWS`: rows of the held-out items.
        statistics: second moments of the calibrating items' inputs.
    """

    name: str
    linear: nn.Linear
    inputs: Tensor
    statistics: InputStatistics

    @classmethod
    @guarded
    @torch.no_grad()
    def of(cls, engine: Any, name: str, items: int = 12, batches: Sequence[Any] | None = None) -> Trial:
        """Take the Linear ``name`` with its inputs on calibration items, or on ``batches`` of the model's arguments.

        Every `HELD_OUT`-th of them is held out for testing, the others calibrate; a single item does both.

        Raises:
            LabError: the model has no such Linear, or no calibration item reaches it.
        """
        linear = find_linear(engine.model, name)
        if batches is None:
            batches = default_calibration(engine.processor, engine.modalities, items, model=engine.model)
        rows: list[Tensor] = []
        statistics = InputStatistics(linear.in_features, device=linear.weight.device)

        def see(_: str, number: int, inputs: Tensor) -> None:
            held_out = number % HELD_OUT == HELD_OUT - 1
            if held_out or len(batches) == 1:
                rows.append(inputs.detach().reshape(-1, linear.in_features).float().cpu())
            if not held_out:
                statistics.add(inputs)

        watch_inputs(engine.model, [name], batches, see)
        if not rows or not statistics.rows:
            raise LabError(f"no calibration item comes to {name}")
        inputs = torch.cat(rows)
        inputs = inputs[:: -(-len(inputs) // KEPT_ROWS)]
        copied = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
        copied.weight.copy_(linear.weight)
        if linear.bias is not None:
            copied.bias.copy_(linear.bias)
        return cls(name, copied.requires_grad_(False), inputs, statistics)

    @property
    def weight(self) -> Tensor:
        """[N, K] fp32."""
        return self.linear.weight.detach()

    @cached_property
    def columns(self) -> gptq.Columns:
        """Order and factor of its columns, most active first (`gptq.prepare_columns`)."""
        return gptq.prepare_columns(self.statistics.second_moment)

    def channel_sizes(self) -> dict[str, numpy.ndarray]:
        """``{"largest", "typical"}``: largest magnitude and root mean square of each input channel [K]."""
        return {
            "largest": self.inputs.abs().amax(0).numpy(),
            "typical": self.inputs.square().mean(0).sqrt().numpy(),
        }

    def outlier_share(self, threshold: float) -> float:
        """The share of input channels with a value above ``threshold``: what LLM.int8() keeps in 16 bits."""
        return (self.inputs.abs().amax(0) > threshold).float().mean().item()

    def correlation(self, count: int = 160) -> numpy.ndarray:
        """Second moments of the ``count`` most active columns, scaled to -1 … 1, in the order of the solve."""
        order = self.columns.order[:count]
        moment = self.statistics.second_moment[order][:, order]
        size = moment.diagonal().clamp(min=1e-30).sqrt()
        return (moment / size / size[:, None]).numpy()

    @guarded
    def quantized(self, scheme: str | Scheme) -> nn.Module:
        """The module that ``scheme`` (``int8``, ``gptq-3bit``, …: see `labkit.quantization.shorthand`) puts in its place."""
        return try_scheme(self.linear, scheme, self.statistics).module

    @guarded
    def output_db(self, scheme: str | Scheme) -> float:
        """Signal-to-noise ratio of its outputs on the held-out items, in dB: 20 dB is an error of a tenth."""
        return try_scheme(self.linear, scheme, self.statistics).output_sqnr_db(self.inputs)

    @guarded
    def output_error(self, approximation: Tensor) -> float:
        """The squared output error if ``approximation`` [N, K] replaces the weight, as a share of the squared output, on
        the calibrating items."""
        return gptq.trace_error(self.weight, approximation, self.statistics.second_moment)

    @guarded
    def qparams(self, num_bits: int = 4, group_size: int = 64) -> tuple[Tensor, Tensor]:
        """scale and zero_point [N, K/G] that cover the full range of each group."""
        return affine.choose_qparams(self.weight, num_bits, group_size, False, torch.bfloat16)

    @guarded
    def solve_errors(self, num_bits: int = 4, group_size: int = 64) -> Mapping[str, list[float]]:
        """The squared output error that each step adds: rounded to the nearest, and solved with and without ordering the
        columns by activation; for `labkit.results.charts.methods.column_errors`."""
        qparams, moment = self.qparams(num_bits, group_size), self.statistics.second_moment
        curves = {"rounded to the nearest": self._nearest_errors(qparams, num_bits)}
        for label, act_order in (("solved, left to right", False), ("solved, most active first", True)):
            columns = gptq.prepare_columns(moment, act_order=act_order)
            solution = gptq.solve(self.weight, columns, *qparams, num_bits)
            curves[label] = solution.column_errors[columns.order].tolist()
        return curves

    @guarded
    def watch(self, rows: int = 8, num_bits: int = 4, group_size: int = 64) -> list[Step]:
        """Every step of the solve of the first ``rows`` output channels."""
        scale, zero_point = self.qparams(num_bits, group_size)
        return list(watch(self.weight[:rows], self.columns, scale[:rows], zero_point[:rows], num_bits))

    def _nearest_errors(self, qparams: tuple[Tensor, Tensor], num_bits: int) -> list[float]:
        """The error that rounding each column to the nearest adds, in the order of the solve."""
        scale, zero_point = qparams
        codes = affine.quantize(self.weight, scale, zero_point, num_bits)
        change = (self.weight - affine.dequantize(codes, scale, zero_point))[:, self.columns.order]
        moment = self.columns.moment
        before = change @ moment.triu(1)  # the output error that the earlier columns have left
        return ((2 * before + change * moment.diagonal()) * change).sum(0).tolist()
