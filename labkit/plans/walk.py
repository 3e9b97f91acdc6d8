"""The steps that every way of quantizing a model shares for each module: load it from an earlier run or quantize it,
save it, and replace the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from labkit.plans.finished import WorkFolder
from labkit.plans.resolved import ResolvedPlan
from labkit.plans.unread import at_hand
from labkit.quantization import Scheme
from labkit.quantization.statistics import InputStatistics

Placement = Callable[[str], torch.device | str]
"""Module name -> the device it is on."""


class PlanWalk:
    """Carries out a resolved plan on ``model``.

    Args:
        model: the model whose modules are replaced.
        resolved: the plan, resolved for it.
        place: the device of each replacement.
        work: the folder of finished modules, to save and reload them.

    Attributes:
        schemes: module name -> scheme of every module that is replaced.
        sequential: the part of ``schemes`` that `labkit.plans.calibrate` replaces in the model's order.
        dtype: the plan's default dtype.
    """

    def __init__(
        self, model: nn.Module, resolved: ResolvedPlan, place: Placement, work: WorkFolder | None
    ) -> None:
        self.model, self.place, self.work = model, place, work
        self.schemes, self.dtype = resolved.schemes, resolved.plan.dtype
        self.sequential = sequential_schemes(model, self.schemes)
        self._places = find_places(model, set(self.schemes))

    def take_finished(self, name: str) -> bool:
        """Replace the module ``name`` by an earlier run's; False if there is none."""
        if self.work is None:
            return False
        original = self.model.get_submodule(name)
        module = self.work.load(name, self.schemes[name], original, self.place(name), self.dtype)
        if module is not None:
            self.replace(name, module.train(original.training))
        return module is not None

    def quantize(self, name: str, statistics: InputStatistics | None = None) -> None:
        """Quantize and replace the module ``name``; the original is then free.

        Raises:
            SchemeError: the module cannot be quantized (the message names it).
        """
        original = self.model.get_submodule(name)
        try:
            module = self.schemes[name].quantize_module(
                at_hand(original), device=self.place(name), dtype=self.dtype, statistics=statistics
            )
        except ValueError as error:
            raise type(error)(f"{name}: {error}") from error
        if self.work is not None:
            self.work.save(name, module)
        self.replace(name, module.train(original.training))

    def replace(self, name: str, module: nn.Module) -> None:
        """Replace the module ``name`` in every parent that holds it."""
        for parent, attribute in self._places[name]:
            setattr(parent, attribute, module)


def sequential_schemes(model: nn.Module, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The schemes that need calibration; if one needs the unquantized model's inputs, those of all Linears."""
    calibrated = {name: scheme for name, scheme in schemes.items() if scheme.requires_calibration}
    if not any(scheme.needs_reference for scheme in calibrated.values()):
        return calibrated
    return {
        name: scheme for name, scheme in schemes.items() if isinstance(model.get_submodule(name), nn.Linear)
    }


def find_places(model: nn.Module, names: set[str]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Name -> every (parent, attribute) that holds the module; keeps no reference to the modules."""
    ids = {id(module): name for name, module in model.named_modules() if name in names}
    places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in names}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if id(child) in ids:
                places[ids[id(child)]].append((parent, attribute))
    return places
