"""Finished modules of a quantization under way: what an interrupted run continues from.

```
pocket-int4.partial/
  run.json              what is being made: model, plan, calibration, versions
  modules/<name>.safetensors
```
Each module is a file of its own, written whole or not at all, so a process that is killed loses the module
it was working on and no other. The same run again finds them; another run is refused.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from labkit.checkpoint.manifest import CheckpointError
from labkit.checkpoint.tensors import assign_tensors, module_tensors
from labkit.common.files import atomic_path
from labkit.quantization import Scheme


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
