"""The arguments of ``labkit serve`` and of the launch script, made of `ServiceOptions`. No torch."""

from __future__ import annotations

import argparse
import os

from labkit.common.errors import LabError
from labkit.service.options import API_KEY_VARIABLE, ServiceOptions, help_of

ENGINES = ("labkit", "vllm")
_NUMBERS = {
    "port": int,
    "streams": int,
    "queue": int,
    "max_tokens": int,
    "timeout_s": float,
    "grace_s": float,
    "max_body_bytes": int,
}
_TEXTS = ("host", "api_key", "served_name", "cors_origin")
_SWITCHES = ("thinking", "allow_remote_images")


def add_service_arguments(command: argparse.ArgumentParser) -> None:
    """One argument for each option that people change, and those of the engines."""
    for name in ("host", "port", "streams", "queue", "max_tokens", "timeout_s", "grace_s", "max_body_bytes"):
        told, metavar, default = help_of(name)
        command.add_argument(
            _flag(name),
            dest=name,
            type=_NUMBERS.get(name, str),
            default=default,
            metavar=metavar,
            help=f"{told} ({default:g})" if name in _NUMBERS else f"{told} ({default})",
        )
    for name in _TEXTS[1:]:
        told, metavar, _ = help_of(name)
        command.add_argument(_flag(name), dest=name, metavar=metavar, help=told)
    for name in _SWITCHES:
        command.add_argument(
            _flag(name),
            dest=name,
            action=argparse.BooleanOptionalAction,
            default=False,
            help=help_of(name)[0],
        )
    command.add_argument(
        "--engine",
        choices=ENGINES,
        default="labkit",
        help="what generates: the lab's engine, or vLLM (labkit)",
    )
    command.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="GPUs of one model, with vLLM (1)"
    )
    command.add_argument(
        "--pipeline-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="machines of one model, with vLLM over its Ray back end (1)",
    )
    command.add_argument(
        "--vllm-args",
        default="",
        metavar="ARGUMENTS",
        help="further arguments for vLLM in one string: --vllm-args='--enforce-eager --swap-space 4'",
    )


def options_of(namespace: argparse.Namespace) -> ServiceOptions:
    """The options in parsed arguments; the key may come from the environment.

    Raises:
        LabError: an option out of range.
    """
    given = {name: getattr(namespace, name) for name in (*_NUMBERS, *_TEXTS, *_SWITCHES)}
    given["api_key"] = given["api_key"] or os.environ.get(API_KEY_VARIABLE) or None
    if namespace.tensor_parallel_size < 1 or namespace.pipeline_parallel_size < 1:
        raise LabError("parallel sizes are whole numbers from 1")
    if namespace.engine == "labkit" and (
        namespace.tensor_parallel_size > 1 or namespace.pipeline_parallel_size > 1 or namespace.vllm_args
    ):
        raise LabError("the lab's engine uses one device: several GPUs, and --vllm-args, need --engine vllm")
    return ServiceOptions(**given)


def _flag(name: str) -> str:
    return "--" + name.removesuffix("_s").replace("_", "-")
