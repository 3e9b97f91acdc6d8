"""Controls for a scheme's options, made from its dataclass fields with their help texts."""

import html
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Any

import anywidget
import ipywidgets
from plotly.graph_objects import FigureWidget

from labkit.quantization import Scheme, known_schemes

WIDE = ipywidgets.Layout(width="calc(100% - 8px)")
STYLE = {"description_width": "134px"}
USUAL = {"group_size": (16, 32, 64, 128, 256)}
"""Values that a slider offers for options which take any number."""
SOFT = "opacity:.75;font-size:13px;line-height:1.4"


def label(field: Field) -> str:
    """A field's name as words: ``group_size`` is group size."""
    return field.name.replace("_", " ")


def control(field: Field, value: Any = None) -> ipywidgets.Widget:
    """A slider for a few numbers, a checkbox for yes or no, a list for words; its tooltip is the help text."""
    value = field.default if value is None else value
    choices, help_text = field.metadata.get("choices"), field.metadata.get("help", "")
    if choices is None and value in USUAL.get(field.name, ()):
        choices = USUAL[field.name]
    common = {"description": label(field), "tooltip": help_text, "style": STYLE, "layout": WIDE}
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


class Chart(ipywidgets.VBox):
    """A chart as wide as its container, even if the width changes later (a tab opens, a window grows).

    height: in pixels. `figure` is plotly's ``FigureWidget``: its marks can be changed.
    """

    def __init__(self, chart: Any, height: int) -> None:
        self.figure = FigureWidget(chart.update_layout(height=height, width=None, autosize=True))
        self.figure._config = {**self.figure._config, "responsive": True, "displaylogo": False}
        super().__init__([self.figure, _Ruler()], layout=ipywidgets.Layout(width="100%", overflow="hidden"))


class _Ruler(anywidget.AnyWidget):
    """Sends resize events until the chart beside it fills its box, whenever the box changes.

    Plotly measures its container once, often before the chart is on the page, and then only on resize events; it
    starts to listen for them shortly after it has drawn.
    """

    _esm = """
    const fits = (box) => !box.clientWidth
      || [...box.querySelectorAll(".main-svg")].some((drawn) => Math.abs(drawn.clientWidth - box.clientWidth) < 2);
    export default { render({ el }) {
      const fit = (times) => {
        if (!el.isConnected || fits(el.parentElement)) return;
        window.dispatchEvent(new Event("resize"));
        if (times) setTimeout(fit, 300, times - 1);
      };
      const watcher = new ResizeObserver(() => fit(20));
      const watch = () => (el.isConnected ? watcher.observe(el.parentElement) : requestAnimationFrame(watch));
      watch();
      return () => watcher.disconnect();
    } }
    """


def message(text: str, is_error: bool = False) -> str:
    """A status line; an error is marked in words as well as in colour."""
    if not text:
        return ""
    word = "<b>Not possible:</b> " if is_error else ""
    colour = "#D55E00" if is_error else "#0072B2"
    return f'<div style="border-left:4px solid {colour};padding:2px 10px">{word}{html.escape(text)}</div>'
