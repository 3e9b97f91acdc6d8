"""The chat: what it sends, how it reads a service, what it shows and exports."""

import json
import time

import numpy as np
import pytest
from fake_service import serving
from PIL import Image

from labkit import phonetap
from labkit.cli import main
from labkit.common.errors import ClientError, LabError
from labkit.common.messages import normalise_messages
from labkit.interactive import chat
from labkit.interactive.chat import local, turns, window, words

ENGLISH = words.words_of("en")


def test_a_message_is_read_back_as_it_was():
    picture = Image.new("RGB", (4, 6), "#0072B2")
    recording = np.sin(np.arange(8000, dtype=np.float32) / 9) / 2
    message = chat.user_message("open it", picture, recording)
    image, audio, text = normalise_messages([message])[0]["content"]
    assert image["image"].tobytes() == picture.tobytes()
    assert np.abs(audio["audio"] - recording).max() < 1e-4
    assert text["text"] == "open it"
    assert chat.user_message("hi") == {"role": "user", "content": "hi"}


def test_an_answer_grows_and_ends_with_its_cost():
    with serving(plan="nf4") as service:
        endpoint = chat.Endpoint(service.base_url)
        replies = list(chat.stream(endpoint, [chat.user_message("open it")], thinking=True))
        assert endpoint.models() == ["fake"]
        assert endpoint.facts()["plan"] == "nf4"
    assert [reply.finished for reply in replies] == [False] * (len(replies) - 1) + [True]
    last = replies[-1]
    assert last.reasoning == 'I heard: open it. Tap "it".'
    assert last.heard == "open it"
    assert last.answer.action.point == (500, 500)
    assert (last.tokens, last.error) == (17, None)
    assert 0 < last.ttft_s < last.total_s
    assert service.asked[0]["model"] == "fake"
    assert service.asked[0]["enable_thinking"] is True


def test_services_that_know_no_thinking_are_not_asked_for_it():
    with serving() as service:
        list(chat.stream(chat.Endpoint(service.base_url, "gpt"), [chat.user_message("x")]))
    assert "enable_thinking" not in service.asked[0]
    assert service.asked[0]["model"] == "gpt"


@pytest.mark.parametrize(
    ("thinking", "heard"),
    [
        ("听到：打开设置。要点“设置”。", "打开设置"),
        ("Tap it.", None),
        ("I heard: press a.b now. Tap", "press a.b now"),
    ],
)
def test_what_was_heard_is_read_from_the_thinking(thinking, heard):
    assert chat.Reply(reasoning=thinking).heard == heard
    assert chat.Reply(f"<think>{thinking}</think><answer>x</answer>").heard == heard


def test_a_refusal_and_a_dead_service_are_told_not_raised():
    with serving() as service:
        endpoint = chat.Endpoint(service.base_url)
        [reply] = chat.stream(endpoint, [chat.user_message("refuse me")])
        assert (reply.finished, reply.error) == (True, "this picture is too large")
    [reply] = chat.stream(endpoint, [chat.user_message("x")])
    assert "does not answer" in reply.error
    assert endpoint.facts() == {}
    with pytest.raises(ClientError, match="does not answer"):
        endpoint.models()


def test_leaving_early_ends_the_request():
    with serving(pause_s=0.3) as service:
        answer = chat.stream(chat.Endpoint(service.base_url), [chat.user_message("x")])
        next(answer)
        answer.close()
        end = time.monotonic() + 10
        while not service.left and time.monotonic() < end:
            time.sleep(0.05)
    assert service.left == 1


def test_a_wrong_address_or_language_is_refused():
    with pytest.raises(ClientError, match="a base URL is like"):
        chat.Endpoint("127.0.0.1:8000")
    with pytest.raises(LabError, match="not 'fr'"):
        chat.build(language="fr")
    with pytest.raises(ClientError, match="one service or to two"):
        chat.build([])
    assert words.WORDS["en"].keys() == words.WORDS["zh"].keys()


def test_the_window_opens_in_the_language_of_the_courses_edition(tmp_path, monkeypatch):
    for folder, told in (("zh", "画一张新屏幕"), ("notebooks", "Draw me a new screen")):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        parts = chat.build().config["components"]
        assert told in [part["props"].get("value") for part in parts]


def drawn_item():
    return next(item for item in phonetap.items("typed", 9) if item.task == "tap")


def test_the_target_is_known_for_drawn_screens_only():
    item = drawn_item()
    assert turns.target_of(item.screen, item, item.instruction) == item.box
    assert turns.target_of(item.screen, item, "") is None  # asked by voice: what was said is not known
    assert turns.target_of(None, None, item.instruction) is None
    other = next(one for one in item.screen.elements if one.label not in (item.target, ""))
    named = [one for one in item.screen.elements if one.label == other.label]
    box = turns.target_of(item.screen, item, f"please tap {other.label}")
    assert (box is None) == (len(named) > 1)
    assert turns.target_of(item.screen, item, "please tap nothing of this") is None


