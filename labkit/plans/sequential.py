"""Sequential calibration: one forward pass per batch, halted at each watched module until it is replaced.

Each layer is calibrated on the outputs of the already quantized layers before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from labkit.common.errors import LabError
from labkit.quantization.kernels.upcast import upcast

Visit = Callable[[str, list[Tensor], list[Tensor] | None], nn.Module]


def run_model(model: nn.Module, batch: Any) -> Any:
    """``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple or list, else ``model(batch)``.

    Transformers models run without a KV cache, which nothing would read.
    """
    options = {"use_cache": False} if hasattr(model, "prepare_inputs_for_generation") else {}
    with upcast(next((tensor.device for tensor in model.parameters()), torch.device("cpu"))):
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
        batches: Sequence[Any],
        device: torch.device | str | None = None,
        references: bool = False,
    ) -> None:
        self.model, self.device, self.references = model, _with_index(device), references
        self.watched = dict(watched)
        self.batches = list(batches)
        self.replacements: dict[str, nn.Module] = {}
        self.called: list[str] | None = None  # names called, while `find_order` runs a batch
        self.original: Callable[[Tensor], Tensor] | None = None  # the current module, unquantized
        self._orders: dict[Any, list[str]] = {}
        self._passes: list[_Pass] = []

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
            order = set(self._orders.get(_kind(batch), ()))
            batch_pass = _Pass(len(self._passes), self.model, batch, self.device, order)
            if self.references:
                batch_pass.reference = _Pass(batch_pass.number, self.model, batch, self.device, order)
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


class _Ended(BaseException):
    """Unwinds the thread of a cancelled pass; a BaseException, so that no model code catches it."""


class _Pass(threading.Thread):
    """One batch's forward pass: a thread that runs only while `advance` waits, so one runs at a time."""

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
        """Run to the next halt or to the end of the model. Raises LabError if the model raises an error."""
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
        """Whether the other pass has halted at the same module: the two may part where the model's path depends
        on its values, as with experts."""
        if self.halted_at is None or self.halted_at != other.halted_at:
            return False
        return self.inputs.shape == other.inputs.shape

    @property
    def reference_inputs(self) -> Tensor:
        """The inputs in the reference pass; this pass's own if the reference has parted from it."""
        return self.inputs if self.reference is None else self.reference.inputs

    def end(self) -> None:
        """End the pass wherever it has halted."""
        if self.reference is not None:
            self.reference.end()
        self._unwanted = True
        self._go.release()
        self.join()
        self.halted_at = self.inputs = None

    def halt(self, name: str, inputs: Tensor) -> None:
        """Called in the pass's thread: wait for the module's replacement."""
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
            torch.cuda.set_device(device)  # the current device is a setting of each thread
        with torch.no_grad():
            run_model(self._model, to_device(batch, device))


def _with_index(device: torch.device | str | None) -> torch.device | str | None:
    """``cuda`` with this thread's current index: in another thread ``cuda`` means the first GPU."""
    if device is None or torch.device(device).type != "cuda" or torch.device(device).index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _free_workspaces() -> None:
    """Free cuBLAS's workspaces, 32 MB for each thread on recent cards: hundreds of threads wait and one works."""
    if clear := getattr(torch._C, "_cuda_clearCublasWorkspaces", None):
        clear()


def _kind(batch: Any) -> Any:
    """What batches with the same arguments share: they take the same path through a model."""
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
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return LabError(f"calibration batch {index} does not run through the model ({reason})")


def checked_batches(batches: Iterable[Any]) -> list[Any]:
    """The batches as a list. Raises LabError if it is empty or a batch has a type that no model takes."""
    if isinstance(batches, Tensor | Mapping):
        raise LabError("calibration is a list of batches; this is a single one: put it in a list")
    checked = list(batches)
    if not checked:
        raise LabError("there are no calibration batches")
    for index, batch in enumerate(checked):
        if not isinstance(batch, Tensor | Mapping | tuple | list):
            raise LabError(
                f"calibration batch {index} is of type {type(batch).__name__}; a batch is a tensor, a mapping of "
                "arguments, or a tuple of them"
            )
    return checked
