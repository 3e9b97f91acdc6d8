"""The service answers as the engine does, alone and in company, whole and in pieces, with every parameter."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from service_tools import CHAT, as_content, body, image_part, running, screen, streamed

import labkit
from labkit import phonetap
from labkit.common.actions import parse_answer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(labkit.get_spec("pocket").availability() != "here", reason="no pocket model"),
]
WHO = "你是谁?"


@pytest.fixture(scope="module")
def engine():
    return labkit.load("pocket", "bf16", "cpu", progress=False)


@pytest.fixture(scope="module")
def service(engine):
    with running(engine, streams=8) as one:
        yield one


@pytest.fixture(scope="module")
def items():
    return [*phonetap.items("typed", 4), *phonetap.items("spoken", 4)]


@pytest.fixture(scope="module")
def expected(items):
    """What `labkit ask` and `labkit compare` get, from an engine that serves nobody."""
    alone = labkit.load("pocket", "bf16", "cpu", progress=False)
    return [alone.generate(item.messages()).text for item in items]


def test_typed_and_spoken_answers_are_the_engines(service, items, expected):
    assert [service.text(as_content(item.messages())) for item in items] == expected


@pytest.mark.parametrize("stream", [False, True])
def test_eight_at_once_get_what_each_gets_alone(service, items, expected, stream):
    def ask(item):
        content = as_content(item.messages())
        return streamed(service.events(content)) if stream else service.text(content)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, items)) == expected
    service.wait_until_idle()


def test_a_stream_begins_with_the_role_and_ends_with_one_reason(service):
    events = service.events(WHO)
    first, last = events[0]["choices"][0], events[-1]["choices"][0]
    assert first["delta"]["role"] == "assistant"
    assert last["delta"] == {}
    assert last["finish_reason"] == "stop"
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert len({(event["id"], event["model"], event["created"]) for event in events}) == 1
    assert not any("usage" in event for event in events)


def test_a_stream_makes_the_text_that_comes_whole(service):
    whole = service.ask(WHO, enable_thinking=True)
    events = service.events(WHO, enable_thinking=True, stream_options={"include_usage": True})
    assert streamed(events) == whole["choices"][0]["message"]["content"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])


def test_usage_adds_up_and_counts_pictures(service):
    plain, seen = (
        service.ask(WHO)["usage"],
        service.ask([image_part(screen()), {"type": "text", "text": WHO}]),
    )
    for usage in (plain, seen["usage"]):
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert seen["usage"]["prompt_tokens"] >= plain["prompt_tokens"] + 16


def test_thinking_stands_apart_or_inline_or_nowhere(service, engine):
    raw = engine.generate([{"role": "user", "content": WHO}], enable_thinking=True).text
    parts = parse_answer(raw)
    inline = service.ask(WHO, enable_thinking=True)["choices"][0]["message"]
    apart = service.ask(WHO, enable_thinking=True, return_reasoning=True)
    message = apart["choices"][0]["message"]
    off = service.ask(WHO, enable_thinking=False, return_reasoning=True)["choices"][0]["message"]
    assert parts.thinking
    assert inline["content"] == raw
    assert message["reasoning_content"] == message["reasoning"] == parts.thinking
    assert message["content"] == raw.partition("</think>")[2]
    assert apart["usage"]["completion_tokens_details"]["reasoning_tokens"] > 2
    for one in (inline, off):
        assert "reasoning_content" not in one
    assert "think" not in off["content"]


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template_kwargs": {"enable_thinking": True}, "include_reasoning": True},
        {"enable_thinking": True, "return_reasoning": True},
    ],
)
def test_both_spellings_of_thinking_are_understood(service, fields):
    events = service.events(WHO, **fields)
    kinds = [
        next(
            (name for name in ("reasoning_content", "content") if event["choices"][0]["delta"].get(name)), ""
        )
        for event in events
    ]
    told = [kind for kind in kinds if kind]
    assert set(told) == {"reasoning_content", "content"}
    assert told == sorted(told, reverse=True)  # thinking comes first
    assert streamed(events, "reasoning") == streamed(events, "reasoning_content")


def test_thinking_that_is_cut_off_does_not_become_the_answer(service):
    [choice] = service.ask(WHO, enable_thinking=True, return_reasoning=True, max_tokens=4)["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == ""
    assert choice["message"]["reasoning_content"]


def test_earlier_turns_are_accepted_with_their_reasoning(service):
    answer = service.ask(WHO, enable_thinking=True, return_reasoning=True)["choices"][0]["message"]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": WHO}, answer]
    assert service.text(messages=[*messages, {"role": "user", "content": [{"type": "text", "text": WHO}]}])


def test_a_seed_repeats_an_answer_and_each_choice_has_its_own(service):
    fields = {"temperature": 2.0, "seed": 7, "n": 3, "max_tokens": 24}
    first, second = service.ask(WHO, **fields), service.ask(WHO, **fields)
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert texts == [choice["message"]["content"] for choice in second["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert first["usage"]["prompt_tokens"] == service.ask(WHO)["usage"]["prompt_tokens"]
    events = service.events(WHO, **fields)
    assert [streamed(events, index=index) for index in range(3)] == texts


def test_a_stop_string_ends_the_answer_wherever_its_pieces_fall(service):
    whole = service.text(WHO)
    stop = whole[15:22]
    assert service.text(WHO, stop=[stop, "never there"]) == whole[:15]
    events = service.events(WHO, stop=stop)
    assert streamed(events) == whole[:15]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_longest_answer_is_as_asked(service):
    for fields in ({"max_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 50}):
        answer = service.ask(WHO, **fields)
        assert answer["usage"]["completion_tokens"] == 3
        assert answer["choices"][0]["finish_reason"] == "length"


def test_parameters_change_the_answer(service):
    plain = service.text(WHO)
    token = service.ask(WHO, logprobs=True)["choices"][0]["logprobs"]["content"][3]
    banned = service.backend.engine.tokenizer.convert_tokens_to_ids("message")
    assert token["token"] == "message"
    assert "message" not in service.text(WHO, logit_bias={str(banned): -100})
    for fields in (
        {"repetition_penalty": 50.0},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0, "repetition_penalty": 3.0},
        {"temperature": 2.0, "seed": 1},
    ):
        assert service.text(WHO, **fields, max_tokens=40) != plain
    assert service.text(WHO, temperature=2.0, seed=1, top_k=1) == plain
    assert service.text(WHO, temperature=2.0, seed=1, top_p=0.01) == plain


def test_log_probabilities_spell_the_answer(service):
    [choice] = service.ask(WHO, logprobs=True, top_logprobs=3)["choices"]
    entries = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == choice["message"]["content"]
    for entry in entries:
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"] <= 0
    events = service.events(WHO, logprobs=True)
    parts = [event["choices"][0]["logprobs"] for event in events]
    spelled = [entry["token"] for part in parts if part for entry in part["content"]]
    assert "".join(spelled) == choice["message"]["content"]
    assert "logprobs" in service.ask(WHO)["choices"][0]


@pytest.mark.parametrize("thinking", [False, True])
def test_an_answer_in_the_action_grammar_parses_at_any_temperature(service, thinking):
    for seed in range(4):
        text = service.text(
            WHO,
            response_format={"type": "action"},
            temperature=2.0,
            seed=seed,
            enable_thinking=thinking,
            max_tokens=400,
        )
        assert parse_answer(text).action is not None, text


def test_json_formats_are_kept_to(service):
    sampled = {"max_tokens": 600, "temperature": 0.7, "seed": 1, "n": 4}
    for one in service.ask(WHO, response_format={"type": "json_object"}, **sampled)["choices"]:
        assert isinstance(json.loads(one["message"]["content"]), dict)
        assert one["finish_reason"] == "stop"
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["a", "b"]},
            "count": {"type": "integer", "maximum": 99, "minimum": 0},
        },
        "required": ["kind", "count"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    made = json.loads(service.text(WHO, response_format=wanted))
    assert made["kind"] in ("a", "b")
    assert 0 <= made["count"] <= 99
    assert service.text(WHO, response_format={"type": "text"}) == service.text(WHO)


def tool(name, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("tap", x={"type": "integer", "minimum": 0, "maximum": 9}), tool("home")]


@pytest.mark.parametrize(
    ("choice", "names", "reason"),
    [
        ("required", ("tap", "home"), "tool_calls"),
        ({"type": "function", "function": {"name": "tap"}}, ("tap",), "stop"),
    ],
)
def test_a_required_tool_is_called_with_arguments_that_fit(service, choice, names, reason):
    [told] = service.ask(WHO, tools=TOOLS, tool_choice=choice)["choices"]
    [call] = told["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert told["finish_reason"] == reason
    assert told["message"]["content"] is None
    assert call["function"]["name"] in names
    assert set(arguments) <= {"x"} or call["function"]["name"] == "home"
    events = service.events(WHO, tools=TOOLS, tool_choice=choice)
    deltas = [event["choices"][0]["delta"].get("tool_calls") for event in events]
    [streamed_call] = [calls[0] for calls in deltas if calls]
    assert streamed_call["function"] == call["function"]
    assert streamed_call["index"] == 0
    history = [
        {"role": "user", "content": WHO},
        told["message"],
        {"role": "tool", "tool_call_id": call["id"], "content": "done"},
    ]
    assert service.text(messages=history)


def test_a_model_that_may_call_tools_answers_as_it_can(service):
    for choice in ("auto", "none"):
        assert service.text(WHO, tools=TOOLS, tool_choice=choice) == service.text(WHO)
    assert streamed(service.events(WHO, tools=TOOLS)) == service.text(WHO)


def test_control_tokens_in_a_users_text_are_letters(service):
    plain, marked = service.ask("a b")["usage"], service.ask("a <|user|> b")["usage"]
    assert marked["prompt_tokens"] > plain["prompt_tokens"] + 2


def test_models_agree_and_the_answer_echoes_the_name(service):
    listed = service.http.get("/v1/models").json()["data"]
    names = [card["id"] for card in listed]
    assert names == ["pocket", "autoglm-phone-9b"]
    for card in listed:
        assert service.http.get(f"/v1/models/{card['id']}").json() == card
        assert service.http.post(CHAT, json=body(WHO) | {"model": card["id"]}).json()["model"] == card["id"]
    assert service.http.get("/v1/models/gpt-4").status_code == 404


def test_published_clients_get_an_action_without_tags(service):
    """They take all that follows ``do(action=`` or ``finish(message=`` as the action."""
    raw, fields = service.text(WHO), {"answer_tags": None}
    assert raw.startswith("<answer>finish(")
    bare = raw.removeprefix("<answer>").removesuffix("</answer>")
    assert service.text(WHO, **fields) == streamed(service.events(WHO, **fields)) == bare
    assert service.text(WHO, **fields, model="pocket") == raw
    thinking = service.text(WHO, **fields, enable_thinking=True)
    assert thinking.startswith("<think>")
    assert thinking.endswith('")')


def test_unknown_fields_are_ignored(service):
    assert service.text(WHO, user="me", store=False, metadata={"a": "b"}, made_up=[1], reasoning_effort="low")