def turn_with(*replies, **known):
    facts = [{"plan": plan, "weights_bytes": 21_200_000} for plan in ("int4", "fp32")]
    endpoints = [chat.Endpoint("http://a/v1"), chat.Endpoint("http://b/v1", "m")]
    message = chat.user_message("open it", known.get("picture"))
    return turns.Turn(message, "open it", replies=list(replies), endpoints=endpoints, facts=facts, **known)


def test_an_answer_is_shown_with_tap_target_and_cost():
    item = drawn_item()
    x, y = item.action.point
    text, thinking = f'do(action="Tap", element=[{x},{y}])', "I heard: open it. Tap"
    hit = chat.Reply(
        text, thinking, "stop", {"completion_tokens": 9}, ttft_s=0.1, total_s=0.25, finished=True
    )
    miss = chat.Reply('do(action="Tap", element=[0,0])', finished=True)
    turn = turn_with(hit, miss, picture=item.screen.image, target=item.box)
    asked, thought, heard, action, picture, cost = turns.shown([turn], 0, ENGLISH)
    assert asked == {"role": "user", "content": "open it"}
    assert thought["metadata"] == {"title": "Thinking", "status": "done"}
    assert "open it" in heard["content"]
    assert action["content"].startswith("`do(action=")
    assert (
        turns.shown([turn], 0, ENGLISH)[4] == picture
    )  # drawn once: a window that shows it again does not flicker
    assert Image.open(picture["content"]["path"]).size == tuple(2 * side for side in item.screen.size)
    for told in (
        "the tap lands",
        "100 ms to the first token",
        "250 ms in all",
        "9 tokens",
        "21.2 MB",
        "(int4)",
    ):
        assert told in cost["content"]
    assert "misses the target" in turns.shown([turn], 1, ENGLISH)[-1]["content"]
    assert "from the left" in action["content"]
    assert "距左 0 %,距上 0 %" in turns.shown([turn], 1, words.words_of("zh"))[1]["content"]


def test_an_answer_without_a_point_draws_nothing():
    turn = turn_with(chat.Reply('finish(message="no")', finished=True), picture=Image.new("RGB", (4, 4)))
    assert all(isinstance(one["content"], str) for one in turns.shown([turn], 0, ENGLISH))


def test_what_a_model_writes_is_text():
    turn = turn_with(chat.Reply("# <img src=x> **bold** [a](b)", finished=True))
    said = turns.shown([turn], 0, ENGLISH)[1]["content"]
    assert said == r"\# \<img src=x\> \*\*bold\*\* \[a\]\(b\)"


def test_history_is_what_that_service_said():
    first = turn_with(chat.Reply("one", finished=True), chat.Reply("two", finished=True))
    failed = turn_with(chat.Reply("", error="no", finished=True))
    assert [one["content"] for one in turns.history([first, failed], 1)] == ["open it", "two"]


def test_an_export_has_everything_but_the_media(tmp_path):
    turn = turn_with(chat.Reply("one", usage={"completion_tokens": 3}), picture=Image.new("RGB", (4, 4)))
    text = (tmp_path / "conversation.json").read_text() if turns.export([turn], str(tmp_path)) else ""
    [told] = json.loads(text)
    assert told["question"] == "[picture] open it"
    assert told["answers"][0]["plan"] == "int4"
    assert (told["answers"][0]["content"], told["answers"][0]["tokens"]) == ("one", 3)
    assert "base64" not in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["chat", "pocket", "--url", "http://127.0.0.1:1/v1"], "not both"),
        (["chat", "--plans", "a,b,c"], "at most two"),
        (["chat", "--url", "somewhere", "--no-browser"], "a base URL is like"),
    ],
)
def test_wrong_arguments_are_refused(arguments, told, capsys):
    assert main.main(arguments) == 2
    assert told in capsys.readouterr().err


def test_services_that_were_started_are_stopped(monkeypatch):
    stopped, opened = [], {}

    class Started:
        def __init__(self, plan):
            self.plan = plan

        def stop(self):
            stopped.append(self.plan)

    def start(model, plan, port=0):
        return chat.Endpoint(f"http://127.0.0.1:1/{plan}/v1"), Started(plan)

    def launch(self, **options):
        opened.update(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "start", start)
    monkeypatch.setattr(window.ChatBlocks, "launch", launch)
    assert main.main(["chat", "pocket", "--plans", "fp32,int4", "--no-browser", "--port", "7999"]) == 130
    assert stopped == ["fp32", "int4"]
    assert opened == {"server_name": "127.0.0.1", "server_port": 7999, "inbrowser": False}
