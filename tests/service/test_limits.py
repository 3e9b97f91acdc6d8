"""What one client may take of what all share: connections, time for headers, bodies, text, pictures; and how it ends."""

import contextlib
import gc
import json
import logging
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import tiny_models
from service_tools import CHAT, body, image_part, reader, running, screen

from labkit.engine.engine import Engine
from labkit.engine.forward import Forward
from labkit.models.spec import ModelSpec
from labkit.service import app, connections, log, media
from labkit.service.options import ServiceOptions
from labkit.service.transport import Bodies

GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def service():
    with running(reader(), headers_s=0.5, max_connections=6, max_body_bytes=200_000) as shared:
        yield shared


def connect(service, sent=b""):
    connection = socket.create_connection(
        (service.http.base_url.host, service.http.base_url.port), timeout=20
    )
    connection.sendall(sent)
    return connection


def everything(connection):
    """All that comes until the other side closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65_536):
            received += piece
    connection.close()
    return received


def fresh(service, path="/health", **options):
    """A request on a connection of its own."""
    return httpx.get(service.url + path, trust_env=False, timeout=20, **options)


def error_of(response):
    """The error in the bytes of a response."""
    head, _, content = response.partition(b"\r\n\r\n")
    assert b"application/json" in head
    return int(head.split()[1]), json.loads(content)["error"]


@pytest.mark.parametrize("sent", [b"POST /v1/ch", GET + b"X-A: "])
def test_half_sent_headers_are_answered_and_closed_in_time(service, sent):
    connection = connect(service, sent)
    for _ in range(6):  # a letter now and then gains no time
        time.sleep(0.05)
        connection.sendall(b"a")
    status, error = error_of(everything(connection))
    assert (status, error["code"]) == (408, "timeout")


def test_a_connection_without_a_request_is_closed_in_time(service):
    assert everything(connect(service)) == b""


def test_headers_half_sent_after_an_answer_are_closed_in_time(service):
    connection = connect(service, GET + b"\r\n")
    assert b"200 OK" in connection.recv(65_536)
    connection.sendall(GET)
    status, error = error_of(everything(connection))
    assert (status, error["code"]) == (408, "timeout")


def test_what_is_no_http_gets_an_error_in_json(service):
    status, error = error_of(everything(connect(service, b"hello\r\n\r\n")))
    assert (status, error["code"]) == (400, "invalid_http")


def test_a_slow_body_has_the_time_for_bodies(service):
    asked = json.dumps(body(max_tokens=2)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = connect(service, f"{head}Connection: close\r\nContent-Length: {len(asked)}\r\n\r\n".encode())
    time.sleep(1)
    connection.sendall(asked)
    assert b" 200 OK" in everything(connection)


def test_held_connections_make_room_for_new_ones(service, capfd):
    held = [connect(service, GET + b"X-A: ") for _ in range(40)]
    assert [fresh(service).status_code for _ in range(8)] == [200] * 8
    for connection in held:
        connection.close()
    assert capfd.readouterr().out.count("connections are open") <= 3


def test_a_running_answer_keeps_its_connection(service, monkeypatch):
    step = Forward.step
    monkeypatch.setattr(Forward, "step", lambda *a, **k: (time.sleep(0.01), step(*a, **k))[1])
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, service.url + CHAT, json=body(max_tokens=60), timeout=60)
        while not service.scheduler.running:
            time.sleep(0.005)
        held = [connect(service, GET) for _ in range(30)]
        assert answer.result().json()["usage"]["completion_tokens"] == 60
    for connection in held:
        connection.close()


def test_connections_leave_file_descriptors_free(monkeypatch):
    resource = pytest.importorskip("resource")
    used = connections.psutil.Process().num_fds()
    for allowed, expected in ((used + 100, 100 - connections.SPARE_DESCRIPTORS), (used, 4), (10**6, 512)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, allowed=allowed: (allowed, allowed))
        assert connections.connection_limit(512) == expected
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert connections.connection_limit(512) == 512


def test_the_log_says_one_reason_once_a_second(monkeypatch, capfd):
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    log.take_over_libraries()
    for number in range(500):
        logging.getLogger("asyncio").error("no %s left", number, exc_info=OSError("secret"))
    now[0] += 1.5
    logging.getLogger("asyncio").error("no %s left", 0, exc_info=OSError("secret"))
    lines = capfd.readouterr().out.splitlines()
    assert lines == [
        "[ERROR] no 0 left: OSError in ",
        "[ERROR] no 0 left: OSError in  (and 499 times more before)",
    ]


def test_a_long_text_is_refused_before_it_is_tokenized(service, monkeypatch):
    tokenized = []
    monkeypatch.setattr(
        type(service.backend.engine.processor), "__call__", lambda *a, **k: tokenized.append(a)
    )
    response = service.post("hello world " * 10_000)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "characters" in response.json()["error"]["message"]
    assert not tokenized


def test_bodies_are_bounded_together(monkeypatch):
    made = []
    monkeypatch.setattr(app, "Bodies", lambda options: made.append(Bodies(options)) or made[0])
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    part = head + b"Content-Length: 199999\r\n\r\n" + b" " * 199_000
    with running(reader(), max_body_bytes=200_000) as service:
        held = [connect(service, part) for _ in range(8)]
        large = {"messages": [{"role": "user", "content": "hi"}], "user": "x" * 100_000, "max_tokens": 2}
        ends = time.monotonic() + 60
        while made[0].held < 8 * 199_000:
            assert time.monotonic() < ends
            time.sleep(0.05)
        busy = service.post(**large)
        assert (busy.status_code, busy.json()["error"]["code"]) == (429, "queue_full")
        assert service.post(max_tokens=2).status_code == 200
        for connection in held:
            connection.close()
        while service.post(**large).status_code != 200:
            assert time.monotonic() < ends
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b'{"x":[' + b"[]," * 300_000 + b"1]}", "too_many_values"),
        (json.dumps(body([{"type": "text", "text": ""}] * 1025)).encode(), "too_long"),
    ],
)
def test_a_document_of_very_many_values_is_refused(content, code):
    with running(reader()) as service:
        response = service.http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, code)


@pytest.fixture(scope="module")
def seeing():
    engine = Engine(*tiny_models.pocket(), spec=ModelSpec("tiny", "."))
    pixels = (
        112 * 224
    )  # more than an eighth of the limit: large, as pictures of tens of megapixels are by default
    with running(engine, max_pixels=3 * pixels) as shared:
        yield shared


def test_pictures_of_a_request_are_bounded_together(seeing):
    part = image_part(screen())
    assert seeing.post([part] * 3, max_tokens=2).status_code == 200
    response = seeing.post([part] * 4, max_tokens=2)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("too_many_pixels", "messages.0.content.3.image_url")
    assert "75,264 pixels together" in error["message"]


def test_pictures_of_all_requests_wait_for_each_other(seeing, monkeypatch):
    load, now, most = media.lab_messages, [0], [0]

    def counted(messages, fetched):
        now[0] += 1
        most[0] = max(most)
        most[0] = max(most[0], now[0])
        time.sleep(0.05)
        loaded = load(messages, fetched)
        now[0] -= 1
        return loaded

    monkeypatch.setattr(media, "lab_messages", counted)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: seeing.post([image_part(screen())] * 2, max_tokens=2), range(6)))
    assert {answer.status_code for answer in answers} == {200}
    assert most == [1]
    assert seeing.backend._chat.media.pixels.used == 0


def test_who_waits_too_long_for_others_pictures_is_told_so(seeing, monkeypatch):
    load, free = media.lab_messages, threading.Event()
    monkeypatch.setattr(media, "lab_messages", lambda *a: (free.wait(20), load(*a))[1])
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(seeing.post, [image_part(screen())] * 3, max_tokens=2)
        while not seeing.backend._chat.media.pixels.used:
            time.sleep(0.01)
        late = seeing.post([image_part(screen())], max_tokens=2, timeout=0.2)
        assert (late.status_code, late.json()["error"]["code"]) == (429, "queue_full")
        free.set()
        assert first.result().status_code == 200


def test_pictures_are_let_go_of_while_the_answer_runs(seeing, monkeypatch):
    load, images, requests = media.lab_messages, [], []

    def watched(messages, fetched):
        requests.append(messages)
        loaded = load(messages, fetched)
        images.append(weakref.ref(loaded[0]["content"][0]["image"]))
        return loaded

    monkeypatch.setattr(media, "lab_messages", watched)
    with seeing.http.stream(
        "POST", CHAT, json=body([image_part(screen())], max_tokens=30, stream=True)
    ) as response:
        lines = response.iter_lines()
        next(lines)
        gc.collect()
        assert images[0]() is None
        assert requests == [[]]
        assert list(lines)[-2] == "data: [DONE]"


def test_at_the_end_of_the_grace_clients_are_told_in_their_format(monkeypatch):
    step = Forward.step
    monkeypatch.setattr(Forward, "step", lambda *a, **k: (time.sleep(0.05), step(*a, **k))[1])
    with ThreadPoolExecutor(3) as pool, httpx.Client(trust_env=False, timeout=60) as client:
        with running(reader(), grace_s=1) as service:
            url = service.url + CHAT
            plain = pool.submit(client.post, url, json=body(max_tokens=200))
            stream = pool.submit(client.post, url, json=body(max_tokens=200, stream=True))
            while service.scheduler.running < 2:
                time.sleep(0.005)
            asked = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            half = pool.submit(
                everything, connect(service, f"{asked}Content-Length: 1000\r\n\r\n{{".encode())
            )
            time.sleep(0.2)
        assert plain.result().status_code == 503
        assert plain.result().json()["error"]["code"] == "stopping"
        lines = [line for line in stream.result().text.split("\n\n") if line]
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "stopping"
        assert lines[-1] == "data: [DONE]"
        assert error_of(half.result())[0] == 503


@pytest.mark.parametrize("path", ["/health", "/ready", "/", "/status", "/metrics", "/v1/models"])
def test_head_is_get_without_a_body(service, path):
    head, get = service.http.head(path), service.http.get(path)
    assert head.status_code == get.status_code == 200
    assert head.headers["content-type"] == get.headers["content-type"]
    assert head.content == b""
    assert service.http.head(CHAT).status_code == 405


def test_a_foreign_host_is_refused_unless_it_is_let_in(service, monkeypatch):
    for name in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
        for path in ("/v1/models", "/status", "/"):
            refused = fresh(service, path, headers={"Host": name})
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "host_not_allowed")
    for name in (
        "localhost",
        "localhost:8000",
        "[::1]:8000",
        "127.0.0.1",
        "laptop:8000",
        "app.localhost",
        socket.gethostname(),
    ):
        assert fresh(service, "/v1/models", headers={"Host": name}).status_code == 200
    with running(reader(), allowed_hosts="good.example, other.example") as named:
        assert fresh(named, "/v1/models", headers={"Host": "good.example:80"}).status_code == 200
        assert fresh(named, "/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert ServiceOptions(host="0.0.0.0").host_names is None
    assert ServiceOptions(allowed_hosts="*").host_names is None
    monkeypatch.setenv("JPY_PARENT_PID", "1")
    assert ServiceOptions().host_names is None
