"""One scheme on one Linear, or on a whole part, of a loaded model: what it does to weights, bytes and a tap.

    look = exploring.look(engine, "lm_head", "int4")
    look.sqnr_db, look.bytes_after
    exploring.answer(engine, item, {"lm_head": look.module}).text

The engine's model is left as it was: other modules stand in the Linears' places only while an answer is made.
Schemes that calibrate get the inputs that the unquantized model has on some calibration items (`statistics`); when a
whole model is quantized, each Linear is calibrated behind the quantized ones before it instead.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from labkit.common.errors import LabError
from labkit.engine.engine import Engine
from labkit.loading.calibration import default_calibration
from labkit.plans.calibrate import input_statistics
from labkit.plans.quantize import find_places
from labkit.quantization import Scheme, get_scheme, known_schemes
from labkit.quantization.affine import sqnr_db
from labkit.quantization.scheme import resident_bytes
from labkit.quantization.statistics import InputStatistics

ITEMS = 8
"""Calibration items: enough to see what calibration does, in a few seconds."""
MOST_BYTES = 2**30
"""Of the inputs' second moments that are held at a time."""


class ExploringError(LabError):
    """A Linear, a part or a scheme that cannot be looked at."""


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
    """Part -> names of its Linears, in the model's order. Raises ExploringError for a quantized model."""
    found: dict[str, list[str]] = {}
    for name, module in engine.model.named_modules():
        if isinstance(module, nn.Linear):
            found.setdefault(engine.roles.get(name, "other"), []).append(name)
    if not found:
        raise ExploringError(
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
        ExploringError: together they would take more than `MOST_BYTES`, or no item comes to one of the Linears.
    """
    size = sum(4 * _linear(engine, name).in_features ** 2 for name in names)
    if size > MOST_BYTES and len(names) > 1:
        raise ExploringError(
            f"calibrating these {len(names)} Linears at once takes {size / 1e9:.1f} GB: choose one of them"
        )
    batches = default_calibration(
        engine.processor, engine.modalities, items, device=engine.device, model=engine.model
    )
    found = input_statistics(engine.model, names, batches)
    if missing := [name for name in names if name not in found]:
        raise ExploringError(f"no calibration item comes to {missing[0]}")
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
        raise ExploringError(f"{engine.spec.name} has no module {name!r}") from None
    if not isinstance(module, nn.Linear):
        raise ExploringError(f"{name} is a {type(module).__name__}, not an unquantized Linear")
    return module
