"""`labkit.client`, OpenAI's own client and LangChain's talk to the service; all get what the engine gives."""

import asyncio
import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai import ChatOpenAI
from PIL import Image
from service_tools import as_content, encoded, png, running

import labkit
from labkit import phonetap
from labkit.client import AsyncClient, Client, ClientError, audio_part, image_part, user_message
from labkit.client.langchain import ReasoningChatOpenAI
from labkit.common.actions import parse_answer
from labkit.common.errors import MediaError
from labkit.common.messages import normalise_messages
from labkit.phonetap.recordings import load_recording

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(labkit.get_spec("pocket").availability() != "here", reason="no pocket model"),
]
WHO = "你是谁?"
THINK = {"enable_thinking": True, "return_reasoning": True}


@pytest.fixture(scope="module")
def engine():
    return labkit.load("pocket", "bf16", "cpu", progress=False)


@pytest.fixture(scope="module")
def service(engine):
    with running(labkit.load("pocket", "bf16", "cpu", progress=False)) as one:
        yield one


@pytest.fixture(scope="module")
def url(service):
    return f"{service.url}/v1"


@pytest.fixture(scope="module")
def client(url):
    with Client(url) as one:
        yield one


@pytest.fixture(scope="module")
def typed():
    return phonetap.items("typed", 1)[0]


@pytest.fixture(scope="module")
def spoken():
    return phonetap.items("spoken", 1)[0]


def test_screens_and_recordings_get_the_engines_answer(client, engine, typed, spoken):
    expected = engine.generate(typed.messages()).text
    assert client.ask(typed.instruction, image=typed.screen).text == expected
    assert client.ask(messages=typed.messages()).text == expected
    heard = engine.generate(spoken.messages()).text
    samples = load_recording(spoken.recording)
    assert client.ask(image=spoken.screen.image, audio=samples).text == heard
    assert client.ask(messages=spoken.messages()).text == heard


def test_files_are_sent_as_they_are(client, engine, typed, tmp_path):
    typed.screen.image.save(tmp_path / "screen.jpg", quality=80)
    content = [
        {"type": "image", "image": tmp_path / "screen.jpg"},
        {"type": "text", "text": typed.instruction},
    ]
    expected = engine.generate([{"role": "user", "content": content}]).text
    assert client.ask(typed.instruction, image=tmp_path / "screen.jpg").text == expected
    with pytest.raises(MediaError, match="does not exist"):
        client.ask(image=tmp_path / "nowhere.png")


def test_thinking_and_actions_are_taken_apart(client, engine):
    raw = engine.generate([{"role": "user", "content": WHO}], enable_thinking=True).text
    reply = client.ask(WHO, thinking=True)
    assert reply.reasoning == parse_answer(raw).thinking
    assert reply.action == parse_answer(raw).action
    assert reply.finish_reason == "stop"
    assert reply.usage["completion_tokens_details"]["reasoning_tokens"]
    assert client.act(WHO, temperature=2.0, seed=3).name


def test_a_stream_comes_in_pieces_and_makes_the_same_reply(client):
    whole, stream = client.ask(WHO, thinking=True), client.stream(WHO, thinking=True)
    pieces = list(stream)
    assert len(pieces) > 10
    assert "".join(piece.text for piece in pieces) == whole.text == stream.reply.text
    assert "".join(piece.reasoning for piece in pieces) == whole.reasoning
    assert (stream.reply.usage, stream.reply.finish_reason) == (whole.usage, "stop")


def test_leaving_a_stream_stops_it(client, service):
    with client.stream(WHO) as stream:
        next(stream)
    service.wait_until_idle(2)


def test_several_turns(client):
    first = client.ask(WHO)
    history = [user_message(WHO), first.message()]
    assert client.ask(WHO, messages=history).usage["prompt_tokens"] > first.usage["prompt_tokens"] + 10


def test_errors_say_what_the_service_says(client):
    with pytest.raises(ClientError, match="temperature") as caught:
        client.ask(WHO, temperature=9)
    assert (caught.value.status, caught.value.param) == (400, "temperature")
    with pytest.raises(ClientError, match="temperature"):
        list(client.stream(WHO, temperature=9))
    with pytest.raises(ClientError, match="does not answer"):
        Client("http://127.0.0.1:9/v1", model="x").ask("hello")
    with pytest.raises(MediaError, match="nothing is asked"):
        client.ask()


def test_thinking_that_was_returned_is_accepted_in_the_history(client):
    first = client.ask(WHO, thinking=True)
    plain = client.ask(WHO, messages=[user_message(WHO), first.message()])
    for field in ("reasoning_content", "reasoning"):
        spoken = {**first.message(), field: first.reasoning}
        assert client.ask(WHO, messages=[user_message(WHO), spoken]).text == plain.text


