"""Clients that leave, wait too long or come in crowds; a broken engine; a stop in good order; keys."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
import tiny_models
from service_tools import CHAT, body, image_part, reader, running, screen, streamed

from labkit.common.errors import LabError
from labkit.engine.batching import Batch
from labkit.engine.forward import Forward
from labkit.service.options import ServiceOptions

LONG = {"max_tokens": 200}
STEP_S = 0.02


@pytest.fixture(scope="module")
def service():
    with running(reader(), streams=4, queue=4) as one:
        yield one


@pytest.fixture
def slow(service, monkeypatch):
    """Every token takes 20 ms: an answer of 200 tokens takes four seconds."""
    step = Forward.step

    def slow_step(self, *arguments, **options):
        time.sleep(STEP_S)
        return step(self, *arguments, **options)

    monkeypatch.setattr(Forward, "step", slow_step)
    service.wait_until_idle()
    yield service
    service.wait_until_idle(10)


def value(service, name):
    return service.backend.metrics.registry.get_sample_value(name) or 0


def raw(service, asked):
    """A connection on which a request was sent, and nothing read."""
    place = service.http.base_url
    connection = socket.create_connection((place.host, place.port))
    sent = json.dumps(asked).encode()
    connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(sent)}\r\n\r\n".encode()
        + sent
    )
    return connection


@contextlib.contextmanager
def crowd(service, count, **fields):
    """That many answers on their way, whose clients leave at the end."""
    connections = [raw(service, body(f"question {index}", **LONG, **fields)) for index in range(count)]
    ends = time.monotonic() + 5
    rows = min(count, service.options.streams)
    while (service.scheduler.running, service.scheduler.waiting) != (rows, count - rows):
        assert time.monotonic() < ends
        time.sleep(0.005)
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row_within_a_few_steps(slow, stream):
    gone = value(slow, "labkit_abandoned_requests_total")
    connection = raw(slow, body(stream=stream, **LONG))
    while not slow.scheduler.running:
        time.sleep(0.005)
    generated = value(slow, "labkit_generated_tokens_total")
    connection.close()
    slow.wait_until_idle(10 * STEP_S + 0.5)
    time.sleep(3 * STEP_S)
    assert value(slow, "labkit_generated_tokens_total") - generated < 30
    assert value(slow, "labkit_abandoned_requests_total") == gone + 1


def test_leaving_a_stream_in_its_middle_frees_the_row(slow):
    with slow.http.stream("POST", CHAT, json=body(stream=True, **LONG)) as response:
        for index, _ in enumerate(response.iter_lines()):
            if index > 6:
                break
    slow.wait_until_idle(1.5)


def test_a_client_that_leaves_the_queue_gives_its_place_back(slow):
    with crowd(slow, 6) as connections:
        assert slow.scheduler.running == 4
        connections[-1].close()
        connections[-2].close()
        ends = time.monotonic() + 2
        while slow.scheduler.waiting and time.monotonic() < ends:
            time.sleep(0.01)
        assert (slow.scheduler.running, slow.scheduler.waiting) == (4, 0)


def test_a_full_queue_answers_429_at_once_and_everything_else_goes_on(slow):
    with crowd(slow, 8):
        started = time.monotonic()
        refused = slow.post("one more")
        assert time.monotonic() - started < 1
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["code"] == "queue_full"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert slow.http.get("/health").status_code == 200
        assert slow.http.get("/v1/models").status_code == 200


def test_several_choices_count_as_several_answers(slow):
    with crowd(slow, 6):
        assert slow.post("many", n=3).status_code == 429


def test_health_answers_quickly_while_answers_are_generated(slow):
    with crowd(slow, 4):
        for path in ("/health", "/ready", "/metrics", "/status", "/"):
            started = time.monotonic()
            assert slow.http.get(path).status_code == 200
            assert time.monotonic() - started < 2


def test_an_answer_that_takes_too_long_is_given_up(slow):
    response = slow.post(timeout=0.2, **LONG)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "timeout"
    events = slow.events(timeout=0.2, **LONG)
    assert events[-1]["error"]["code"] == "timeout"
    assert events[0]["choices"]
    slow.wait_until_idle(1)


def test_the_services_own_limit_holds_too(monkeypatch):
    step = Forward.step
    monkeypatch.setattr(Forward, "step", lambda *a, **k: (time.sleep(STEP_S), step(*a, **k))[1])
    with running(reader(), timeout_s=0.3) as service:
        assert service.post(timeout=100.0, **LONG).status_code == 504


def test_an_answer_that_waits_too_long_for_its_turn_is_given_up(slow):
    with crowd(slow, 4):
        assert slow.post("late", timeout=0.3).status_code == 504


def test_a_slow_reader_harms_nobody(slow):
    with crowd(slow, 2, stream=True):
        assert slow.text("hello", max_tokens=3) is not None


def test_concurrent_streams_do_not_mix(service):
    texts = [f"question {index}" for index in range(12)]
    alone = [service.text(text, max_tokens=40) for text in texts]

    def ask(text):
        while True:
            response = service.post(text, max_tokens=40)
            if response.status_code != 429:
                return response.json()["choices"][0]["message"]["content"]
            time.sleep(0.05)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, texts)) == alone
    with ThreadPoolExecutor(4) as pool:
        events = pool.map(lambda text: streamed(service.events(text, max_tokens=40)), texts)
        assert list(events) == alone


def test_two_hundred_requests_over_eight_connections(service):
    texts = [f"q{index % 10}" for index in range(200)]
    alone = {text: service.text(text, max_tokens=8) for text in set(texts)}

    async def everything():
        async with httpx.AsyncClient(
            base_url=service.url, trust_env=False, timeout=60, limits=httpx.Limits(max_connections=8)
        ) as client:

            async def ask(text):
                response = await client.post(CHAT, json=body(text, max_tokens=8))
                return text, response.json()["choices"][0]["message"]["content"]

            return await asyncio.gather(*map(ask, texts))

    assert all(answer == alone[text] for text, answer in asyncio.run(everything()))
    service.wait_until_idle()


def test_memory_does_not_grow_with_requests(service):
    def work(count):
        for index in range(count):
            if index % 3 == 0:
                service.events("hello", max_tokens=4)
            else:
                service.post("hello" if index % 3 == 1 else [{"type": "wrong"}], max_tokens=4)

    work(60)
    before = psutil.Process().memory_info().rss
    work(240)
    assert psutil.Process().memory_info().rss - before < 12e6
    assert not service.scheduler._jobs


def test_an_engine_that_fails_once_fails_the_answers_of_that_step_only(service, monkeypatch, capfd):
    step, calls = Forward.step, []

    def broken(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("secret prompt")
        return step(self, *arguments, **options)

    monkeypatch.setattr(Forward, "step", broken)
    response = service.post(**LONG)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "secret" not in capfd.readouterr().out
    assert service.http.get("/health").status_code == 200
    assert service.ask(max_tokens=5)["usage"]["completion_tokens"] == 5
    service.wait_until_idle()


def test_an_error_inside_a_stream_is_an_event_and_the_stream_ends(service, monkeypatch):
    step, calls = Forward.step, []

    def broken(self, *arguments, **options):
        calls.append(1)
        if len(calls) > 5:
            raise RuntimeError
        return step(self, *arguments, **options)

    monkeypatch.setattr(Forward, "step", broken)
    events = service.events(**LONG)
    assert events[-1]["error"]["type"] == "server_error"
    assert events[0]["choices"]


def test_a_prompt_that_fails_leaves_the_others_alone(slow, monkeypatch):
    prefill = Forward.prefill

    def broken(self, inputs):
        if inputs["input_ids"].shape[1] > 60:
            raise RuntimeError
        return prefill(self, inputs)

    monkeypatch.setattr(Forward, "prefill", broken)
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(slow.ask, "short", max_tokens=30)
        time.sleep(0.1)
        assert slow.post("x" * 100).status_code == 500
        assert good.result()["usage"]["completion_tokens"] == 30


def test_a_stuck_engine_is_said_to_be_unhealthy(monkeypatch):
    with running(reader(), stuck_s=0.2) as service:
        free = threading.Event()
        step = Batch.step
        monkeypatch.setattr(Batch, "step", lambda self: (free.wait(10), step(self))[1])
        connection = raw(service, body())
        time.sleep(0.5)
        sick = service.http.get("/health")
        assert sick.status_code == service.http.get("/ready").status_code == 503
        assert "no token" in sick.json()["error"]["message"]
        free.set()
        service.wait_until_idle()
        assert service.http.get("/health").status_code == 200
        connection.close()


def test_not_ready_until_a_real_answer_was_generated(monkeypatch):
    step, free = Batch.step, threading.Event()
    monkeypatch.setattr(Batch, "step", lambda self: (free.wait(10), step(self))[1])
    seen = []
    from service_tools import serving

    from labkit.service.backend import EngineBackend

    options = ServiceOptions(port=0)
    with serving(EngineBackend(reader(), options, lambda: seen.append("ready")), options) as service:
        waiting = service.http.get("/ready")
        assert (waiting.status_code, waiting.json()["error"]["code"]) == (503, "not_ready")
        assert service.http.get("/health").status_code == 200
        assert not seen
        free.set()
        while service.http.get("/ready").status_code != 200:
            time.sleep(0.02)
        assert seen == ["ready"]
        assert value(service, "labkit_generated_tokens_total") >= 8


def test_stopping_finishes_what_runs(monkeypatch):
    step = Forward.step
    monkeypatch.setattr(Forward, "step", lambda *a, **k: (time.sleep(0.01), step(*a, **k))[1])
    with ThreadPoolExecutor(1) as pool:
        with running(reader()) as service:
            client = httpx.Client(base_url=service.url, trust_env=False, timeout=30)
            answer = pool.submit(client.post, CHAT, json=body(max_tokens=100))
            while not service.scheduler.running:
                time.sleep(0.005)
        assert answer.result().json()["usage"]["completion_tokens"] == 100
        client.close()


def test_the_key_is_asked_for_and_compared():
    with running(reader(), api_key="sesame") as service:
        missing, wrong = (
            service.post(),
            service.http.post(CHAT, json=body(), headers={"Authorization": "Bearer x"}),
        )
        closed = ("/v1/models", "/status", "/metrics", "/screen.png", "/nothing")
        for refused in (missing, wrong, *map(service.http.get, closed), service.http.head("/status")):
            assert refused.status_code == 401
            assert refused.request.method == "HEAD" or refused.json()["error"]["code"] == "invalid_api_key"
            assert "sesame" not in refused.text
        right = {"Authorization": "Bearer sesame"}
        assert service.http.post(CHAT, json=body(max_tokens=2), headers=right).status_code == 200
        odd = {"Authorization": "Bearer é".encode()}
        assert service.http.get("/v1/models", headers=odd).status_code == 401
        assert service.http.get("/status", headers=right).json()["ready"]
        assert service.http.get("/metrics", headers=right).status_code == 200
        for path in (
            "/health",
            "/ready",
            "/",
            "/page.js",
            "/docs",
            "/docs-assets/swagger-ui.css",
            "/openapi.json",
        ):
            assert service.http.get(path).status_code == 200


def test_without_a_key_any_will_do(service):
    right = {"Authorization": "Bearer EMPTY"}
    assert service.http.post(CHAT, json=body(max_tokens=2), headers=right).status_code == 200


def test_requests_keep_their_id_and_errors_are_counted(service):
    named = service.http.get("/health", headers={"X-Request-Id": "my-1"})
    assert named.headers["x-request-id"] == "my-1"
    odd = service.http.get("/health", headers={"X-Request-Id": "a b; c"}).headers["x-request-id"]
    assert len(odd) == 32
    name = 'labkit_requests_total{path="/v1/chat/completions",status="400"}'

    def count():
        lines = service.http.get("/metrics").text.splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)), 0)

    before = count()
    service.post([])
    assert count() == before + 1


def test_the_log_holds_no_prompts(service, capfd):
    service.post([image_part(screen()), {"type": "text", "text": "open sesame"}])
    service.http.get("/open-sesame")
    time.sleep(0.1)
    told = capfd.readouterr().out
    assert "400 in" in told
    assert "sesame" not in told
    assert "base64" not in told


def test_pages_of_other_origins_may_not_call_it(service):
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in service.http.options(CHAT, headers=asked).headers
    assert "access-control-allow-origin" not in service.http.get("/health", headers=asked).headers


def test_one_origin_can_be_let_in():
    with running(reader(), cors_origin="https://good.example") as service:
        answer = service.http.get("/health", headers={"Origin": "https://good.example"})
        assert answer.headers["access-control-allow-origin"] == "https://good.example"
        other = service.http.get("/health", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


def test_small_answers_do_not_wait_for_acknowledgements(service):
    """Without TCP_NODELAY each takes 40 ms longer."""

    def seconds():
        started = time.perf_counter()
        service.http.get("/health")
        return time.perf_counter() - started

    assert min(seconds() for _ in range(20)) < 0.03


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"streams": 0}, "streams is 0"),
        ({"queue": -1}, "queue is -1"),
        ({"port": 70_000}, "port is 70000"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"api_key": "two words"}, "API key"),
    ],
)
def test_options_out_of_range_are_refused(options, told):
    with pytest.raises(LabError, match=told):
        ServiceOptions(**options)


ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_command_serves_warns_and_stops_on_a_signal(tmp_path):
    tiny_models.llama().save_pretrained(tmp_path / "tiny")
    tiny_models.tokenizer().save_pretrained(tmp_path / "tiny")
    command = [
        sys.executable,
        "-m",
        "labkit",
        "serve",
        str(tmp_path / "tiny"),
        "--port",
        "0",
        "--host",
        "0.0.0.0",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if line.startswith("[SUCCESS]"):
                break
        url = next(line for line in lines if "FastAPI server started at" in line).rpartition(" ")[2]
        answer = httpx.post(url + CHAT, json=body(max_tokens=3), trust_env=False, timeout=30)
        process.send_signal(signal.SIGTERM)
        lines += process.stdout.read().splitlines()
        assert process.wait(20) == 0
    assert answer.json()["usage"]["completion_tokens"] == 3
    assert lines[0].startswith("[WARNING] Listening on 0.0.0.0 without an API key")
    assert lines[1] == "[INFO] Loading tiny with its plan..."
    assert lines[2].startswith("[INFO] Model loaded on ")
    assert lines[4] == "[SUCCESS] tiny service is ready for inference!"
    assert lines[-1] == "[INFO] The service has stopped"
