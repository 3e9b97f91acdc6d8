"""``--config FILE.yaml``: it fills the arguments, is checked before anything starts, and every run can be repeated."""

import functools
import inspect
import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import tiny_models
import yaml

import labkit
from labkit.cli.main import build_parser, main
from labkit.common.errors import LabError
from labkit.common.options import REQUIRED
from labkit.loading.datasets import Datasets
from labkit.measure import compare as measuring
from labkit.plans.plan import QuantizationPlan
from labkit.results.config import write_config

WORKER = (sys.executable, str(Path(__file__).parents[1] / "compare_fakes.py"))
EXTRA = ("options", "command", "run", "config")


def parsed(*arguments):
    found = vars(build_parser().parse_args([str(argument) for argument in arguments]))
    return {name: value for name, value in found.items() if name not in EXTRA}


@pytest.fixture
def write(tmp_path):
    def write(text):
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
        return tmp_path / "mine.yaml"

    return write


def test_a_run_is_repeated_from_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "compare", functools.partial(measuring.compare, _worker=WORKER))
    given = ["--plans", "fp32,int4", "--items", 5, "--split", "typed", "--device", "cpu", "--threads", 1]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*map(str, ["compare", "pocket", *given, "--batch-size", 3, "--output", first])]) == 0
    assert main(["compare", "--config", str(first / "config.yaml"), "--output", str(second)]) == 0
    settings = [json.loads((folder / "settings.json").read_text()) for folder in (first, second)]
    assert settings[0] == settings[1]
    assert (settings[1]["items"], settings[1]["batch_size"]) == (5, 3)
    configs = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (first, second)]
    assert [config.pop("output") for config in configs] == [str(first), str(second)]
    assert configs[0] == configs[1]
    assert configs[0]["command"] == "compare"
    assert not list(first.glob(".config*"))


def test_a_folder_of_another_run_keeps_its_config(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "compare", functools.partial(measuring.compare, _worker=WORKER))
    given = ["compare", "pocket", "--plans", "fp32", "--split", "typed", "--device", "cpu"]
    assert main([*given, "--items", "5", "--output", str(tmp_path)]) == 0
    before = (tmp_path / "config.yaml").read_text()
    assert main([*given, "--items", "6", "--output", str(tmp_path)]) == 2
    assert "holds another comparison" in capsys.readouterr().err
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_run_from_python_keeps_one_too(tmp_path):
    plan = QuantizationPlan.uniform("int8", default="fp32")
    settings = {"items": 5, "split": "typed", "device": "cpu", "threads": 1, "enable_thinking": True}
    folder = tmp_path / "mine"
    labkit.compare("pocket", ["fp32", plan], output=folder, progress=False, _worker=WORKER, **settings)
    options = parsed("compare", "--config", folder / "config.yaml")
    assert (options["model"], options["items"], options["thinking"]) == ("pocket", 5, True)
    assert options["output"] == str(folder)
    kept = options["plans"]
    assert kept == ("fp32", str(folder / "plans" / "int8.yaml"))
    assert QuantizationPlan.from_yaml(kept[1]) == plan


def test_what_python_alone_knows_is_written_as_the_command_takes_it(tmp_path):
    datasets = Datasets(text="book.txt", calibration=8)
    arguments = {"model": tmp_path, "schemes": "int8;gptq:act_order=true,num_bits=3", "datasets": datasets}
    write_config(tmp_path, "sensitivity", {**arguments, "jobs": None, "progress": True, "output": None})
    options = parsed("sensitivity", "--config", tmp_path / "config.yaml")
    assert (options["model"], options["text"], options["calibration"]) == (str(tmp_path), "book.txt", 8)
    assert (options["schemes"], options["jobs"]) == (arguments["schemes"], None)


