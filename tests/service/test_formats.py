"""Formats over HTTP from a model that knows nothing: each answer is whole, streamed or not, and thinking stands apart."""

import json

import pytest
import tiny_models
from service_tools import running, streamed

from labkit.common.actions import parse_answer
from labkit.engine.engine import Engine
from labkit.models.spec import ModelSpec

SCHEMA = {"type": "object", "properties": {"a": {"const": "</think> <answer>"}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]


@pytest.fixture(scope="module")
def service():
    engine = Engine(*tiny_models.pocket(), spec=ModelSpec("tiny", "."))
    with running(engine, streams=8) as started:
        yield started


def both_ways(service, **fields):
    """``(content, reasoning, tool calls)`` of the seeds that come to an end, each the same whole and streamed."""
    ended = 0
    for seed in range(3):
        asked = {"temperature": 1.3, "seed": seed, "max_tokens": 300, "answer_tags": None, **fields}
        [choice] = service.ask(**asked)["choices"]
        message = choice["message"]
        events = service.events(**asked)
        assert streamed(events) == (message["content"] or "")
        assert streamed(events, "reasoning_content") == message.get("reasoning_content", "")
        assert events[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
        if choice["finish_reason"] == "length":  # thinking before a schema may take all tokens
            assert message["content"] or message["reasoning_content"]
            continue
        ended += 1
        yield message["content"], message.get("reasoning_content", ""), message.get("tool_calls", [])
    assert ended


@pytest.mark.parametrize("thinking", [False, True])
def test_an_action_is_closed_under_the_models_name_and_bare_under_the_published_one(service, thinking):
    fields = {"response_format": {"type": "action"}, "enable_thinking": thinking}
    for content, _, _ in both_ways(service, model="tiny", **fields):
        assert "<answer>" in content
        assert content.endswith("</answer>")
        assert parse_answer(content).action is not None
    for content, _, _ in both_ways(service, model="autoglm-phone-9b", **fields):
        assert content.endswith(")")
        assert parse_answer(content).action is not None


@pytest.mark.parametrize("model", ["tiny", "autoglm-phone-9b"])
def test_json_is_nothing_but_json_even_after_thinking(service, model):
    thoughts = []
    for wanted in (
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    ):
        fields = {"response_format": wanted, "enable_thinking": True, "model": model}
        for content, reasoning, _ in both_ways(service, **fields):
            made = json.loads(content)
            assert isinstance(made, dict)
            assert wanted["type"] == "json_object" or made == {"a": "</think> <answer>"}
            thoughts.append(reasoning)
    assert any(thoughts)


def test_a_call_after_thinking_is_a_call(service):
    thoughts = []
    for content, reasoning, calls in both_ways(
        service, tools=TOOLS, tool_choice="required", enable_thinking=True
    ):
        assert content is None
        assert json.loads(calls[0]["function"]["arguments"]) == {"a": "</think> <answer>"}
        thoughts.append(reasoning)
    assert any(thoughts)


def test_a_schema_that_no_answer_fits_is_refused(service):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
    response = service.post(response_format=wanted)
    assert response.status_code == 400
    assert "no answer fits it" in response.json()["error"]["message"]