@contextlib.contextmanager
def scripted(*answers, pause_s=0.0):
    """A service that gives these answers in turn, each (status, headers, body); yields a base URL and the requests."""
    asked, left = [], list(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, headers, body = left.pop(0)
            time.sleep(pause_s)
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):  # a client that did not wait
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


BUSY = (429, {"Retry-After": "1"}, {"error": {"message": "too many requests", "param": None, "code": "busy"}})
EVENTS = {"Content-Type": "text/event-stream"}


def whole(**message):
    choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}
    return 200, {}, {"choices": [choice], "usage": {"completion_tokens": 3}}


def events(*deltas):
    told = [json.dumps({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas]
    return "".join(f"data: {line}\n\n" for line in told).encode()


def test_a_busy_service_says_when_to_come_back_and_is_asked_again_if_wished():
    with scripted(BUSY, BUSY, whole(content="hi")) as (url, asked):
        with pytest.raises(ClientError, match="too many requests") as caught:
            Client(url, model="x").ask("a")
        assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (429, "busy", 1.0)
        started = time.monotonic()
        assert Client(url, model="x", max_retries=1).ask("b").text == "hi"
        assert time.monotonic() - started >= 1
    assert [body["messages"][0]["content"] for body in asked] == ["a", "b", "b"]


def test_without_a_wish_only_openais_fields_are_sent_and_what_others_add_is_read():
    with scripted(whole(content=None, reasoning="hm"), whole(content="x", reasoning_content="so")) as (
        url,
        asked,
    ):
        first, second = Client(url, model="x").ask("a"), Client(url, model="x").ask("a", thinking=False)
    assert (first.text, first.reasoning, second.reasoning, first.tokens) == ("", "hm", "so", 3)
    assert 0 < first.total_s < 10
    assert asked[0].keys() == {"model", "messages"}
    assert asked[1]["enable_thinking"] is False


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_a_stream_that_breaks_off_keeps_what_came(field):
    broken = (
        events({field: "hm"}, {"content": "a"})
        + b'data: {"error": {"message": "no memory", "code": "x"}}\n\n'
    )
    with scripted((200, EVENTS, broken)) as (url, _):
        stream = Client(url, model="x").stream("a")
        with pytest.raises(ClientError, match="no memory") as caught:
            list(stream)
    assert (caught.value.status, caught.value.code) == (200, "x")
    assert (stream.reply.reasoning, stream.reply.text, stream.reply.finished) == ("hm", "a", False)
    assert 0 < stream.reply.ttft_s <= stream.reply.total_s


def test_a_connection_that_breaks_and_one_that_waits_too_long_are_told():
    cut = {**EVENTS, "Content-Length": "1000"}
    with scripted((200, cut, events({"content": "a"}))) as (url, _):
        with pytest.raises(ClientError, match="broke off") as caught:
            list(Client(url, model="x").stream("a"))
        assert caught.value.status == 200
    with scripted(whole(content="late"), pause_s=0.6) as (url, _):
        started = time.monotonic()
        with pytest.raises(ClientError, match="does not answer \\(ReadTimeout\\)") as caught:
            Client(url, model="x", timeout_s=0.2).ask("a")
        assert time.monotonic() - started < 0.6
        assert caught.value.status is None


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {"Content-Type": "text/html"}, b"<html>"), "no choices: is the base URL right"),
        ((200, {}, b"{"), "Expecting"),
        ((422, {}, {"detail": "Unexpected fields"}), "Unexpected fields"),
        ((502, {}, b"bad gateway"), "status 502"),
    ],
)
def test_what_speaks_another_protocol_is_told(answer, message):
    with scripted(answer, answer) as (url, _):
        with pytest.raises(ClientError, match=message):
            Client(url, model="x").ask("a")

        async def work():
            async with AsyncClient(url, model="x") as client:
                await client.ask("a")

        with pytest.raises(ClientError, match=message):
            asyncio.run(work())


