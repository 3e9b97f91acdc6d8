"""Prints the pinned packages of one extra of pyproject.toml, one a line: ``list_extra.py train``."""

import sys
import tomllib
from pathlib import Path

EXTRAS = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]

if __name__ == "__main__":
    print(*EXTRAS[sys.argv[1]], sep="\n")
