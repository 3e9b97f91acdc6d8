"""The status page in a real browser, the documentation without a network, counts for Prometheus."""

import re
import time

import pytest
from browsing import browser_needed, page
from prometheus_client.parser import text_string_to_metric_families
from service_tools import CHAT, running, screen

import labkit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(labkit.get_spec("pocket").availability() != "here", reason="no pocket model"),
]


@pytest.fixture(scope="module")
def service():
    with running(labkit.load("pocket", "int8", "cpu", progress=False)) as one:
        yield one


@browser_needed
def test_the_page_shows_the_model_and_answers_a_prompt_with_a_screen(service, tmp_path):
    with page() as tab:
        wrong, asked = [], []
        tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(service.url)
        tab.wait_for_selector("#state.ready", timeout=20_000)
        assert tab.inner_text("h1") == "pocket"
        assert tab.inner_text("#plan") == "int8"
        assert "32.2 MB" in tab.inner_text("#weights")
        assert tab.locator("#parts tr").count() == 8
        tab.wait_for_selector("#screen:visible")
        blank = tab.evaluate("document.getElementById('screen').toDataURL()")
        tab.fill("#prompt", "返回上一页")
        tab.check("#action")
        tab.click("#send")
        tab.wait_for_selector("#cost:not(:empty)", timeout=30_000)
        assert re.match(r"<answer>(do|finish)\(", tab.inner_text("#answer"))
        assert tab.inner_text("#reasoning")
        tab.uncheck("#action")
        tab.fill("#prompt", "点击屏幕中间")
        tab.press("#prompt", "Enter")
        tab.wait_for_selector("#send:enabled")
        tab.wait_for_selector("#answers:text-matches('[2-9]')", timeout=30_000)
        drawn = "was => document.getElementById('screen').toDataURL() != was"
        tab.wait_for_function(drawn, arg=blank, timeout=30_000)
        assert wrong == []
        assert all(url.startswith((service.url, "data:", "blob:")) for url in asked)


@browser_needed
def test_the_page_asks_for_a_key_where_one_is_needed():
    with (
        running(labkit.load("pocket", "int8", "cpu", progress=False), api_key="sesame") as service,
        page() as tab,
    ):
        tab.goto(service.url)
        tab.wait_for_selector("#key:visible", timeout=20_000)
        assert tab.inner_text("#state") == "API key needed"
        assert tab.inner_text("#plan") == ""
        tab.click("#send")
        tab.wait_for_selector("#answer.bad")
        assert "API key" in tab.inner_text("#answer")
        tab.fill("#key", "sesame")
        tab.wait_for_selector("#state.ready", timeout=20_000)
        tab.wait_for_selector("#screen:visible")
        tab.click("#send")
        tab.wait_for_selector("#cost:not(:empty)", timeout=30_000)


@browser_needed
def test_the_page_fits_a_phone(service):
    with page(width=390, height=844) as tab:
        tab.goto(service.url)
        tab.wait_for_selector("#parts tr", timeout=20_000)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        right = tab.evaluate(
            "Math.max(...[...document.querySelectorAll('#plan-panel td')].map((e) => e.getBoundingClientRect().right))"
        )
        assert right <= 390


@browser_needed
def test_a_broken_picture_does_not_leave_the_screen_before_it(service, tmp_path):
    broken, whole = tmp_path / "broken.png", tmp_path / "whole.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 100)
    screen().save(whole)
    with page() as tab:
        tab.goto(service.url)
        tab.wait_for_selector("#screen:visible", timeout=20_000)
        tab.set_input_files("#image", broken)
        tab.wait_for_selector("#screen", state="hidden")
        assert "cannot show" in tab.inner_text("#drop")
        with tab.expect_request("**/chat/completions") as asked:
            tab.click("#send")
        assert "image_url" not in asked.value.post_data
        tab.wait_for_selector("#send:enabled", timeout=30_000)
        tab.set_input_files("#image", whole)
        tab.wait_for_selector("#screen:visible")
        assert "Drop a screenshot" in tab.evaluate("document.getElementById('drop').textContent")


@browser_needed
def test_the_documentation_needs_no_network(service):
    with page() as tab:
        asked = []
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(f"{service.url}/docs")
        tab.wait_for_selector("[data-path='/v1/chat/completions']", timeout=20_000)
        assert all(url.startswith((service.url, "data:")) for url in asked)


def test_the_api_is_described(service):
    described = service.http.get("/openapi.json").json()
    post = described["paths"][CHAT]["post"]
    schema = post["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "messages"} == set(schema["required"])
    assert set(post["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert {"200", "400", "401", "404", "413", "429"} <= set(post["responses"])
    references = set(re.findall(r'"#/components/schemas/(\w+)"', service.http.get("/openapi.json").text))
    assert references <= set(described["components"]["schemas"])


def test_counts_are_prometheus(service):
    before = numbers(service)
    service.text("你是谁?")
    time.sleep(0.05)
    now = numbers(service)
    for name in (
        "labkit_generated_tokens_total",
        "labkit_prompt_tokens_total",
        "labkit_request_seconds_count",
    ):
        assert now[name, ()] > before[name, ()]
    assert now["labkit_running_answers", ()] == now["labkit_waiting_answers", ()] == 0
    assert now["labkit_time_to_first_token_seconds_count", ()] == now["labkit_request_seconds_count", ()]
    parts = {dict(labels)["part"] for name, labels in now if name == "labkit_memory_bytes"}
    assert {"decoder", "vision", "speech", "cross_modal", "kv_cache", "process"} <= parts


def numbers(service):
    families = text_string_to_metric_families(service.http.get("/metrics").text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_a_screen_to_try_is_drawn(service):
    assert service.http.get("/screen.png?seed=3").content[:4] == b"\x89PNG"
    assert service.http.get("/screen.png?seed=x").json()["error"]["param"] == "seed"
    assert service.http.get("/screen.png?seed=-1").status_code == 400
