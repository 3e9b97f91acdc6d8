"""The tree of errors: one file, no class that only a reader could miss, and one line for each in its picture."""

import inspect
import re
from pathlib import Path

from labkit.common import errors

ROOT = Path(__file__).resolve().parents[2]


def subclasses():
    return {
        name: c for name, c in vars(errors).items() if inspect.isclass(c) and issubclass(c, BaseException)
    }


def test_the_picture_shows_every_class_and_no_other():
    shown = re.findall(r"(\w+Error|Interrupted) {2,}", errors.__doc__)
    assert sorted(shown) == sorted(subclasses())


def test_no_other_file_of_the_package_adds_to_the_tree():
    names = "|".join(subclasses())
    for path in (ROOT / "labkit").rglob("*.py"):
        if path != ROOT / "labkit/common/errors.py":
            assert not re.search(rf"^class \w+\(({names})\)", path.read_text(), re.MULTILINE), path


def test_every_class_is_caught_somewhere_or_belongs_to_the_public_client():
    code = "\n".join(
        p.read_text()
        for p in (ROOT / "labkit").rglob("*.py")
        if p.name != "errors.py" or "service" in p.parts
    )
    for name in set(subclasses()) - {"Interrupted", "ClientError"}:
        assert re.search(rf"except[^\n]*\b{name}\b|isinstance\([^\n]*\b{name}\b", code), name
