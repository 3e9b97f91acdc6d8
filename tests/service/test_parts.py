"""The service's parts by themselves: thinking, narrow schemas, tool schemas, remote images, arguments."""

import argparse
import asyncio
import json

import httpx
import pytest

from labkit.common.actions import Action, format_action
from labkit.common.errors import ApiError, LabError, MediaError
from labkit.service import remote
from labkit.service.arguments import add_service_arguments, options_of
from labkit.service.choice import ChoiceReader, thinks_apart
from labkit.service.conversation import lab_messages
from labkit.service.options import API_KEY_VARIABLE, ServiceOptions
from labkit.service.reasoning import ReasoningSplitter, TagFilter
from labkit.service.remote import RemoteImages, public_address
from labkit.service.scheduler import Event
from labkit.service.schema_limits import narrowed
from labkit.service.schemas import FunctionDefinition, read_request
from labkit.service.tools import ToolUse, as_tool_call, call_schema, tool_use

ANSWERS = [
    ("<think>a b</think><answer>x</answer>", False, "a b", "<answer>x</answer>"),
    ("<think>\na\n</think>\n\nx < y", False, "a\n", "x < y"),
    ("a</think>x", True, "a", "x"),
    ("no thinking, <think>not here</think>", False, "", "no thinking, <think>not here</think>"),
    ("<think>cut of", False, "cut of", ""),
    ("<think>cut off</thi", False, "cut off</thi", ""),
    ("<thin", False, "", "<thin"),
    ("  \n<think></think>x", False, "", "x"),
    ("", False, "", ""),
    ("<think>a</think>b", True, "a", "b"),
    (
        '\n<answer>do(action="Type", text="</think>")',
        True,
        "",
        '\n<answer>do(action="Type", text="</think>")',
    ),
]


@pytest.mark.parametrize(("text", "opened", "thinking", "answer"), ANSWERS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_thinking_is_split_off_wherever_the_pieces_fall(text, opened, thinking, answer, size):
    splitter, thoughts, answers = ReasoningSplitter(opened), "", ""
    for at in range(0, len(text), size):
        thought, said = splitter.push(text[at : at + size])
        assert not (said and thought) or splitter.thinking is False
        thoughts, answers = thoughts + thought, answers + said
    thought, said = splitter.flush()
    assert (thoughts + thought, answers + said) == (thinking, answer)


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_answer_tags_are_taken_out_wherever_the_pieces_fall(size):
    text, tags = "a < b <answer>do(x)</answer> <ans", TagFilter()
    pieces = [tags.push(text[at : at + size]) for at in range(0, len(text), size)]
    assert "".join(pieces) + tags.flush() == "a < b do(x) <ans"


@pytest.mark.parametrize("size", [1, 3, 8, 100])
@pytest.mark.parametrize(
    "typed", ["a</answer>b", "<answer>", 'say "</answer>"', "</answer>", "\\</answer>\n)", "'</answer>'"]
)
def test_answer_tags_that_an_action_types_stay(typed, size):
    for action in (Action("Type", {"text": typed}), Action("finish", {"message": typed})):
        call, tags = format_action(action), TagFilter()
        text = f"<think>{call}</think><answer>{call}</answer>"
        pieces = [tags.push(text[at : at + size]) for at in range(0, len(text), size)]
        assert ("".join(pieces) + tags.flush()).endswith(f"</think>{call}")


CALL = '{"name": "f", "arguments": {"a": "</answer>"}}'


def read_all(text, finish_reason, size, **options):
    """The reader, and the texts that its stream gave."""
    reader, content, reasoning = ChoiceReader(0, **options), "", ""
    events = [Event(0, text[at : at + size]) for at in range(0, len(text), size)]
    for event in [*events, Event(0, finish_reason=finish_reason)]:
        news = reader.read(event)
        content, reasoning = content + news.content, reasoning + news.reasoning
    assert (content, reasoning) == (reader.content, reader.reasoning)
    return reader


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize("tools", [ToolUse(), ToolUse((FunctionDefinition(name="f"),))])
@pytest.mark.parametrize(
    ("text", "opened", "finish_reason", "reasoning", "content"),
    [
        ("<think>on and on", False, "stop", "on and on", "on and on"),
        ("on and on</thi", True, "stop", "on and on</thi", "on and on</thi"),
        ("<think>on and on", False, "length", "on and on", ""),
        ("<think>a</think>b <think>c", False, "stop", "a", "b <think>c"),
        ("<think>a<answer>b</answer>", False, "stop", "a<answer>b</answer>", "a<answer>b</answer>"),
        ("<answer>b</answer>", True, "stop", "", "<answer>b</answer>"),
        ("<think></think>b", False, "stop", "", "b"),
        ("<thi", True, "stop", "<thi", "<thi"),
    ],
)
def test_nothing_that_a_model_wrote_is_lost(text, opened, finish_reason, reasoning, content, tools, size):
    reader = read_all(text, finish_reason, size, apart=True, opened=opened, tools=tools)
    assert (reader.reasoning, reader.content) == (reasoning, content)
    assert reader.finish_reason == finish_reason


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize("must", [False, True])
@pytest.mark.parametrize(
    ("text", "reasoning"),
    [(f"<think>it is f</think>\n{CALL}", "it is f"), (f"<think>{CALL}", CALL), (CALL, "")],
)
def test_a_call_after_thinking_is_one_and_keeps_its_text(text, reasoning, must, size):
    tools = ToolUse((FunctionDefinition(name="f"),), must=must)
    reader = read_all(text, "stop", size, apart=True, tools=tools, tags=False)
    assert (reader.reasoning, reader.content, reader.finish_reason) == (reasoning, "", "tool_calls")
    assert json.loads(reader.tool_call.function.arguments) == {"a": "</answer>"}


@pytest.mark.parametrize(
    ("fields", "apart"),
    [
        ({}, False),
        ({"enable_thinking": True}, False),
        ({"enable_thinking": False}, True),
        ({"return_reasoning": True}, True),
        ({"response_format": {"type": "json_object"}}, True),
        ({"response_format": {"type": "action"}}, False),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, True),
    ],
)
def test_where_thinking_goes(fields, apart):
    request = read_request({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})
    assert thinks_apart(request, tool_use(request)) is apart


