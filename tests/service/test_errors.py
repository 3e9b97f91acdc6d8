"""Bad input: OpenAI's error object with the right status, at once, and the service goes on for everybody else."""

import io
import json
import socket
import time
import zlib

import numpy as np
import pytest
import tiny_models
from PIL import Image
from service_tools import (
    CHAT,
    audio_part,
    body,
    encoded,
    image_part,
    running,
    screen,
    sound,
    tone,
)

from labkit.engine.engine import Engine
from labkit.models.processors import TemplateProcessor
from labkit.models.spec import ModelSpec

MAX_BODY = 3_000_000
MAX_IMAGES = 3


@pytest.fixture(scope="module")
def service():
    engine = Engine(*tiny_models.pocket(), spec=ModelSpec("tiny", "."))
    with running(engine, max_body_bytes=MAX_BODY, max_images=MAX_IMAGES, max_recordings=2) as one:
        yield one


@pytest.fixture(scope="module")
def reader():
    """A service whose model only reads."""
    processor = TemplateProcessor(tiny_models.tokenizer())
    with running(Engine(tiny_models.llama(), processor, spec=ModelSpec("reader", "."))) as one:
        yield one


def check_error(response, status=400, param=None, told=""):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    [(name, error)] = response.json().items()
    assert name == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert told in error["message"], error
    if param is not None:
        assert error["param"] == param
    for secret in ("/work", "/home", "Traceback", "site-packages", ".py", "0x"):
        assert secret not in response.text
    return error


def check_alive(service):
    """A good request is answered after the bad one, and nothing is left of that."""
    assert service.post("hi", max_tokens=2).status_code == 200
    service.wait_until_idle()


BAD_BODIES = {
    "nothing": b"",
    "no JSON": b"hello",
    "half a document": b'{"model": "tiny", "messages": [',
    "a list": b"[]",
    "a string": b'"hello"',
    "null": b"null",
    "invalid UTF-8": b'{"model": "\xff\xfe"}',
    "a lone surrogate": rb'{"model": "tiny", "messages": [{"role": "user", "content": "\ud800"}]}',
    "10,000 nested lists": b'{"messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "100,000 nested objects": b'{"a":' * 100_000,
    "a number of 5,000 digits": b'{"model": "tiny", "seed": ' + b"9" * 5_000 + b"}",
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_body_that_is_no_json_object(service, name):
    response = service.http.post(CHAT, content=BAD_BODIES[name], headers={"Content-Type": "application/json"})
    check_error(response)
    check_alive(service)


HELLO = {"role": "user", "content": "hello"}
BAD_MESSAGES = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": ["hello"]}, "messages.0"),
    ({"messages": [{}]}, "messages.0"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages.0"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
    (
        {"messages": [HELLO, {"role": "user", "content": [{"type": "text", "text": 1}]}]},
        "messages.1.content.0.text",
    ),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_MESSAGES)
def test_messages_of_the_wrong_form(service, fields, param):
    check_error(service.http.post(CHAT, json=body() | fields), param=param)
    check_alive(service)


def without(*names):
    return {name: value for name, value in body().items() if name not in names}


@pytest.mark.parametrize("name", ["model", "messages"])
def test_a_missing_field_is_named(service, name):
    check_error(service.http.post(CHAT, json=without(name)), param=name, told="required")


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_not_found(service, stream):
    response = service.http.post(CHAT, json=body(stream=stream) | {"model": "gpt-4"})
    error = check_error(response, 404, "model", "tiny")
    assert error["code"] == "model_not_found"


BAD_PARAMETERS = [
    {"max_tokens": 0},
    {"max_tokens": -1},
    {"max_tokens": 1.5},
    {"max_tokens": 8.0},
    {"max_tokens": "8"},
    {"max_tokens": True},
    {"max_tokens": 10**30},
    {"max_completion_tokens": 0},
    {"temperature": -0.1},
    {"temperature": 2.1},
    {"temperature": float("nan")},
    {"temperature": float("inf")},
    {"temperature": "hot"},
    {"top_p": 0},
    {"top_p": 1.1},
    {"top_p": float("nan")},
    {"top_k": -2},
    {"top_k": 1.5},
    {"n": 0},
    {"n": -1},
    {"n": 9},
    {"n": 1000},
    {"frequency_penalty": 3},
    {"presence_penalty": float("nan")},
    {"repetition_penalty": 0},
    {"repetition_penalty": -1},
    {"seed": 1.5},
    {"seed": 2**70},
    {"seed": "lucky"},
    {"stop": 5},
    {"stop": [5]},
    {"stop": ""},
    {"stop": ["x"] * 5000},
    {"stop": "x" * 5000},
    {"logit_bias": []},
    {"logit_bias": {"word": 1}},
    {"logit_bias": {"1": 101}},
    {"logit_bias": {"99999999": 1}},
    {"logit_bias": {"-1": 1}},
    {"logprobs": 5},
    {"top_logprobs": 21, "logprobs": True},
    {"top_logprobs": 5},
    {"stream": "yes"},
    {"stream_options": {"include_usage": True}},
    {"response_format": "json"},
    {"response_format": {"type": "xml"}},
    {"response_format": {"type": "json_schema"}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "made up"}}}},
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"$ref": "#/nowhere"}},
        }
    },
    {"response_format": {"type": "action"}, "max_tokens": 20},
    {"tools": "all"},
    {"tools": [{"type": "function"}]},
    {"tools": [{"type": "function", "function": {"name": "bad name!"}}]},
    {"tools": [{"type": "function", "function": {"name": "x"}}] * 2},
    {"tools": [{"type": "function", "function": {"name": "x"}}], "tool_choice": "maybe"},
    {
        "tools": [{"type": "function", "function": {"name": "x"}}],
        "tool_choice": {"type": "function", "function": {"name": "y"}},
    },
    {"tool_choice": "required"},
    {"enable_thinking": "yes"},
    {"chat_template_kwargs": {"enable_thinking": "yes"}},
    {"timeout": 0},
    {"timeout": float("nan")},
]


