"""Widgets for notebooks, on ipywidgets and plotly's FigureWidget.

    from labkit import widgets
    widgets.explore("pocket")        # one scheme on one Linear or part: weights, error, bytes, a live tap
    widgets.compare("pocket")        # choose plans, run them in the background, watch the results come in
    widgets.plan_editor("pocket")    # rules by part with live predicted bytes, and the YAML both ways

Each is an ordinary widget: the last line of a cell shows it. Labels and help are the same field
descriptions that the command line shows.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkit.interactive.widgets.comparer import Compare
    from labkit.interactive.widgets.editor import PlanEditor
    from labkit.interactive.widgets.explorer import Explore

__all__ = ["compare", "explore", "plan_editor"]


def explore(model: Any = "pocket", **chosen: Any) -> "Explore":
    """Pick a Linear or a part and a scheme; see weights before and after, error, bytes and a live tap.

    model: a model's name, which is loaded in fp32, or an engine (`labkit.load`) that is not quantized.
    chosen: initial choices: ``part="lm_head"``, ``linear=…``, ``scheme="int4"``.
    """
    from labkit.interactive.widgets.explorer import Explore

    return Explore(model, **chosen)


def compare(model: str = "pocket", **chosen: Any) -> "Compare":
    """Choose plans, items and device; run them outside the kernel, with progress, a stop button and results.

    chosen: initial choices: ``plans=["fp32", "int4"]``, ``items=60``, ``output="results/mine"``.
    """
    from labkit.interactive.widgets.comparer import Compare

    return Compare(model, **chosen)


def plan_editor(model: str = "pocket", plan: Any = "int4") -> "PlanEditor":
    """Choose a scheme for each part and see the bytes it predicts; the same as YAML, in both directions.

    ``.plan`` is the current plan: pass it to ``labkit.load`` or ``labkit.compare``.
    """
    from labkit.interactive.widgets.editor import PlanEditor

    return PlanEditor(model, plan)