def test_a_deep_schema_is_refused_at_the_door():
    schema = {"type": "null"}
    for _ in range(300):
        schema = {"items": schema}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    for fields in ({"response_format": wanted}, {"tools": tools}):
        with pytest.raises(ApiError, match="nested more than 100 levels deep"):
            read_request({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})


@pytest.mark.parametrize(
    "text",
    [
        '{"name": ["f"], "arguments": {}}',
        '{"name": "f", "arguments": {"a": NaN}}',
        '{"name": "f", "arguments": [1]}',
    ],
)
def test_what_is_no_call_is_content(text):
    assert as_tool_call(text, {"f"}) is None


def test_arguments_can_be_sent_whatever_they_hold():
    call = as_tool_call('{"name": "f", "arguments": {"a": "\\ud800", "b": "é"}}', {"f"})
    assert json.loads(call.model_dump_json())["function"]["arguments"].isascii()
    assert json.loads(call.function.arguments) == {"a": "\ud800", "b": "é"}


def test_narrow_schemas_close_objects_and_bound_strings():
    schema = {
        "type": "object",
        "properties": {
            "free": {"type": "string"},
            "short": {"type": "string", "maxLength": 3},
            "kind": {"enum": ["a"], "default": {"properties": {}}},
            "inner": {"type": "object", "properties": {"x": {"type": ["string", "null"]}}},
            "open": {"type": "object", "properties": {}, "additionalProperties": True},
        },
    }
    made = narrowed(schema, 400)
    assert made["additionalProperties"] is False
    assert made["properties"]["free"]["maxLength"] == 100
    assert made["properties"]["inner"]["properties"]["x"]["maxLength"] == 100
    assert made["properties"]["inner"]["additionalProperties"] is False
    for name in ("short", "kind", "open"):
        assert made["properties"][name] == schema["properties"][name]
    assert "additionalProperties" not in schema


def test_a_property_that_is_called_like_a_keyword_is_left_in_place():
    schema = {"type": "object", "properties": {"properties": {"type": "string"}, "type": {"type": "integer"}}}
    made = narrowed(schema, 100)
    assert set(made["properties"]) == {"properties", "type"}
    assert made["properties"]["type"] == {"type": "integer"}


def test_definitions_of_several_functions_do_not_mix():
    def function(name, kind):
        return FunctionDefinition(
            name=name,
            parameters={
                "type": "object",
                "properties": {"a": {"$ref": "#/$defs/A"}},
                "$defs": {"A": {"type": kind}},
            },
        )

    schema = call_schema([function("f", "integer"), function("g", "boolean")])
    first, second = schema["anyOf"]
    for number, call, kind in ((0, first, "integer"), (1, second, "boolean")):
        reference = call["properties"]["arguments"]["properties"]["a"]["$ref"]
        assert reference == f"#/$defs/tool{number}_A"
        assert schema["$defs"][f"tool{number}_A"] == {"type": kind}


