"""``labkit serve --engine vllm``: check, quantize and export if need be, start vLLM, and stand before it."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from labkit.common.files import user_path
from labkit.common.formats import format_bytes
from labkit.models.spec import ModelSpec
from labkit.plans.resolved import ResolvedPlan
from labkit.service import log
from labkit.service.backend import served_names
from labkit.service.options import ServiceOptions
from labkit.service.serve import listening, run, warn
from labkit.service.vllm.backend import VllmBackend
from labkit.service.vllm.command import (
    VllmOptions,
    check_model,
    check_plan,
    compose,
    environment,
    interpreter,
    is_dense,
)

CACHE_VARIABLE = "LABKIT_CACHE"
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def serve_vllm(model: str, plan: str | None, options: ServiceOptions, vllm: VllmOptions) -> None:
    """Serve a model by vLLM until the process is told to stop.

    Raises:
        LabError: vLLM is not there, or cannot do what the plan or the GPUs ask for; before anything is started.
    """
    from labkit.loading.prepare import Prepared

    with listening(options) as listener:
        warn(options)
        python = interpreter()
        prepared = Prepared.of(model)
        spec, checkpoint = prepared.spec, prepared.checkpoint
        check_model(checkpoint, vllm)
        resolved = prepared.resolve(prepared.choose_plan(plan or None))
        check_plan(resolved, prepared.skeleton, vllm)
        log.info(f"Loading {spec.name} with plan {resolved.plan.name} by vLLM...")
        folder = exported(spec, resolved)
        names, port = served_names(spec.name, options), _free_port()
        command = compose(
            python,
            folder,
            names,
            port,
            checkpoint.config,
            vllm,
            dtype=_DTYPES[resolved.plan.default],
            streams=options.streams,
        )
        process = subprocess.Popen(
            command,
            env=dict(environment()),
            stdin=subprocess.DEVNULL,
            stdout=sys.stdout,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )

        def ready() -> None:
            log.info(f"Model loaded by vLLM: {format_bytes(resolved.predicted_bytes)} of weights")
            log.success(f"{spec.name} service is ready for inference!")

        backend = VllmBackend(
            process, f"http://127.0.0.1:{port}", names, options, facts_of(spec, resolved), ready
        )
        try:
            run(backend, options, listener)
        finally:
            end(process)


def exported(spec: ModelSpec, resolved: ResolvedPlan) -> str:
    """A checkpoint that vLLM loads: the model's own if nothing is quantized, else an export, made once."""
    if not spec.is_quantized and is_dense(resolved):
        return str(spec.folder or spec.source)
    from labkit.loading.export import export
    from labkit.loading.quantize_to import quantize_to

    kept = cache_folder(spec, resolved)
    done = kept.with_name(f"{kept.name}-compressed-tensors")
    if done.is_dir():
        return str(done)
    source = spec.folder
    if not spec.is_quantized:
        if not kept.is_dir():
            log.info(f"Quantizing {spec.name} by the plan {resolved.plan.name}, once")
            quantize_to(spec, resolved.plan, kept, progress=False)
        source = kept
    log.info("Exporting it as compressed-tensors")
    export(source, done, progress=False)
    return str(done)


def cache_folder(spec: ModelSpec, resolved: ResolvedPlan) -> Path:
    """Where the quantized model is kept: ``$LABKIT_CACHE``, or where this system keeps such things."""
    given = os.environ.get(CACHE_VARIABLE)
    top = user_path(given) if given else _system_cache() / "labkit"
    described = json.dumps([spec.source, resolved.plan.to_dict()], sort_keys=True, default=str)
    mark = hashlib.sha256(described.encode()).hexdigest()[:12]
    return top / f"{spec.name.replace('/', '--')}-{resolved.plan.name}-{mark}"


def facts_of(spec: ModelSpec, resolved: ResolvedPlan) -> dict[str, Any]:
    """What the status page shows of the model."""
    return {
        "model": spec.name,
        "description": spec.description,
        "plan": resolved.plan.name,
        "plan_description": resolved.plan.description,
        "engine": "vLLM",
        "device": "",
        "modalities": ["text", "image"],
        "parts": resolved.rows(),
        "weights_bytes": resolved.predicted_bytes,
    }


def end(process: subprocess.Popen) -> None:
    """Leave neither vLLM nor the processes behind that it has started, even if it has ended already."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # its session is its own
    process.wait()


def _end_with_parent() -> None:
    """In the child, on Linux: be ended when the service is, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _system_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
