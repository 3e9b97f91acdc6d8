"""One batch's forward pass, which halts at a module until the module is replaced."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from labkit.common.errors import LabError
from labkit.plans.batches import Batch, run_model, to_device

TOO_LARGE = (
    "what the calibration batches hold at one layer does not fit into the device's memory: give fewer or shorter ones, "
    "or a scheme that needs no second pass of the unquantized model (gptq with drift_correction: 0.0), which halves it"
)


class _Ended(BaseException):
    """Unwinds the thread of a cancelled pass; a BaseException, so that no model code catches it."""


class BatchPass(threading.Thread):
    """One batch's forward pass: a thread that runs only while `advance` waits, so one runs at a time."""

    def __init__(
        self, number: int, model: nn.Module, batch: Batch, device: torch.device | str | None, order: set[str]
    ) -> None:
        super().__init__(daemon=True, name="labkit-pass")
        self.number, self.order = number, order
        self.reference: BatchPass | None = None
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
            raise failure_of(self.number, self._error) from self._error
        if self.inputs is not None and self.inputs.is_cuda:
            _free_workspaces()
        if self.reference is not None:
            self.reference.advance()
            if not self._is_beside(self.reference):
                self.reference.end()
                self.reference = None

    def _is_beside(self, other: BatchPass) -> bool:
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

    def _run(self, batch: Batch) -> None:
        device = None if self._device is None else torch.device(self._device)
        if device is not None and device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # the current device is a setting of each thread
        with torch.no_grad():
            run_model(self._model, to_device(batch, device))


def with_index(device: torch.device | str | None) -> torch.device | str | None:
    """``cuda`` with this thread's current index: in another thread ``cuda`` means the first GPU."""
    if device is None or torch.device(device).type != "cuda" or torch.device(device).index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _free_workspaces() -> None:
    """Free cuBLAS's workspaces, 32 MB for each thread on recent cards: hundreds of threads wait and one works."""
    if clear := getattr(torch._C, "_cuda_clearCublasWorkspaces", None):
        clear()


def failure_of(index: int, error: Exception) -> LabError:
    """The error of a batch that does not run."""
    if isinstance(error, torch.OutOfMemoryError):
        return LabError(TOO_LARGE)
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return LabError(f"calibration batch {index} does not run through the model ({reason})")
