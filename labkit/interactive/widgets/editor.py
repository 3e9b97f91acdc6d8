"""The plan editor: a scheme for each part with live predicted bytes, and the plan's YAML both ways."""

import html
from dataclasses import fields
from typing import Any

import ipywidgets
import yaml

from labkit.common.errors import LabError
from labkit.common.formats import format_bytes
from labkit.common.yaml_text import parse_yaml
from labkit.interactive.widgets.fields import STYLE, WIDE, Chart, SchemeOptions, message
from labkit.measure.anatomy import dissect
from labkit.models import ROLES
from labkit.plans.plan import QuantizationPlan, Rule, presets
from labkit.quantization import DTYPES, known_schemes
from labkit.results.charts.anatomy import role_name

DEFAULT = "the default"


class PlanEditor(ipywidgets.VBox):
    """See `labkit.interactive.widgets.plan_editor`. ``plan`` is the current plan, None while the YAML is wrong."""

    def __init__(self, model: str = "pocket", plan: str | QuantizationPlan = "int4") -> None:
        self._anatomy = dissect(model)
        self._quiet = False
        self.plan: QuantizationPlan | None = None
        present = {part.role for part in self._anatomy.parts if part.is_linear}
        self.roles = [role for role in ROLES if role in present]
        self.name = ipywidgets.Text(description="name", continuous_update=False, style=STYLE, layout=WIDE)
        self.default = ipywidgets.Dropdown(
            options=list(DTYPES),
            value="bf16",
            description="default",
            tooltip="dtype of everything that no rule is about",
            style=STYLE,
            layout=WIDE,
        )
        self.stored = ipywidgets.Checkbox(
            description="embedding and convolutions in 8 bits",
            tooltip="they are looked up or slid over the input, not multiplied as Linears are; stored in 8 bits",
            indent=False,
            layout=WIDE,
        )
        self.rules = {role: _RoleRule(role, self._rules_changed) for role in self.roles}
        self.yaml = ipywidgets.Textarea(continuous_update=False, layout=_area())
        self.path = ipywidgets.Text(
            value="my-plan.yaml", description="file", style=STYLE, layout=ipywidgets.Layout(flex="1 1 auto")
        )
        self.save_button = ipywidgets.Button(description="Save", icon="save")
        self.status, self.bytes = ipywidgets.HTML(layout=WIDE), ipywidgets.HTML(layout=WIDE)
        self.chart = Chart(self._anatomy.plan_chart(["bf16"]), 260)
        for control in (self.name, self.default, self.stored):
            control.observe(self._rules_changed, names="value")
        self.yaml.observe(self._yaml_changed, names="value")
        self.save_button.on_click(lambda _: self.save())
        left = ipywidgets.VBox(
            [self.name, self.default, self.stored, *self.rules.values()],
            layout=ipywidgets.Layout(width="360px", flex="0 0 auto"),
        )
        right = ipywidgets.VBox(
            [self.status, self.bytes, self.chart, ipywidgets.HTML("<b>The same as YAML</b>: edit it here, too"),
             self.yaml, ipywidgets.HBox([self.path, self.save_button])],
            layout=ipywidgets.Layout(flex="1 1 380px", overflow="hidden"),
        )  # fmt: skip
        row = ipywidgets.Layout(display="flex", flex_flow="row wrap", width="100%", grid_gap="16px")
        super().__init__([ipywidgets.Box([left, right], layout=row)], layout=WIDE)
        self.show(plan if isinstance(plan, QuantizationPlan) else QuantizationPlan.from_yaml(plan))

    def show(self, plan: QuantizationPlan) -> None:
        """Show a plan in the rules and as YAML. Raises LabError if it does not fit the model."""
        resolved = self._anatomy.under(plan).resolved
        self._quiet = True
        self.name.value, self.default.value = plan.name, plan.default
        self.stored.value = any(_is_of_stored(rule) for rule in plan.rules)
        for role, rule in self.rules.items():
            names = [part.module for part in resolved.parts if part.is_linear and part.role == role]
            rule.show({resolved.schemes.get(name) for name in names})
        self.yaml.value = _written(plan)
        self._quiet = False
        self._accept(plan)

    def save(self) -> None:
        """Write the plan to the named file; its path works wherever a plan's name does."""
        try:
            if self.plan is None:
                raise LabError("this is no plan yet: see above")
            self.plan.to_yaml(self.path.value)
        except (LabError, OSError) as error:
            self.status.value = message(str(error), is_error=True)
            return
        self.status.value = message(f"saved: labkit.load(…, plan={self.path.value!r})")

    def _rules_changed(self, _: Any = None) -> None:
        """Make the plan from the controls: one rule for each part."""
        if self._quiet:
            return
        special = (
            [] if self.plan is None else [rule.to_dict() for rule in self.plan.rules if _is_special(rule)]
        )
        fallbacks = {} if self.plan is None else {rule.on_unsupported for rule in self.plan.rules} - {None}
        rest = {"on_unsupported": next(iter(fallbacks)).name} if fallbacks else {}
        if self.stored.value:
            special += _store_rules(self.plan)
        rules = [*special, *({**rule.definition(), **rest} for rule in self.rules.values() if rule.is_set)]
        written = {} if self.plan is None else self.plan.to_dict()
        extras = {name: written[name] for name in ("description", "runtime") if name in written}
        name = self.name.value or "mine"
        if name in presets():  # a preset's name stays with the preset
            name, extras["description"] = f"{name}-mine", ""
        self._try({"name": name, "rules": rules, "default": self.default.value, **extras}, True)

    def _yaml_changed(self, _: Any) -> None:
        """Make the plan from the YAML, which may also hold rules by pattern."""
        if self._quiet:
            return
        try:
            data = parse_yaml(self.yaml.value)
        except LabError as error:
            self._refuse(str(error))
            return
        self._try(data, False)

    def _try(self, data: Any, from_rules: bool) -> None:
        try:
            plan = QuantizationPlan.from_dict(data, "plan")
            if not from_rules:
                self.show(plan)
                return
            self._accept(plan)
        except LabError as error:
            self._refuse(str(error))
            return
        self._quiet = True
        self.name.value, self.yaml.value = plan.name, _written(plan)
        self._quiet = False

    def _accept(self, plan: QuantizationPlan) -> None:
        under = self._anatomy.under(plan)
        self.plan = plan
        before = self._anatomy.under("bf16").bytes
        self.bytes.value = (
            f"<div style='font-size:15px'><b>{format_bytes(under.bytes)}</b> of weights are predicted, "
            f"{under.bytes / before:.0%} of bf16's {format_bytes(before)}; "
            f"{8 * under.bytes / under.parameters:.2f} bits a parameter</div>"
        )
        self.status.value = "".join(message(note) for note in under.resolved.summary[:3])
        chart = self._anatomy.plan_chart(["bf16", plan] if plan.name != "bf16" else ["bf16"])
        shown = self.chart.figure
        with shown.batch_update():
            shown.data = []
            shown.add_traces(list(chart.data))
            shown.layout.annotations = chart.layout.annotations
            shown.layout.xaxis.range = chart.layout.xaxis.range

    def _refuse(self, why: str) -> None:
        self.plan = None
        self.status.value = message(why, is_error=True)
        self.bytes.value = f"<div>{html.escape('No bytes are predicted until this is a plan.')}</div>"


