"""The command line: what is wrong is said in one line with exit code 2, before anything takes long."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from compare_fakes import measurements
from PIL import Image

import labkit
from labkit.cli.main import build_parser, main
from labkit.common.errors import Interrupted
from labkit.common.options import help_of
from labkit.measure.options import CompareOptions
from labkit.results.comparison import Comparison

SETTINGS = {
    "model": "pocket",
    "device": "cpu",
    "threads": 2,
    "items": 10,
    "split": "all",
    "seed": None,
    "enable_thinking": False,
}


def run(capsys, *arguments):
    """Exit code, standard output, standard error."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # --help and --version
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (56, 112), "white").save(tmp_path / "screen.png")
    return tmp_path / "screen.png"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "required: COMMAND"),
        ("cook", "invalid choice: 'cook'"),
        ("compare", "required: model"),
        ("compare nobody", "no model is called 'nobody'"),
        ("compare ./nowhere", "the folder ./nowhere does not exist"),
        ("compare pocket --plans int5", "'int5'"),
        ("compare pocket --plans fp32,nowhere.yaml", "'nowhere.yaml'"),
        ("compare pocket --plans ,", "no plan given"),
        ("compare pocket --plans fp32,fp32", "two plans are called 'fp32'"),
        ("compare pocket --split easy", "known: all, typed, spoken, hard"),
        ("compare pocket --items 0", "--items: must be at least 1"),
        ("compare pocket --items many", "--items: must be a whole number"),
        ("compare pocket --seed -1", "--seed: must be 0 or more"),
        ("compare pocket --threads 0", "--threads: must be at least 1"),
        ("compare pocket --device tpu", "device"),
        ("compare pocket --device cuda:99", "cuda:99"),
        ("compare pocket --colour", "unrecognized arguments: --colour"),
        ("ask pocket", "nothing is asked"),
        ("ask pocket --image nowhere.png hello", "nowhere.png does not exist"),
        ("ask pocket --audio nowhere.wav", "nowhere.wav does not exist"),
        ("ask nobody hello", "no model is called 'nobody'"),
        ("ask pocket --temperature -1 hello", "temperature is -1.0"),
        ("screen --seed 1 --output screen.jpg", "must end in .png"),
        ("screen --output screen.png", "required: --seed"),
        ("plans --model nobody", "no model is called 'nobody'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, arguments, told):
    code, out, err = run(capsys, *arguments.split())
    assert code == 2
    assert out == ""
    assert told in err
    assert err.startswith("labkit: ")
    assert err.count("\n") == 1


def test_broken_media_are_refused_before_a_model_is_loaded(capsys, tmp_path, picture):
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:40])
    (tmp_path / "broken.wav").write_bytes(b"RIFF and no more")
    for option, name in (("--image", "broken.png"), ("--audio", "broken.wav")):
        code, _, err = run(capsys, "ask", "nobody", option, tmp_path / name, "hello")
        assert (code, name in err) == (2, True)


def test_a_wrong_scheme_in_a_plan_file_is_named(capsys, tmp_path):
    plan = tmp_path / "mine.yaml"
    plan.write_text("name: mine\nrules:\n  - match: 're:.*'\n    scheme: int7\n")
    code, _, err = run(capsys, "compare", "pocket", "--plans", plan)
    assert code == 2
    assert "mine.yaml" in err
    assert "int7" in err
    assert "int8-dynamic" in err  # what would be right


def test_a_plans_name_cannot_leave_the_folder(capsys, tmp_path):
    plan = tmp_path / "mine.yaml"
    plan.write_text("name: ../../mine\nrules:\n  - match: 're:.*'\n    scheme: int8\n")
    code, _, err = run(capsys, "compare", "pocket", "--plans", plan)
    assert (code, "letters, digits" in err) == (2, True)


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"labkit {labkit.__version__}\n", "")


