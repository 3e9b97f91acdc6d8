"""`labkit.interactive.widgets.compare`: choose plans, run them in another process, and watch the results come in."""

import html
import threading
import time
from pathlib import Path
from typing import Any

import ipywidgets

from labkit import phonetap
from labkit.common.errors import LabError
from labkit.common.formats import format_bytes
from labkit.common.options import help_of
from labkit.interactive.widgets.fields import STYLE, WIDE, Chart, message
from labkit.interactive.widgets.running import LABKIT, ComparisonRun, PlanProgress, write_plan
from labkit.measure.anatomy import Anatomy, dissect
from labkit.measure.options import CompareOptions
from labkit.models import get_spec
from labkit.plans.plan import QuantizationPlan, presets
from labkit.results.charts.marks import plan_colour
from labkit.results.comparison import Comparison

CHARTS = {"Bytes": "bytes", "Time": "latency", "Accuracy": "accuracy", "Paired": "paired", "Drift": "drift"}
POLL_S = 0.7

TABLE_STYLE = (
    "<style>.labkit-results th, .labkit-results td {padding: 2px 8px; text-align: right; white-space: nowrap}"
    " .labkit-results tbody tr:nth-child(odd) {background: rgba(128, 128, 128, .12)}"
    " .labkit-results table {border-collapse: collapse; margin-bottom: 12px}</style>"
)
"""Notebook CSS styles the tables of cell outputs, but not those inside a widget."""


