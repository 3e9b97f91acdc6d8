"""Makes the Chinese edition of the course: the English notebooks' code cells, with their words from ``notebooks/zh/text``.

``python .ci/make_chinese.py`` writes ``notebooks/zh/*.ipynb``. A text file has one part for each markdown cell, in any
order, begun by a comment with the cell's id and a mark of the English words it was made from:

    <!-- cell: title · 3f2a9c -->
    # 00 · 先转一圈

Where the English words have changed since, the mark differs: the tool says so and writes nothing. Translate anew what it
names, then run it with ``--accept``, which renews the marks. ``--check`` only compares.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENGLISH, CHINESE = Path("notebooks"), Path("notebooks/zh")
PART = re.compile(r"^<!-- cell: (\S+)(?: · (\w+))? -->\n(.*?)(?=^<!-- cell: |\Z)", re.M | re.S)


def mark_of(text: str) -> str:
    """Six digits that change with the English words."""
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def texts(path: Path) -> dict[str, tuple[str, str]]:
    """Cell id -> (mark, Chinese words). Raises SystemExit for an id that stands twice."""
    found: dict[str, tuple[str, str]] = {}
    for id, mark, words in PART.findall(path.read_text(encoding="utf-8")):
        if id in found:
            raise SystemExit(f"{path}: the cell {id} stands twice")
        found[id] = (mark, words.strip("\n"))
    return found


def faults(name: str, root: Path = ROOT) -> list[str]:
    """What keeps a notebook from being made: words that are missing, out of date, or of no cell."""
    path = root / CHINESE / "text" / f"{name}.md"
    if not path.is_file():
        return [f"{path.relative_to(root)} is missing"]
    known, cells = texts(path), markdown(name, root)
    told = [f"{name}: the cell {id} has no Chinese words" for id in cells if not known.get(id, ("", ""))[1]]
    told += [f"{name}: there is no cell {id}" for id in known if id not in cells]
    changed = [id for id, words in cells.items() if id in known and known[id][0] != mark_of(words)]
    return told + [f"{name}: the English of {id} has changed since it was translated" for id in changed]


def markdown(name: str, root: Path = ROOT) -> dict[str, str]:
    """Cell id -> English words."""
    return {c["id"]: source(c) for c in english(name, root)["cells"] if c["cell_type"] == "markdown"}


def english(name: str, root: Path = ROOT) -> dict[str, Any]:
    """An English notebook."""
    return json.loads((root / ENGLISH / f"{name}.ipynb").read_text(encoding="utf-8"))


def chinese(name: str, root: Path = ROOT) -> str:
    """The Chinese notebook as its file holds it."""
    notebook, known = english(name, root), texts(root / CHINESE / "text" / f"{name}.md")
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = known[cell["id"]][1]
    return json.dumps(notebook, ensure_ascii=False, indent=1) + "\n"


def accept(name: str, root: Path = ROOT) -> None:
    """Renew the marks of a text file: its words are those of the English as it is now."""
    path, cells = root / CHINESE / "text" / f"{name}.md", markdown(name, root)

    def renewed(part: re.Match) -> str:
        mark = f" · {mark_of(cells[part[1]])}" if part[1] in cells else ""
        return f"<!-- cell: {part[1]}{mark} -->\n{part[3]}"

    path.write_text(PART.sub(renewed, path.read_text(encoding="utf-8")), encoding="utf-8")


def source(cell: dict[str, Any]) -> str:
    """A cell's text, whichever way it is stored."""
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


def names(root: Path = ROOT) -> list[str]:
    """The course's notebooks."""
    return sorted(path.stem for path in (root / ENGLISH).glob("[0-9]*.ipynb"))


def main(words: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only, and write nothing")
    parser.add_argument(
        "--accept", action="store_true", help="the words are right for the English as it is now"
    )
    options = parser.parse_args(words)
    if options.accept:
        for name in names(root):
            if (root / CHINESE / "text" / f"{name}.md").is_file():
                accept(name, root)
    told = [fault for name in names(root) for fault in faults(name, root)]
    for name in names(root):
        if faults(name, root):
            continue
        path, wanted = root / CHINESE / f"{name}.ipynb", chinese(name, root)
        if path.is_file() and path.read_text(encoding="utf-8") == wanted:
            continue
        if options.check:
            told.append(f"{path.relative_to(root)} is not what {name}.ipynb and its words make")
        else:
            path.write_text(wanted, encoding="utf-8")
            print(f"{path.relative_to(root)} written")
    print(*told, sep="\n", end="\n" if told else "")
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
