"""A specimen: one Linear of a model with the inputs that it really gets, to try schemes on and to look at.

    specimen = Specimen.of(labkit.load("pocket", "fp32"), "model.language_model.layers.1.mlp.down_proj")
    specimen.output_db("int8-dynamic"), specimen.output_db("llm-int8")

Nothing of the model is changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from labkit.common.errors import LabError
from labkit.engine.engine import Engine
from labkit.loading.calibration import default_calibration
from labkit.plans.calibrate import input_statistics
from labkit.plans.sequential import run_model, to_device
from labkit.plans.walk import find_places
from labkit.quantization import Scheme, affine, get_scheme, gptq, known_schemes
from labkit.quantization.affine import sqnr_db
from labkit.quantization.gptq_steps import Step, watch
from labkit.quantization.scheme import resident_bytes
from labkit.quantization.shorthand import parse_candidate
from labkit.quantization.statistics import InputStatistics

if TYPE_CHECKING:
    import numpy


ITEMS = 8
"""Calibration items: enough to see what calibration does, in a few seconds."""
MOST_BYTES = 2**30
"""Of the inputs' second moments that are held at a time."""


@dataclass(frozen=True)
class Look:
    """What a scheme makes of one Linear.

    Attributes:
        name: the Linear.
        scheme: the scheme.
        before: its weight [N, K] fp32.
        after: the weight that is multiplied by afterwards [N, K] fp32.
        bytes_before: of the Linear as it is loaded, bias included.
        bytes_after: of the module that would stand in its place.
        module: that module.
    """

    name: str
    scheme: Scheme
    before: Tensor = field(repr=False)
    after: Tensor = field(repr=False)
    bytes_before: int
    bytes_after: int
    module: nn.Module = field(repr=False)

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio of the weight."""
        return sqnr_db(self.before, self.after)

    @property
    def largest_error(self) -> float:
        """Largest |after - before|."""
        return (self.after - self.before).abs().max().item()

    @property
    def bits(self) -> float:
        """Bits a weight, scales and bias included."""
        return 8 * self.bytes_after / self.before.numel()


def linears(engine: Engine) -> dict[str, list[str]]:
    """Part -> names of its Linears, in the model's order. Raises LabError for a quantized model."""
    found: dict[str, list[str]] = {}
    for name, module in engine.model.named_modules():
        if isinstance(module, nn.Linear):
            found.setdefault(engine.roles.get(name, "other"), []).append(name)
    if not found:
        raise LabError(
            f"{engine.spec.name} is quantized already: load it with the plan fp32 or bf16 to explore it"
        )
    return found


def explorable_schemes(engine: Engine) -> list[str]:
    """Schemes that can be looked at; a model that takes no screens has no calibration items."""
    sees = "image" in engine.modalities
    return [name for name, scheme in known_schemes().items() if sees or not scheme().requires_calibration]


def statistics(engine: Engine, names: Sequence[str], items: int = ITEMS) -> dict[str, InputStatistics]:
    """Name -> second moments of the Linear's inputs on calibration items, as the model is.

    Raises:
        LabError: together they would take more than `MOST_BYTES`, or no item comes to one of the Linears.
    """
    size = sum(4 * _linear(engine, name).in_features ** 2 for name in names)
    if size > MOST_BYTES and len(names) > 1:
        raise LabError(
            f"calibrating these {len(names)} Linears at once takes {size / 1e9:.1f} GB: choose one of them"
        )
    batches = default_calibration(
        engine.processor, engine.modalities, items, device=engine.device, model=engine.model
    )
    found = input_statistics(engine.model, names, batches)
    if missing := [name for name in names if name not in found]:
        raise LabError(f"no calibration item comes to {missing[0]}")
    return found


