"""``config.yaml`` of a result folder: the command that repeats the run, from Python or from the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from labkit.common.files import atomic_path
from labkit.common.options import flag_of

CONFIG = "config.yaml"
OWN_TO_PYTHON = ("progress", "_worker")
"""Arguments of functions that the command line does not have."""


@runtime_checkable
class PlanFile(Protocol):
    """A plan that was made in Python; the folder keeps its file."""

    name: str

    def to_yaml(self, path: Path) -> None: ...


def write_config(folder: Path, command: str, arguments: Mapping[str, Any]) -> None:
    """Write ``config.yaml`` for ``labkit COMMAND --config FILE``.

    Args:
        folder: the result folder.
        command: the name of the command.
        arguments: those of the function, by their names; a dataclass stands for its fields, a plan for its file.
    """
    import yaml

    content: dict[str, Any] = {"command": command}
    for name, value in _flat(arguments):
        if value is not None and name not in OWN_TO_PYTHON:
            content[flag_of(name).removeprefix("--")] = _plain(value, folder)
    if "output" in arguments:
        content["output"] = str(folder)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    with atomic_path(folder / CONFIG) as temporary:
        temporary.write_text(
            f"# Repeats this run: labkit {command} --config {CONFIG}\n{text}", encoding="utf-8"
        )


def _flat(arguments: Mapping[str, Any]) -> list[tuple[str, Any]]:
    pairs = []
    for name, value in arguments.items():
        if is_dataclass(value) and not isinstance(value, PlanFile):
            pairs += [(item.name, getattr(value, item.name)) for item in fields(value)]
        else:
            pairs.append((name, value))
    return pairs


def _plain(value: Any, folder: Path) -> Any:
    if isinstance(value, PlanFile):
        path = folder / "plans" / f"{value.name}.yaml"
        value.to_yaml(path)
        return str(path)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_plain(part, folder) for part in value] if isinstance(value, list | tuple) else value
