"""The script and `labkit.client.launch`: start, status, stop; a killed service; ports that are taken."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import tiny_models

from labkit.client import launch
from labkit.client.launch import jupyter, state
from labkit.client.launch.__main__ import build_parser, main
from labkit.client.launch.request import flags_of
from labkit.client.launch.start import _free_port, state_of
from labkit.common.errors import LabError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "assets/run_autoglm_server.sh"
LINES = (
    r"\[INFO\] Loading tiny with plan bf16\.\.\.",
    r"\[INFO\] Model loaded on cpu in .*: plan bf16, .* of weights",
    r"\[INFO\] FastAPI server started at http://127\.0\.0\.1:\d+",
    r"\[SUCCESS\] tiny service is ready for inference!",
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_models.llama().save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def records(tmp_path, monkeypatch):
    """Records and logs of these tests only; whatever is left running is ended."""
    monkeypatch.setenv(state.FOLDER_VARIABLE, str(tmp_path / "state"))
    yield tmp_path / "state"
    for path in (tmp_path / "state").glob("service-*.json"):
        launch.find(int(re.findall(r"\d+", path.name)[0])).stop(1)


def script(*words):
    environment = {**os.environ, "LABKIT_PYTHON": sys.executable}
    done = subprocess.run(
        ["sh", str(SCRIPT), *words], env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_the_script_starts_tells_the_truth_after_a_kill_and_starts_again(model):
    port = str(_free_port())
    assert script("status", "--port", port) == (3, f"[INFO] no service on port {port}\n")
    code, told = script("start", model, "--plan", "bf16", "--port", port)
    assert code == 0, told
    for line in LINES:
        assert re.search(line, told), told
    code, told = script("status", "--port", port)
    assert (code, told[:19]) == (0, "[SUCCESS] ready at ")
    assert "Already there" in script(model, "--plan", "bf16", "--port", port)[1]
    refused = script(model, "--plan", "fp32", "--port", port)
    assert refused[0] == 1
    assert "stop it first" in refused[1]

    os.kill(state.read(int(port)).pid, signal.SIGKILL)
    code, told = script("status", "--port", port)
    assert code == 3
    assert "has ended by itself" in told
    assert script("start", model, "--plan", "bf16", "--port", port)[0] == 0
    assert "[SUCCESS]" in script("logs", "--port", port)[1]
    assert script("stop", "--port", port)[0] == 0
    assert script("status", "--port", port)[0] == 3


def test_a_service_from_python_whose_key_is_in_no_list_of_processes(model, records):
    shown, more = [], {"arguments": ["--streams", "2"], "api_key": "open-sesame"}
    with launch.start(model, "bf16", port=0, show=shown.append, **more) as service:
        command = psutil.Process(service._record.pid).cmdline()
        record = (records / f"service-{service.port}.json").read_text()
        assert "open-sesame" not in " ".join([*command, record, *service.lines()])
        assert service.state.name == "ready"
        assert service.facts()["streams"] == 2
        assert service.base_url == f"{service.url}/v1"
        assert launch.find(service.port).state.name == "ready"
        assert len(shown) == len(LINES)
    assert state_of(service.port).name == "stopped"
    assert launch.find(service.port) is None


def test_a_service_that_cannot_start_says_why():
    with pytest.raises(LabError, match="no model is called 'nobody'"):
        launch.start("nobody", port=0, show=None)


def test_a_port_that_others_use_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(launch.LaunchError, match="not started here"):
            launch.start("pocket", port=port, show=None)
        assert state_of(port).name == "foreign"


def test_a_record_of_another_process_counts_as_ended():
    record = state.Record(1, "http://127.0.0.1:1", os.getpid(), 12.0, (), "nowhere")
    assert not record.is_running
    state.write(record)
    assert state.read(1) == record
    assert state_of(1).name == "died"
    (state.folder() / "service-1.json").write_text("{broken")
    assert state.read(1) is None
    state.write(record)
    state.forget(record)
    assert state.read(1) is None


def test_the_script_without_a_command_starts(monkeypatch):
    calls = []

    def start(model, plan, **options):
        calls.append((model, plan, options))
        return SimpleNamespace(url="http://127.0.0.1:8000", base_url="http://127.0.0.1:8000/v1")

    monkeypatch.setattr("labkit.client.launch.__main__.start", start)
    assert main([]) == 0
    assert main(["--plan", "int4", "--streams", "4", "--thinking"]) == 0
    assert main(["start", "x", "--engine", "vllm", "--api-key", "sesame", "--device", "cpu"]) == 0
    assert [call[:2] for call in calls] == [("pocket", None), ("pocket", "int4"), ("x", None)]
    assert calls[1][2]["arguments"] == ["--streams=4", "--thinking"]
    assert sorted(calls[2][2]["arguments"]) == ["--device=cpu", "--engine=vllm"]
    assert calls[2][2]["api_key"] == "sesame"


def test_only_what_differs_from_the_defaults_is_handed_on():
    assert flags_of(build_parser().parse_args(["start", "pocket", "--port", "8001"])) == []


@pytest.mark.skipif(shutil.which("dash") is None, reason="no dash here")
def test_the_script_is_plain_sh():
    subprocess.run(["dash", "-n", str(SCRIPT)], check=True)
    assert SCRIPT.stat().st_mode & 0o111


def test_jupyterlab_is_told_of_the_service(monkeypatch):
    for name in ("LABKIT_PORT", "LABKIT_MODEL"):
        monkeypatch.delenv(name, raising=False)
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert entries["jupyter_serverproxy_servers"] == {"labkit": "labkit.client.launch.jupyter:setup"}
    told = jupyter.setup()
    assert told["command"][:3] == [sys.executable, "-m", "labkit.client.launch.jupyter"]
    assert told["command"][3:] == ["--port", "8000", "--model", "pocket"]
    assert told["port"] == 8000
    assert Path(told["launcher_entry"]["icon_path"]).read_text().startswith("<svg")


def test_the_tile_stands_for_the_service_and_ends_what_it_started(model):
    port = _free_port()
    command = [sys.executable, "-m", "labkit.client.launch.jupyter", "--model", model, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tile:
        assert any(line.startswith("[SUCCESS]") for line in tile.stdout)
        assert state_of(port).name == "ready"
        tile.terminate()
        assert tile.wait(30) == 0
    assert state_of(port).name == "stopped"


def test_a_service_in_a_notebook_shows_where_it_is(monkeypatch):
    monkeypatch.delenv("JUPYTERHUB_SERVICE_PREFIX", raising=False)
    record = state.Record(8123, "http://127.0.0.1:8123", os.getpid(), 12.0, (), "<nowhere>")
    shown = launch.Service(record)._repr_html_()
    assert 'href="http://127.0.0.1:8123/"' in shown
    assert "proxy" not in shown
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/me/")
    assert 'href="/user/me/proxy/8123/"' in launch.Service(record)._repr_html_()
    assert "<nowhere>" not in shown


def test_the_script_from_python():
    assert launch.script("status", "--port", "1") == "[INFO] no service on port 1\n"
