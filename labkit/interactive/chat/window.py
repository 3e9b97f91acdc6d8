"""The chat window, in Gradio. `endpoint` talks to the services, `turns` renders the conversation."""

import atexit
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from labkit import phonetap
from labkit.client import Reply, user_message
from labkit.common.errors import ClientError, LabError, MediaError
from labkit.common.messages import load_media
from labkit.interactive.chat import local
from labkit.interactive.chat.endpoint import Endpoint, describe, stream
from labkit.interactive.chat.frame import ChatBlocks
from labkit.interactive.chat.panel import screen_panel
from labkit.interactive.chat.turns import Turn, export, history, shown, target_of
from labkit.interactive.chat.words import LANGUAGES, words_of


class Window:
    """The window's components by name, and their event handlers."""

    def __init__(self, endpoints: Sequence[Endpoint], language: str) -> None:
        self.endpoints, self.language = list(endpoints), language
        self.words = words_of(language)
        self.parts: dict[str, Any] = {}
        self.services: list[Any] = []
        with ChatBlocks(title="labkit chat", analytics_enabled=False, fill_width=True) as self.blocks:
            self._lay_out()
            self._connect()
        atexit.register(self.stop_services)

    # -- layout ------------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        words, parts = self.words, self.parts
        with gr.Row():
            parts["title"] = gr.Markdown(words["title"])
            names = {code: name for name, code in LANGUAGES.items()}
            parts["language"] = gr.Radio(
                list(LANGUAGES), value=names[self.language], show_label=False, container=False, scale=0,
                min_width=210,
            )  # fmt: skip
        parts["state"] = gr.Markdown()
        self._lay_out_services()
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=250, elem_classes="labkit-narrow"):
                self._lay_out_screen()
            with gr.Column(scale=4):
                with gr.Row():
                    two = len(self.endpoints) > 1
                    parts["chat_a"] = gr.Chatbot(label="A", height=520, buttons=["copy"])
                    parts["chat_b"] = gr.Chatbot(label="B", height=520, buttons=["copy"], visible=two)
                parts["ask"] = gr.MultimodalTextbox(
                    placeholder=words["ask"], show_label=False, sources=["upload", "microphone"],
                    autofocus=True,
                )  # fmt: skip
                with gr.Row():
                    parts["stop"] = gr.Button(words["stop"], size="sm")
                    parts["new"] = gr.Button(words["new"], size="sm")
                    parts["export"] = gr.DownloadButton(words["export"], size="sm", interactive=False)
        self.turns, self.item = gr.State([]), gr.State(None)

    def _lay_out_services(self) -> None:
        words, parts = self.words, self.parts
        with gr.Accordion(words["services"], open=False) as parts["services"]:
            parts["both"] = gr.Checkbox(label=words["both"], value=len(self.endpoints) > 1)
            with gr.Row():
                for letter, endpoint in zip("ab", [*self.endpoints, self.endpoints[0]]):
                    visible = letter == "a" or len(self.endpoints) > 1
                    with gr.Column(visible=visible, min_width=260) as parts[f"column_{letter}"]:
                        parts[f"url_{letter}"] = gr.Textbox(
                            endpoint.base_url, label=words[f"url_{letter}"], lines=1
                        )
                        with gr.Row():
                            models = [endpoint.model] if endpoint.model else []
                            parts[f"model_{letter}"] = gr.Dropdown(
                                models, value=endpoint.model, label=words[f"model_{letter}"],
                                allow_custom_value=True, min_width=150,
                            )  # fmt: skip
                            parts[f"key_{letter}"] = gr.Textbox(
                                endpoint.api_key, label=words["key"], type="password", min_width=150
                            )
            parts["connect"] = gr.Button(words["connect"], size="sm")
            with gr.Accordion(words["start"], open=False) as parts["start"], gr.Row():
                parts["local_model"] = gr.Textbox("pocket", label=words["local_model"], min_width=140)
                parts["local_plan"] = gr.Dropdown(
                    local.PLANS,
                    value="int4",
                    label=words["local_plan"],
                    allow_custom_value=True,
                    min_width=140,
                )
                parts["start_a"] = gr.Button(words["start_a"], scale=0, min_width=120)
                parts["start_b"] = gr.Button(words["start_b"], scale=0, min_width=120)

    def _lay_out_screen(self) -> None:
        words, parts = self.words, self.parts
        parts["screen"] = screen_panel(words["screen"])
        parts["draw"] = gr.Button(words["draw"], variant="primary")
        parts["clear_screen"] = gr.Button(words["clear_screen"], size="sm")
        with gr.Accordion(words["options"], open=True) as parts["options"]:
            parts["thinking"] = gr.Checkbox(label=words["thinking"])
            parts["history"] = gr.Checkbox(label=words["history"])
            parts["temperature"] = gr.Slider(0, 1.5, 0, step=0.1, label=words["temperature"])
            parts["max_tokens"] = gr.Slider(16, 2048, 512, step=16, label=words["max_tokens"])

    # -- events -------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        p = self.parts
        chats = [p["chat_a"], p["chat_b"]]
        urls = [p[f"{name}_{letter}"] for letter in "ab" for name in ("url", "model", "key")]
        asking = p["ask"].submit(
            self.answer,
            [p["ask"], p["screen"], self.item, self.turns, p["both"], *urls, p["thinking"], p["history"],
             p["temperature"], p["max_tokens"], p["language"]],
            [p["ask"], p["screen"], self.item, self.turns, *chats],
            show_progress="hidden",
        )  # fmt: skip
        exported = {"fn": lambda turns: gr.update(value=export(turns), interactive=True),
                    "inputs": self.turns, "outputs": p["export"]}  # fmt: skip
        asking.then(**exported)
        p["stop"].click(**exported, cancels=[asking])
        p["new"].click(
            lambda: ([], [], [], gr.update(value=None, interactive=False)),
            None,
            [self.turns, *chats, p["export"]],
            cancels=[asking],
        )
        p["draw"].click(self.draw, None, [p["screen"], self.item, p["ask"]])
        p["clear_screen"].click(lambda: (None, None), None, [p["screen"], self.item])
        p["screen"].upload(self.take, p["screen"], [p["screen"], self.item])
        p["both"].change(lambda both: [gr.update(visible=both)] * 2, p["both"], [p["column_b"], p["chat_b"]])
        connected = [p["model_a"], p["model_b"], p["state"]]
        p["connect"].click(self.connect, [p["both"], *urls, p["language"]], connected)
        for letter in "ab":
            p[f"start_{letter}"].click(
                self.start,
                [p["local_model"], p["local_plan"], p["language"]],
                [p[f"url_{letter}"], p[f"model_{letter}"], p["state"]],
            )
        p["start_b"].click(lambda: True, None, p["both"])
        named = [name for name in p if name in self.words or name in ("key_a", "key_b")]
        translated = p["language"].change(self.translate, p["language"], [p[name] for name in named])
        translated.then(self.connect, [p["both"], *urls, p["language"]], connected)
        translated.then(self.show_again, [self.turns, p["language"]], chats)
        self._named = named
        self.blocks.load(self.connect, [p["both"], *urls, p["language"]], connected)

    def answer(
        self,
        asked: Mapping[str, Any],
        screen: Image.Image | MediaError | None,
        item: phonetap.Item | None,
        turns: list[Turn],
        both: bool,
        *rest: Any,
    ) -> Iterator[tuple]:
        """Send the question to A, then to B, and show each answer while it is written."""
        urls, (thinking, keep, temperature, max_tokens, language) = rest[:6], rest[6:]
        words = words_of(LANGUAGES[language])
        text = (asked.get("text") or "").strip()
        try:
            picture, recording, audio = _attached(asked.get("files") or [])
            screen = screen if picture is None else picture
            if isinstance(screen, MediaError):
                raise screen
            endpoints = _endpoints(urls, both)
        except LabError as error:
            raise gr.Error(str(error)) from None
        item = item if picture is None else None
        if screen is None and not text and recording is None:
            raise gr.Error(words["empty"])
        message = user_message(text, screen, recording)
        target = (
            target_of(item.screen if item is not None else None, item, text) if screen is not None else None
        )
        facts = [endpoint.facts() for endpoint in endpoints]
        turn = Turn(message, text, screen, target, audio, [], endpoints, facts)
        earlier = list(turns) if keep else []
        turns = [*turns, turn]
        cleared = {"text": "", "files": []}
        seen = (screen, None) if picture is not None else (gr.skip(), gr.skip())
        for which, endpoint in enumerate(endpoints):
            turn.replies.append(Reply())
            conversation = [*history(earlier, which), message]
            for reply in stream(
                endpoint, conversation, thinking=thinking, temperature=temperature, max_tokens=int(max_tokens)
            ):
                turn.replies[which] = reply
                yield cleared, *seen, turns, shown(turns, 0, words), shown(turns, 1, words)
                # Clear the inputs once: a later update would load the picture again.
                cleared, seen = gr.skip(), (gr.skip(), gr.skip())

    def take(self, upload: Image.Image | MediaError | None) -> tuple:
        """The uploaded screen as the model sees it; a broken one leaves the panel empty, without the screen before."""
        if isinstance(upload, MediaError):
            gr.Warning(str(upload))
            upload = None
        return upload, None

    def draw(self) -> tuple:
        """Draw a new test item: its screen, and its request as a suggestion."""
        split = random.choice(("typed", "hard"))
        item = phonetap.items(split, count=1, seed=random.randrange(1, 1_000_000))[0]
        return item.screen.image, item, {"text": item.instruction, "files": []}

    def connect(self, both: bool, *rest: Any) -> tuple:
        """Ask each service for its models, and for the model it has loaded."""
        urls, language = rest[:6], rest[6]
        words = words_of(LANGUAGES[language])
        states, updates = [], [gr.update(), gr.update()]
        for which, letter in enumerate("AB" if both else "A"):
            try:
                endpoint = _endpoint(*urls[3 * which : 3 * which + 3])
                names = endpoint.models()
                chosen = endpoint.model if endpoint.model in names else next(iter(names), None)
                updates[which] = gr.update(choices=names, value=chosen)
                states.append(f"**{letter}** {words['connected']}: {describe(endpoint, chosen, words)}")
            except LabError as error:
                states.append(f"**{letter}** ⚠️ {error}")
        return *updates, "  \n".join(states)

    def start(self, model: str, plan: str, language: str, progress: Any = gr.Progress()) -> tuple:  # noqa: B008
        """Start a service on this machine."""
        words = words_of(LANGUAGES[language])
        progress(0.3, desc=words["starting"])
        try:
            endpoint, service = local.start(model, plan)
            self.services.append(service)
            names = endpoint.models()
        except LabError as error:
            raise gr.Error(str(error)) from None
        state = f"{words['connected']}: {describe(endpoint, names[0], words)}"
        return endpoint.base_url, gr.update(choices=names, value=names[0]), state

    def translate(self, language: str) -> list:
        """Return every label in another language."""
        words = words_of(LANGUAGES[language])
        changed = []
        for name in self._named:
            part, text = self.parts[name], words["key" if name.startswith("key_") else name]
            if isinstance(part, gr.Markdown | gr.Button):
                changed.append(gr.update(value=text))
            elif isinstance(part, gr.MultimodalTextbox):
                changed.append(gr.update(placeholder=text))
            else:
                changed.append(gr.update(label=text))
        return changed

    def show_again(self, turns: list[Turn], language: str) -> list:
        """Show the conversation again with its captions in another language."""
        return [shown(turns, which, words_of(LANGUAGES[language])) for which in range(2)]

    def stop_services(self) -> None:
        """Stop the services that this window started."""
        while self.services:
            self.services.pop().stop()


def build_window(endpoints: Sequence[Endpoint], language: str) -> gr.Blocks:
    """See `labkit.interactive.chat.build`."""
    if not 1 <= len(endpoints) <= 2:
        raise ClientError(f"the chat talks to one service or to two, not to {len(endpoints)}")
    return Window(endpoints, language).blocks


def _endpoint(url: str, model: str | None, key: str | None) -> Endpoint:
    return Endpoint((url or "").strip(), model or None, key or "EMPTY")


def _endpoints(urls: Sequence[Any], both: bool) -> list[Endpoint]:
    return [_endpoint(*urls[3 * which : 3 * which + 3]) for which in range(2 if both else 1)]


def _attached(files: Sequence[str]) -> tuple[Image.Image | None, np.ndarray | None, str | None]:
    """The picture, the recording and the recording's path from the attached files; the last of each kind wins."""
    picture = recording = audio = None
    for path in files:
        media = load_media(path)
        if isinstance(media, Image.Image):
            picture = media
        else:
            recording, audio = media, path
    return picture, recording, audio