def test_a_quantized_folder_is_made_again_from_its_own_config(tmp_path, capsys):
    model, folder = tmp_path / "tiny", tmp_path / "quantized"
    tiny_models.llama().save_pretrained(model)
    tiny_models.tokenizer().save_pretrained(model)
    given = ["quantize", str(model), "--plan", "int8", "--device", "cpu", "--output", str(folder)]
    assert main([*given, "--calibration-items", "5", "--force"]) == 0
    config = folder / "config.yaml"
    options = parsed("quantize", "--config", config)
    assert (options["plan"], options["force"], options["calibration_items"]) == ("int8", True, 5)
    config.write_text(config.read_text().replace("force: true", "force: false"))
    assert main(["quantize", "--config", str(config)]) == 2
    assert "is there already" in capsys.readouterr().err
    before = (folder / "labkit.json").stat().st_ino
    assert main(["quantize", "--config", str(config), "--force"]) == 0
    assert (folder / "labkit.json").stat().st_ino != before
    assert "force: true" in config.read_text()
    assert main(["models", str(folder)]) == 0


@pytest.mark.parametrize(
    ("line", "function"),
    [
        ("search pocket --memory 20MB --output x", "labkit.measure.search.search.search_plan"),
        ("sensitivity pocket --output x", "labkit.measure.search.sensitivity.measure_sensitivity"),
        ("perplexity pocket --text book.txt --output x", "labkit.measure.perplexity.compare_perplexity"),
        ("context pocket --output x", "labkit.measure.context.measure_growth"),
        ("compare pocket --output x", "labkit.measure.compare.compare"),
        ("bench-gpu pocket --output x", "labkit.measure.bench_gpu.bench_gpu"),
    ],
)
def test_every_option_of_a_measurement_is_an_argument_of_its_function(monkeypatch, line, function):
    signature, calls = inspect.signature(import_string(function)), []

    def called(*arguments, **options):
        calls.append(signature.bind(*arguments, **options).arguments)
        raise LabError("enough")

    monkeypatch.setattr(function, called)
    assert main(line.split()) == 2
    (arguments,) = calls
    assert (arguments["model"], arguments["output"]) == ("pocket", Path("x"))


def import_string(name):
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


COMMANDS = [
    "compare pocket --plans fp32,int4 --seed 3 --thinking",
    "ask pocket hello --image a.png --temperature 0.5",
    "quantize pocket --plan gptq --output q --calibration-items 8 --force",
    "export folder --format gptq --dequantize vision,projector",
    "sensitivity pocket --schemes gptq-2bit,gptq:dampening_frac=0.05,act_order=true --no-parts",
    "search pocket --memory 20MB --apart --against int4",
    "perplexity folder --text book.txt --plans gptq:dampening_frac=0.05",
    "fit pocket --card h100 --bandwidth 900 --plans bf16,int4",
    "context pocket --windows 192,384",
    "bench-gpu pocket --weights random --batches 1 --output x --timeout 60",
    "serve pocket --timeout 5 --engine vllm --tensor-parallel-size 2 --vllm-args=--enforce-eager",
    "chat --url http://a/v1 --url http://b/v1 --no-browser",
]


@pytest.mark.parametrize("line", COMMANDS)
def test_what_is_written_is_what_was_given(tmp_path, line):
    options = build_parser().parse_args(line.split())
    folder = tmp_path / "r"
    arguments = {action.dest: getattr(options, action.dest) for action in options.command.settings()}
    write_config(
        folder, line.split()[0], {"output": None, **arguments} if "output" in arguments else arguments
    )
    again = parsed(line.split()[0], "--config", folder / "config.yaml")
    expected = {name: value for name, value in vars(options).items() if name not in EXTRA}
    for values in (again, expected):
        values.pop("output", None)
    assert again == expected


def test_what_is_given_wins_over_the_file(write):
    path = write("model: pocket\nitems: 7\nplans: [fp32, int4]\nthinking: true\nseed: null\n")
    options = parsed("compare", "--config", path, "--items", 9, "--no-thinking")
    assert (options["model"], options["items"], options["thinking"]) == ("pocket", 9, False)
    assert (options["plans"], options["seed"], options["split"]) == (("fp32", "int4"), None, "all")
    assert parsed("compare", "other", "--config", path)["model"] == "other"
    path = write("command: search\nmodel: pocket\nmemory: 20MB\n")
    options = parsed("search", "--config", path, "--bits", "5")
    assert (options["memory"], options["bits"]) == (None, 5.0)