def test_a_call_that_was_cut_off_is_none():
    whole = '{"name": "f", "arguments": {"a": "é"}}'
    assert as_tool_call(whole[:18], {"f"}) is None
    assert as_tool_call(whole, {"g"}) is None
    for text in (whole, f"<tool_call>\n{whole}\n</tool_call>"):
        assert json.loads(as_tool_call(text, {"f"}).function.arguments) == {"a": "é"}


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "content"),
    [
        ('<tool_call>{"name": "f", "arguments": {}}</tool_call>', ""),
        (' {"name": "f", "arguments": {}}', ""),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}'),
        ("<tool is a word", "<tool is a word"),
        ("hello {}", "hello {}"),
    ],
)
def test_a_model_that_may_call_is_streamed_unless_it_calls(text, content, size):
    reader = ChoiceReader(0, tools=ToolUse((FunctionDefinition(name="f"),)))
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    told = [reader.read(Event(0, piece)) for piece in pieces] + [reader.read(Event(0, finish_reason="stop"))]
    assert "".join(news.content for news in told) == content
    assert (told[-1].finish_reason == "tool_calls") == (content == "")
    if text.startswith("hello") and size == 1:
        assert told[0].content == "h"


PRIVATE = [
    "127.0.0.1", "10.1.2.3", "192.168.0.1", "169.254.169.254", "172.16.0.1", "0.0.0.0", "100.64.0.1", "224.0.0.1",
    "::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1", "2002:7f00:1::", "localhost", "2130706433", "0x7f.1",
]  # fmt: skip


@pytest.mark.parametrize("name", PRIVATE)
def test_private_addresses_are_never_fetched(name):
    with pytest.raises(MediaError, match=r"not on the public internet|unknown"):
        asyncio.run(public_address(name, 80))


def fetched(handler, url="http://example.test/a.png", monkeypatch=None):
    async def work():
        images = RemoteImages(httpx.MockTransport(handler))
        try:
            return await images.fetch(url)
        finally:
            await images.close()

    return asyncio.run(work())


@pytest.fixture
def names(monkeypatch):
    """example.test is public, inside.test is not."""

    async def address(name, port):
        if name != "example.test":
            raise MediaError("the image's host is not on the public internet")
        return "203.0.113.7"

    monkeypatch.setattr(remote, "public_address", address)


def test_an_image_is_fetched_from_the_address_that_was_checked(names):
    asked = []

    def handler(request):
        asked.append((str(request.url), request.headers["host"], request.extensions["sni_hostname"]))
        return httpx.Response(200, content=b"picture")

    assert fetched(handler, "https://example.test:8443/a.png?x=1") == b"picture"
    assert asked == [("https://203.0.113.7:8443/a.png?x=1", "example.test:8443", "example.test")]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (httpx.Response(302, headers={"location": "http://inside.test/"}), "not on the public"),
        (httpx.Response(302, headers={"location": "file:///etc/passwd"}), "http://"),
        (httpx.Response(302, headers={"location": "/again"}), "redirects"),
        (httpx.Response(404), "status 404"),
        (httpx.Response(200, content=b"x" * (remote.MAX_BYTES + 1)), "larger than"),
    ],
)
def test_redirects_errors_and_large_bodies_are_refused(names, answer, told):
    with pytest.raises(MediaError, match=told):
        fetched(lambda request: answer)


def test_a_server_that_hangs_is_given_up(names, monkeypatch):
    monkeypatch.setattr(remote, "SECONDS", 0.1)

    async def handler(request):
        await asyncio.sleep(5)

    with pytest.raises(MediaError, match="not there within"):
        fetched(handler)


@pytest.mark.parametrize(
    "url", ["http://", "ftp://example.test/x", "http://a:b@example.test/x", "http://[bad/"]
)
def test_odd_addresses_are_refused(names, url):
    with pytest.raises(MediaError):
        fetched(lambda request: httpx.Response(200), url)


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_service_arguments(parser)
    return parser.parse_args(words)


def test_the_arguments_defaults_are_the_options(monkeypatch):
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert options_of(parsed()) == ServiceOptions()
    monkeypatch.setenv(API_KEY_VARIABLE, "secret")
    assert options_of(parsed("--streams", "3", "--timeout", "5")) == ServiceOptions(
        streams=3, timeout_s=5.0, api_key="secret"
    )
    assert "secret" not in repr(options_of(parsed()))


def test_several_gpus_need_vllm():
    with pytest.raises(LabError, match="--engine vllm"):
        options_of(parsed("--tensor-parallel-size", "2"))


def test_an_assistant_that_only_refused_is_remembered():
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "Never."}]},
        {"role": "assistant", "refusal": "not this", "content": "Yes."},
    ]
    request = read_request({"model": "x", "messages": messages})
    made = [message["content"] for message in lab_messages(request.messages, {})]
    assert made == ["hi", "No.", [{"type": "text", "text": "Never."}], "Yes."]
    with pytest.raises(ApiError, match="content, a refusal or tool_calls"):
        read_request({"model": "x", "messages": [{"role": "assistant", "refusal": None}]})
