"""Displays for notebooks: pictures (`labkit.results.pictures`), the parts of an answer, recordings, tables. No torch.

The HTML is readable on light and dark pages.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from PIL import Image

from labkit.common.actions import Action, format_action, parse_answer
from labkit.common.errors import LabError
from labkit.common.formats import format_bytes, format_seconds
from labkit.common.recordings import SAMPLING_RATE
from labkit.phonetap import Item, score
from labkit.results.pictures import GIVEN, RIGHT, SCALE, Generation, elements, grid, item, tap, taps, text_of

if TYPE_CHECKING:
    import IPython.display
    import numpy as np
    import pandas

__all__ = [
    "GIVEN", "RIGHT", "SCALE", "answer", "audio", "elements", "grid", "in_words", "item", "row", "sentences", "table",
    "tap", "taps",
]  # fmt: skip


def row(*pictures: Image.Image, captions: Sequence[str] = (), height: int = 420) -> IPython.display.HTML:
    """Pictures side by side, each ``height`` pixels high with its caption below."""
    if captions and len(captions) != len(pictures):
        raise LabError(f"{len(pictures)} pictures and {len(captions)} captions: give one for each, or none")
    cells = []
    for number, picture in enumerate(pictures):
        caption = html.escape(captions[number]) if captions else ""
        cells.append(
            f'<figure style="margin:0"><img src="{_png_url(picture)}" alt="{caption}" '
            f'style="height:{height}px;border-radius:8px;border:1px solid rgba(128,128,128,.5)">'
            f'<figcaption style="max-width:{height}px">{caption}</figcaption></figure>'
        )
    return _html(f'<div style="display:flex;gap:24px;flex-wrap:wrap">{"".join(cells)}</div>')


def audio(samples: np.ndarray) -> IPython.display.Audio:
    """A player for a recording, float32 [samples] at 16 kHz."""
    from IPython.display import Audio

    return Audio(samples, rate=SAMPLING_RATE)


def answer(generation: Generation | str, question: Item | None = None) -> IPython.display.HTML:
    """The parts of an answer: its thinking, its action, whether it is right, its time.

    generation: a `Generation` or its text. question: its PhoneTap item, for whether it is right.
    """
    text = text_of(generation)
    parsed = parse_answer(text)
    rows = []
    if parsed.thinking:
        rows.append(("thinks", html.escape(parsed.thinking)))
    if parsed.action is not None:
        rows.append(("does", f"<code>{html.escape(format_action(parsed.action))}</code>"))
        rows.append(("that is", html.escape(in_words(parsed.action))))
    else:
        rows.append(("says", f"{html.escape(parsed.text)} <em>({html.escape(parsed.error or '')})</em>"))
    if question is not None:
        rows.append(("is it right?", html.escape(_score_text(question, text))))
    if hasattr(generation, "ttft_s"):
        whole = format_seconds(generation.ttft_s + generation.decode_s)
        first = format_seconds(generation.ttft_s)
        rows.append(
            ("took", f"{whole}, {first} of it before the first of {generation.completion_tokens} tokens")
        )
    body = "".join(
        f'<tr style="background:transparent"><th style="text-align:right;opacity:.65;font-weight:normal">'
        f'{name}</th><td style="text-align:left">{value}</td></tr>'
        for name, value in rows
    )
    return _html(f'<table style="font-size:14px;border-left:4px solid {GIVEN}">{body}</table>')


def table(frame: pandas.DataFrame, unit: str | None = None) -> IPython.display.HTML:
    """A DataFrame with readable numbers, without truncation.

    Columns called bytes, parameters and share are formatted as such; ``unit="bytes"`` formats all columns as bytes.
    Other fractions have four digits, missing values are dashes, and text is aligned to the left.
    """
    formatters = {"bytes": format_bytes, "parameters": _count, "share": "{:.1%}".format}
    writers = [
        _unbroken(formatters[unit or name]) if unit or name in formatters else _plain
        for name in frame.columns
    ]
    words = [frame[name].map(lambda value: isinstance(value, str)).any() for name in frame.columns]
    sides = ["left" if is_text else "right" for is_text in words]
    head = [
        f'<th style="text-align:{side}">{html.escape(str(name))}</th>' for name, side in zip(frame, sides)
    ]
    lines = [f"<tr><th></th>{''.join(head)}</tr>"]
    for index, row in zip(frame.index, frame.itertuples(index=False)):
        texts = ["–" if value != value else write(value) for value, write in zip(row, writers)]
        cells = [
            f'<td style="text-align:{side}">{html.escape(text)}</td>' for text, side in zip(texts, sides)
        ]
        lines.append(f"<tr><th>{html.escape(str(index))}</th>{''.join(cells)}</tr>")
    body = "".join(lines[1:])
    return _html(
        f'<div style="overflow-x:auto"><table><thead>{lines[0]}</thead><tbody>{body}</tbody></table></div>'
    )


def sentences(lines: Sequence[str]) -> IPython.display.HTML:
    """Sentences as a bulleted list."""
    return _html(f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>")


def in_words(action: Action) -> str:
    """An action in plain English: ``tap 50 % from the left and 12 % from the top``."""
    values = action.arguments
    if action.point is not None:
        return f"{action.name.lower()} {_place(action.point)}"
    if action.name == "Swipe":
        return f"swipe from {_place(values['start'])} to {_place(values['end'])}"
    if action.name == "finish":
        return f"say “{values['message']}” and stop"
    text = ", ".join(str(value) for value in values.values())
    return f"{action.name.lower().replace('_', ' ')} {text}".strip()


def _unbroken(write: Callable[[float], str]) -> Callable[[float], str]:
    """``write`` with no-break spaces."""
    return lambda value: write(value).replace(" ", "\N{NO-BREAK SPACE}")


def _plain(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _count(number: float) -> str:
    """Parameters: ``885 k``, ``6.87 M``, ``8.16 B``."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:#.3g}".removesuffix(".") + f" {unit}"
    return f"{number:.0f}"


def _score_text(question: Item, text: str) -> str:
    result = score(question, text)
    if not result.parsed:
        return "no: it cannot be read as an action"
    if result.click is None:
        return "yes" if result.success else f"no: right is {format_action(question.action)}"
    if result.click:
        return f"yes: the tap lands on “{question.target}”"
    if result.distance is None:
        return f"no: nothing is tapped; right is “{question.target}”"
    return f"no: it misses “{question.target}” by {result.distance:.0%} of the screen's side"


def _place(point: tuple[int, int]) -> str:
    return f"{point[0] / 10:.0f} % from the left and {point[1] / 10:.0f} % from the top"


def _png_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _html(text: str) -> IPython.display.HTML:
    from IPython.display import HTML

    return HTML(text)
