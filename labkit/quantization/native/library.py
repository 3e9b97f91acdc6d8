"""The compiled library: built once for this machine's processor and stored in the cache folder.

The compiler is ``$CXX``, or the first of g++, c++ and clang++. ``LABKIT_NATIVE=0`` disables the library.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from labkit.common.errors import NativeError

if TYPE_CHECKING:
    import torch

SWITCH = "LABKIT_NATIVE"
COMPILERS = ("g++", "c++", "clang++")
SOURCES = ("step.cpp", "model.h", "attention.h", "products.h", "pairs.h", "inputs.h", "linear.h", "vectors.h")
COMMON = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-w")
CHOICES = (
    ("-march=native", "-fopenmp"),
    ("-mcpu=native", "-fopenmp"),
    ("-march=native",),
    ("-mcpu=native",),
    (),
)
"""Flags that not every compiler accepts; the first set that compiles is used. Without OpenMP there is one thread."""
LONGEST_S = 180
F32, BF16, F16, INT8, INT4 = range(5)
"""The types of `vectors.h`."""


_suspended: ContextVar[bool] = ContextVar("suspended", default=False)


class Linear(ctypes.Structure):
    """`Linear` of linear.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("type", "out", "in_", "group", "block", "stride")),
        *((name, ctypes.c_int32) for name in ("taken", "given", "bias_first")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias")),
    ]


class Layer(ctypes.Structure):
    """`Layer` of model.h."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in ("before_attention", "after_attention", "before_mlp", "after_mlp")
        ),
        *((name, Linear) for name in ("query", "key", "value", "out", "gate", "up", "down")),
    ]


class Model(ctypes.Structure):
    """`Model` of model.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("dtype", "layers", "width", "heads", "key_heads")),
        *((name, ctypes.c_int32) for name in ("head_width", "rotary", "interleaved", "inner", "vocabulary")),
        *((name, ctypes.c_int32) for name in ("embedding_type", "embedding_given")),
        *((name, ctypes.c_float) for name in ("epsilon", "scaling")),
        *((name, ctypes.c_void_p) for name in ("embedding", "embedding_scale")),
        ("layer", ctypes.POINTER(Layer)),
        ("norm", ctypes.c_void_p),
        ("head", Linear),
    ]


