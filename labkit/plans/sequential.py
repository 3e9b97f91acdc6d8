"""Many forward passes side by side, halted where they call one of the watched modules.

A calibrated scheme wants to see the inputs of a Linear, replace it, and go on with what the replacement
answers: each layer is then calibrated on the already quantized ones before it. Here every batch has a pass of
its own through the model, in a thread of its own, of which only one runs at any time. Each pass halts when it
calls a watched module; when all that will come there have come, their inputs are shown to a function that
gives the replacement, and with it they go on to the next one.

So the whole calibration is one forward pass of each batch, whatever the model's code does between its layers
(it is neither traced nor taken apart), and what is held are the inputs of one layer and what the model's own
code holds at that place. With ``references`` each batch has a second pass, in which the watched modules answer
as they were: at each halt there are then also the inputs that the unquantized model has there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from labkit.common.errors import LabError

Visit = Callable[[str, list[Tensor], list[Tensor] | None], nn.Module]


def run_model(model: nn.Module, batch: Any) -> Any:
    """``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple or list, else ``model(batch)``.

    Models of transformers are told not to fill a KV cache, which nobody would read.
    """
    options = {"use_cache": False} if hasattr(model, "prepare_inputs_for_generation") else {}
    if isinstance(batch, Mapping):
        return model(**{**options, **batch})
    return model(*batch, **options) if isinstance(batch, tuple | list) else model(batch, **options)


def to_device(batch: Any, device: torch.device | str | None) -> Any:
    """``batch`` with its tensors on ``device`` (None: where they are)."""
    if isinstance(batch, Tensor):
        return batch if device is None else batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    return type(batch)(to_device(value, device) for value in batch) if type(batch) in (tuple, list) else batch


class SequentialRun:
    """The passes of ``batches`` through ``model``, halted at the modules ``watched`` (by name).

    A context: while it lasts the watched modules' ``forward`` is taken over; at its end every pass ends.

        with SequentialRun(model, watched, batches) as run:
            run.find_order()
            run.visit_all(visit)

    Args:
        model: called as `run_model` does; in evaluation mode.
        watched: modules that take one tensor, such as Linears; emptied as they are replaced.
        batches: what the model takes.
        device: where the batches are moved before they are run (default: nowhere).
        references: give every batch a second pass through the modules as they were.
    """

    def __init__(
        self,
        model: nn.Module,
        watched: Mapping[str, nn.Module],
        batches: Sequence[Any],
        device: torch.device | str | None = None,
        references: bool = False,
    ) -> None:
        self.model, self.device, self.references = model, _with_index(device), references
        self.watched = dict(watched)
        self.batches = list(batches)
        self.replacements: dict[str, nn.Module] = {}
        self.called: list[str] | None = None  # names called, while a batch is run to find their order
        self.original: Callable[[Tensor], Tensor] | None = None  # the module under way, as it was
        self._orders: dict[Any, list[str]] = {}
        self._passes: list[_Pass] = []

    def __enter__(self) -> SequentialRun:
        for name, module in self.watched.items():
            module.forward = _Halt(self, name)
        return self

    def __exit__(self, *_: object) -> None:
        for state in self._passes:
            state.end()
        for module in self.watched.values():
            module.__dict__.pop("forward", None)

    @torch.no_grad()
    def find_order(self) -> list[str]:
        """Find the order in which the watched modules are called; returns the names that no batch calls.

        One batch of each kind (the same arguments given) is run through the model as it is; all are if those
        do not call every watched module. Raises LabError if a batch does not run.
        """
        kinds = [_kind(batch) for batch in self.batches]
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
                raise _about_failure(index, error) from error
            finally:
                self.called = None
            order = self._orders.setdefault(kinds[index], [])
            order += [name for name in dict.fromkeys(called) if name not in order]
            missing -= set(called)
        return [name for name in self.watched if name in missing]

    def release(self, names: Iterable[str]) -> None:
        """Watch these modules no longer: they answer as they are."""
        for name in names:
            del self.watched.pop(name).forward

    @torch.no_grad()
    def visit_all(self, visit: Visit) -> None:
        """Run all passes; ``visit(name, inputs, references)`` gives the module that answers from then on.

        Each watched module is visited once, with the inputs [..., K] of all passes that have come to it and
        those of their references (None without); should it be called again, its replacement answers at once.
        Ends when all are replaced.
        """
        while self.batches:
            batch = self.batches.pop(0)
            order = set(self._orders.get(_kind(batch), ()))
            one = _Pass(len(self._passes), self.model, batch, self.device, order)
            if self.references:
                one.reference = _Pass(one.number, self.model, batch, self.device, order)
                one.reference.is_reference = True
            self._passes.append(one)
            one.advance()
        while (name := self._next()) is not None:
            there = [state for state in self._passes if state.halted_at == name]
            references = [entry.reference_inputs for entry in there] if self.references else None
            self.replacements[name] = visit(name, [entry.inputs for entry in there], references)
            del references
            module = self.watched.pop(name)
            del module.forward
            if not self.watched:
                return
            if self.references:
                self.original = _at_hand(module, there[0].inputs)
            del module
            for entry in there:
                entry.advance()
            self.original = None

    def _next(self) -> str | None:
        """The module that all passes that will ever come to it have come to; None when all passes are through."""
        halted = [state.halted_at for state in self._passes if state.halted_at is not None]
        for name in dict.fromkeys(halted):
            if not any(state.halted_at not in (None, name) and name in state.order for state in self._passes):
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


class _Ended(BaseException):
    """Unwinds a pass that is not wanted any more; no code of a model catches it."""


class _Pass(threading.Thread):
    """One batch on its way through the model: a thread that runs only while `advance` waits for it."""

    def __init__(self, number: int, model: nn.Module, batch: Any, device: Any, order: set[str]) -> None:
        super().__init__(daemon=True, name="labkit-pass")
        self.number, self.order = number, order
        self.reference: _Pass | None = None
        self.is_reference = False
        self.halted_at: str | None = None
        self.inputs: Tensor | None = None
        self._model, self._batch, self._device = model, batch, device
        self._error: BaseException | None = None
        self._unwanted = False
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self.start()

    def advance(self) -> None:
        """Let it run to its next halt, or to the end of the model. Raises LabError if the model raises an error."""
        self.halted_at = self.inputs = None
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise _about_failure(self.number, self._error) from self._error
        if self.inputs is not None and self.inputs.is_cuda:
            _free_workspaces()
        if self.reference is not None:
            self.reference.advance()
            if not self._is_beside(self.reference):
                self.reference.end()
                self.reference = None

    def _is_beside(self, other: _Pass) -> bool:
        """Whether the other pass has halted at the same place: where the model's way depends on its values, as
        with experts, passes may part."""
        if self.halted_at is None or self.halted_at != other.halted_at:
            return False
        return self.inputs.shape == other.inputs.shape

    @property
    def reference_inputs(self) -> Tensor:
        """The inputs in the reference pass; its own if that has parted from it."""
        return self.inputs if self.reference is None else self.reference.inputs

    def end(self) -> None:
        """End it, whatever it is doing."""
        if self.reference is not None:
            self.reference.end()
        self._unwanted = True
        self._go.release()
        self.join()
        self.halted_at = self.inputs = None

    def halt(self, name: str, inputs: Tensor) -> None:
        """Called in the pass: wait until the module's replacement is there."""
        self.halted_at, self.inputs = name, inputs
        self._back.release()
        self._go.acquire()
        if self._unwanted:
            raise _Ended

    def run(self) -> None:
        self._go.acquire()
        try:
            if not self._unwanted:
                batch, self._batch = self._batch, None
                self._run(batch)
        except _Ended:
            pass
        except Exception as error:
            self._error = error
        finally:
            self._back.release()

    def _run(self, batch: Any) -> None:
        device = None if self._device is None else torch.device(self._device)
        if device is not None and device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # a setting of the thread
        with torch.no_grad():
            run_model(self._model, to_device(batch, device))