@pytest.mark.parametrize(
    ("command", "text", "reasons"),
    [
        (
            "compare pocket",
            "itmes: 5\n",
            ["unknown key 'itmes'", "known are model, ", "plans, items", "batch-size"],
        ),
        ("compare pocket", "items: many\n", ["items must be a whole number, not 'many'"]),
        ("compare pocket", "items: true\n", ["items must be a whole number, not True"]),
        ("compare pocket", "items: null\n", ["items must be a whole number, not None"]),
        ("compare pocket", "items: 0\n", ["items must be at least 1, not 0"]),
        ("compare pocket", "thinking: 'yes'\n", ["thinking must be true or false"]),
        ("compare pocket", "plans: 4\n", ["plans must be a list"]),
        ("compare pocket", "plans: [fp32, 4]\n", ["plans must be text, not 4"]),
        ("compare pocket", "weights: mine\n", ["weights must be one of random"]),
        ("compare pocket", "command: fit\n", ["is for `labkit fit`, not for `labkit compare`"]),
        ("compare pocket", "- items\n", ["`option: value` a line"]),
        ("compare pocket", "items: [\n", ["not readable as YAML"]),
        ("compare pocket", "items: {{ n }}\n", ["unfilled {{ template }}"]),
        ("compare pocket", "items: 5\nitems: 6\n", ["'items' is given twice"]),
        ("compare pocket", "items: 2026-13-45\n", ["items must be a whole number, not '2026-13-45'"]),
        ("compare pocket", f"plans: {'[' * 3000}{']' * 3000}\n", ["nested too deeply"]),
        ("fit pocket", "memory: 12\n", ["5.5GB, not '12'; 12GB?"]),
        ("search pocket", "memory: 1MB\nbits: 4\n", ["memory and bits exclude each other"]),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_known(capsys, write, command, text, reasons):
    assert main([*command.split(), "--config", str(write(text))]) == 2
    told = capsys.readouterr().err
    assert "mine.yaml" in told
    for reason in reasons:
        assert reason in told


def test_a_missing_file_is_named(capsys):
    assert main(["compare", "pocket", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml cannot be read: No such file" in capsys.readouterr().err


def test_what_neither_gives_is_still_required(capsys, write):
    assert main(["quantize", "pocket", "--config", str(write("output: q\n"))]) == 2
    assert "required: --plan" in capsys.readouterr().err
    assert main(["search", "pocket", "--config", str(write("rounds: 2\n"))]) == 2
    assert "--memory --bits --max-loss is required" in capsys.readouterr().err


def test_defaults_are_those_of_the_functions():
    from labkit.loading.export import export
    from labkit.loading.options import ExportOptions
    from labkit.measure import options
    from labkit.measure.context import measure_growth
    from labkit.measure.fit import needs
    from labkit.measure.perplexity import compare_perplexity
    from labkit.measure.search.search import search_plan
    from labkit.measure.search.sensitivity import measure_sensitivity

    for function, settings in (
        (compare_perplexity, options.PerplexityOptions),
        (export, ExportOptions),
        (measure_growth, options.ContextOptions),
        (measure_sensitivity, options.SensitivityOptions),
        (measuring.compare, options.CompareOptions),
        (needs, options.FitOptions),
        (search_plan, options.GoalOptions),
        (search_plan, options.SearchOptions),
    ):
        defaults = {name: item.default for name, item in inspect.signature(function).parameters.items()}
        compared = 0
        for name, item in settings.__dataclass_fields__.items():
            default = defaults.get(name, inspect.Parameter.empty)
            if default is inspect.Parameter.empty or item.default is REQUIRED or name == "screen":
                continue
            if isinstance(default, tuple) and isinstance(item.default, str):
                default = ",".join(default)
            assert item.default == default, (function.__name__, name)
            compared += 1
        assert compared >= 2
