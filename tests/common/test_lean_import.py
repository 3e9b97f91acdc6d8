"""What talks to a service, reads results or draws charts never loads torch; public names are as promised."""

import subprocess
import sys

import pytest

import labkit

HEAVY = ("torch", "transformers", "bitsandbytes", "pandas", "plotly", "rich", "gradio", "fastapi")
NO_TORCH = (
    "labkit.interactive.chat",
    "labkit.interactive.chat.window",
    "labkit.loading",
    "labkit.cli.main",
    "labkit.client",
    "labkit.measure.quality",
    "labkit.common.files",
    "labkit.client.launch",
    "labkit.client.launch.__main__",
    "labkit.common.messages",
    "labkit.phonetap",
    "labkit.results.charts.methods",
    "labkit.results.charts.layers",
    "labkit.results.charts.methods",
    "labkit.phonetap",
    "labkit.results.charts.comparison",
    "labkit.common.options",
    "labkit.common.process",
    "labkit.loading.options",
    "labkit.measure.options",
    "labkit.common.actions",
    "labkit.results.report",
    "labkit.results.measurement",
    "labkit.results.tables",
)


def loaded_after(statement):
    code = f"import sys\n{statement}\nprint(*(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_labkit_loads_nothing_heavy():
    assert not loaded_after("import labkit") & {*HEAVY, "numpy", "PIL"}


def test_the_command_lines_help_loads_nothing_heavy():
    statement = "from labkit.cli.main import build_parser\nbuild_parser().format_help()"
    assert not loaded_after(statement) & {*HEAVY, "numpy", "PIL"}


@pytest.mark.parametrize("module", NO_TORCH)
def test_these_modules_do_not_load_torch(module):
    assert not loaded_after(f"import {module}") & {"torch", "transformers", "bitsandbytes"}


def test_drawing_a_chart_does_not_load_torch():
    statement = (
        "from labkit.results.measurement import Measurement\n"
        "from labkit.results.charts.comparison import figure\n"
        "figure([Measurement(model='m', plan='fp32', device='cpu', weights_bytes=5)])"
    )
    assert "torch" not in loaded_after(statement)


@pytest.mark.parametrize("name", labkit.__all__)
def test_every_public_name_is_there(name):
    assert getattr(labkit, name) is not None


def test_only_public_names_are_listed():
    assert set(labkit.__all__) == {
        "Action",
        "Comparison",
        "Engine",
        "Generation",
        "LabError",
        "Datasets",
        "Measurement",
        "ModelSpec",
        "QuantizationPlan",
        "__version__",
        "compare",
        "compare_perplexity",
        "export",
        "get_spec",
        "list_models",
        "load",
        "measure_sensitivity",
        "parse_answer",
        "quantize_",
        "quantize_to",
        "save",
        "search_plan",
    }
    assert set(labkit.__all__) <= set(dir(labkit))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        labkit.laod  # noqa: B018