def _with_index(device: torch.device | str | None) -> torch.device | str | None:
    """``cuda`` as the GPU that the present thread means by it: other threads would mean the first."""
    if device is None or torch.device(device).type != "cuda" or torch.device(device).index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _free_workspaces() -> None:
    """Let go of what cuBLAS keeps for each thread that multiplies, 32 MB on recent cards: hundreds of passes wait, and
    one works."""
    if clear := getattr(torch._C, "_cuda_clearCublasWorkspaces", None):
        clear()


def _kind(batch: Any) -> Any:
    """Batches of one kind take the same way through a model: those with the same arguments."""
    if isinstance(batch, Mapping):
        return frozenset(key for key, value in batch.items() if value is not None)
    return len(batch) if isinstance(batch, tuple | list) else None


TOO_LARGE = (
    "what the calibration batches hold at one layer does not fit into the device's memory: give fewer or shorter ones, "
    "or a scheme that needs no second pass of the unquantized model (gptq with drift_correction: 0.0), which halves it"
)


def _about_failure(index: int, error: Exception) -> LabError:
    if isinstance(error, torch.OutOfMemoryError):
        return LabError(TOO_LARGE)
    told = " ".join(f"{type(error).__name__}: {error}".split())
    return LabError(f"calibration batch {index} does not run through the model ({told})")


def checked_batches(batches: Iterable[Any]) -> list[Any]:
    """The batches as a list. Raises LabError if there are none, or if one is of a kind no model takes."""
    if isinstance(batches, Tensor | Mapping):
        raise LabError("calibration is a list of batches; this is a single one: put it in a list")
    found = list(batches)
    if not found:
        raise LabError("there are no calibration batches")
    for index, batch in enumerate(found):
        if not isinstance(batch, Tensor | Mapping | tuple | list):
            raise LabError(
                f"calibration batch {index} is of type {type(batch).__name__}; a batch is a tensor, a mapping of "
                "arguments, or a tuple of them"
            )
    return found