@torch.no_grad()
def look(engine: Engine, name: str, scheme: Scheme | str, inputs: InputStatistics | None = None) -> Look:
    """What ``scheme`` makes of the Linear ``name``; ``inputs`` for schemes that calibrate (`statistics`).

    Raises:
        SchemeError: it cannot take the Linear, or wants inputs.
    """
    scheme = get_scheme(scheme) if isinstance(scheme, str) else scheme
    linear = _linear(engine, name)
    module = scheme.quantize_linear(linear, dtype=linear.weight.dtype, statistics=inputs)
    dequantize = getattr(module, "dequantize", None)
    after = dequantize(torch.float32) if dequantize else module.weight
    before = linear.weight.detach().float().cpu()
    return Look(
        name,
        scheme,
        before,
        after.detach().float().cpu(),
        resident_bytes(linear),
        resident_bytes(module),
        module,
    )


def look_at_all(
    engine: Engine,
    names: Sequence[str],
    scheme: Scheme | str,
    inputs: Mapping[str, InputStatistics] | None = None,
) -> dict[str, nn.Module]:
    """Name -> the module that ``scheme`` puts in the place of each Linear."""
    scheme, inputs = get_scheme(scheme) if isinstance(scheme, str) else scheme, inputs or {}
    return {
        name: scheme.quantize_linear(_linear(engine, name), statistics=inputs.get(name)) for name in names
    }


def answer(engine: Engine, item: Any, modules: Mapping[str, nn.Module], **options: Any) -> Any:
    """The engine's `Generation` for a PhoneTap item while ``modules`` stand in their Linears' places."""
    with replaced(engine.model, modules):
        return engine.generate(item.messages(), **{"max_new_tokens": 64, **options})


@contextlib.contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """``model`` with other modules in some places; when the block ends, and if it fails, all is as before."""
    places = find_places(model, set(modules))
    originals = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            for parent, attribute in places[name]:
                setattr(parent, attribute, module)
        yield model
    finally:
        for name, original in originals.items():
            for parent, attribute in places[name]:
                setattr(parent, attribute, original)


def _linear(engine: Engine, name: str) -> nn.Linear:
    try:
        module = engine.model.get_submodule(name)
    except AttributeError:
        raise LabError(f"{engine.spec.name} has no module {name!r}") from None
    if not isinstance(module, nn.Linear):
        raise LabError(f"{name} is a {type(module).__name__}, not an unquantized Linear")
    return module


KEPT_ROWS = 2048
JUDGING = 4  # every fourth item judges, and is not seen by what calibrates


