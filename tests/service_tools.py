"""A service for tests: a real server on a free port, in a thread of this process, and ways to ask it."""

import base64
import contextlib
import io
import json
import threading
import time

import httpx
import numpy as np
import soundfile
import tiny_models
from PIL import Image

from labkit.engine.engine import Engine
from labkit.models.processors import TemplateProcessor
from labkit.models.spec import ModelSpec
from labkit.service.backend import EngineBackend
from labkit.service.options import ServiceOptions
from labkit.service.serve import Server, listening

CHAT = "/v1/chat/completions"


class Running:
    """A running service: ``url``, ``backend``, and a plain HTTP client ``http``."""

    def __init__(self, backend, options, url):
        self.backend, self.options, self.url = backend, options, url
        self.scheduler = getattr(backend, "scheduler", None)
        self.http = httpx.Client(base_url=url, trust_env=False, timeout=60)

    def ask(self, content="hello", **fields):
        """The JSON of one answer, which must be there."""
        response = self.post(content, **fields)
        assert response.status_code == 200, response.text
        return response.json()

    def text(self, content="hello", **fields):
        return self.ask(content, **fields)["choices"][0]["message"]["content"]

    def post(self, content="hello", **fields):
        return self.http.post(CHAT, json=body(content, **fields))

    def events(self, content="hello", **fields):
        """The data of every event of a stream, parsed; the last must be [DONE], which is left out."""
        with self.http.stream("POST", CHAT, json=body(content, stream=True, **fields)) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]

    def wait_until_idle(self, seconds=5):
        """Every row and place is free again."""
        ends = time.monotonic() + seconds
        while self.scheduler.running or self.scheduler.waiting:
            assert time.monotonic() < ends, (self.scheduler.running, self.scheduler.waiting)
            time.sleep(0.01)


def reader():
    """A tiny engine of a text model."""
    return Engine(
        tiny_models.llama(), TemplateProcessor(tiny_models.tokenizer()), spec=ModelSpec("tiny", ".")
    )


def body(content="hello", **fields):
    messages = fields.pop("messages", [{"role": "user", "content": content}])
    return {"model": "autoglm-phone-9b", "answer_tags": True, "messages": messages, **fields}


def streamed(events, field="content", index=0):
    """The text that a stream's events make together."""
    deltas = [choice["delta"] for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(delta.get(field) or "" for delta in deltas)


def as_content(messages):
    """The one user turn of a PhoneTap item, as OpenAI's clients send it."""
    [message] = messages
    parts = [message["content"]] if isinstance(message["content"], str) else message["content"]
    return [as_part(part) for part in parts]


def as_part(part):
    if part["type"] == "image":
        return image_part(part["image"])
    if part["type"] == "audio":
        return audio_part(part["audio"])
    return part


def image_part(image):
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(png(image))}"}}


def audio_part(samples, rate=16_000, format="wav", **options):
    data = sound(samples, rate, format, **options)
    return {"type": "input_audio", "input_audio": {"data": encoded(data), "format": format}}


def sound(samples, rate=16_000, format="wav", **options):
    buffer = io.BytesIO()
    options = options or ({"subtype": "FLOAT"} if format == "wav" else {})
    soundfile.write(buffer, samples, rate, format=format.upper(), **options)
    return buffer.getvalue()


def tone(seconds=1.0, rate=16_000):
    return (0.1 * np.sin(np.arange(int(seconds * rate)) * 0.1)).astype(np.float32)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def screen(width=112, height=224):
    return Image.linear_gradient("L").resize((width, height)).convert("RGB")


def encoded(data):
    return base64.b64encode(data).decode()


@contextlib.contextmanager
def running(engine, **options):
    """Serve an engine; ready when the block begins, stopped in good order when it ends."""
    options = ServiceOptions(**{"port": 0, "grace_s": 10, **options})
    backend = EngineBackend(engine, options)
    with serving(backend, options) as service:
        ends = time.monotonic() + 120
        while not backend.is_ready:
            assert backend.trouble is None, backend.trouble
            assert time.monotonic() < ends
            time.sleep(0.02)
        yield service


@contextlib.contextmanager
def serving(backend, options):
    """Serve any backend."""
    with listening(options) as listener:
        server = Server(backend, options, listener)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        service = Running(backend, options, f"http://127.0.0.1:{listener.getsockname()[1]}")
        try:
            yield service
        finally:
            service.http.close()
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive(), "the service did not stop"
