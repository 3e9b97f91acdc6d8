"""The work folder of a quantization: it holds each finished module, so that a killed run continues.

```
work/
  run.json                       what identifies the run: model or weights, plan, calibration
  model.layers.0.mlp.down_proj.safetensors   the tensors of one module
```
Files are written atomically, so a run killed at any moment loses only the current module.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from labkit.common.errors import CheckpointError
from labkit.common.files import atomic_path
from labkit.plans.batches import Batch
from labkit.quantization import Scheme
from labkit.quantization.module_tensors import assign_tensors, module_tensors

SUFFIX = ".safetensors"


class WorkFolder:
    """Finished modules of one run, on disk; one process at a time holds the folder.

    Args:
        path: the folder; created if it does not exist.
        run: what identifies the run, as JSON values. A folder that holds another run is refused.
        force: delete another run instead of refusing.

    Attributes:
        loaded: number of modules taken from an earlier run.
        saved: number of modules this run saved.

    Raises:
        CheckpointError: the folder holds another run (the message names what differs) or other files, another
            process uses it, or it cannot be written.
    """

    def __init__(self, path: str | os.PathLike, run: Mapping[str, Any], *, force: bool = False) -> None:
        self.path = Path(path)
        self.loaded = self.saved = 0
        self._lock = None
        self._record = self.path / "run.json"
        try:
            self._refuse_other_files()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path)
            self._begin(json.loads(json.dumps(run)), force)
        except OSError as error:
            self.close()
            raise CheckpointError(f"{self.path} cannot be written: {error.strerror or error}") from None
        except CheckpointError:
            self.close()
            raise

    def load(
        self, name: str, scheme: Scheme, module: nn.Module, device: torch.device | str, dtype: torch.dtype
    ) -> nn.Module | None:
        """The replacement of ``module`` that an earlier run saved, on ``device``; None if there is none."""
        path = self._file(name)
        if not path.is_file():
            return None
        replacement = scheme.empty_module(module, device=device, dtype=dtype)
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError):
            return None  # damaged by a power cut: the module is quantized again
        if _shapes(tensors) != _shapes(module_tensors(replacement)):
            return None
        assign_tensors(replacement, {key: tensor.to(device, copy=True) for key, tensor in tensors.items()})
        self.loaded += 1
        return replacement

    def save(self, name: str, module: nn.Module) -> None:
        """Save a finished module under its place's name.

        Raises:
            CheckpointError: the folder cannot be written, for example because the disk is full.
        """
        try:
            with atomic_path(self._file(name)) as temporary:
                save_file(module_tensors(module), temporary)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path} cannot be written: {error}") from None
        self.saved += 1

    def close(self) -> None:
        """Release the folder to other processes."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Delete the folder, once the run is complete."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}{SUFFIX}"

    def _refuse_other_files(self) -> None:
        if self._record.is_file() or not self.path.exists():
            return
        # A process killed at its start leaves only the lock or a hidden temporary file.
        if any(file.name != "lock" and not file.name.startswith(".") for file in self.path.iterdir()):
            raise CheckpointError(f"{self.path} holds other files: give a folder of its own")

    def _begin(self, run: Mapping[str, Any], force: bool) -> None:
        """Write ``run.json``, after refusing or deleting another run."""
        if self._record.is_file():
            differing = self._differing(run, force)
            if not differing:
                return
            if not force:
                raise CheckpointError(
                    f"{self.path} holds a run with another {' and '.join(differing)}: give another folder, or "
                    "delete it to begin anew"
                )
            for file in self.path.glob(f"*{SUFFIX}"):
                file.unlink()
        with atomic_path(self._record) as temporary:
            temporary.write_text(json.dumps(run, ensure_ascii=False, indent=1), encoding="utf-8")

    def _differing(self, run: Mapping[str, Any], force: bool) -> list[str]:
        try:
            recorded = dict(json.loads(self._record.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            if force:
                return list(run)
            raise CheckpointError(f"{self._record} is damaged: delete {self.path} to begin anew") from None
        return [key for key in {**recorded, **run} if recorded.get(key) != run.get(key)]


@contextmanager
def opened(
    work_folder: str | os.PathLike | WorkFolder | None, run: Callable[[], Mapping[str, Any]] | None
) -> Iterator[WorkFolder | None]:
    """The work folder of a run: a path is opened, and closed at the end; a `WorkFolder` stays open.

    run: returns what identifies the run; called only to open a path. None: a path is ignored.
    """
    if not isinstance(work_folder, str | os.PathLike):
        yield work_folder
    elif run is None:
        yield None
    else:
        work = WorkFolder(work_folder, run())
        try:
            yield work
        finally:
            work.close()


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _lock(folder: Path) -> int | None:
    """File descriptor of an exclusive lock on the folder; None where the system has no such locks.

    Raises:
        CheckpointError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise CheckpointError(f"another process is writing {folder}: wait for it, or stop it") from None
    return lock


def fingerprint_of(
    model: nn.Module | str, schemes: Mapping[str, Scheme], dtype: torch.dtype, batches: Iterable[Batch]
) -> dict[str, str]:
    """``{"plan", "weights", "calibration"}``: what determines the result of a calibrated quantization.

    model: a model whose weights are hashed, or a text that identifies the weights of a model not in memory.
    """
    plan = [(name, scheme.name, scheme.options()) for name, scheme in schemes.items()]
    return {
        "plan": hashlib.sha256(repr((plan, dtype)).encode()).hexdigest(),
        "weights": model if isinstance(model, str) else hash_of(dict(model.state_dict(keep_vars=True))),
        "calibration": hash_of(list(batches)),
    }


def hash_of(value: object) -> str:
    """SHA-256 of nested mappings, lists and tuples of tensors and plain values."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, value: object) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
        whole = value.detach().cpu().contiguous().flatten()
        digest.update(memoryview(whole.view(torch.uint8).numpy()) if whole.numel() else b"")
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            digest.update(repr(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}]".encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(repr(value).encode())