class Row(ctypes.Structure):
    """`Row` of model.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "keys", "values")),
        *((name, ctypes.c_int64) for name in ("length", "room", "token")),
    ]


@dataclass(frozen=True)
class Library:
    """The functions of step.cpp, and the compiler that built them."""

    path: Path
    compiler: str
    step: ctypes._CFuncPtr  # (Model*, Row*, count, float* logits, threads)
    multiply: ctypes._CFuncPtr  # (Linear*, float* x, rows, float* y, threads)
    dequantize: ctypes._CFuncPtr  # (Linear*, void* values, type, threads)
    largest: ctypes._CFuncPtr  # (float* rows, count, width, float* values, int64_t* places)
    vector_width: int  # floats in a vector


def available() -> Library | None:
    """`library`, or None where it is not available."""
    try:
        return library()
    except NativeError:
        return None


def library() -> Library:
    """The library; compiled first if it is not in the cache folder, which takes some seconds once.

    Raises:
        NativeError: the library is switched off, there is no compiler, or the compiler fails.
    """
    if _suspended.get():
        raise NativeError("the compiled library is set aside for a while")
    result = _library()
    if isinstance(result, str):
        raise NativeError(result)
    return result


def pointer(tensor: torch.Tensor, dtype: torch.dtype, *shape: int) -> int:
    """The address of a tensor that a function of the library reads or writes: it knows neither its dtype nor its size.

    Raises:
        ValueError: the tensor is not what the function takes for granted.
    """
    if (
        tensor.dtype != dtype
        or tensor.shape != shape
        or tensor.device.type != "cpu"
        or not tensor.is_contiguous()
    ):
        raise ValueError(
            f"the compiled library wants {dtype} {list(shape)} in one piece on the CPU, not {tensor.dtype} "
            f"{list(tensor.shape)} on {tensor.device}"
        )
    return tensor.data_ptr()


@contextmanager
def suspended() -> Iterator[None]:
    """Within this context the thread works as on a machine without a compiler, to compare the two."""
    token = _suspended.set(True)
    try:
        yield
    finally:
        _suspended.reset(token)


@cache
def _library() -> Library | str:
    """The library, or the reason why there is none; determined once for each process.

    Not the error itself: each time it were raised, its traceback would grow by frames, and these hold every tensor
    of the products that asked for the library.
    """
    try:
        return _find()
    except NativeError as error:
        return str(error)


def _find() -> Library:
    if os.environ.get(SWITCH, "1").strip().lower() in ("0", "no", "off", "false"):
        raise NativeError(f"the compiled step is switched off ({SWITCH}={os.environ[SWITCH]})")
    compiler = find_compiler()
    if compiler is None:
        raise NativeError(
            f"there is no C++ compiler here (looked for $CXX, {', '.join(COMPILERS)}): install g++, and decoding "
            "on the CPU becomes several times faster"
        )
    lines = _output([compiler, "--version"]).splitlines()
    version = lines[0] if lines else compiler
    path = cache_folder() / f"step-{_key(compiler, version)}.so"
    if not path.is_file():
        _compile(compiler, path)
    try:
        return _bound(path, version)
    except OSError as error:
        raise NativeError(f"the compiled library {path} cannot be loaded ({error}): delete it") from error


def find_compiler() -> str | None:
    """Path of the C++ compiler, or None."""
    named = os.environ.get("CXX", "").strip()
    return next((path for name in (named, *COMPILERS) if name and (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """The library's folder: in ``$LABKIT_CACHE``, or in the user's cache folder."""
    own = os.environ.get("LABKIT_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(own) if own else base / "labkit") / "native"


def _key(compiler: str, version: str) -> str:
    """A hash of the sources, the compiler and the processor."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    digest.update(repr((compiler, version, COMMON, CHOICES, platform.machine(), _processor())).encode())
    return digest.hexdigest()[:20]


def _processor() -> str:
    """The processor's model and features, as the system lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _compile(compiler: str, path: Path) -> None:
    """Compile to a file beside ``path`` and rename it, so that two processes can compile at the same time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(suffix=".so", prefix=path.stem, dir=path.parent)
    except OSError as error:
        raise NativeError(f"the cache folder {path.parent} cannot be written ({error.strerror})") from error
    os.close(handle)
    source = Path(__file__).parent / SOURCES[0]
    first = ""
    try:
        for flags in CHOICES:
            failure = _failure([compiler, *COMMON, *flags, str(source), "-o", unfinished])
            if failure is None:
                os.replace(unfinished, path)
                return
            first = first or failure
    finally:
        Path(unfinished).unlink(missing_ok=True)
    raise NativeError(f"{compiler} does not compile {source.name}: {first}")


def _failure(command: list[str]) -> str | None:
    """None if the command succeeds, else the first line that reports an error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    wrong = [line for line in lines if "error" in line.lower()] or lines or [f"exit code {done.returncode}"]
    return wrong[0] if done.returncode else None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _bound(path: Path, compiler: str) -> Library:
    loaded = ctypes.CDLL(str(path))
    step, multiply, dequantize = loaded.labkit_step, loaded.labkit_multiply, loaded.labkit_dequantize
    count, pointer = ctypes.c_int32, ctypes.c_void_p
    step.argtypes = [ctypes.POINTER(Model), ctypes.POINTER(Row), count, pointer, count]
    multiply.argtypes = [ctypes.POINTER(Linear), pointer, count, pointer, count]
    dequantize.argtypes = [ctypes.POINTER(Linear), pointer, count, count]
    largest = loaded.labkit_largest
    largest.argtypes = [pointer, count, count, pointer, pointer]
    step.restype = multiply.restype = dequantize.restype = largest.restype = None
    return Library(path, compiler, step, multiply, dequantize, largest, int(loaded.labkit_vector_width()))