class _RoleRule(ipywidgets.VBox):
    """The scheme of one part, and its options."""

    def __init__(self, role: str, on_change: Any) -> None:
        self.role, self._on_change = role, on_change
        self.scheme = ipywidgets.Dropdown(
            options=[DEFAULT, *known_schemes()],
            description=role_name(role),
            tooltip=f"how the Linears of {role} are stored; “{DEFAULT}” writes no rule",
            style={"description_width": "150px"},
            layout=WIDE,
        )
        self.options = SchemeOptions(lambda: on_change(None), helped=False)
        self.scheme.observe(self._scheme_changed, names="value")
        self.mixed = ipywidgets.HTML()
        self._keep = False
        super().__init__([self.scheme, self.mixed, self.options], layout=WIDE)

    @property
    def is_set(self) -> bool:
        return self.scheme.value != DEFAULT

    def definition(self) -> dict[str, Any]:
        """The rule as it stands in a plan file."""
        options = {name: value for name, value in self.options.values.items() if value is not None}
        return {"role": self.role, "scheme": self.scheme.value, **options}

    def show(self, schemes: set[Any]) -> None:
        """Show the scheme of the part's Linears; for several, point to the YAML."""
        present = [scheme for scheme in schemes if scheme is not None]
        self._keep = True
        scheme = present[0] if present else None
        self.scheme.value = scheme.name if scheme else DEFAULT
        self._show_options(scheme)
        self._keep = False
        several = len(schemes) > 1
        self.mixed.value = message("several schemes in this part; see the YAML") if several else ""

    def _scheme_changed(self, _: Any) -> None:
        if not self._keep:
            self.mixed.value = ""
            self._show_options(None)
            self._on_change(None)

    def _show_options(self, scheme: Any) -> None:
        if not self.is_set or not fields(known_schemes()[self.scheme.value]):
            self.options.clear()
        else:
            self.options.show(self.scheme.value, scheme.options() if scheme else None)


def _is_special(rule: Rule) -> bool:
    """Does it select Linears by name or depth? Such rules have no control, and are kept as they are."""
    narrow = bool(rule.linears) or rule.depth is not None
    return not _is_of_stored(rule) and (
        narrow or (rule.match is not None and rule.match not in ("*", "re:.*"))
    )


def _is_of_stored(rule: Rule) -> bool:
    """Is it about embeddings and convolutions, which are stored and not multiplied?"""
    return "linear" not in rule.modules


def _store_rules(plan: QuantizationPlan | None) -> list[dict[str, Any]]:
    """The plan's own rules for embeddings and convolutions, or the usual ones: 8 bits."""
    own = [] if plan is None else [rule.to_dict() for rule in plan.rules if _is_of_stored(rule)]
    usual = {"match": "re:.*", "modules": ["embedding", "conv"], "scheme": "int8", "optional": True}
    return own or [usual]


def _written(plan: QuantizationPlan) -> str:
    return yaml.safe_dump(plan.to_dict(), sort_keys=False, allow_unicode=True)


def _area() -> ipywidgets.Layout:
    return ipywidgets.Layout(width="calc(100% - 8px)", height="300px")
