"""What this machine can run, and what is missing: the checks of ``labkit doctor``, as plain data."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

OK, NOTE, PROBLEM = "ok", "note", "problem"
SIZES = (4096, 4096)
"""The Linear that the schemes are checked with: in_features, out_features."""


@dataclass(frozen=True)
class Finding:
    """A line of the diagnosis.

    Attributes:
        topic: its heading.
        status: ``ok``, ``note`` (worth knowing, nothing is missing) or ``problem``.
        text: the result of the check.
        advice: the remedy; empty if none is needed.
    """

    topic: str
    status: str
    text: str
    advice: str = ""


def diagnose() -> list[Finding]:
    """Run all checks in order; a check that fails becomes a finding. Takes a few seconds, mostly for importing torch."""
    checks: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
        ("Python", _python),
        ("Packages", _packages),
        ("Machine", _machine),
        ("GPU", _gpu),
        ("Schemes", _schemes),
        ("Models", _models),
        ("Benchmark", _benchmark),
        ("Notebooks", _notebooks),
        ("Network", _network),
        ("Training only", _training),
    )
    findings = []
    for topic, check in checks:
        try:
            findings += list(check())
        except Exception as error:
            findings.append(Finding(topic, NOTE, f"could not be examined: {type(error).__name__}: {error}"))
    return findings


def _python() -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("Python", OK, f"Python {version} in {sys.prefix}")


def _packages() -> Iterator[Finding]:
    from labkit.common.machine import requirements

    pins = list(requirements())
    if not pins:
        yield Finding("Packages", NOTE, "no list of the lab's packages was found to compare with")
        return
    wrong = 0
    for name, specifier in pins:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong += 1
            yield Finding("Packages", PROBLEM, f"{name} is missing", f"pip install '{name}{specifier}'")
            continue
        if specifier.startswith("==") and version.split("+")[0] != specifier[2:].split("+")[0]:
            wrong += 1
            yield Finding("Packages", NOTE, f"{name} {version}; the lab is tested with {specifier[2:]}")
    if not wrong:
        yield Finding("Packages", OK, f"all {len(pins)} packages as pinned")


def _machine() -> Iterator[Finding]:
    import torch

    from labkit.common.machine import memory

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total, free = memory()
    yield Finding(
        "Machine",
        OK,
        f"{cores} CPU core{'s' if cores != 1 else ''}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{total / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB free",
    )
    threads = torch.get_num_threads()
    if threads > cores:
        advice = f"set OMP_NUM_THREADS={cores}"
        yield Finding("Machine", PROBLEM, f"torch uses {threads} threads on {cores} cores", advice)
    if (load := os.getloadavg()[0] if hasattr(os, "getloadavg") else 0) > cores:
        advice = "measured times would be those of a shared machine; OMP_WAIT_POLICY=PASSIVE softens it"
        yield Finding("Machine", NOTE, f"{load:.1f} processes compete for {cores} cores", advice)
    yield _compiled_step()
    free = shutil.disk_usage(Path.home()).free
    status = OK if free > 5e9 else NOTE
    yield Finding("Machine", status, f"{free / 1e9:.0f} GB free on the disk of {Path.home()}")


def _compiled_step() -> Finding:
    """Whether decoding on the CPU is compiled (`labkit.quantization.native`)."""
    from labkit.common.errors import NativeError
    from labkit.quantization.native.library import library

    try:
        native = library()
    except NativeError as error:
        return Finding("Machine", NOTE, f"decoding on the CPU goes through torch: {error}")
    wide = 32 * native.vector_width
    return Finding(
        "Machine", OK, f"decoding on the CPU is compiled, by {native.compiler}, for {wide} bits at a time"
    )


def _gpu() -> Iterator[Finding]:
    from labkit.common.machine import driver_versions, gpus

    devices = gpus()
    for index, gpu in enumerate(devices):
        yield Finding(
            "GPU",
            OK,
            f"cuda:{index} {gpu['name']}, {gpu['memory_bytes'] / 1e9:.1f} GB, "
            f"{gpu['free_bytes'] / 1e9:.1f} GB free, compute capability "
            f"{gpu['capability']}, driver {gpu['driver']}, CUDA {gpu['cuda']}",
        )
    if devices:
        return
    import torch

    if drivers := driver_versions():
        build = torch.version.cuda or "none (a CPU build)"
        advice = "install the build of torch for your CUDA version: https://pytorch.org/get-started"
        text = f"a GPU with driver {drivers[0]} is there, but torch cannot use it (torch's CUDA: {build})"
        yield Finding("GPU", PROBLEM, text, advice)
    else:
        yield Finding("GPU", NOTE, "no GPU: everything runs on the CPU, the 9 B models slowly or not at all")


def _schemes() -> Iterator[Finding]:
    import torch

    from labkit.quantization import get_scheme, known_schemes

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    runs: dict[str, list[str]] = {device: [] for device in devices}
    for device in devices:
        for name in known_schemes():
            try:
                get_scheme(name).validate(*SIZES, torch.device(device))
                runs[device].append(name)
            except ValueError as error:
                yield Finding("Schemes", NOTE, f"{name} does not run on {device}: {error}")
    for device, names in runs.items():
        yield Finding("Schemes", OK, f"on {device}: {', '.join(names)}")
    for name, fast in _cpu_kernels():
        way = "packed product for decoding" if fast else "reference path (slower, the same values)"
        yield Finding("Schemes", OK if fast else NOTE, f"{name} on cpu: {way}")


def _cpu_kernels() -> Iterator[tuple[str, bool]]:
    from labkit.quantization.kernels import cpu_int4, cpu_nf4, int8

    yield "int8", int8.has_packed_int8()
    yield "int8-dynamic", int8.has_integer_product()
    yield "int4", cpu_int4.block_rows() is not None
    yield "nf4", cpu_nf4.has_packed_nf4()


def _models() -> Iterator[Finding]:
    from labkit.models import list_models

    for spec in list_models():
        where = spec.availability()
        missing = where == "missing"
        advice = f"no weights in {spec.source}" if missing else ""
        yield Finding("Models", PROBLEM if missing else OK, f"{spec.name}: {where}", advice)
    yield from _does_9b_fit()


def _does_9b_fit() -> Iterator[Finding]:
    """Compare the needs of the 9 B models (`labkit.measure.fit`) with the memory of each device."""
    from labkit.common.machine import gpus, memory
    from labkit.measure.fit import needs
    from labkit.plans.plan import presets

    needed = needs("autoglm-phone-9b", presets())
    memories = {"cpu": memory()[0]}
    memories |= {f"cuda:{index}": gpu["memory_bytes"] for index, gpu in enumerate(gpus())}
    for device, size in memories.items():
        fits = [f"{need.plan} ({need.weights_bytes / 1e9:.1f} GB)" for need in needed if need.fits(size)]
        if fits:
            text = f"weights of the 9 B models fit {device} ({size / 1e9:.1f} GB) under: {', '.join(fits)}"
        else:
            least = min(needed, key=lambda need: need.total_bytes)
            rest = least.total_bytes - least.weights_bytes
            text = (
                f"the 9 B models do not fit {device} ({size / 1e9:.1f} GB): "
                f"{least.plan} needs {least.weights_bytes / 1e9:.1f} GB and {rest / 1e9:.1f} GB to work with"
            )
        yield Finding("Models", OK if fits else NOTE, text)


def _benchmark() -> Iterator[Finding]:
    from labkit import phonetap
    from labkit.common.errors import LabError

    for split, what in (("typed", "screens are drawn"), ("spoken", "recordings are read")):
        try:
            [item] = phonetap.items(split=split, count=1)
            item.messages()
            yield Finding("Benchmark", OK, f"PhoneTap's {what}")
        except (LabError, OSError, ImportError) as error:
            advice = "part of the assets folder is missing: install anew, or set LABKIT_ASSETS"
            yield Finding("Benchmark", PROBLEM, f"PhoneTap, {split}: {error}", advice)


def _notebooks() -> Iterator[Finding]:
    try:
        version = metadata.version("jupyterlab")
        yield Finding("Notebooks", OK, f"JupyterLab {version}")
    except metadata.PackageNotFoundError:
        yield Finding("Notebooks", PROBLEM, "JupyterLab is missing", "pip install jupyterlab")
    if _browser():
        yield Finding("Notebooks", OK, "a browser can be opened here")
    else:
        advice = "in a checkout, make lab prints an address to open elsewhere (ssh -L 8888:localhost:8888 this-machine)"
        yield Finding("Notebooks", NOTE, "no browser here", advice)


def _browser() -> bool:
    import webbrowser

    headless = sys.platform.startswith("linux") and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return not headless


def _network() -> Iterator[Finding]:
    variables = [name for name in ("http_proxy", "https_proxy", "all_proxy") if _environment(name)]
    spared = _environment("no_proxy") or ""
    if variables and not any(host in spared for host in ("localhost", "127.0.0.1", "*")):
        advice = "export NO_PROXY=localhost,127.0.0.1"
        text = f"{', '.join(variables)} is set and would catch requests to a service on localhost"
        yield Finding("Network", PROBLEM, text, advice)
    else:
        yield Finding("Network", OK, "no proxy stands between this machine and itself")


def _environment(name: str) -> str | None:
    return os.environ.get(name) or os.environ.get(name.upper())


def _training() -> Iterator[Finding]:
    tools = [name for name in ("espeak-ng", "flite", "ffmpeg") if shutil.which(name)]
    availability = f"found: {', '.join(tools)}" if tools else "none found"
    text = f"speech synthesizers and ffmpeg are needed only to train the pocket model anew ({availability})"
    yield Finding("Training only", NOTE, text)
