"""One client's error is its own: seven others get what they get alone, and no text of it."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_models
from service_tools import running, streamed

from labkit.engine.detokenize import StopMatcher
from labkit.engine.engine import Engine
from labkit.engine.forward import Forward
from labkit.engine.sampling import Sampler
from labkit.models.spec import ModelSpec

SECRET = "PIN 4711"
NEUTRAL = "the service failed; its log says more"


@pytest.fixture(scope="module")
def service():
    engine = Engine(*tiny_models.pocket(), spec=ModelSpec("tiny", "."))
    with running(engine, streams=8) as shared:
        yield shared


def good(service, number):
    fields = {"max_tokens": 40, "min_tokens": 40, "temperature": 0.5 * (number % 3), "seed": number}
    if number % 2:
        return streamed(service.events(f"question {number}", **fields))
    return service.text(f"question {number}", **fields)


def beside_seven(service, **fields):
    """The response to a request while seven others are answered, each as it is alone."""
    alone = [good(service, number) for number in range(7)]
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(good, service, number) for number in range(7)]
        response = pool.submit(service.post, SECRET, max_tokens=60, **fields).result()
        assert [other.result() for other in others] == alone
    service.wait_until_idle()
    assert service.http.get("/health").status_code == 200
    return response


def schema(value):
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}


def test_a_schema_that_names_a_control_token_is_answered_with_its_text(service):
    for model in ("tiny", "autoglm-phone-9b"):  # the second leaves tags out of actions
        response = beside_seven(
            service, model=model, response_format=schema({"enum": [f"{SECRET} <answer>"]})
        )
        assert response.status_code == 200
        assert json.loads(response.json()["choices"][0]["message"]["content"]) == f"{SECRET} <answer>"


def test_a_grammar_that_no_answer_fits_is_refused(service):
    response = beside_seven(service, response_format=schema({"$ref": "#"}))
    assert response.status_code == 400
    assert "no answer fits it" in response.json()["error"]["message"]


@pytest.mark.parametrize("stage", ["prefill", "sample", "accept", "detokenize", "event"])
def test_a_fault_in_one_answer_tells_its_client_nothing_but_that(service, stage, monkeypatch, capfd):
    def marked(sampler):
        return sampler.settings.presence_penalty == 1.25

    if stage == "prefill":
        prefill = Forward.prefill
        secret = service.backend.engine.prepare([{"role": "user", "content": SECRET}])["input_ids"].tolist()

        def fails(self, inputs):
            if inputs["input_ids"].tolist() == secret:
                raise RuntimeError(SECRET)
            return prefill(self, inputs)

        monkeypatch.setattr(Forward, "prefill", fails)
    elif stage == "accept":
        accept = Sampler.accept

        def fails(self, token):
            if marked(self) and self._taken == 3:
                raise RuntimeError(SECRET)
            accept(self, token)

        monkeypatch.setattr(Sampler, "accept", fails)
    elif stage == "sample":
        adjusted = Sampler._adjusted

        def fails(self, logits):
            if marked(self):
                raise RuntimeError(SECRET)
            return adjusted(self, logits)

        monkeypatch.setattr(Sampler, "_adjusted", fails)
    elif stage == "detokenize":
        push = StopMatcher.push

        def fails(self, text):
            if "never written" in self._stop:
                raise RuntimeError(SECRET)
            return push(self, text)

        monkeypatch.setattr(StopMatcher, "push", fails)
    else:
        from labkit.service import scheduler

        event = scheduler._event

        def fails(index, answer, text):
            if marked(answer.sampler):
                raise RuntimeError(SECRET)
            return event(index, answer, text)

        monkeypatch.setattr(scheduler, "_event", fails)
    response = beside_seven(service, presence_penalty=1.25, stop=["never written"])
    assert response.status_code == 500
    assert response.json()["error"]["message"] == NEUTRAL
    log = capfd.readouterr().out
    assert "an answer failed: RuntimeError" in log
    assert SECRET not in log


@pytest.mark.parametrize("stage", ["decode", "settings", "events", "choice"])
def test_a_fault_around_the_engine_tells_its_client_nothing_but_that(service, stage, monkeypatch, capfd):
    from labkit.service import chat, media, writing

    holder, name = {
        "decode": (media, "lab_messages"),
        "settings": (chat, "settings_of"),
        "events": (chat.Completion, "news"),
        "choice": (writing, "_choice"),
    }[stage]
    plain = getattr(holder, name)

    def fails(first, *arguments):
        request = getattr(first, "request", first)
        if request.presence_penalty == 1.25 if hasattr(request, "messages") else request[0].content == SECRET:
            raise RuntimeError(SECRET)
        return plain(first, *arguments)

    monkeypatch.setattr(holder, name, fails)
    response = beside_seven(service, presence_penalty=1.25)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == NEUTRAL
    log = capfd.readouterr().out
    assert ": RuntimeError in fails:" in log
    assert SECRET not in log


def test_a_fault_while_a_stream_is_written_ends_that_stream_only(service, monkeypatch, capfd):
    from labkit.service import writing

    chunk = writing._chunk

    def fails(completion, index, delta, *arguments, **options):
        if completion.request.presence_penalty == 1.25 and delta.get("content"):
            raise RuntimeError(SECRET)
        return chunk(completion, index, delta, *arguments, **options)

    monkeypatch.setattr(writing, "_chunk", fails)
    response = beside_seven(service, presence_penalty=1.25, stream=True)
    assert response.text.endswith("data: [DONE]\n\n")
    assert NEUTRAL in response.text
    log = capfd.readouterr().out
    assert "a stream failed: RuntimeError" in log
    assert SECRET not in log + response.text


def test_a_failed_step_tells_each_client_a_neutral_500(service, monkeypatch, capfd):
    step, fail = Forward.step, [False]

    def fails(self, rows, tokens, alone=False):
        if fail[0] and len(rows) == 8:
            fail[0] = False
            raise RuntimeError(SECRET)
        return step(self, rows, tokens, alone)

    monkeypatch.setattr(Forward, "step", fails)
    fail[0] = True
    with ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(service.post, f"x {number}", max_tokens=400, min_tokens=400) for number in range(8)
        ]
        responses = [one.result() for one in asked]
    assert {response.status_code for response in responses} == {500}
    assert {response.json()["error"]["message"] for response in responses} == {NEUTRAL}
    log = capfd.readouterr().out
    assert "a step failed: RuntimeError" in log
    assert SECRET not in log
    assert service.post("hi", max_tokens=2).status_code == 200


def test_a_fault_in_what_counts_the_tokens_stops_nothing(service, monkeypatch):
    monkeypatch.setattr(service.scheduler, "_on_step", lambda *_: 1 // 0)
    assert service.post("hi", max_tokens=20).status_code == 200
