"""The work folder of a calibrated quantization: each module that is finished, so that a killed run continues.

```
work/
  fingerprint.json               what the run is made of: plan, weights, calibration
  model.layers.0.mlp.down_proj.safetensors   the tensors of one module
```
Every file appears whole or not at all, so a run that is killed at any moment loses the module under way.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from labkit.common.errors import CheckpointError, LabError
from labkit.common.files import atomic_path
from labkit.quantization import Scheme
from labkit.quantization.module_tensors import assign_tensors, module_tensors


class Steps:
    """The folder of finished modules beside ``target``.

    Args:
        target: the folder that is to be made; the finished modules lie in ``<target>.partial``.
        run: what is being made, for JSON. A folder with another run in it is refused.
        force: drop another run instead of refusing.

    Raises:
        CheckpointError: another run is there, or another process is at work, or it cannot be written.
    """

    def __init__(self, target: Path, run: Mapping[str, Any], *, force: bool = False) -> None:
        self.folder = target.with_name(target.name + ".partial")
        self.found = 0  # modules that an earlier run left
        self.kept = 0  # modules that this run added
        run = json.loads(json.dumps(run))
        try:
            if self._differs(run, force):
                shutil.rmtree(self.folder)
            (self.folder / "modules").mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder)
            with atomic_path(self.folder / "run.json") as temporary:
                temporary.write_text(json.dumps(run, ensure_ascii=False, indent=1), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be written: {error.strerror or error}") from None

    def load(
        self, name: str, scheme: Scheme, module: nn.Module, device: Any, dtype: torch.dtype
    ) -> nn.Module | None:
        """What stands in the place of ``module``, on ``device``; None if it is not finished."""
        path = self._path(name)
        if not path.is_file():
            return None
        made = scheme.empty_module(module, device=device, dtype=dtype)
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError):
            return None  # what a power cut left: it is made again
        places = module_tensors(made)
        if {key: (one.shape, one.dtype) for key, one in tensors.items()} != {
            key: (one.shape, one.dtype) for key, one in places.items()
        }:
            return None
        assign_tensors(made, {key: one.to(device, copy=True) for key, one in tensors.items()})
        self.found += 1
        return made

    def save(self, name: str, module: nn.Module) -> None:
        """Write a finished module.

        Raises:
            CheckpointError: the disk is full or gone.
        """
        try:
            with atomic_path(self._path(name)) as temporary:
                save_file(module_tensors(module), temporary)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder} cannot be written: {error}") from None
        self.kept += 1

    def remove(self) -> None:
        """Drop the folder: the checkpoint is made."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Let another process have the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _path(self, name: str) -> Path:
        return self.folder / "modules" / f"{name}.safetensors"

    def _differs(self, run: Mapping[str, Any], force: bool) -> bool:
        """Whether the folder holds another run, which ``force`` may drop."""
        path = self.folder / "run.json"
        if not path.is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / "modules").is_dir():
                raise CheckpointError(f"{self.folder} holds other files: give another name to the output")
            return False
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            kept = {}
        differing = [key for key in run if kept.get(key) != run[key]]
        if differing and not force:
            raise CheckpointError(
                f"{self.folder} holds another unfinished run (other {', '.join(differing)}): "
                "give another folder, or --force to drop it"
            )
        return bool(differing)


def _lock(folder: Path) -> int | None:
    """An open file that only one process holds locked; None where the system has no such locks.

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


SUFFIX = ".safetensors"


class FinishedModules(Protocol):
    """Where finished modules are kept, so that an interrupted run continues."""

    def load(
        self, name: str, scheme: Scheme, module: nn.Module, device: Any, dtype: torch.dtype
    ) -> nn.Module | None:
        """What an earlier run put in the place of ``module``, or None."""

    def save(self, name: str, module: nn.Module) -> None:
        """Keep the module that stands in the place ``name``."""


class WorkFolder:
    """Finished modules of one run, on disk.

    Args:
        path: the folder; made if it is not there.
        fingerprint: what the run is made of (see `fingerprint_of`): a folder of another run is refused.

    Raises:
        LabError: it holds another run, naming what differs, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike, fingerprint: Mapping[str, str]) -> None:
        self.path = Path(path)
        record = self.path / "fingerprint.json"
        try:
            if record.is_file():
                self._check(json.loads(record.read_text(encoding="utf-8")), fingerprint)
            elif self.path.is_dir() and any(self.path.glob(f"*{SUFFIX}")):
                raise LabError(f"{self.path} holds other files: give a folder of its own")
            else:
                with atomic_path(record) as temporary:
                    temporary.write_text(json.dumps(dict(fingerprint), indent=1), encoding="utf-8")
        except ValueError as error:
            if isinstance(error, LabError):
                raise
            raise LabError(f"{record} is damaged: delete {self.path} to begin anew") from None
        except OSError as error:
            raise LabError(f"{self.path} cannot be written: {error.strerror or error}") from None

    def _check(self, kept: Mapping[str, str], now: Mapping[str, str]) -> None:
        differing = [name for name in {**kept, **now} if kept.get(name) != now.get(name)]
        if differing:
            raise LabError(
                f"{self.path} holds a run with another {' and '.join(differing)}: give another folder, or "
                "delete it to begin anew"
            )

    def load(
        self, name: str, scheme: Scheme, module: nn.Module, device: Any, dtype: torch.dtype
    ) -> nn.Module | None:
        """What was made of ``module``, or None. Raises LabError if its file is damaged."""
        path = self.path / f"{name}{SUFFIX}"
        if not path.is_file():
            return None
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        made = scheme.empty_module(module, device=device, dtype=dtype)
        try:
            made.load_state_dict(load_file(path))
        except (SafetensorError, RuntimeError, OSError) as error:
            told = str(error).splitlines()[0]
            raise LabError(f"{path} is damaged ({told}): delete it to make that module anew") from None
        return made

    def save(self, name: str, module: nn.Module) -> None:
        """Keep a finished module."""
        from safetensors.torch import save_file

        state = {key: value.cpu().contiguous() for key, value in module.state_dict().items()}
        try:
            with atomic_path(self.path / f"{name}{SUFFIX}") as temporary:
                save_file(state, temporary)
        except OSError as error:
            raise LabError(f"{self.path} cannot be written: {error.strerror or error}") from None


def fingerprint_of(
    model: nn.Module | str, schemes: Mapping[str, Scheme], dtype: torch.dtype, batches: Iterable[Any]
) -> dict[str, str]:
    """``{"plan", "weights", "calibration"}``: what decides the outcome of a calibrated quantization.

    model: whose weights are hashed, or what they are recognized by, for a model that is not in memory.
    """
    plan = [(name, scheme.name, scheme.options()) for name, scheme in schemes.items()]
    return {
        "plan": hashlib.sha256(repr((plan, dtype)).encode()).hexdigest(),
        "weights": model if isinstance(model, str) else hash_of(dict(model.state_dict(keep_vars=True))),
        "calibration": hash_of(list(batches)),
    }


def hash_of(value: Any) -> str:
    """SHA-256 of nested mappings, lists and tuples of tensors and plain values."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
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
