"""vLLM behind the service's door: the command, what is refused before it starts, and what is translated.

vLLM itself is a stand-in here that answers as it does; `make test-vllm` runs `tests/loading/test_export_vllm.py` and
`tests/service/test_vllm_real.py` with the real one.
"""

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
import pytest
import tiny_models
import uvicorn
from service_tools import CHAT, image_part, screen, serving, streamed
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from labkit.common.errors import LabError
from labkit.models.checkpoint import Checkpoint
from labkit.models.families import find_roles
from labkit.models.spec import get_spec
from labkit.plans.plan import QuantizationPlan
from labkit.service.options import ServiceOptions
from labkit.service.vllm import command as vllm_command
from labkit.service.vllm import serve
from labkit.service.vllm.backend import VllmBackend
from labkit.service.vllm.command import VllmOptions, check_model, check_plan, compose, is_dense
from labkit.service.vllm.request import action_grammar


@pytest.fixture(scope="module")
def phone():
    """AutoGLM-Phone-9B without its weights."""
    return Checkpoint(get_spec("autoglm-phone-9b"))


@pytest.fixture(scope="module")
def skeleton(phone):
    return phone.skeleton()


def resolved(skeleton, *rules, default="bf16"):
    plan = QuantizationPlan.from_dict({"name": "p", "rules": list(rules), "default": default})
    return plan.resolve(skeleton, roles=find_roles(skeleton))


