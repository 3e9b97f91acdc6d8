"""Displays for notebooks: taps on a screen, the parts of an answer, recordings, tables. No torch.

Pictures are PIL images; the HTML is readable on light and dark pages.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from labkit.common.actions import COORDINATE_MAX, SAMPLE_RATE, Action, Answer, format_action, parse_answer
from labkit.common.errors import LabError
from labkit.common.formats import format_bytes, format_seconds
from labkit.phonetap import Item, Screen, score

if TYPE_CHECKING:
    import IPython.display
    import numpy as np
    import pandas

RIGHT, GIVEN = "#0072B2", "#D55E00"
"""Blue for the true target, orange for the model's tap (Okabe and Ito's); the marks differ in shape too."""
SCALE = 2
"""Factor by which pictures are larger than screens, so that marks are crisp."""


def tap(
    screen: Screen | Image.Image,
    answer: Any = None,
    target: str | tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """The screen with the model's tap (orange ring) and the true target (blue box).

    answer: a `Generation`, its text, or an `Action`; one without a point draws nothing. target: an element's
    label, or a box (x0, y0, x1, y1) in thousandths. Raises LabError for a label that is not on the screen.
    """
    canvas = _enlarged(screen)
    if target is not None:
        _box(canvas, _pixels(_target_box(screen, target), canvas.size), RIGHT)
    action = _action(answer)
    if action is not None:
        names = [name for name in ("element", "start", "end") if name in action.arguments]
        points = [_point(action.arguments[name], canvas.size) for name in names]
        if len(points) == 2:
            ImageDraw.Draw(canvas).line(points, fill=GIVEN, width=6)
        for point in points:
            _ring(canvas, point)
    return canvas


def taps(
    screen: Screen | Image.Image,
    answers: Sequence[tuple[Any, str]],
    target: str | tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """The screen with the taps of several answers, each in its colour: a ring, a diamond, a ring …; blue box: target.

    answers: pairs of an answer, as for `tap`, and a colour.
    """
    canvas = _enlarged(screen)
    if target is not None:
        _box(canvas, _pixels(_target_box(screen, target), canvas.size), RIGHT)
    for number, (answer, colour) in enumerate(answers):
        action = _action(answer)
        if action is not None and action.point is not None:
            draw = _diamond if number % 2 else _ring
            draw(canvas, _point(action.point, canvas.size), colour=colour)
    return canvas


def item(question: Item, answer: Any = None) -> Image.Image:
    """The screen of a PhoneTap item with its true target, and the tap of ``answer`` if there is one."""
    return tap(question.screen, answer, question.box)


def elements(screen: Screen) -> Image.Image:
    """The screen with a box around each element that can be tapped."""
    canvas = _enlarged(screen)
    for element in screen.elements:
        _box(canvas, tuple(SCALE * side for side in element.box), RIGHT)
    return canvas


def grid(screen: Screen | Image.Image, rows: int, columns: int) -> Image.Image:
    """The picture with the grid of its image tokens: each cell becomes one token."""
    if rows < 1 or columns < 1:
        raise LabError(f"a grid needs at least one row and one column, not {rows} x {columns}")
    canvas = _enlarged(screen)
    draw, (width, height) = ImageDraw.Draw(canvas), canvas.size
    for column in range(1, columns):
        x = round(column * width / columns)
        draw.line([(x, 0), (x, height)], fill=GIVEN, width=2)
    for row in range(1, rows):
        y = round(row * height / rows)
        draw.line([(0, y), (width, y)], fill=GIVEN, width=2)
    return canvas


def row(*pictures: Image.Image, captions: Sequence[str] = (), height: int = 420) -> IPython.display.HTML:
    """Pictures side by side, each ``height`` pixels high with its caption below."""
    if captions and len(captions) != len(pictures):
        raise LabError(f"{len(pictures)} pictures and {len(captions)} captions: give one for each, or none")
    cells = []
    for number, picture in enumerate(pictures):
        caption = html.escape(captions[number]) if captions else ""
        cells.append(
            f'<figure style="margin:0"><img src="{_data_url(picture)}" alt="{caption}" '
            f'style="height:{height}px;border-radius:8px;border:1px solid rgba(128,128,128,.5)">'
            f'<figcaption style="max-width:{height}px">{caption}</figcaption></figure>'
        )
    return _html(f'<div style="display:flex;gap:24px;flex-wrap:wrap">{"".join(cells)}</div>')


def audio(samples: np.ndarray) -> IPython.display.Audio:
    """A player for a recording, float32 [samples] at 16 kHz."""
    from IPython.display import Audio

    return Audio(samples, rate=SAMPLE_RATE)


def answer(generation: Any, question: Item | None = None) -> IPython.display.HTML:
    """The parts of an answer: its thinking, its action, whether it is right, its time.

    generation: a `Generation` or its text. question: its PhoneTap item, for whether it is right.
    """
    text = _text(generation)
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


def _plain(value: Any) -> str:
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


def _text(generation: Any) -> str:
    text = getattr(generation, "text", generation)
    if not isinstance(text, str):
        raise LabError(f"an answer is a Generation or its text, not {type(generation).__name__}")
    return text


def _action(answer: Any) -> Action | None:
    if answer is None or isinstance(answer, Action):
        return answer
    if isinstance(answer, Answer):
        return answer.action
    return parse_answer(_text(answer)).action


def _target_box(screen: Screen | Image.Image, target: str | tuple) -> tuple[float, ...]:
    """The box of a target, in thousandths of the screen."""
    if not isinstance(target, str):
        return tuple(target)
    if not isinstance(screen, Screen):
        raise LabError("a picture has no labels: give the target as a box in thousandths")
    labels = [element.label for element in screen.elements]
    if target not in labels:
        raise LabError(f"there is no {target!r} on this screen; there are {', '.join(labels)}")
    sides = screen.size * 2
    return tuple(edge / side * 1000 for edge, side in zip(screen.find(target).box, sides))


def _enlarged(screen: Screen | Image.Image) -> Image.Image:
    image = screen.image if isinstance(screen, Screen) else screen
    width, height = image.size
    return image.convert("RGB").resize((width * SCALE, height * SCALE), Image.Resampling.LANCZOS)


def _pixels(box: Sequence[float], size: tuple[int, int]) -> tuple[float, ...]:
    return tuple(edge * side / 1000 for edge, side in zip(box, size * 2))


def _point(point: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    return tuple((place + 0.5) * side / (COORDINATE_MAX + 1) for place, side in zip(point, size))


def _box(canvas: Image.Image, box: Sequence[float], colour: str) -> None:
    draw = ImageDraw.Draw(canvas)
    draw.rectangle([box[0] - 2, box[1] - 2, box[2] + 1, box[3] + 1], outline="white", width=7)
    draw.rectangle([box[0], box[1], box[2] - 1, box[3] - 1], outline=colour, width=3)


def _ring(canvas: Image.Image, centre: tuple[float, float], radius: int = 17, colour: str = GIVEN) -> None:
    draw, (x, y) = ImageDraw.Draw(canvas), centre
    for reach, width, shade in ((radius + 3, 11, "white"), (radius, 5, colour)):
        draw.ellipse([x - reach, y - reach, x + reach, y + reach], outline=shade, width=width)
    draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour, outline="white", width=1)


def _diamond(canvas: Image.Image, centre: tuple[float, float], radius: int = 20, colour: str = GIVEN) -> None:
    draw, (x, y) = ImageDraw.Draw(canvas), centre
    corners = [(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y), (x, y - radius)]
    for width, shade in ((11, "white"), (5, colour)):
        draw.line([*corners, corners[1]], fill=shade, width=width, joint="curve")
    draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour, outline="white", width=1)


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _html(text: str) -> IPython.display.HTML:
    from IPython.display import HTML

    return HTML(text)
