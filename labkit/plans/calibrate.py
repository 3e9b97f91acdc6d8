"""The walk of calibrated schemes through a model: each Linear is solved on the inputs it really gets.

The passes of all batches go through the model side by side (`lockstep.py`). Where they meet at a Linear, its
inputs' second moments are gathered, the scheme solves it, and the passes go on with the solved one: so every
layer is calibrated on the already quantized ones before it, and the memory needed is that of one layer's
inputs. Weights may lie on the CPU while the solving and the passes are on a GPU: each is moved when its turn
comes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from labkit.common.errors import LabError
from labkit.plans.finished import WorkFolder
from labkit.plans.sequential import TOO_LARGE, Lockstep, run_model, to_device
from labkit.plans.unread import at_hand
from labkit.quantization import Scheme
from labkit.quantization.gptq_blocks import forget_graphs
from labkit.quantization.statistics import InputStatistics


@torch.no_grad()
def calibrate_(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    batches: Sequence[Any],
    replace: Callable[[str, nn.Module], None],
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    work: WorkFolder | None = None,
) -> None:
    """Replace the Linears of ``model`` that ``schemes`` names, in the order in which the model calls them.

    Args:
        model: all else in it is quantized, or has its dtype, already; on ``device``.
        schemes: module name -> scheme. Those that require no calibration may be among them, so that the
            unquantized model's inputs are known behind them too.
        batches: see `lockstep.run_model`.
        replace: called with each name and its new module, to put it in its place.
        dtype: of the new modules' biases.
        device: where they are solved, and where they stay (default: where each Linear is).
        work: where finished modules are kept, and taken from.

    Raises:
        LabError: a batch does not run, or no batch comes to some of the Linears (before any is solved); or all
            of them together do not fit into the device's memory.
        SchemeError: a Linear cannot be solved, naming it.
    """
    in_training = [name for name, module in model.named_modules() if module.training]
    model.eval()
    linears = {name: model.get_submodule(name) for name in schemes}
    references = any(scheme.needs_reference for scheme in schemes.values())
    gathered: _Gathered | None = None

    def visit(name: str, inputs: list[Tensor], originals: list[Tensor] | None) -> nn.Module:
        nonlocal gathered
        scheme, linear = schemes[name], linears.pop(name)
        there = device or linear.weight.device
        module = work.load(name, scheme, linear, there, dtype) if work is not None else None
        if module is None:
            if not scheme.requires_calibration:
                gathered = None
            elif gathered is None or not gathered.serves(scheme, inputs):
                gathered = _Gathered(scheme, inputs, originals, there)
            statistics = gathered and gathered.statistics
            linear = at_hand(linear)
            try:
                module = scheme.quantize_linear(linear, device=there, dtype=dtype, statistics=statistics)
            except ValueError as error:
                raise type(error)(f"{name}: {error}") from error
            if work is not None:
                work.save(name, module)
        replace(name, module.eval())
        return module

    try:
        with Lockstep(model, linears, batches, device, references) as lockstep:
            missing = lockstep.scout()
            if needing := [name for name in missing if schemes[name].requires_calibration]:
                raise LabError(_about_missing(needing))
            lockstep.let_go(missing)
            for name in missing:
                visit(name, [], None)
            lockstep.walk(visit)
    except torch.OutOfMemoryError as error:
        raise LabError(TOO_LARGE) from error
    finally:
        forget_graphs()
        for name in in_training:
            model.get_submodule(name).training = True


class _Gathered:
    """Statistics, and which inputs they are of: neighbours such as q, k and v are given the same tensors."""

    def __init__(
        self, scheme: Scheme, inputs: list[Tensor], originals: list[Tensor] | None, device: Any
    ) -> None:
        drifting = scheme.needs_reference and originals is not None
        columns = inputs[0].shape[-1]
        self.statistics = InputStatistics(columns, scheme.needs_full_moment, drifting, device)
        for index, batch in enumerate(inputs):
            self.statistics.add(batch, originals[index] if drifting else None)
        self._inputs = [weakref.ref(batch) for batch in inputs]  # they are not kept from being freed

    def serves(self, scheme: Scheme, inputs: Sequence[Tensor]) -> bool:
        """Whether these are the very same inputs, and what was gathered of them is what the scheme wants."""
        same = [one() for one in self._inputs]
        return (
            self.statistics.full == scheme.needs_full_moment
            and self.statistics.drifting == scheme.needs_reference
            and len(same) == len(inputs)
            and all(a is b for a, b in zip(same, inputs))
        )


@torch.no_grad()
def input_statistics(
    model: nn.Module, names: Sequence[str], batches: Sequence[Any], full: bool = True
) -> dict[str, InputStatistics]:
    """Second moments of the inputs of the Linears ``names``, with the model as it is.

    One pass over the batches; memory holds K² numbers for each Linear (K with ``full`` False). A Linear that
    no batch comes to is left out.
    """
    found: dict[str, InputStatistics] = {}

    def watch(name: str) -> Callable:
        def hook(_: nn.Module, arguments: tuple) -> None:
            if name not in found:
                found[name] = InputStatistics(arguments[0].shape[-1], full, device=arguments[0].device)
            found[name].add(arguments[0])

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    try:
        device = next((parameter.device for parameter in model.parameters()), None)
        for batch in batches:
            run_model(model, to_device(batch, device))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _about_missing(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (
        f"no calibration batch comes to {', '.join(names[:4])}{more}: give batches that use them "
        "(images for a vision encoder, recordings for a speech encoder), or lay a scheme on them that needs none"
    )
