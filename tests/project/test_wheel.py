"""An installation without a checkout: what the wheel holds, and that it measures from an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

IMPORT_ALL = """
import json, pkgutil, labkit
from labkit.common.machine import requirements
from labkit.results import shipped

def fail(name):
    raise

names = [module.name for module in pkgutil.walk_packages(labkit.__path__, "labkit.", onerror=fail)]
for name in names:
    try:
        name.endswith("__main__") or __import__(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":  # comes with torch's CUDA builds only
            raise
print(json.dumps([labkit.__file__, names, dict(requirements()), shipped.names()]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources: setuptools leaves its build folders beside them."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "labkit", source / "labkit", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tests").mkdir()
    (source / "assets").symlink_to(ROOT / "assets")
    pip("wheel", source, "--no-build-isolation", "--wheel-dir", source / "dist")
    [path] = (source / "dist").glob("labkit-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The environment of a process that imports the installed labkit, and its folder."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", wheel, "--target", folder)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("LABKIT_")}
    return {**environ, "PYTHONPATH": str(folder)}, folder


def pip(command, what, *options):
    words = [sys.executable, "-m", "pip", command, what, "--quiet", "--no-deps", "--no-index", *options]
    subprocess.run(words, check=True)


def run(environ, folder, *words):
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_wheel_holds_the_package_and_its_assets(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [metadata] = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    assets = {f"labkit/{path.relative_to(ROOT)}" for path in (ROOT / "assets").rglob("*") if path.is_file()}
    assert {name for name in names if name.startswith("labkit/assets/")} == assets
    pages = {"page.html", "page.css", "page.js"}
    assert {f"labkit/service/{page}" for page in pages} <= names
    assert {"labkit/results/report.css", "labkit/client/launch/icon.svg"} <= names
    assert any(name.endswith("/LICENSE") for name in names)
    native = {f"labkit/quantization/native/{p.name}" for p in (ROOT / "labkit/quantization/native").iterdir()}
    assert {name for name in native if name.endswith((".cpp", ".h"))} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"labkit"}
    assert not [name for name in names if name.startswith("labkit/models/pocket/training")]
    assert "torch==2.13.0" in metadata
    assert (ROOT / "README.md").read_text()[:200] in metadata


def test_every_module_of_an_installation_is_imported(installed, tmp_path):
    environ, folder = installed
    path, names, pins, shipped = json.loads(run(environ, tmp_path, "-c", IMPORT_ALL).splitlines()[-1])
    assert Path(path) == folder / "labkit/__init__.py"
    assert len(names) > 200
    assert pins["torch"] == "==2.13.0"
    assert "pytest" not in pins
    assert "pocket-cpu" in shipped


def test_an_installation_compares_plans_from_an_empty_folder(installed, tmp_path):
    environ, folder = installed
    where = run(environ, tmp_path, "-c", "import labkit; print(labkit.__file__)").strip()
    assert Path(where) == folder / "labkit/__init__.py"
    run(environ, tmp_path, "-m", "labkit", "compare", "pocket", "--plans", "fp32,int4", "--items", "4")
    body = json.loads((tmp_path / "results/pocket/results.json").read_text())
    assert [row["plan"] for row in body["measurements"]] == ["fp32", "int4"]
    assert body["environment"]["commit"] is None


def test_notebooks_are_said_to_need_a_checkout(installed, tmp_path):
    environ, _ = installed
    command = [sys.executable, "-m", "labkit.interactive.lab"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "need a checkout" in done.stderr
