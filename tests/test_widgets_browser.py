"""The widgets in JupyterLab, in a real browser and in the dark theme: clicked, changed, run and stopped."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from browsing import browser_needed, page

from labkit.models import get_spec

ROOT = Path(__file__).resolve().parents[1]
FAKES = str(Path(__file__).with_name("compare_fakes_cli.py"))
CELLS = (
    "from labkit import widgets\nwidgets.explore('pocket', part='lm_head', items=2)",
    "widgets.plan_editor('pocket')",
    "import sys\nc = widgets.compare('pocket', items=10, output='run')\n"
    f"c.command = (sys.executable, {FAKES!r})\nc",
)
OUTPUTS = "(() => [...jupyterapp.shell.currentWidget.content.model.cells].flatMap(c => c.toJSON().outputs))()"
IDLE = (
    "() => { const w = jupyterapp.shell.currentWidget; const k = w?.sessionContext?.session?.kernel;"
    " return k?.status === 'idle' }"
)


@contextlib.contextmanager
def jupyter(folder):
    """JupyterLab in the dark theme on ``folder``; its address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    theme = folder / "settings/@jupyterlab/apputils-extension/themes.jupyterlab-settings"
    theme.parent.mkdir(parents=True)
    theme.write_text(json.dumps({"theme": "JupyterLab Dark"}))
    news = theme.with_name("notification.jupyterlab-settings")
    news.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    command = [
        sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder}", f"--ServerApp.port={port}",
        "--ServerApp.open_browser=False", "--ServerApp.allow_root=True", "--IdentityProvider.token=",
        "--LabApp.expose_app_in_browser=True",
    ]  # fmt: skip
    environ = {
        **os.environ, "PYTHONPATH": str(ROOT), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "FAKE_PAUSE_S": "1",
    }  # fmt: skip
    with (folder / "log.txt").open("wb") as told:
        server = subprocess.Popen(command, env=environ, stdout=told, stderr=told, start_new_session=True)
    try:
        for _ in range(400):
            assert server.poll() is None, (folder / "log.txt").read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api"):
                break
            time.sleep(0.25)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def written(folder):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in CELLS])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "widgets.ipynb")


@pytest.mark.slow
@browser_needed
@pytest.mark.skipif(get_spec("pocket").availability() != "here", reason="the pocket model is not in assets")
def test_widgets_work_in_jupyterlab_in_the_dark(tmp_path):
    written(tmp_path)
    with jupyter(tmp_path) as url, page(1500, 2600) as tab:
        tab.set_default_timeout(120_000)
        tab.goto(f"{url}/lab/tree/widgets.ipynb?reset")
        tab.wait_for_selector(".jp-NotebookPanel .jp-Cell")
        tab.wait_for_function(IDLE)
        assert tab.evaluate("document.body.dataset.jpThemeLight") == "false"
        tab.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
        explore, editor, compare = (tab.locator(".jp-CodeCell").nth(number) for number in range(3))

        explore.get_by_text("4.50 bits a weight").wait_for()
        explore.locator("img[alt^='int4']").wait_for()
        before = explore.locator(".jp-OutputArea").inner_text()
        explore.locator("select").nth(3).select_option("int8")
        explore.get_by_text("bits a weight").filter(has_text="8.").wait_for()
        assert explore.locator(".jp-OutputArea").inner_text() != before

        editor.get_by_text("of weights are predicted").wait_for()
        editor.locator("select").nth(1).select_option("fp32")
        editor.get_by_text("int4-mine").first.wait_for()
        assert "scheme: fp32" in editor.locator("textarea").input_value()

        compare.get_by_role("button", name="Run").click()
        compare.get_by_text("of 10 answers").first.wait_for()
        compare.get_by_role("button", name="Stop").click()
        compare.get_by_text("Run continues").wait_for()
        compare.get_by_role("button", name="Run").click()
        compare.get_by_text("finished; results").wait_for()
        compare.get_by_text("Accuracy", exact=True).last.click()
        compare.locator(".js-plotly-plot .scatterlayer path").first.wait_for()

        outputs = tab.evaluate(OUTPUTS)
        assert [one for one in outputs if one["output_type"] == "error" or one.get("name") == "stderr"] == []
        assert tab.trouble == []