@dataclass(frozen=True)
class Specimen:
    """One Linear and its inputs.

    Attributes:
        name: its name in the model.
        linear: the Linear, in fp32 and with a weight of its own.
        inputs: [M, K] fp32, M at most `KEPT_ROWS`: rows of the items that judge.
        statistics: second moments of the inputs of the other items, which calibrate.
    """

    name: str
    linear: nn.Linear
    inputs: Tensor
    statistics: InputStatistics

    @classmethod
    @torch.no_grad()
    def of(cls, engine: Any, name: str, items: int = 12, batches: Sequence[Any] | None = None) -> Specimen:
        """Take the Linear ``name`` with its inputs on calibration items, or on ``batches`` of the model's arguments.

        One in `JUDGING` of them judges what the others calibrate; a single one does both.

        Raises:
            LabError: the model has no such Linear, or nothing came to it.
        """
        try:
            linear = engine.model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            some = [one for one, module in engine.model.named_modules() if isinstance(module, nn.Linear)][:3]
            raise LabError(f"the model has no Linear called {name}; there are {', '.join(some)} …")
        if batches is None:
            batches = default_calibration(engine.processor, engine.modalities, items, model=engine.model)
        rows: list[Tensor] = []
        statistics = InputStatistics(linear.in_features, device=linear.weight.device)
        given: list[Tensor] = []
        handle = linear.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0].detach()))
        try:
            for number, batch in enumerate(batches):
                run_model(engine.model, to_device(batch, linear.weight.device))
                judges = number % JUDGING == JUDGING - 1
                for one in given:
                    if judges or len(batches) == 1:
                        rows.append(one.reshape(-1, linear.in_features).float().cpu())
                    if not judges:
                        statistics.add(one)
                given.clear()
        finally:
            handle.remove()
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
        """``{"largest", "typical"}``: of each input channel [K] the largest value seen, and the root mean square."""
        return {
            "largest": self.inputs.abs().amax(0).numpy(),
            "typical": self.inputs.square().mean(0).sqrt().numpy(),
        }

    def outlier_share(self, threshold: float) -> float:
        """The share of input channels with a value above ``threshold``: what LLM.int8() keeps in 16 bits."""
        return (self.inputs.abs().amax(0) > threshold).float().mean().item()

    def correlation(self, count: int = 160) -> numpy.ndarray:
        """Second moments of the inputs over their sizes, between -1 and 1, of the ``count`` most active columns, in
        the order of the solve."""
        order = self.columns.order[:count]
        moment = self.statistics.second_moment[order][:, order]
        size = moment.diagonal().clamp(min=1e-30).sqrt()
        return (moment / size / size[:, None]).numpy()

    @torch.no_grad()
    def quantized(self, scheme: str | Scheme) -> nn.Module:
        """The module that ``scheme`` (``int8``, ``gptq-3bit``, …: see `labkit.quantization.shorthand`) puts in its place."""
        scheme = parse_candidate(scheme) if isinstance(scheme, str) else scheme
        return scheme.quantize_linear(self.linear, statistics=self.statistics)

    @torch.no_grad()
    def output_db(self, scheme: str | Scheme) -> float:
        """Signal-to-noise ratio of its outputs on the items that judge, in dB: 20 dB is an error of a tenth."""
        return sqnr_db(self.linear(self.inputs), self.quantized(scheme)(self.inputs))

    def output_error(self, approximation: Tensor) -> float:
        """The squared output error of a weight [N, K] in its place, as a share of the squared output, on
        the items that calibrate."""
        return gptq.trace_error(self.weight, approximation, self.statistics.second_moment)

    def qparams(self, num_bits: int = 4, group_size: int = 64) -> tuple[Tensor, Tensor]:
        """scale and zero_point [N, K/G] of the whole range of each group."""
        return affine.choose_qparams(self.weight, num_bits, group_size, False, torch.bfloat16)

    def solve_errors(self, num_bits: int = 4, group_size: int = 64) -> Mapping[str, list[float]]:
        """The squared output error that each step adds, rounding to the nearest and solving, with and without the
        order of falling activation; for `labkit.results.charts.methods.column_errors`."""
        qparams, moment = self.qparams(num_bits, group_size), self.statistics.second_moment
        curves = {"rounded to the nearest": self._nearest_errors(qparams, num_bits)}
        for label, act_order in (("solved, left to right", False), ("solved, most active first", True)):
            columns = gptq.prepare_columns(moment, act_order=act_order)
            solution = gptq.solve(self.weight, columns, *qparams, num_bits)
            curves[label] = solution.column_errors[columns.order].tolist()
        return curves

    def watch(self, rows: int = 8, num_bits: int = 4, group_size: int = 64) -> list[Step]:
        """Every step of the solve of the first ``rows`` output channels."""
        scale, zero_point = self.qparams(num_bits, group_size)
        return list(watch(self.weight[:rows], self.columns, scale[:rows], zero_point[:rows], num_bits))

    def _nearest_errors(self, qparams: tuple[Tensor, Tensor], num_bits: int) -> list[float]:
        """What rounding one column after the other to the nearest adds, in the order of the solve."""
        scale, zero_point = qparams
        codes = affine.quantize(self.weight, scale, zero_point, num_bits)
        change = (self.weight - affine.dequantize(codes, scale, zero_point))[:, self.columns.order]
        moment = self.columns.moment
        before = change @ moment.triu(1)  # what the columns before have already done to the output
        return ((2 * before + change * moment.diagonal()) * change).sum(0).tolist()