def test_the_command_has_the_authors_flags(phone):
    command = compose("python", "folder", ["autoglm-phone-9b"], 8001, phone.config, VllmOptions(2))
    told = " ".join(command)
    assert command[:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    for flags in (
        "--model folder",
        "--served-model-name autoglm-phone-9b",
        "--max-model-len 25480",
        "--chat-template-content-format string",
        '--limit-mm-per-prompt {"image": 10}',
        '--mm_processor_kwargs {"max_pixels": 5000000}',
        "--mm-encoder-tp-mode data",
        "--mm_processor_cache_type shm",
        "--tensor-parallel-size 2",
        "--host 127.0.0.1 --port 8001",
        "--dtype bfloat16",
    ):
        assert flags in told
    assert "local-media" not in told
    assert "ray" not in told


def test_several_machines_go_through_ray_and_own_arguments_come_last(phone):
    options = VllmOptions(8, 2, "--swap-space 4 --max-model-len 9000")
    told = " ".join(compose("python", "folder", ["x"], 1, phone.config, options))
    assert "--pipeline-parallel-size 2 --distributed-executor-backend ray" in told
    assert told.endswith("--swap-space 4 --max-model-len 9000")


def test_a_language_model_gets_no_flags_of_pictures():
    told = " ".join(compose("python", "f", ["x"], 1, tiny_models.llama_config(), VllmOptions()))
    assert "mm" not in told
    assert "--max-model-len 256" in told


@pytest.mark.parametrize(
    ("rule", "size", "told"),
    [
        ({"role": "decoder", "scheme": "nf4"}, 1, "the nearest is int4"),
        ({"role": "decoder", "scheme": "llm-int8"}, 1, "the nearest is int8-dynamic"),
        ({"role": "decoder", "scheme": "int4", "num_bits": 3}, 1, "no kernel for 3 bits"),
        ({"role": "decoder", "scheme": "int4", "group_size": 128}, 2, "group_size 64 does"),
    ],
)
def test_what_vllm_cannot_do_with_a_plan_is_said(skeleton, rule, size, told):
    with pytest.raises(LabError, match=told):
        check_plan(resolved(skeleton, rule), skeleton, VllmOptions(size))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_it_can_do_passes(skeleton, size):
    plan = resolved(
        skeleton,
        {"role": "decoder", "scheme": "int4", "group_size": 32, "symmetric": True},
        {"role": "vision", "scheme": "bf16"},
    )
    check_plan(plan, skeleton, VllmOptions(size))
    assert not is_dense(plan)
    assert is_dense(resolved(skeleton))


def test_models_that_vllm_has_not_and_gpus_that_do_not_divide_are_refused(phone):
    with pytest.raises(LabError, match="--engine labkit"):
        check_model(Checkpoint(get_spec("pocket")), VllmOptions())
    with pytest.raises(LabError, match="32 attention heads, which 3 GPUs"):
        check_model(phone, VllmOptions(3))
    check_model(phone, VllmOptions(2))


def test_a_missing_vllm_is_said_before_anything_starts(monkeypatch):
    monkeypatch.setenv(vllm_command.INTERPRETER_VARIABLE, "/nowhere/python")
    with pytest.raises(LabError, match="no interpreter"):
        serve.serve_vllm("autoglm-phone-9b", "int4", ServiceOptions(port=0), VllmOptions())


def test_an_export_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv(serve.CACHE_VARIABLE, str(tmp_path / "cache"))
    tiny_models.llama().save_pretrained(tmp_path / "tiny")
    tiny_models.tokenizer().save_pretrained(tmp_path / "tiny")
    spec = get_spec(tmp_path / "tiny")
    bare = Checkpoint(spec).skeleton()
    assert serve.exported(spec, resolved(bare)) == str(tmp_path / "tiny")
    plan = resolved(bare, {"role": "decoder", "scheme": "int4", "group_size": 32, "symmetric": True})
    folder = serve.exported(spec, plan)
    config = json.loads((tmp_path / "cache" / folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    monkeypatch.setattr("labkit.loading.quantize_to.quantize_to", None)
    monkeypatch.setattr("labkit.loading.export.export", None)
    assert serve.exported(spec, plan) == folder


ANSWER = '<think>a b</think><answer>finish(message="ok")</answer>'


class StandIn:
    """Answers as vLLM does, letter by letter, and remembers what it was asked."""

    def __init__(self):
        self.asked, self.status, self.pause, self.text, self.left = [], 200, 0.0, ANSWER, 0

    async def chat(self, request):
        asked = await request.json()
        self.asked.append(asked)
        if self.status != 200:
            told = {
                "error": {"message": "too long: context length" if self.status == 400 else "/secret/path"}
            }
            return JSONResponse(told, self.status)
        usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
        common = {"id": "x", "created": 1, "model": asked["model"]}
        if not asked.get("stream"):
            message = {"role": "assistant", "content": self.text}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
            await asyncio.sleep(self.pause)
            return JSONResponse({**common, "object": "chat.completion", "choices": [choice], "usage": usage})

        def line(delta, finish=None):
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
            return (
                f"data: {json.dumps({**common, 'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"
            )

        async def lines():
            try:
                yield line({"role": "assistant", "content": ""})
                for letter in self.text:
                    yield line({"content": letter})
                    await asyncio.sleep(self.pause)
                yield line({}, "stop")
                yield f"data: {json.dumps({**common, 'choices': [], 'usage': usage})}\n\n"
                yield "data: [DONE]\n\n"
            except asyncio.CancelledError:
                self.left += 1
                raise

        return StreamingResponse(lines(), media_type="text/event-stream")

    async def models(self, request):
        return JSONResponse({"data": [{"id": "tiny", "max_model_len": 99}]})


@contextmanager
def listening(app):
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    server.install_signal_handlers = lambda: None
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def vllm():
    return StandIn()


@pytest.fixture
def service(vllm):
    routes = [Route("/v1/chat/completions", vllm.chat, methods=["POST"]), Route("/v1/models", vllm.models)]
    facts = {"model": "tiny", "plan": "p", "plan_description": "", "modalities": ["text"], "parts": []}
    vllm.process = SimpleNamespace(poll=lambda: None)
    options = ServiceOptions(port=0, streams=2, queue=0)
    with listening(Starlette(routes=routes)) as url:
        backend = VllmBackend(vllm.process, url, ["tiny", "autoglm-phone-9b"], options, facts)
        with serving(backend, options) as one:
            while not backend.is_ready:
                time.sleep(0.02)
            vllm.asked.clear()
            yield one


def test_it_is_ready_when_vllm_has_answered(service):
    assert service.http.get("/ready").status_code == 200
    assert service.http.get("/v1/models").json()["data"][0]["max_model_len"] == 99
    assert service.http.get("/status").json()["model"] == "tiny"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "reasoning", "content"),
    [
        ({}, "", ANSWER),
        ({"enable_thinking": True}, "", ANSWER),
        ({"enable_thinking": True, "return_reasoning": True}, "a b", ANSWER.partition("</think>")[2]),
        ({"enable_thinking": False}, "a b", ANSWER.partition("</think>")[2]),
    ],
)
def test_thinking_is_split_as_asked(service, vllm, stream, fields, reasoning, content):
    if stream:
        events = service.events(**fields, stream_options={"include_usage": True})
        assert (streamed(events, "reasoning_content"), streamed(events)) == (reasoning, content)
        assert events[-1]["usage"]["total_tokens"] == 12
        assert events[-2]["choices"][0]["finish_reason"] == "stop"
        assert {event["model"] for event in events} == {"autoglm-phone-9b"}
    else:
        message = service.ask(**fields)["choices"][0]["message"]
        assert (message.get("reasoning_content", ""), message["content"]) == (reasoning, content)
    asked = vllm.asked[0]
    assert asked["chat_template_kwargs"]["enable_thinking"] is bool(fields.get("enable_thinking"))
    assert not {"enable_thinking", "return_reasoning", "made_up"} & set(asked)


def test_parameters_and_formats_are_translated(service, vllm):
    service.ask(
        temperature=0.5, top_k=0, max_completion_tokens=9, made_up=1, response_format={"type": "action"}
    )
    asked = vllm.asked[-1]
    assert (asked["temperature"], asked["top_k"], asked["max_tokens"]) == (0.5, -1, 9)
    assert "grammar" in asked["structured_outputs"]
    assert "made_up" not in asked
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    service.ask(response_format=wanted)
    assert vllm.asked[-1]["structured_outputs"]["json"]["properties"] == schema["properties"]
    assert vllm.asked[-1]["temperature"] == 0


def test_a_required_tool_is_a_call(service, vllm):
    vllm.text = '{"name": "f", "arguments": {"x": 1}}'
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    [choice] = service.ask(tools=tools, tool_choice="required")["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]) == {"x": 1}


def test_the_action_grammar_is_one_that_guidance_takes():
    import llguidance

    for thinking in (False, True):
        grammar = llguidance.LLMatcher.grammar_from_lark(action_grammar(thinking))
        assert not llguidance.LLMatcher.validate_grammar(grammar)


def test_wrong_requests_never_reach_vllm(service, vllm):
    bad = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    for response in (
        service.post([bad]),
        service.post(temperature=9),
        service.http.post(CHAT, json={"model": "other", "messages": [{"role": "user", "content": "x"}]}),
    ):
        assert response.status_code in (400, 404)
    assert vllm.asked == []
    service.ask([image_part(screen()), {"type": "text", "text": "x"}])
    assert vllm.asked[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png")


@pytest.mark.parametrize(("status", "expected"), [(400, 400), (500, 500)])
@pytest.mark.parametrize("stream", [False, True])
def test_vllms_errors_keep_their_status_and_no_paths(service, vllm, status, expected, stream):
    vllm.status = status
    response = service.post(stream=stream)
    assert response.status_code == expected
    error = response.json()["error"]
    assert "secret" not in error["message"]
    assert (error["code"] == "context_length_exceeded") == (status == 400)


def test_a_full_queue_a_timeout_and_a_client_that_leaves(service, vllm):
    vllm.pause = 1.0
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True}
    with service.http.stream("POST", CHAT, json=asked) as one:
        lines = one.iter_lines()  # kept, for the stream ends with it
        next(lines)
        assert service.post(n=2).status_code == 429
    ends = time.monotonic() + 30
    while service.backend._held or not vllm.left:
        assert time.monotonic() < ends
        time.sleep(0.02)
    vllm.pause = 3.0
    assert service.post(timeout=0.2).status_code == 504
    assert service.backend._held == 0


def test_a_vllm_that_has_ended_is_told(service, vllm):
    vllm.process.poll = lambda: -9
    assert "ended with code -9" in service.http.get("/health").json()["error"]["message"]
    assert service.http.get("/ready").status_code == 503


def test_an_unreachable_vllm_is_503():
    async def refuse(request):
        raise httpx.ConnectError("no")

    backend = VllmBackend(
        SimpleNamespace(poll=lambda: None), "http://x", ["tiny"], ServiceOptions(port=0), {"parts": []},
        transport=httpx.MockTransport(refuse),
    )  # fmt: skip
    with serving(backend, backend.options) as one:
        response = one.http.post(CHAT, json={"model": "tiny", "messages": [{"role": "user", "content": "x"}]})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
        assert one.http.get("/ready").json()["error"]["code"] == "not_ready"
