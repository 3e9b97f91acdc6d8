"""`labkit.interactive.widgets.explore`: a scheme on a Linear or on a part; weights, error, bytes, and a tap on a screen."""

import html
from typing import Any

import ipywidgets

from labkit import phonetap
from labkit.common.errors import LabError
from labkit.common.formats import format_bytes
from labkit.engine.engine import Engine
from labkit.interactive.widgets.fields import STYLE, WIDE, Chart, SchemeOptions, message
from labkit.loading.load import load
from labkit.measure import trial
from labkit.quantization import known_schemes
from labkit.results import show
from labkit.results.charts import weights

ONE, ALL = "this Linear", "the whole part"
SAMPLED = 400_000
"""Most weights in a histogram; larger matrices are sampled at every n-th weight."""


def explorable_schemes(engine: Engine) -> list[str]:
    """Schemes that can be tried; a model that takes no screens has no calibration items."""
    sees = "image" in engine.modalities
    return [name for name, scheme in known_schemes().items() if sees or not scheme().requires_calibration]


class Explore(ipywidgets.VBox):
    """See `labkit.interactive.widgets.explore`. ``result`` is the trial on show."""

    def __init__(
        self,
        model: str | Engine = "pocket",
        part: str = "decoder",
        linear: str | None = None,
        scheme: str = "int4",
        items: int = 12,
    ) -> None:
        self.engine = model if isinstance(model, Engine) else load(model, "fp32", progress=False)
        self.parts = trial.linears_by_part(self.engine)
        self.items = phonetap.items("typed", items)
        self.result: trial.TrialResult | None = None
        self._before: dict[int, Any] = {}
        self._statistics: dict[str, Any] = {}
        self._shown = ""  # name of the Linear of `result`
        self._quiet = False
        self._make_controls(part if part in self.parts else next(iter(self.parts)), linear, scheme)
        self._make_results()
        controls = ipywidgets.VBox(
            [self.part, self.linear, self.scope, self.scheme, self.options, self.screen],
            layout=ipywidgets.Layout(width="290px", flex="0 0 auto"),
        )
        charts = ipywidgets.VBox(
            [self.status, self.facts, self.weights, self.errors],
            layout=ipywidgets.Layout(flex="1 1 440px", overflow="hidden"),
        )
        wrapped = {"display": "flex", "flex_flow": "row wrap", "grid_gap": "14px"}
        seen = ipywidgets.Box([charts, self.taps], layout=ipywidgets.Layout(flex="1 1 450px", **wrapped))
        row = ipywidgets.Layout(width="100%", **wrapped)
        super().__init__([ipywidgets.Box([controls, seen], layout=row)], layout=WIDE)
        self.update()

    def _make_controls(self, part: str, linear: str | None, scheme: str) -> None:
        def common(name: str, help_text: str) -> dict[str, Any]:
            return {"description": name, "tooltip": help_text, "style": STYLE, "layout": WIDE}

        self.part = ipywidgets.Dropdown(
            options=list(self.parts), value=part, **common("part", "a part of the model")
        )
        names = self.parts[part]
        self.linear = ipywidgets.Dropdown(
            options=names,
            value=linear if linear in names else names[-1],
            **common("Linear", "one matrix of weights"),
        )
        self.scope = ipywidgets.Dropdown(
            options=[ONE, ALL], **common("for the tap", "what is quantized when the model answers")
        )
        schemes = explorable_schemes(self.engine)
        self.scheme = ipywidgets.Dropdown(
            options=schemes,
            value=scheme if scheme in schemes else schemes[-1],
            **common("scheme", "how the weights are stored and multiplied"),
        )
        self.screen = ipywidgets.IntSlider(
            value=0,
            min=0,
            max=len(self.items) - 1,
            continuous_update=False,
            **common("screen", "which test item the model is asked"),
        )
        self.options = SchemeOptions(self.update)
        self.options.show(self.scheme.value)
        self.part.observe(self._part_changed, names="value")
        self.scheme.observe(self._scheme_changed, names="value")
        for control in (self.linear, self.scope):
            control.observe(lambda _: self.update(), names="value")
        self.screen.observe(lambda _: self.show_tap(), names="value")

    def _make_results(self) -> None:
        self.status, self.facts = ipywidgets.HTML(layout=WIDE), ipywidgets.HTML(layout=WIDE)
        self.taps = ipywidgets.HTML(layout=ipywidgets.Layout(width="330px", flex="0 0 auto"))
        zeros = [[0.0, 0.0], [0.0, 0.0]]
        self.weights = Chart(weights.histogram(zeros, zeros), 280)
        self.errors = Chart(weights.heat(zeros, "error"), 260)

    def _part_changed(self, _: Any) -> None:
        self._quiet = True
        names = self.parts[self.part.value]
        self.linear.options = names
        self.linear.value = names[-1]
        self._quiet = False
        self.update()

    def _scheme_changed(self, _: Any) -> None:
        self.options.show(self.scheme.value)
        self.update()

    def update(self) -> None:
        """Quantize the choice and draw it. An error is shown as status, and the last charts stay."""
        if self._quiet:
            return
        self.status.value = message("working …")
        try:
            scheme, name = self.options.scheme(), self.linear.value
            statistics = self._statistics_for(scheme, [name])
            linear = trial.find_linear(self.engine.model, name)
            self.result = trial.try_scheme(linear, scheme, statistics.get(name))
            self._shown = name
        except LabError as error:
            self.status.value = message(str(error), is_error=True)
            return
        self._show_weights()
        self.show_tap()

    def show_tap(self) -> None:
        """Let the model answer with unquantized and with quantized weights, and draw both taps."""
        if self.result is None:
            return
        number = self.screen.value
        item = self.items[number]
        try:
            if number not in self._before:
                self._before[number] = trial.answer(self.engine, item, {})
            modules = {self._shown: self.result.module}
            if self.scope.value == ALL:
                modules = self._quantized(self.parts[self.part.value], self.result.scheme)
            after = trial.answer(self.engine, item, modules)
        except LabError as error:
            self.status.value = message(str(error), is_error=True)
            return
        pictures = [show.item(item, self._before[number]), show.item(item, after)]
        kind = f"every Linear of {self.part.value} in" if self.scope.value == ALL else f"{self._shown} in"
        scheme = self.result.scheme.name
        captions = [
            f"unquantized: {_verdict(item, self._before[number])}",
            f"{scheme}: {_verdict(item, after)}",
        ]
        request = f"<div><b>{html.escape(item.instruction)}</b><br>box: the target, ring: the tap</div>"
        self.taps.value = request + show.row(*pictures, captions=captions, height=320).data
        self.status.value = message(f"{kind} {scheme}")

    def _quantized(self, names: list[str], scheme: Any) -> dict[str, Any]:
        """Name -> the module that the scheme puts in the place of each Linear."""
        statistics, model = self._statistics_for(scheme, names), self.engine.model
        return {
            name: trial.try_scheme(trial.find_linear(model, name), scheme, statistics.get(name)).module
            for name in names
        }

    def _statistics_for(self, scheme: Any, names: list[str]) -> dict[str, Any]:
        """Input statistics for a scheme that calibrates, cached for each Linear."""
        missing = [name for name in names if name not in self._statistics]
        if scheme.requires_calibration and missing:
            screens = f"{trial.CALIBRATION_ITEMS} calibration screens"
            self.status.value = message(f"{scheme.name} calibrates: the model looks at {screens} …")
            self._statistics |= trial.calibration_statistics(self.engine, missing)
        return self._statistics if scheme.requires_calibration else {}

    def _show_weights(self) -> None:
        result = self.result
        rows, columns = result.before.shape
        self.facts.value = (
            f"<div style='line-height:1.6'><b>{rows:,} × {columns:,}</b> weights · "
            f"{format_bytes(result.bytes_before)} → <b>{format_bytes(result.bytes_after)}</b> "
            f"({result.bits:.2f} bits a weight) · "
            f"signal to noise <b>{result.sqnr_db:.1f} dB</b> · largest error {result.largest_error:.4f}</div>"
        )
        step = -(-result.before.numel() // SAMPLED)
        before, after = result.before.flatten()[::step], result.after.flatten()[::step]
        traces = weights.histogram_traces(before, after)
        with self.weights.figure.batch_update():
            for shown, new in zip(self.weights.figure.data, traces):
                shown.x, shown.y = new.x, new.y
        errors = self.errors.figure
        with errors.batch_update():
            errors.data[0].z = weights.smaller((result.after - result.before).abs())
            errors.layout.xaxis.title.text = f"input features ({columns:,})"
            errors.layout.yaxis.title.text = f"output features ({rows:,})"


def _verdict(item: phonetap.Item, generation: Any) -> str:
    """hit, miss, or the answer itself where nothing is to be tapped."""
    result = phonetap.score(item, generation.text)
    return "right" if result.success else "wrong" if result.parsed else f"unreadable ({generation.text[:40]})"
