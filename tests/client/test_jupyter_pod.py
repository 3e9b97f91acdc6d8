"""As in a pod, where only Jupyter's port is open: the service's tile, and the chat in a cell, in a real browser."""

import json
from urllib.parse import urlsplit

import psutil
import pytest
import tiny_models
from browsing import IDLE, browser_needed, free_port, jupyter, page, write_notebook
from fake_service import serving

from labkit.client.launch.proxy import proxied
from labkit.interactive.chat.frame import BehindJupyter

BASE = "/user/me/"


def test_the_way_through_jupyter_is_found_by_the_server_that_started_the_kernel(tmp_path, monkeypatch):
    for name in ("JUPYTERHUB_SERVICE_PREFIX", "JPY_PARENT_PID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    assert proxied(8000) is None
    monkeypatch.setenv("JPY_PARENT_PID", "123")
    assert proxied(8000) is None  # a kernel that something else has started
    (tmp_path / "jpserver-123.json").write_text(json.dumps({"base_url": BASE, "pid": 123}))
    assert proxied(8000) == "/user/me/proxy/8000/"
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/hub/")
    assert proxied(8000) == "/user/hub/proxy/8000/"


@pytest.mark.parametrize(
    ("sent", "host", "scheme"),
    [
        ({"referer": "https://pod.example/lab"}, "pod.example/x/proxy/7/", "https"),
        ({"referer": "http://pod.example/lab"}, "pod.example/x/proxy/7/", "http"),
        ({"x-forwarded-proto": "https"}, "pod.example/x/proxy/7/", "https"),
        ({"referer": "https://elsewhere.example/"}, "pod.example/x/proxy/7/", "http"),
    ],
)
def test_gradio_is_told_where_jupyter_puts_it(sent, host, scheme):
    told = _headers({"host": "pod.example", "x-forwarded-prefix": "/x/proxy/7/", **sent})
    assert (told["x-forwarded-host"], told["x-forwarded-proto"]) == (host.rstrip("/"), scheme)


def test_whoever_asks_directly_is_left_alone():
    assert _headers({"host": "127.0.0.1:7860"}) == {"host": "127.0.0.1:7860"}


def _headers(sent):
    import asyncio

    seen = {}

    async def app(scope, receive, send):
        seen.update({name.decode(): value.decode() for name, value in scope["headers"]})

    scope = {"type": "http", "headers": [(name.encode(), value.encode()) for name, value in sent.items()]}
    asyncio.run(BehindJupyter(app)(scope, None, None))
    return seen


def foreign(tab, url):
    """What a page asked of any address but Jupyter's."""
    place = urlsplit(url).netloc
    return [one for one in tab.asked if one.startswith("http") and urlsplit(one).netloc != place]


@pytest.mark.slow
@browser_needed
def test_the_chat_in_a_cell_answers_through_jupyters_address(tmp_path):
    with serving(plan="int4", pause_s=0.2) as service:
        cell = (
            f"from labkit import chat\nwindow = chat.build([{service.base_url!r}])\nwindow.launch(quiet=True)"
        )
        write_notebook(tmp_path / "chat.ipynb", [cell, "window.close()"])
        with jupyter(tmp_path, base=BASE, dark=True) as url, page() as tab:
            tab.set_default_timeout(120_000)
            tab.goto(f"{url}/lab/tree/chat.ipynb?reset")
            tab.wait_for_selector(".jp-NotebookPanel .jp-Cell")
            tab.wait_for_function(IDLE)
            tab.evaluate("jupyterapp.commands.execute('notebook:run-cell')")
            address = tab.locator(".jp-OutputArea iframe").get_attribute("src")
            assert f"{BASE}proxy/" in address
            window = tab.frame_locator(".jp-OutputArea iframe")
            window.get_by_text("pocket in int4, 21.2 MB").wait_for()
            window.locator("body.dark").wait_for()
            window.get_by_text("Draw me a new screen").click()
            window.locator(".image-frame img").first.wait_for()
            window.get_by_label("Think first").check()
            window.locator("textarea[data-testid=textbox]").last.press("Enter")
            window.get_by_text("heard: “open it”").wait_for()
            window.get_by_text("21.2 MB of weights (int4)").wait_for()
            taps = window.locator("[data-testid=bot] img, .bot img")
            taps.first.wait_for()
            assert taps.first.evaluate("one => one.complete && one.naturalWidth > 0")
            assert foreign(tab, url) == []
            assert tab.trouble == []


@pytest.mark.slow
@browser_needed
def test_the_tile_in_the_launcher_opens_the_services_page(tmp_path):
    model = tmp_path / "tiny"
    tiny_models.llama().save_pretrained(model)
    tiny_models.tokenizer().save_pretrained(model)
    chosen = {"LABKIT_PORT": str(free_port()), "LABKIT_MODEL": str(model), "OMP_NUM_THREADS": "1"}
    with jupyter(tmp_path, base=BASE, **chosen) as url, page() as tab:
        tab.set_default_timeout(120_000)
        tab.goto(f"{url}/lab?reset")
        tile = tab.locator(".jp-LauncherCard", has_text="labkit service")
        tile.wait_for()
        assert tile.locator("img").evaluate("one => one.complete && one.naturalWidth > 0")
        with tab.context.expect_page() as opened:
            tile.click()
        seen = opened.value
        asked = []
        seen.on("request", lambda request: asked.append(request.url))
        seen.wait_for_selector("#state.ready", timeout=120_000)
        assert seen.url == f"{url}/labkit/"
        assert seen.inner_text("h1") == "tiny"
        assert seen.locator("#look").is_hidden()  # this model does not see
        seen.fill("#prompt", "hello")
        seen.click("#send")
        seen.wait_for_selector("#cost:not(:empty)")
        assert all(one.startswith((url, "data:", "blob:")) for one in asked)
        service = psutil.Process(json.loads(next((tmp_path / "services").glob("*.json")).read_text())["pid"])
    service.wait(60)  # it ends with Jupyter
