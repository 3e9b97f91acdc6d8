"""Sequential calibration: one forward pass per batch, halted at each watched module until it is replaced.

Each layer is calibrated on the outputs of the already quantized layers before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from labkit.plans.batch_pass import BatchPass, failure_of, with_index
from labkit.plans.batches import Batch, kind_of_batch, run_model, to_device

Visit = Callable[[str, list[Tensor], list[Tensor] | None], nn.Module]
"""``visit(name, inputs, references)`` -> the replacement of the module ``name``."""


class SequentialRun:
    """The passes of ``batches`` through ``model``, halted at the modules ``watched`` (by name).

    When every pass that reaches a module has halted there, `visit_all` shows their inputs to a function that
    returns the replacement, and the passes continue with it. The whole calibration is one forward pass per
    batch, whatever the model's code does between its layers: the code is neither traced nor split. Memory holds
    the inputs of one layer and what the model's code itself holds at that point.

    A context manager: it replaces the watched modules' ``forward`` on entry and ends every pass on exit.

        with SequentialRun(model, watched, batches) as run:
            run.find_order()
            run.visit_all(visit)

    Args:
        model: called as `run_model` does; in evaluation mode.
        watched: modules that take one tensor, such as Linears; each is dropped when it is replaced.
        batches: what the model takes.
        device: where each batch is moved before it runs (default: it is not moved).
        references: give every batch a second pass through the unquantized modules, whose inputs `visit_all`
            passes on too.
    """

    def __init__(
        self,
        model: nn.Module,
        watched: Mapping[str, nn.Module],
        batches: Sequence[Batch],
        device: torch.device | str | None = None,
        references: bool = False,
    ) -> None:
        self.model, self.device, self.references = model, with_index(device), references
        self.watched = dict(watched)
        self.batches = list(batches)
        self.replacements: dict[str, nn.Module] = {}
        self.called: list[str] | None = None  # names called, while `find_order` runs a batch
        self.original: Callable[[Tensor], Tensor] | None = None  # the current module, unquantized
        self._orders: dict[Hashable, list[str]] = {}
        self._passes: list[BatchPass] = []

    def __enter__(self) -> SequentialRun:
        for name, module in self.watched.items():
            module.forward = _Halt(self, name)
        return self

    def __exit__(self, *_: object) -> None:
        for batch_pass in self._passes:
            batch_pass.end()
        for module in self.watched.values():
            module.__dict__.pop("forward", None)

    @torch.no_grad()
    def find_order(self) -> list[str]:
        """Find the order in which the watched modules are called; returns the names that no batch calls.

        Runs one batch of each kind (batches with the same arguments) through the unchanged model, and all batches
        if those do not call every watched module. Raises LabError if a batch does not run.
        """
        kinds = [kind_of_batch(batch) for batch in self.batches]
        first = [index for index, kind in enumerate(kinds) if kind not in kinds[:index]]
        rest = [index for index in range(len(kinds)) if index not in first]
        missing = set(self.watched)
        for index in (*first, *rest):
            if index in rest and not missing:
                break
            called = self.called = []
            try:
                run_model(self.model, to_device(self.batches[index], self.device))
            except Exception as error:
                raise failure_of(index, error) from error
            finally:
                self.called = None
            order = self._orders.setdefault(kinds[index], [])
            order += [name for name in dict.fromkeys(called) if name not in order]
            missing -= set(called)
        return [name for name in self.watched if name in missing]

    def release(self, names: Iterable[str]) -> None:
        """Stop watching these modules; they keep their own forward."""
        for name in names:
            del self.watched.pop(name).forward

    @torch.no_grad()
    def visit_all(self, visit: Visit) -> None:
        """Run all passes; ``visit(name, inputs, references)`` returns the replacement of the module ``name``.

        Each watched module is visited once, with the inputs [..., K] of all passes halted at it and those of
        their reference passes (None without references). Later calls of the module run the replacement. Ends
        when all modules are replaced.
        """
        while self.batches:
            batch = self.batches.pop(0)
            order = set(self._orders.get(kind_of_batch(batch), ()))
            batch_pass = BatchPass(len(self._passes), self.model, batch, self.device, order)
            if self.references:
                batch_pass.reference = BatchPass(batch_pass.number, self.model, batch, self.device, order)
                batch_pass.reference.is_reference = True
            self._passes.append(batch_pass)
            batch_pass.advance()
        while (name := self._next()) is not None:
            halted = [batch_pass for batch_pass in self._passes if batch_pass.halted_at == name]
            references = [batch_pass.reference_inputs for batch_pass in halted] if self.references else None
            self.replacements[name] = visit(name, [batch_pass.inputs for batch_pass in halted], references)
            del references
            module = self.watched.pop(name)
            del module.forward
            if not self.watched:
                return
            if self.references:
                self.original = _at_hand(module, halted[0].inputs)
            del module
            for batch_pass in halted:
                batch_pass.advance()
            self.original = None

    def _next(self) -> str | None:
        """The module to visit next: one that no other pass will still reach, else the one where most have halted.
        None when all passes have ended."""
        halted = [batch_pass.halted_at for batch_pass in self._passes if batch_pass.halted_at is not None]
        for name in dict.fromkeys(halted):
            if not any(
                batch_pass.halted_at not in (None, name) and name in batch_pass.order
                for batch_pass in self._passes
            ):
                return name
        return max(halted, key=halted.count) if halted else None


class _Halt:
    """The ``forward`` of a watched module."""

    def __init__(self, run: SequentialRun, name: str) -> None:
        self.run, self.name = run, name

    def __call__(self, inputs: Tensor) -> Tensor:
        if self.run.called is not None:
            self.run.called.append(self.name)
            return _at_hand(self.run.watched[self.name], inputs)(inputs)
        this = threading.current_thread()
        if self.name not in self.run.replacements:
            this.halt(self.name, inputs)
            if this.is_reference:
                return self.run.original(inputs)
        return self.run.replacements[self.name](inputs)


def _at_hand(linear: nn.Linear, inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """The unquantized Linear as a function, its weight brought to the inputs' device and dtype."""
    weight, bias = linear.weight.to(inputs), linear.bias
    bias = None if bias is None else bias.to(inputs)
    return lambda rows: nn.functional.linear(rows, weight, bias)
