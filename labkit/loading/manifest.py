"""``labkit.json``: the content and origin of a quantized checkpoint, and the hashes of its files.

```
pocket-int4/
  labkit.json                        this
  plan.yaml                          the plan, every option written out; usable with --plan
  config.json                        the model's, with quantization_config.quant_method "labkit"
  tokenizer.json …                   tokenizer, processor and licence files of the model, unchanged
  packed.safetensors                 every tensor, packed as the schemes store it (or packed-00001-of-00002…);
                                     not named model, so that other libraries refuse the folder instead of
                                     reading half of it
  README.md                          the model card; the only file that may be edited
```
Hashes detect damage and accidental changes. They are not a signature: anybody who can write the folder can write hashes.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labkit.common.errors import CheckpointError
from labkit.common.files import sha256_of

NAME = "labkit.json"
FORMAT = "labkit-checkpoint"
VERSION = 1
EDITABLE = ("README.md",)
HASHING_THREADS = 4


@dataclass(frozen=True)
class Manifest:
    """The content of ``labkit.json``.

    Attributes:
        base: the unquantized model: ``name, source, commit, fingerprint, model_type, parameters``.
        plan: the plan as `QuantizationPlan.to_dict` gives it.
        modules: module name -> ``{"scheme", "options", "rule"}`` of every Linear that a rule matched.
        notes: Linears that the plan left unquantized or degraded, in sentences.
        calibration: ``{"source", "batches", "sha256"}``, or None if no scheme looked at activations.
        ties: name of a parameter -> the name under which its tensor is stored.
        weights_bytes: bytes of the model in memory.
        made_with: time, versions and machine.
        files: file name -> ``{"bytes", "sha256"}`` of every file except this file and the model card.
    """

    base: dict[str, Any]
    plan: dict[str, Any]
    modules: dict[str, dict[str, Any]]
    notes: list[str]
    calibration: dict[str, Any] | None
    ties: dict[str, str]
    weights_bytes: int
    made_with: dict[str, Any]
    files: dict[str, dict[str, Any]] = field(repr=False)

    def write(self, folder: Path) -> None:
        """Write ``labkit.json`` into a new checkpoint's folder."""
        body = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        body["sha256"] = _digest(body)
        text = json.dumps(body, ensure_ascii=False, indent=1, allow_nan=False)
        (folder / NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "Manifest":
        """Read ``labkit.json`` from ``folder``.

        Raises:
            CheckpointError: the file is missing, damaged, changed, or of another format version.
        """
        path = Path(folder) / NAME
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{folder} has no {NAME}: it is no quantized checkpoint") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise CheckpointError(f"{path} is damaged: it does not say {FORMAT!r}")
        if body.get("version") != VERSION:
            raise CheckpointError(
                f"{path} has version {body.get('version')!r} of the format, this lab reads {VERSION}: "
                "update labkit, or quantize the model anew"
            )
        if body.pop("sha256", None) != _digest(body):
            raise CheckpointError(
                f"{path} has changed since it was written (its hash differs): get it again, or quantize anew"
            )
        names = {item.name for item in dataclasses.fields(cls)}
        if missing := names - body.keys():
            raise CheckpointError(f"{path} is damaged: {', '.join(sorted(missing))} missing")
        manifest = cls(**{name: body[name] for name in names})
        for name in manifest.files:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise CheckpointError(f"{path} is damaged: {name!r} is no name of a file in the folder")
        return manifest

    @property
    def weight_files(self) -> list[str]:
        """Names of the files that hold tensors."""
        return [name for name in self.files if name.endswith(".safetensors")]

    def check_sizes(self, folder: Path) -> None:
        """Raise `CheckpointError` for a file that is missing or has another size: quick, reads nothing."""
        for name, facts in self.files.items():
            path = folder / name
            if not path.is_file():
                raise CheckpointError(f"{folder} has no {name}, which it had when it was written")
            size = path.stat().st_size
            if size != facts["bytes"]:
                what = "cut off" if size < facts["bytes"] else "longer than when it was written"
                raise CheckpointError(
                    f"{path} is {what}: {size:,} bytes instead of {facts['bytes']:,}; "
                    "get it again, or quantize anew"
                )

    def check_hashes(self, folder: Path) -> None:
        """Raise `CheckpointError` for a file whose content has changed."""
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            digests = pool.map(lambda name: sha256_of(folder / name), self.files)
            for name, digest in zip(self.files, digests):
                if digest != self.files[name]["sha256"]:
                    raise CheckpointError(
                        f"{folder / name} has changed since it was written (its hash differs): "
                        "get it again, or quantize anew"
                    )


def file_facts(folder: Path) -> dict[str, dict[str, Any]]:
    """``{name: {"bytes", "sha256"}}`` of the folder's files that the manifest covers."""
    names = sorted(path.name for path in folder.iterdir() if path.name not in (NAME, *EDITABLE))
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        digests = pool.map(lambda name: sha256_of(folder / name), names)
        return {
            name: {"bytes": (folder / name).stat().st_size, "sha256": digest}
            for name, digest in zip(names, digests)
        }


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps({key: body[key] for key in body if key != "sha256"}, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
