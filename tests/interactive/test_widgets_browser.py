"""The widgets in JupyterLab, in a real browser and in the dark theme: clicked, changed, run and stopped."""

from pathlib import Path

import pytest
from browsing import IDLE, browser_needed, jupyter, page, write_notebook

from labkit.models import get_spec

FAKES = str(Path(__file__).parents[1] / "compare_fakes_cli.py")
CELLS = (
    "from labkit import widgets\nwidgets.explore('pocket', part='lm_head', items=2)",
    "widgets.plan_editor('pocket')",
    "import sys\nc = widgets.compare('pocket', items=10, output='run')\n"
    f"c.command = (sys.executable, {FAKES!r})\nc",
)
FITS = (
    "() => { const shown = [...document.querySelectorAll('.js-plotly-plot')].filter(one => one.clientWidth);"
    " const fits = one => Math.abs(one.querySelector('.main-svg').clientWidth - one.clientWidth) < 2;"
    " return shown.length == 4 && shown.every(fits) }"
)
"""JavaScript: the widgets' charts are as wide as their places: two of explore, one each of the others."""
OUTPUTS = "(() => [...jupyterapp.shell.currentWidget.content.model.cells].flatMap(c => c.toJSON().outputs))()"


@pytest.mark.slow
@browser_needed
@pytest.mark.skipif(get_spec("pocket").availability() != "here", reason="the pocket model is not in assets")
def test_widgets_work_in_jupyterlab_in_the_dark(tmp_path):
    write_notebook(tmp_path / "widgets.ipynb", CELLS)
    with jupyter(tmp_path, dark=True, FAKE_PAUSE_S="1") as url, page(1500, 2600) as tab:
        tab.set_default_timeout(120_000)
        tab.goto(f"{url}/lab/tree/widgets.ipynb?reset")
        tab.wait_for_selector(".jp-NotebookPanel .jp-Cell")
        tab.wait_for_function(IDLE)
        assert tab.evaluate("document.body.dataset.jpThemeLight") == "false"
        tab.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
        explore, editor, compare = (tab.locator(".jp-CodeCell").nth(number) for number in range(3))

        explore.get_by_text("4.50 bits a weight").wait_for()
        explore.locator("img[alt^='int4']").wait_for()
        before = explore.locator(".jp-OutputArea").inner_text()
        explore.locator("select").nth(3).select_option("int8")
        explore.get_by_text("bits a weight").filter(has_text="8.").wait_for()
        assert explore.locator(".jp-OutputArea").inner_text() != before

        editor.get_by_text("of weights are predicted").wait_for()
        editor.locator("select").nth(1).select_option("fp32")
        editor.get_by_text("int4-mine").first.wait_for()
        assert "scheme: fp32" in editor.locator("textarea").input_value()

        compare.get_by_role("button", name="Run").click()
        compare.get_by_text("of 10 answers").first.wait_for()
        compare.get_by_role("button", name="Stop").click()
        compare.get_by_text("Run continues").wait_for()
        compare.get_by_role("button", name="Run").click()
        compare.get_by_text("finished; results").wait_for()
        compare.get_by_text("Accuracy", exact=True).last.click()
        compare.locator(".js-plotly-plot .scatterlayer path").first.wait_for()
        tab.wait_for_function(FITS)
        narrow = compare.locator(".main-svg").first.bounding_box()["width"]
        tab.set_viewport_size({"width": 1900, "height": 2600})
        tab.wait_for_function(
            f"() => document.querySelectorAll('.jp-CodeCell')[2].clientWidth > {narrow} + 200"
        )
        tab.wait_for_function(FITS)
        assert compare.locator(".main-svg").first.bounding_box()["width"] > narrow + 200

        outputs = tab.evaluate(OUTPUTS)
        assert [one for one in outputs if one["output_type"] == "error" or one.get("name") == "stderr"] == []
        assert tab.trouble == []
