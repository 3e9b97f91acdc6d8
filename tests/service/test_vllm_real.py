"""The service in front of the real vLLM, on a tiny quantized model. Run by `make test-vllm`."""

import os
import time

import httpx
import pytest
import tiny_models
import torch
from service_tools import body, streamed
from test_export_vllm import SITE, VLLM, tokenizer

from labkit.client import launch
from labkit.client.launch import state
from labkit.common.actions import parse_answer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(VLLM is None, reason="$LABKIT_VLLM is not set: run `make test-vllm`"),
    pytest.mark.timeout(900),
]
PLAN = """
name: small
description: INT4 in the decoder.
rules:
  - role: decoder
    scheme: int4
    symmetric: true
    group_size: 32
default: bf16
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """``labkit serve --engine vllm`` of a tiny model: quantized, exported and served."""
    top = tmp_path_factory.mktemp("vllm")
    config = tiny_models.llama_config()
    config.vocab_size = 320
    model = tiny_models.random_model(tiny_models.LlamaForCausalLM, config).to(torch.bfloat16)
    model.save_pretrained(top / "tiny")
    tokenizer().save_pretrained(top / "tiny")
    (top / "small.yaml").write_text(PLAN)
    changed = {
        state.FOLDER_VARIABLE: str(top / "state"),
        "LABKIT_CACHE": str(top / "cache"),
        "PYTHONPATH": os.pathsep.join([str(SITE), os.environ.get("PYTHONPATH", "")]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    arguments = ["--engine", "vllm", "--streams", "2", "--vllm-args=--enforce-eager"]
    started = launch.start(str(top / "tiny"), str(top / "small.yaml"), port=0, arguments=arguments)
    yield started
    started.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def post(service, **fields):
    return httpx.post(
        f"{service.base_url}/chat/completions", json=body(**fields), trust_env=False, timeout=120
    )


def test_it_answers_whole_and_streamed(service):
    whole = post(service, max_tokens=12).json()
    assert whole["usage"]["completion_tokens"] == 12
    assert whole["model"] == "autoglm-phone-9b"
    response = post(service, max_tokens=12, stream=True)
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    events = [httpx.Response(200, text=line.removeprefix("data: ")).json() for line in lines[:-1]]
    assert streamed(events) == whole["choices"][0]["message"]["content"]


def test_an_answer_in_the_action_grammar_parses(service):
    text = post(service, response_format={"type": "action"}, max_tokens=200, temperature=1.0, seed=3).json()
    answer = text["choices"][0]
    if answer["finish_reason"] == "stop":
        assert parse_answer(answer["message"]["content"]).action is not None
    assert answer["message"]["content"].startswith("<answer>")


def test_the_page_knows_plan_and_engine(service):
    facts = service.facts()
    assert (facts["engine"], facts["plan"], facts["ready"]) == ("vLLM", "small", True)
    assert any(part["scheme"] == "int4" for part in facts["parts"])


def test_wrong_requests_are_refused_as_the_labs_engine_does(service):
    refused = post(service, temperature=9)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")
    long = post(service, content="x" * 3000)
    assert long.status_code == 400, long.text


def test_killing_vllm_is_told_and_stopping_leaves_nothing(service):
    import psutil

    front = psutil.Process(service._record.pid)
    [vllm] = [one for one in front.children() if "vllm" in " ".join(one.cmdline())]
    family = vllm.children(recursive=True)
    vllm.kill()
    ends = time.monotonic() + 20
    while service.state.name != "unhealthy":
        assert time.monotonic() < ends
        time.sleep(0.2)
    service.stop()
    _, alive = psutil.wait_procs([front, vllm, *family], timeout=20)
    assert not alive
