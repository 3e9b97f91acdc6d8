"""One Linear under one scheme: its inputs, the quantized module, and the model with that module in its place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from labkit.common.errors import LabError
from labkit.engine.engine import Engine
from labkit.loading.calibration import default_calibration
from labkit.plans.calibrate import input_statistics
from labkit.plans.walk import find_places
from labkit.quantization import Scheme
from labkit.quantization.affine import sqnr_db
from labkit.quantization.scheme import resident_bytes
from labkit.quantization.shorthand import parse_candidate
from labkit.quantization.statistics import InputStatistics
from labkit.quantization.torch_state import guarded

CALIBRATION_ITEMS = 8
"""Enough items to show the effect of calibration, in a few seconds."""
MOST_BYTES = 2**30
"""Limit for the second moments of inputs that are held at a time."""


@dataclass(frozen=True)
class TrialResult:
    """One module before and after quantization by a scheme.

    Attributes:
        scheme: the scheme.
        original: the loaded module, a Linear or another kind that the scheme replaces.
        module: its replacement.
    """

    scheme: Scheme
    original: nn.Module = field(repr=False)
    module: nn.Module = field(repr=False)

    @cached_property
    def before(self) -> Tensor:
        """The weight [N, K] fp32, on the CPU."""
        return self.original.weight.detach().float().cpu()

    @cached_property
    def after(self) -> Tensor:
        """The weight of the replacement, dequantized [N, K] fp32, on the CPU."""
        dequantize = getattr(self.module, "dequantize", None)
        weight = dequantize(torch.float32) if dequantize else self.module.weight
        return weight.detach().float().cpu()

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio of the weight."""
        return sqnr_db(self.before, self.after)

    @guarded
    @torch.no_grad()
    def output_sqnr_db(self, inputs: Tensor) -> float:
        """Signal-to-quantization-noise ratio of the outputs for ``inputs`` [M, K]."""
        return sqnr_db(self.original(inputs), self.module(inputs))

    @property
    def largest_error(self) -> float:
        """Largest |after - before|."""
        return (self.after - self.before).abs().max().item()

    @property
    def bytes_before(self) -> int:
        """Bytes of the loaded module, with its bias."""
        return resident_bytes(self.original)

    @property
    def bytes_after(self) -> int:
        """Bytes of the replacement, with its bias."""
        return resident_bytes(self.module)

    @property
    def bits(self) -> float:
        """Bits a weight, with scales and bias."""
        return 8 * self.bytes_after / self.before.numel()


@guarded
@torch.no_grad()
def try_scheme(
    module: nn.Module, scheme: Scheme | str, statistics: InputStatistics | None = None
) -> TrialResult:
    """Quantize ``module`` by ``scheme`` (``int8``, ``gptq-3bit``, …: see `labkit.quantization.shorthand`).

    ``statistics`` of its inputs are for schemes that calibrate. The model does not change.

    Raises:
        SchemeError: the scheme does not support the module, or requires statistics.
    """
    scheme = parse_candidate(scheme) if isinstance(scheme, str) else scheme
    return TrialResult(scheme, module, scheme.quantize_module(module, statistics=statistics))


def find_linear(model: nn.Module, name: str) -> nn.Linear:
    """The unquantized Linear ``name``. Raises LabError if there is none."""
    modules = dict(model.named_modules())
    module = modules.get(name)
    if not isinstance(module, nn.Linear):
        kind = "" if module is None else f" it is a {type(module).__name__};"
        some = [name for name, module in modules.items() if isinstance(module, nn.Linear)][:3]
        raise LabError(f"the model has no Linear called {name};{kind} there are {', '.join(some)} …")
    return module


def linears_by_part(engine: Engine) -> dict[str, list[str]]:
    """Part -> names of its Linears, in the model's order. Raises LabError for a quantized model."""
    parts: dict[str, list[str]] = {}
    for name, module in engine.model.named_modules():
        if isinstance(module, nn.Linear):
            parts.setdefault(engine.roles.get(name, "other"), []).append(name)
    if not parts:
        raise LabError(
            f"{engine.spec.name} is quantized already: load it with the plan fp32 or bf16 to explore it"
        )
    return parts


@guarded
def calibration_statistics(
    engine: Engine, names: Sequence[str], items: int = CALIBRATION_ITEMS
) -> dict[str, InputStatistics]:
    """Name -> second moments of the Linear's inputs on calibration items, in the current model.

    Raises:
        LabError: together they take more than `MOST_BYTES`, or no item reaches one of the Linears.
    """
    size = sum(moment_bytes(find_linear(engine.model, name)) for name in names)
    if size > MOST_BYTES and len(names) > 1:
        raise LabError(
            f"calibrating these {len(names)} Linears at once takes {size / 1e9:.1f} GB: choose one of them"
        )
    batches = default_calibration(
        engine.processor, engine.modalities, items, device=engine.device, model=engine.model
    )
    statistics = input_statistics(engine.model, names, batches)
    if missing := [name for name in names if name not in statistics]:
        raise LabError(f"no calibration item comes to {missing[0]}")
    return statistics


def moment_bytes(linear: nn.Linear) -> int:
    """Bytes of the second moments of its inputs [K, K] fp32."""
    return 4 * linear.in_features**2


@contextlib.contextmanager
def replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """``model`` with ``modules`` in place of those with the same names; restores them when the block ends or fails."""
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


@guarded
def answer(engine: Engine, item: Any, modules: Mapping[str, nn.Module], **options: Any) -> Any:
    """The engine's `Generation` for a PhoneTap item with ``modules`` in place of their Linears."""
    with replaced(engine.model, modules):
        return engine.generate(item.messages(), **{"max_new_tokens": 64, **options})
