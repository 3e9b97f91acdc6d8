"""A service as it is asked for: the words of ``labkit serve``, and what differs from the service that runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from labkit.client.launch.state import Record, hash_of, is_key
from labkit.common.errors import LaunchError
from labkit.common.files import sha256_of, user_path
from labkit.common.options import Kind, Parser, flag_of
from labkit.models.spec import get_spec, list_models
from labkit.service.arguments import add_service_arguments
from labkit.service.options import API_KEY_VARIABLE


@dataclass(frozen=True)
class Request:
    """The service that a caller wants.

    Attributes:
        words: the arguments of ``labkit serve``; paths are absolute, so that the same words mean the same files.
        settings: the same as values, by their names.
        key: the API key that the service will have, or None.
        plan: the SHA-256 of the plan's file; empty for a preset.
    """

    words: tuple[str, ...]
    settings: dict[str, Any]
    key: str | None = field(repr=False)
    plan: str

    @classmethod
    def of(
        cls, model: str, plan: str | None, port: int, arguments: Sequence[str], api_key: str | None
    ) -> Request:
        """Read the arguments of `labkit.client.launch.start`.

        Raises:
            LabError: no such model, or a wrong argument.
        """
        spec = get_spec(model)
        registered = str(model) in (entry.name for entry in list_models())
        words = [str(model) if registered or spec.folder is None else spec.source]
        file = None if plan is None else user_path(plan)
        is_file = file is not None and file.is_file()
        if plan is not None:
            words += ["--plan", str(file.resolve()) if is_file else str(plan)]
        words += ["--port", str(port), *arguments]
        settings = settings_in(words)
        key = settings.pop("api_key") or api_key or os.environ.get(API_KEY_VARIABLE) or None
        return cls(tuple(words), settings, key, sha256_of(file) if is_file else "")

    @property
    def host(self) -> str:
        """The address it listens on, as this machine reaches it."""
        host = self.settings["host"]
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)

    @property
    def url(self) -> str:
        """The URL it will have."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.settings['port']}"

    def record(self, pid: int, created: float, log: str) -> Record:
        """The record of the process that was started for it."""
        port = self.settings["port"]
        return Record(port, self.url, pid, created, self.words, log, hash_of(self.key), self.plan)

    def check_same(self, record: Record) -> None:
        """Raise `LaunchError` that names each setting in which the running service differs."""
        running = settings_in(record.arguments)
        running.pop("api_key")
        differing = [
            f"{name.replace('_', ' ')} is {running[name]!r} there and {value!r} here"
            for name, value in self.settings.items()
            if running[name] != value
        ]
        if self.plan != record.plan and not any(text.startswith("plan ") for text in differing):
            differing.append("the plan's file has changed since")
        if not is_key(self.key, record.key):
            differing.append(
                "the API key differs" if self.key and record.key
                else "it has an API key, and none is given here" if record.key
                else "it has no API key, and one is given here"
            )  # fmt: skip
        if differing:
            raise LaunchError(
                f"the service on port {record.port} runs with other settings: {'; '.join(differing)}: "
                "stop it first, or use restart"
            )


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``labkit serve``; those of loading stand in a module that may import torch."""
    parser.add_argument("--plan", help="a name from `labkit plans`, or a YAML file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    parser.add_argument("--threads", type=Kind(int, least=1), metavar="N", help="CPU threads (all cores)")
    add_service_arguments(parser)


def settings_in(words: Sequence[str]) -> dict[str, Any]:
    """The settings in the arguments of ``labkit serve``. Raises LabError for one that it does not have."""
    parser = Parser(prog="labkit serve", add_help=False, allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--config")
    add_serve_arguments(parser)
    return vars(parser.parse_intermixed_args([str(word) for word in words]))


def flags_of(options: argparse.Namespace) -> list[str]:
    """The flags of ``labkit serve`` that differ from their defaults; model, plan, port and key are no flags here."""
    defaults = settings_in(["model"])
    words = []
    for name, default in defaults.items():
        value = getattr(options, name, default)
        if name in ("model", "plan", "port", "api_key", "config") or value == default:
            continue
        words.append(flag_of(name) if value is True else f"{flag_of(name)}={value}")
    return words
