"""Controls for the options of a scheme, made from its dataclass fields: one label and one help text everywhere."""

import html
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Any

import ipywidgets
from plotly.graph_objects import FigureWidget

from labkit.quantization import Scheme, known_schemes

WIDE = ipywidgets.Layout(width="calc(100% - 8px)")
STYLE = {"description_width": "124px"}
USUAL = {"group_size": (16, 32, 64, 128, 256)}
"""Values that a slider offers for options which take any number."""
SOFT = "opacity:.75;font-size:13px;line-height:1.4"


def label(field: Field) -> str:
    """A field's name as words: ``group_size`` is group size."""
    return field.name.replace("_", " ")


def control(field: Field, value: Any = None) -> ipywidgets.Widget:
    """A slider for a few numbers, a checkbox for yes or no, a list for words; its tooltip is the help text."""
    value = field.default if value is None else value
    choices, told = field.metadata.get("choices"), field.metadata.get("help", "")
    if choices is None and value in USUAL.get(field.name, ()):
        choices = USUAL[field.name]
    common = {"description": label(field), "tooltip": told, "style": STYLE, "layout": WIDE}
    if isinstance(field.default, bool):
        return ipywidgets.Checkbox(value=value, indent=False, **{**common, "description": label(field)})
    if choices and all(isinstance(choice, int) for choice in choices):
        return ipywidgets.SelectionSlider(options=choices, value=value, continuous_update=False, **common)
    if choices:
        named = [("–" if choice is None else str(choice), choice) for choice in choices]
        return ipywidgets.Dropdown(options=named, value=value, **common)
    if isinstance(field.default, int):
        return ipywidgets.BoundedIntText(value=value, min=1, max=2**31 - 1, **common)
    if isinstance(field.default, float):
        return ipywidgets.FloatText(value=value, **common)
    return ipywidgets.Text(value="" if value is None else str(value), continuous_update=False, **common)


def note(text: str) -> ipywidgets.HTML:
    """A line of help below a control."""
    return ipywidgets.HTML(f'<div style="{SOFT}">{html.escape(text)}</div>', layout=WIDE)


class SchemeOptions(ipywidgets.VBox):
    """The controls of one scheme's options; ``on_change`` is called when one changes.

    helped: write the help below each control, not only into its tooltip.
    """

    def __init__(self, on_change: Callable[[], None], helped: bool = True) -> None:
        super().__init__(layout=WIDE)
        self._on_change, self._helped = on_change, helped
        self._name = ""
        self.controls: dict[str, ipywidgets.Widget] = {}

    def show(self, name: str, values: Mapping[str, Any] | None = None) -> None:
        """Show the options of the scheme ``name``, at ``values`` or their defaults."""
        self._name, values = name, values or {}
        scheme = known_schemes()[name]
        self.controls = {field.name: control(field, values.get(field.name)) for field in fields(scheme)}
        children = [note((scheme.__doc__ or "").strip().splitlines()[0])] if self._helped else []
        for field in fields(scheme):
            self.controls[field.name].observe(lambda _: self._on_change(), names="value")
            children.append(self.controls[field.name])
            if self._helped:
                children.append(note(field.metadata.get("help", "")))
        self.children = children

    def clear(self) -> None:
        """Show nothing."""
        self._name, self.controls, self.children = "", {}, ()

    @property
    def values(self) -> dict[str, Any]:
        """The options as they are set."""
        return {name: control.value for name, control in self.controls.items()}

    def scheme(self) -> Scheme:
        """The scheme with these options. Raises SchemeError for values that it refuses."""
        return known_schemes()[self._name](**self.values)


def option_help(command: str) -> dict[str, str]:
    """Option -> help text, as ``labkit COMMAND --help`` prints it, with a capital first letter."""
    from labkit.cli import build_parser

    [commands] = (
        action for action in build_parser()._actions if hasattr(action, "choices") and action.choices
    )
    found = {}
    for action in commands.choices[command]._actions:
        for name in action.option_strings:
            if name.startswith("--") and action.help:
                found[name.removeprefix("--")] = action.help[0].upper() + action.help[1:]
    return found


def live(chart: Any, height: int, width: int | None = None) -> FigureWidget:
    """A chart whose marks can be changed. ``width`` in pixels; None: of the place it is in, as far as it knows."""
    figure = FigureWidget(chart.update_layout(height=height, width=width, autosize=width is None))
    figure._config = {**figure._config, "responsive": width is None, "displaylogo": False}
    return figure


def message(text: str, is_error: bool = False) -> str:
    """A line of state; an error says so in words, besides its colour."""
    if not text:
        return ""
    word = "<b>Not possible:</b> " if is_error else ""
    colour = "#D55E00" if is_error else "#0072B2"
    return f'<div style="border-left:4px solid {colour};padding:2px 10px">{word}{html.escape(text)}</div>'
