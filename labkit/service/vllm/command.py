"""vLLM's command line for a model and a plan, and what is refused before anything starts. Starts nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from labkit.common.errors import LabError
from labkit.common.files import checkout_folder
from labkit.loading.export.compressed_tensors import NEAREST
from labkit.models.checkpoint import Checkpoint
from labkit.models.experts import is_unfused
from labkit.plans.resolved import ResolvedPlan
from labkit.quantization import DTYPES

INTERPRETER_VARIABLE = "LABKIT_VLLM"
CONTEXT = 25_480
"""Most tokens of a conversation, as AutoGLM-Phone's authors serve it (``--max-model-len``)."""
MAX_PIXELS = 5_000_000
_BITS = (4, 8)
_ROW_PARALLEL = ("down_proj", "o_proj")


@dataclass(frozen=True)
class VllmOptions:
    """What only vLLM is told: GPUs of one model, machines of one model, and further arguments."""

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    arguments: str = ""


def interpreter() -> str:
    """The Python that has vLLM: ``$LABKIT_VLLM``, the environment of ``make test-vllm``, or this one.

    Raises:
        LabError: none has.
    """
    if named := os.environ.get(INTERPRETER_VARIABLE):
        if not os.access(named, os.X_OK):
            raise LabError(f"${INTERPRETER_VARIABLE} names {named}, which is no interpreter")
        return named
    own = checkout_folder() / ".venv-vllm/bin/python"
    if own.exists():
        return str(own)
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    raise LabError(
        "vLLM is not installed: install it into an environment of its own, and name that environment's Python in "
        f"${INTERPRETER_VARIABLE} (in a checkout, `make test-vllm` makes one for the CPU)"
    )


def check_model(checkpoint: Checkpoint, options: VllmOptions) -> None:
    """Refuse models that vLLM has not, and GPUs that do not divide the heads.

    Raises:
        LabError: with what can be done.
    """
    name, config = checkpoint.spec.name, checkpoint.config
    if type(config).__module__.startswith("labkit."):
        raise LabError(
            f"vLLM has no architecture of {name}'s, with its ear and cross-modal attention: serve it with --engine labkit"
        )
    heads, size = config.get_text_config().num_attention_heads, options.tensor_parallel_size
    if heads % size:
        raise LabError(f"{name} has {heads} attention heads, which {size} GPUs do not divide evenly")


def check_plan(resolved: ResolvedPlan, skeleton: Any, options: VllmOptions) -> None:
    """Refuse schemes that vLLM cannot multiply with, and groups that its GPUs would cut.

    Raises:
        LabError: naming the first Linear, and the nearest that can be had.
    """
    size, plan = options.tensor_parallel_size, resolved.plan.name
    if not resolved.plan.runtime.is_default:
        raise LabError(
            f"vLLM keeps the cache in its own way: the runtime options of the plan {plan} are for the lab's engine; "
            "take a plan without them"
        )
    if is_unfused(skeleton) and any(scheme.name not in DTYPES for scheme in resolved.schemes.values()):
        raise LabError(
            f"vLLM cannot serve the plan {plan}: no export writes this model's experts yet; bf16 works"
        )
    for name, scheme in resolved.schemes.items():
        if scheme.name in NEAREST:
            raise LabError(
                f"vLLM cannot serve the plan {plan}: {scheme.name} ({name}) cannot be exported; "
                f"the nearest is {NEAREST[scheme.name]}"
            )
        bits = getattr(scheme, "num_bits", 8)
        if scheme.name not in DTYPES and bits not in _BITS:
            raise LabError(
                f"vLLM cannot serve the plan {plan}: it has no kernel for {bits} bits ({name}); the nearest is 4"
            )
        group = getattr(scheme, "group_size", None)
        share = skeleton.get_submodule(name).in_features // size
        if group and size > 1 and name.endswith(_ROW_PARALLEL) and share % group:
            fits = [size for size in (128, 64, 32, 16) if share % size == 0]
            raise LabError(
                f"the plan {plan} with {size} GPUs: each gets {share} inputs of {name}, which groups of {group} do "
                f"not divide; {f'group_size {fits[0]} does' if fits else 'no usual group_size does'}"
            )


def is_dense(resolved: ResolvedPlan) -> bool:
    """Whether the plan quantizes nothing, so that the checkpoint is served as it is."""
    return all(scheme.name in DTYPES for scheme in resolved.schemes.values())


def compose(
    python: str,
    folder: str,
    names: Sequence[str],
    port: int,
    config: Any,
    options: VllmOptions,
    *,
    dtype: str = "bfloat16",
    streams: int = 8,
) -> list[str]:
    """The command: the flags that AutoGLM-Phone's authors ask for, as far as the model has what they are about.

    One of theirs is left out: ``--allowed-local-media-path /`` would let every client read this machine's pictures.
    vLLM listens on this machine only; the service stands before it.
    """
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or CONTEXT
    command = [
        *(python, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", folder),
        *("--served-model-name", *names),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", dtype),
        *("--max-model-len", str(min(longest, CONTEXT))),
        *("--max-num-seqs", str(streams)),
        *("--chat-template-content-format", "string"),
        *("--structured-outputs-config", json.dumps({"backend": "guidance"})),
        "--disable-log-stats",
    ]
    if getattr(config, "vision_config", None) is not None:
        command += ["--limit-mm-per-prompt", json.dumps({"image": 10})]
        command += ["--mm_processor_kwargs", json.dumps({"max_pixels": MAX_PIXELS})]
        command += ["--mm-encoder-tp-mode", "data", "--mm_processor_cache_type", "shm"]
    if options.tensor_parallel_size > 1:
        command += ["--tensor-parallel-size", str(options.tensor_parallel_size)]
    if options.pipeline_parallel_size > 1:
        command += ["--pipeline-parallel-size", str(options.pipeline_parallel_size)]
        command += ["--distributed-executor-backend", "ray"]
    return [*command, *shlex.split(options.arguments)]


def environment() -> Mapping[str, str]:
    """What vLLM's process gets: this one's environment, nothing fetched, nothing reported."""
    return {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        **os.environ,
        "PYTHONUNBUFFERED": "1",
    }