@pytest.mark.parametrize("fields", BAD_PARAMETERS, ids=lambda fields: str(fields)[:60])
@pytest.mark.parametrize("stream", [False, True])
def test_parameters_out_of_range(service, fields, stream):
    if stream and ("stream" in fields or "stream_options" in fields):
        pytest.skip("says itself whether to stream")
    asked = body(**({"stream": True} if stream else {})) | fields
    response = service.http.post(
        CHAT, content=json.dumps(asked), headers={"Content-Type": "application/json"}
    )
    error = check_error(response)
    assert error["param"], error
    assert error["param"].partition(".")[0] in {*fields, "tool_choice"}
    service.wait_until_idle()


def test_the_service_goes_on_after_all_that(service):
    check_alive(service)


def url(data, kind="image/png"):
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{encoded(data)}"}}


def bomb(width, height):
    """A small PNG that claims to be large."""

    def chunk(name, data):
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100_000))
        + chunk(b"IEND", b"")
    )


def cut_png():
    buffer = io.BytesIO()
    Image.effect_noise((300, 300), 50).save(buffer, "PNG")
    return buffer.getvalue()[:-20_000]


BAD_MEDIA = {
    "an image that is none": (url(b"hello"), "not an image"),
    "an empty image": (url(b""), "empty"),
    "a bomb": (url(bomb(60_000, 60_000)), "pixels"),
    "half an image": (url(cut_png()), "broken"),
    "a strip": (image_part(Image.new("RGB", (3000, 2))), "strip"),
    "broken base64": ({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@"}}, "base64"),
    "an image without a comma": ({"type": "image_url", "image_url": {"url": "data:image/png"}}, "comma"),
    "a web address": ({"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}, "data: URL"),
    "a file": ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "data: URL"),
    "a path": ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "data: URL"),
    "PostScript": (url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"), "not an image"),
    "a recording that is none": ({"type": "input_audio", "input_audio": {"data": encoded(b"hello")}}, "recording"),
    "an empty recording": ({"type": "input_audio", "input_audio": {"data": ""}}, "empty"),
    "broken base64 of a recording": ({"type": "input_audio", "input_audio": {"data": "@@@"}}, "base64"),
    "a recording too long": (audio_part(np.zeros(31 * 8000, np.float32) + 0.1, 8000, "flac", subtype="PCM_16"), "at most"),
    "a recording too short": (audio_part(tone(0.01)), "at least"),
    "silence": (audio_part(np.zeros(16_000, np.float32)), "silent"),
    "a recording of NaN": (audio_part(np.full(16_000, np.nan, np.float32)), "not numbers"),
    "an unknown format": (
        {"type": "input_audio", "input_audio": {"data": encoded(sound(tone())), "format": "m4a"}},
        "",
    ),
    "an image without an address": ({"type": "image_url", "image_url": {}}, "url"),
    "an unknown detail": ({"type": "image_url", "image_url": {"url": "data:,", "detail": "max"}}, "detail"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MEDIA)
def test_pictures_and_recordings_that_cannot_be_used(service, name):
    part, told = BAD_MEDIA[name]
    started = time.monotonic()
    response = service.post([part, {"type": "text", "text": "hello"}])
    error = check_error(response, told=told)
    assert error["param"].startswith("messages.0.content.0")
    assert time.monotonic() - started < 5
    check_alive(service)


@pytest.mark.parametrize(
    "part",
    [
        image_part(Image.new("RGB", (1, 1))),
        image_part(Image.new("RGBA", (40, 40), (0, 0, 0, 0))),
        image_part(Image.new("L", (30, 30))),
        url(b"GIF89a\x01\x00\x01\x00\x80\x00\x00\xff\xff\xff\x00\x00\x00!\xf9\x04\x00\x00\x00\x00\x00,\x00\x00\x00\x00\x01\x00\x01\x00\x00\x02\x02D\x01\x00;"),
    ],
    ids=["1x1", "transparent", "grey", "gif"],
)  # fmt: skip
def test_odd_but_whole_pictures_get_an_answer_or_a_reason(service, part):
    response = service.post([part, {"type": "text", "text": "x"}], max_tokens=2)
    if response.status_code != 200:
        check_error(response)
    check_alive(service)


@pytest.mark.parametrize("format", ["wav", "flac", "ogg", "mp3"])
def test_every_format_of_sound_is_heard(service, format):
    part = audio_part(tone(), format=format, **({} if format == "wav" else {"subtype": None}))
    assert service.post([part], max_tokens=2).status_code == 200


def test_several_pictures_and_recordings_keep_their_order(service):
    def told(*parts):
        answer = service.ask([*parts, {"type": "text", "text": "x"}], max_tokens=8, logprobs=True)
        return [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]]

    first, second = image_part(screen()), image_part(screen().rotate(180))
    assert told(first, second) != told(second, first)
    low, high = audio_part(tone()), audio_part(tone()[::3])
    assert told(low, high) != told(high, low)


def test_too_many_pictures_are_refused(service):
    response = service.post([image_part(screen())] * (MAX_IMAGES + 1))
    check_error(response, param=f"messages.0.content.{MAX_IMAGES}", told="at most 3 images")
    response = service.post([audio_part(tone(0.2))] * 3)
    check_error(response, told="at most 2 recordings")


def test_only_users_send_pictures(service):
    messages = [{"role": "system", "content": [image_part(screen())]}, HELLO]
    check_error(service.post(messages=messages), told="only user messages")


@pytest.mark.parametrize("part", [image_part(screen()), audio_part(tone())], ids=["image", "audio"])
def test_media_for_a_model_that_only_reads_are_refused(reader, part):
    check_error(reader.post([part]), told="reader does not take")


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context_is_refused_at_once(service, stream):
    started = time.monotonic()
    error = check_error(service.post("long " * 20_000, stream=stream), param="messages", told="tokens")
    assert error["code"] == "context_length_exceeded"
    assert time.monotonic() - started < 3
    check_alive(service)


def test_a_longest_answer_beyond_the_context_is_cut_to_it(reader):
    answer = reader.ask("x" * 200, max_tokens=3000)
    assert answer["usage"]["total_tokens"] <= 256
    assert answer["choices"][0]["finish_reason"] in ("length", "stop")


def test_control_tokens_in_text_are_letters_for_template_models_too(reader):
    plain = reader.ask("a b", max_tokens=1)["usage"]["prompt_tokens"]
    marked = reader.ask("a<|user|>b", max_tokens=1)["usage"]["prompt_tokens"]
    assert marked == plain + len("<|user|>") - 1


def test_a_body_over_the_limit(service):
    declared = service.http.post(CHAT, json=body("x" * (MAX_BODY + 1)))
    check_error(declared, 413, told="larger than")

    def pieces():
        for _ in range(40):
            yield b" " * 100_000

    chunked = service.http.post(CHAT, content=pieces(), headers={"Content-Type": "application/json"})
    check_error(chunked, 413)
    check_alive(service)


def test_a_body_that_is_not_declared_as_json(service):
    response = service.http.post(CHAT, content=json.dumps(body()), headers={"Content-Type": "text/plain"})
    check_error(response, 415)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/models/nobody", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("GET", "/v1/../../etc/passwd", 404),
        ("GET", "/docs-assets/../app.py", 404),
    ],
)
def test_addresses_that_are_not_there(service, method, path, status):
    response = service.http.request(method, path)
    check_error(response, status)
    if status == 405:
        assert response.headers["allow"]


def test_half_a_body_harms_nobody(service):
    place = service.http.base_url
    halves = []
    for _ in range(5):
        half = socket.create_connection((place.host, place.port))
        half.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Content-Length: 1000\r\n\r\n{"model": '
        )
        halves.append(half)
    check_alive(service)
    for half in halves:
        half.close()
    check_alive(service)


def test_a_body_that_never_ends_is_given_up():
    engine = Engine(*tiny_models.pocket(), spec=ModelSpec("tiny", "."))
    with running(engine, body_s=0.3) as service:
        place = service.http.base_url
        with socket.create_connection((place.host, place.port)) as half:
            half.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b'Content-Length: 1000\r\n\r\n{"model": '
            )
            half.settimeout(5)
            assert half.recv(100).startswith(b"HTTP/1.1 408")


def test_errors_never_quote_what_was_sent(service):
    marks = ["sesame-open", "x" * 300]
    for fields in (
        {"temperature": marks[0]},
        {"messages": [{"role": marks[0]}]},
        {"stop": [marks[1], marks[1] + "y"]},
    ):
        response = service.http.post(CHAT, json=body() | fields)
        check_error(response)
        assert not any(mark in response.text for mark in marks)