def test_a_proxy_variable_does_not_come_between(url, monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert Client(url).models() == ["pocket", "autoglm-phone-9b"]
    assert ReasoningChatOpenAI(model="pocket", base_url=url, api_key="EMPTY").invoke(WHO).content


def test_the_same_with_await(url, client, typed):
    async def work():
        async with AsyncClient(url) as asked:
            replies = await asyncio.gather(
                *(asked.ask(typed.instruction, image=typed.screen) for _ in range(4))
            )
            assert (await asked.act(WHO)).name
            stream = await asked.stream(WHO, thinking=True)
            pieces = [piece async for piece in stream]
            return [reply.text for reply in replies], pieces, stream.reply

    texts, pieces, reply = asyncio.run(work())
    assert texts == [client.ask(typed.instruction, image=typed.screen).text] * 4
    assert "".join(piece.text for piece in pieces) == reply.text == client.ask(WHO, thinking=True).text


def test_openais_own_client_understands_everything(url, typed, engine):
    asked = openai.OpenAI(base_url=url, api_key="EMPTY", max_retries=0)
    messages = [{"role": "user", "content": as_content(typed.messages())}]
    options = {"model": "pocket", "messages": messages, "temperature": 0}
    whole = asked.chat.completions.create(**options, logprobs=True, top_logprobs=2)
    expected = engine.generate(typed.messages()).text
    assert whole.choices[0].message.content == expected
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    chunks = list(
        asked.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert [one.id for one in asked.models.list()] == ["pocket", "autoglm-phone-9b"]
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        asked.chat.completions.create(model="gpt-4", messages=messages)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        asked.chat.completions.create(**options | {"temperature": 9})


def articles_model(url, kind=ChatOpenAI, **more):
    """As the article has it."""
    return kind(
        model="autoglm-phone-9b",
        temperature=0.5,
        base_url=url,
        api_key="EMPTY",
        extra_body=THINK,
        streaming=True,
        **more,
    )


def test_the_articles_client_works_as_it_is(url):
    answer = articles_model(url).invoke(WHO)
    assert parse_answer(answer.content).action is not None
    assert answer.response_metadata["finish_reason"] == "stop"


def test_langchain_keeps_the_thinking_with_the_labs_class(url, client):
    expected = client.ask(WHO, thinking=True)
    for streaming in (True, False):
        model = ReasoningChatOpenAI(
            model="pocket",
            temperature=0,
            base_url=url,
            api_key="EMPTY",
            extra_body=THINK,
            streaming=streaming,
        )
        answer = model.invoke(WHO)
        assert answer.content == expected.text
        assert answer.additional_kwargs["reasoning_content"] == expected.reasoning
        assert {"type": "reasoning", "reasoning": expected.reasoning} in answer.content_blocks
        again = model.invoke([HumanMessage(WHO), answer, HumanMessage(WHO)])
        assert isinstance(again, AIMessage)
    merged = None
    for chunk in model.stream(WHO):
        merged = chunk if merged is None else merged + chunk
    assert merged.additional_kwargs["reasoning_content"] == expected.reasoning
    assert merged.content == expected.text


def test_langchain_sends_screens_batches_and_structures(url, typed, engine):
    model = ChatOpenAI(model="pocket", temperature=0, base_url=url, api_key="EMPTY", max_tokens=300)
    picture = {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{encoded(png(typed.screen.image))}"},
    }
    message = HumanMessage([picture, {"type": "text", "text": typed.instruction}])
    expected = engine.generate(typed.messages()).text
    assert model.invoke([message]).content == expected
    assert [one.content for one in model.batch([[message]] * 4)] == [expected] * 4
    schema = {
        "title": "Point",
        "description": "where",
        "type": "object",
        "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 999}},
        "required": ["x"],
    }
    for method in ("json_schema", "function_calling"):
        made = model.with_structured_output(schema, method=method).invoke(WHO)
        assert 0 <= made["x"] <= 999
    assert model.invoke(WHO).usage_metadata["total_tokens"] > 20

    async def work():
        return [chunk.content async for chunk in model.astream(WHO)]

    assert "".join(asyncio.run(work())) == model.invoke(WHO).content


def test_parts_take_what_users_have(tmp_path, typed):
    typed.screen.image.save(tmp_path / "a.png")
    for image in (typed.screen, typed.screen.image, tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        assert image_part(image)["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert image_part("https://example.org/a.png")["image_url"]["url"] == "https://example.org/a.png"
    assert normalise_messages([user_message(image=Image.new("CMYK", (4, 6)))])[0]["content"][0][
        "image"
    ].size == (4, 6)
    assert audio_part([0.0, 0.1] * 800)["input_audio"]["format"] == "wav"
    assert len(user_message("x", image=[typed.screen, typed.screen])["content"]) == 3
    with pytest.raises(MediaError, match="not int"):
        image_part(5)
    with pytest.raises(MediaError, match="not int"):
        audio_part(5)


def test_importing_the_client_loads_nothing_heavy():
    code = "import sys, labkit.client; print(*sorted(m for m in sys.modules if '.' not in m))"
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
    )
    heavy = {
        "torch",
        "transformers",
        "openai",
        "httpx",
        "httpx2",
        "pydantic",
        "numpy",
        "PIL",
        "langchain_core",
        "fastapi",
    }
    assert not heavy & set(told.stdout.split())