class Compare(ipywidgets.VBox):
    """See `labkit.interactive.widgets.compare`. ``comparison`` holds the finished results; ``run`` the process or None."""

    def __init__(
        self,
        model: str = "pocket",
        plans: list[Any] | None = None,
        items: int = 60,
        output: str | None = None,
    ) -> None:
        self.model, self.run, self.comparison = model, None, None
        self.command = LABKIT
        self._anatomy: Anatomy = dissect(model)
        self._sources: dict[str, str | QuantizationPlan] = {}
        self._shown = -1
        self._make_controls(items, output)
        self.plans = ipywidgets.VBox(layout=WIDE)
        chosen = ["fp32", "int4"] if plans is None else plans
        for plan in [*presets(), *(plan for plan in chosen if plan not in presets())]:
            self.add_plan(plan, chosen=plan in chosen)
        self.progress, self.status = ipywidgets.HTML(layout=WIDE), ipywidgets.HTML(layout=WIDE)
        self.results = ipywidgets.Tab(layout=ipywidgets.Layout(width="calc(100% - 8px)", display="none"))
        self.results.observe(self._page_opened, names="selected_index")
        left = ipywidgets.VBox(
            [ipywidgets.HTML("<b>Plans</b> and the bytes they predict"), self.plans],
            layout=ipywidgets.Layout(width="330px", flex="0 0 auto"),
        )
        buttons = ipywidgets.HBox([self.start_button, self.stop_button, self.load_button])
        right = ipywidgets.VBox(
            [self.items, self.split, self.device, self.thinking, self.output, buttons, self.status,
             self.progress],
            layout=ipywidgets.Layout(flex="1 1 340px"),
        )  # fmt: skip
        row = ipywidgets.Layout(display="flex", flex_flow="row wrap", width="100%", grid_gap="16px")
        super().__init__([ipywidgets.Box([left, right], layout=row), self.results], layout=WIDE)

    def _make_controls(self, items: int, output: str | None) -> None:
        def common(name: str) -> dict[str, Any]:
            text = help_of(CompareOptions, name)
            return {
                "description": name,
                "tooltip": text[0].upper() + text[1:],
                "style": STYLE,
                "layout": WIDE,
            }

        self.items = ipywidgets.IntSlider(
            value=items, min=5, max=600, step=5, continuous_update=False, **common("items")
        )
        self.split = ipywidgets.Dropdown(options=["all", *phonetap.SPLITS], **common("split"))
        self.device = ipywidgets.Dropdown(options=["auto", "cpu", *_gpus()], **common("device"))
        self.thinking = ipywidgets.Checkbox(indent=True, **common("thinking"))
        self._own_output = output is not None
        self.output = ipywidgets.Text(value=output or self._usual_output(), **common("output"))
        for control in (self.items, self.split, self.device, self.thinking):
            control.observe(self._settings_changed, names="value")
        self.output.observe(self._output_changed, names="value")
        self.start_button = ipywidgets.Button(description="Run", icon="play", button_style="primary")
        self.stop_button = ipywidgets.Button(description="Stop", icon="stop", disabled=True)
        self.load_button = ipywidgets.Button(
            description="Load", icon="folder-open", tooltip="show the results that are in the folder"
        )
        self.start_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())
        self.load_button.on_click(lambda _: self.load())

    # -- choosing -----------------------------------------------------------------------------------------

    def add_plan(self, plan: str | QuantizationPlan, chosen: bool = True) -> None:
        """Offer another plan: a preset's name, a YAML file, or a plan (from `plan_editor`, say)."""
        source = plan if isinstance(plan, QuantizationPlan) else str(plan)
        note, possible, name, described = "", True, str(plan), ""
        try:
            loaded = plan if isinstance(plan, QuantizationPlan) else QuantizationPlan.from_yaml(plan)
            name, described = loaded.name, loaded.description
            note = format_bytes(self._anatomy.under(loaded).bytes)
        except LabError as error:
            note, possible = str(error), False
        box = ipywidgets.Checkbox(
            value=chosen and possible, description=name, disabled=not possible, indent=False,
            layout=ipywidgets.Layout(width="190px"), tooltip=described,
        )  # fmt: skip
        line = ipywidgets.HBox([box, ipywidgets.HTML(f"<span>{html.escape(note)}</span>")])
        others = [other for other in self.plans.children if other.children[0].description != name]
        self._sources[name] = source
        self.plans.children = [*others, line]

    @property
    def chosen(self) -> list[str]:
        """Names of the plans that are ticked."""
        return [line.children[0].description for line in self.plans.children if line.children[0].value]

    def _usual_output(self) -> str:
        name = Path(get_spec(self.model).name).name
        parts = [name, str(self.items.value), self.split.value, self.device.value]
        return "results/" + "-".join([*parts, *(["thinking"] if self.thinking.value else [])])

    def _settings_changed(self, _: Any) -> None:
        if not self._own_output:
            self.output.value = self._usual_output()

    def _output_changed(self, change: Any) -> None:
        self._own_output = change["new"] != self._usual_output()

    # -- running ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start or continue the chosen comparison."""
        if self.run is not None and self.run.is_running:
            return
        if not self.chosen:
            self.status.value = message("tick at least one plan", is_error=True)
            return
        output = Path(self.output.value)
        try:
            sources = [self._named(name, output) for name in self.chosen]
            self.run = ComparisonRun(
                self.model, sources, output, items=self.items.value, split=self.split.value,
                device=self.device.value, thinking=self.thinking.value, command=self.command,
            )  # fmt: skip
            self.run.start()
        except LabError as error:
            self.status.value = message(str(error), is_error=True)
            return
        self._set_running(True)
        self.status.value = message("running; you can go on working in other cells")
        threading.Thread(target=self._follow, daemon=True).start()

    def stop(self) -> None:
        """Stop; measured results are kept, and Run continues."""
        if self.run is not None and self.run.is_running:
            self.status.value = message("stopping …")
            self.run.stop()

    def load(self) -> None:
        """Show the results in the folder."""
        try:
            self._show(Comparison.load(self.output.value))
        except LabError as error:
            self.status.value = message(str(error), is_error=True)
            return
        self.status.value = message(f"loaded from {self.output.value}")

    def _named(self, name: str, output: Path) -> str:
        source = self._sources[name]
        return write_plan(source, output / "given") if isinstance(source, QuantizationPlan) else source

    def _follow(self) -> None:
        """Show progress and finished results until the process ends."""
        while True:
            running = self.run.is_running
            self._show_progress(self.run.progress())
            comparison = self.run.comparison()
            if comparison is not None and len(comparison.measurements) != self._shown:
                self._show(comparison)
            if not running:
                break
            time.sleep(POLL_S)
        self._set_running(False)
        ends = {
            0: message(f"finished; results and report.html are in {self.run.folder.path}"),
            130: message("stopped; what is measured is kept: Run continues"),
        }
        self.status.value = ends.get(self.run.code, message(self.run.last_words(), is_error=True))

    def _set_running(self, running: bool) -> None:
        self.start_button.disabled, self.stop_button.disabled = running, not running
        for control in (self.items, self.split, self.device, self.thinking, self.output, self.load_button):
            control.disabled = running
        if running:
            self._shown = -1

    # -- showing ------------------------------------------------------------------------------------------

    def _show_progress(self, plans: list[PlanProgress]) -> None:
        self.progress.value = f"<table style='width:100%'>{''.join(map(self._progress_row, plans))}</table>"

    def _progress_row(self, progress: PlanProgress) -> str:
        share = progress.answers / max(1, self.run.items)
        state = {
            "waiting": "waiting",
            "measuring": "loading, quantizing, measuring its speed",
            "answering": f"{progress.answers} of {self.run.items} answers, {progress.right} right",
            "finished": "finished",
            "failed": "failed",
        }[progress.state]
        bar = (
            f"<div style='background:rgba(128,128,128,.25);border-radius:4px;height:10px'><div style='width:"
            f"{share:.0%};height:10px;border-radius:4px;background:{plan_colour(progress.plan)}'></div></div>"
        )
        return (
            f"<tr style='background:transparent'><td style='text-align:left'>{html.escape(progress.plan)}</td>"
            f"<td style='width:45%'>{bar}</td><td style='text-align:left'>{html.escape(state)}</td></tr>"
        )

    def _show(self, comparison: Comparison) -> None:
        """Show table, conclusions and charts of the finished plans."""
        self.comparison, self._shown = comparison, len(comparison.measurements)
        table = ipywidgets.HTML(TABLE_STYLE + comparison._repr_html_(), layout=WIDE)
        table.add_class("labkit-results")
        sentences = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in comparison.conclusions())
        pages = {"Table": table, "Conclusions": ipywidgets.HTML(f"<ul>{sentences}</ul>", layout=WIDE)}
        pages |= {title: ipywidgets.VBox(layout=WIDE) for title in CHARTS}
        selected = self.results.selected_index
        self.results.children = list(pages.values())
        self.results.titles = list(pages)
        self.results.selected_index = selected or 0
        self.results.layout.display = "flex"
        self._page_opened()

    def _page_opened(self, _: Any = None) -> None:
        """Draw a chart only when its page is opened."""
        if self.comparison is None or self.results.selected_index is None:
            return
        kinds = [None, None, *CHARTS.values()]
        page, kind = (of[self.results.selected_index] for of in (self.results.children, kinds))
        if kind is not None and not page.children:
            chart = self.comparison.plot(kind)
            page.children = [Chart(chart, chart.layout.height)]


def _gpus() -> list[str]:
    from labkit.common.machine import gpus

    return [f"cuda:{index}" for index in range(len(gpus()))]