@pytest.mark.parametrize(
    "command", ["", "compare", "ask", "quantize", "export", "screen", "plot", "models", "plans", "doctor"]
)
def test_help_fits_a_terminal(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = run(capsys, *command.split(), "--help")
    assert code == 0
    assert out.startswith("usage: labkit")
    assert max(map(len, out.splitlines())) <= 100


def test_help_of_compare_names_every_option(capsys):
    _, out, _ = run(capsys, "compare", "--help")
    named = set(out.replace(",", " ").replace("[", " ").replace("]", " ").split())
    assert {"--plans", "--items", "--split", "--seed", "--output", "--device", "--threads"} <= named
    assert {"--thinking", "--no-thinking", "--batch-size"} <= named


def test_defaults_are_those_of_python():
    import inspect

    from labkit.measure.compare import compare
    from labkit.measure.defaults import DEFAULT_PLANS

    options = build_parser().parse_args(["compare", "pocket"])
    defaults = {name: p.default for name, p in inspect.signature(compare).parameters.items()}
    assert f"({','.join(DEFAULT_PLANS)}; " in help_of(CompareOptions, "plans")
    assert options.plans is defaults["plans"] is None
    assert (options.items, options.split, options.seed) == (
        defaults["items"],
        defaults["split"],
        defaults["seed"],
    )
    assert (options.device, options.threads) == (defaults["device"], defaults["threads"])
    assert (options.thinking, options.batch_size) == (defaults["enable_thinking"], defaults["batch_size"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask", "pocket", "--image", "a.png", "--audio", "b.wav", "open it", "--plan", "int4"],
        ["ask", "--image", "a.png", "pocket", "--audio", "b.wav", "--plan", "int4", "open it"],
        ["ask", "pocket", "open it", "--plan", "int4", "--image", "a.png", "--audio", "b.wav"],
    ],
)
def test_options_may_stand_between_model_and_instruction(arguments):
    options = build_parser().parse_args(arguments)
    assert (options.model, options.instruction) == ("pocket", "open it")
    assert (options.image, options.audio, options.plan) == ("a.png", "b.wav", "int4")


def test_models_and_plans_are_listed(capsys):
    _, out, _ = run(capsys, "models")
    assert "pocket" in out
    assert "autoglm-phone-9b-multilingual" in out
    _, out, _ = run(capsys, "plans")
    for name in ("fp32", "bf16", "int8", "int8-dynamic", "int4", "nf4", "llm-int8"):
        assert f" {name} " in out


def test_a_sense_the_model_lacks_is_refused_before_it_is_loaded(capsys, tmp_path, picture):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code, _, err = run(capsys, "ask", tmp_path, "--image", picture, "hello")
    assert (code, "takes no image" in err) == (2, True)
    code, _, err = run(capsys, "compare", tmp_path, "--plans", "fp32", "--output", tmp_path / "out")
    assert (code, "takes no images" in err) == (2, True)


@pytest.fixture
def finished():
    return Comparison({}, measurements("fp32", "int4"), settings=SETTINGS)


def test_compare_prints_conclusions_tables_and_files(capsys, monkeypatch, tmp_path, finished):
    asked = {}

    def fake(*arguments, **options):
        asked.update(options, arguments=arguments)
        return finished

    monkeypatch.setattr("labkit.measure.compare.compare", fake)
    code, out, err = run(
        capsys, "compare", "pocket", "--plans", "fp32, int4", "--items", 10, "--seed", 3, "--output", tmp_path
    )
    assert (code, err) == (0, "")
    assert (asked["arguments"], asked["plans"], asked["items"]) == (("pocket",), ("fp32", "int4"), 10)
    assert asked["seed"] == 3
    assert out.index("int4 is the smallest") < out.index("Cost") < out.index("Quality")
    assert "−82 %" in out
    assert "article's claim" in out
    assert str(tmp_path / "report.html") in out
    assert max(map(len, out.splitlines())) <= 120


def test_an_added_plan_is_mentioned(capsys, monkeypatch, tmp_path, finished):
    finished.added_plan = "fp32"
    monkeypatch.setattr("labkit.measure.compare.compare", lambda *a, **k: finished)
    _, out, _ = run(capsys, "compare", "pocket", "--plans", "int4", "--output", tmp_path)
    assert "fp32 was added" in out


def test_a_failed_plan_gives_exit_code_one(capsys, monkeypatch, tmp_path, finished):
    finished.failures["nf4"] = "no GPU"
    monkeypatch.setattr("labkit.measure.compare.compare", lambda *a, **k: finished)
    code, _, err = run(capsys, "compare", "pocket", "--output", tmp_path)
    assert (code, err) == (1, "labkit: plan nf4 could not be measured: no GPU\n")


def test_ctrl_c_tells_what_is_kept(capsys, monkeypatch, tmp_path, finished):
    def interrupt(*arguments, **options):
        raise Interrupted("interrupted: 1 of 2 plans are finished", finished)

    monkeypatch.setattr("labkit.measure.compare.compare", interrupt)
    code, _, err = run(capsys, "compare", "pocket", "--output", tmp_path)
    assert code == 130
    assert "1 of 2 plans are finished" in err


class FakeStream:
    """Streams an answer in two pieces."""

    def __init__(self):
        self.generation = SimpleNamespace(
            completion_tokens=9, ttft_s=0.5, decode_tokens_per_s=20.0, finish_reason="stop"
        )

    def __iter__(self):
        yield from ("do(action=", '"Back")')


def test_ask_sends_image_recording_and_text_in_this_order(capsys, monkeypatch, tmp_path, picture):
    import soundfile

    soundfile.write(tmp_path / "said.wav", np.sin(np.arange(16_000) / 5).astype(np.float32), 16_000)
    sent = {}

    class FakeEngine:
        def stream(self, messages, **options):
            sent.update(options, content=messages[0]["content"])
            return FakeStream()

    monkeypatch.setattr("labkit.measure.job.check_senses", lambda model, kinds: sent.update(senses=kinds))
    monkeypatch.setattr("labkit.loading.load.load", lambda *a, **k: sent.update(loaded=a) or FakeEngine())
    code, out, err = run(
        capsys, "ask", "pocket", "--image", picture, "--audio", tmp_path / "said.wav", "open it", "--thinking"
    )
    assert (code, out) == (0, 'do(action="Back")\n')
    assert "9 tokens" in err
    assert [part["type"] for part in sent["content"]] == ["image", "audio", "text"]
    assert sent["content"][1]["audio"].shape == (16_000,)
    assert sent["loaded"] == ("pocket", None, "auto")
    assert sent["enable_thinking"] is True
    assert sent["senses"] == ["image", "audio"]


def test_the_module_is_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "labkit", "compare", "pocket", "--split", "easy"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("labkit: unknown split 'easy'")


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m labkit plans | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert json.loads(done.stdout.split()[-1]) == 0
