"""The READMEs: their files are there, their figures are those of the results, their commands run."""

import ast
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import fill_readme
import pytest

from labkit.models import get_spec
from labkit.results.comparison import Comparison
from labkit.results.measurement import Measurement

ROOT = Path(__file__).resolve().parents[2]

READMES = ("README.md", "README.zh-CN.md")
MARKS = (fill_readme.FIGURES, fill_readme.LIBRARIES)
FAST = {
    "--items 200": "--items 4",
    "items=40": "items=4",
    "fp32,bf16,int8,int8-dynamic,int4,nf4,llm-int8": "fp32,int4",
}


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name, language):
    """The fenced blocks of `language` that a comment marks as tested."""
    return re.findall(rf"<!-- tested -->\n```{language}\n(.*?)```", text_of(name), re.DOTALL)


def file_map(name):
    """``{path: phrase}`` of the map of files."""
    [found] = re.findall(r"<!-- files -->\n```text\n(.*?)```", text_of(name), re.DOTALL)
    lines = [re.split(r"\s{2,}", line, maxsplit=1) for line in found.splitlines() if line]
    assert all(len(line) == 2 for line in lines), (
        f"{name}: a line of the map needs a path, two spaces, a phrase"
    )
    assert len({path for path, _ in lines}) == len(lines), f"{name}: a path stands twice in the map"
    return dict(lines)


def tree():
    """What the map must name: single files of code, and folders of notebooks, tests and assets."""
    top = [
        p
        for p in ROOT.iterdir()
        if p.is_file() and (p.suffix != "" or p.name in ("Makefile", "LICENSE", ".gitignore"))
    ]
    code = [
        p
        for folder in ("labkit", "tools")
        for p in (ROOT / folder).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    ]
    files = {p.relative_to(ROOT).as_posix() for p in [*top, *code, ROOT / ".ci/run"]}
    assets = {f"assets/{p.name}/" for p in (ROOT / "assets").iterdir() if p.is_dir()}
    assets |= {f"assets/{p.name}" for p in (ROOT / "assets").iterdir() if p.is_file()}
    figures = {f"{fill_readme.RESULTS.parents[1]}/", f"{fill_readme.PICTURE.parent}/"}
    return files | assets | figures | {"notebooks/", "tests/"}


@pytest.mark.parametrize("name", READMES)
def test_the_map_names_every_file(name):
    named, there = set(file_map(name)), tree()
    assert not there - named, f"{name}: add a line with a phrase for each: {sorted(there - named)}"
    assert not named - there, f"{name}: these are gone: {sorted(named - there)}"


def test_both_readmes_have_the_same_parts_and_commands():
    english, chinese = map(text_of, READMES)
    assert list(file_map(READMES[0])) == list(file_map(READMES[1]))
    assert [h.count("#") for h in re.findall(r"^#+ ", english, re.M)] == [
        h.count("#") for h in re.findall(r"^#+ ", chinese, re.M)
    ]
    for language in ("console", "python"):
        fenced = [re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) for text in (english, chinese)]
        without_comments = [[re.sub(r"#.*", "", block) for block in found] for found in fenced]
        assert without_comments[0] == without_comments[1]


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)\)", text_of(name)):
        assert target.startswith("https://") or (ROOT / target).exists(), f"{name}: {target} is not there"


def test_figures_are_those_of_the_results():
    old = [
        path.as_posix()
        for path, wanted in fill_readme.wanted().items()
        if ((ROOT / path).read_text(encoding="utf-8") if (ROOT / path).exists() else None) != wanted
    ]
    assert not old, f"not as assets/results says: {old}; run `make readme`"


@pytest.mark.parametrize("name", READMES)
def test_no_measured_figure_is_written_by_hand(name):
    outside = text_of(name)
    for mark in MARKS:
        outside = re.sub(".*".join(fill_readme.marks(mark)), "", outside, flags=re.DOTALL)
    prose = re.sub(r"```.*?```", "", outside, flags=re.DOTALL)
    found = re.findall(r"\d[\d.,]*\s?(?:%|[kMG]B\b|ms\b|s\b|tok/s|seconds|minutes|秒|分钟|点)", prose)
    assert set(found) <= {"95 %"}, f"{name}: {found}"


def results_in(folder):
    rows = [
        Measurement(model="m", plan=plan, device="cpu", weights_bytes=size, step_success_rate=rate, items=1)
        for plan, size, rate in (("fp32", 4000, 1.0), ("int4", 1000, 0.5))
    ]
    settings = dict.fromkeys(("seed", "enable_thinking")) | {
        "model": "m", "device": "cpu", "threads": 2, "items": 1, "split": "all",
    }  # fmt: skip
    where = {
        "time": "2026-01-02T03:04:05+00:00", "command": ["labkit", "compare"],
        "cpu": "C", "python": "3", "packages": {"torch": "2", "transformers": "5"},
    }  # fmt: skip
    Comparison(where, rows, settings=settings).save(folder / fill_readme.RESULTS)
    judged = [
        {"plan": plan, "library": "auto-round", "version": "1", "bytes": 1, "bits": bits, "kl": 0.01,
         "losses": [loss, loss + 0.2], "perplexity": math.exp(loss + 0.1)}
        for plan, bits, loss in (("unquantized", 32.0, 2.0), ("gptq", 4.5, 2.1), ("auto-round-50", 4.3, 2.05))
    ]  # fmt: skip
    material = {"material": {"calibration": 4, "length": 256, "validation": 2}}
    for file, records in ((fill_readme.OURS, judged[:2]), (fill_readme.PEERS, judged[2:])):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps({"settings": material, "records": records, "environment": {}}))
    for name in READMES:
        blocks = ["\nold\n".join(fill_readme.marks(one)) for one in MARKS]
        (folder / name).write_text("\n".join(["before", *blocks, "after\n"]))


def test_filling_writes_figures_and_checking_writes_nothing(tmp_path, capsys):
    results_in(tmp_path)
    assert fill_readme.main(["--check"], tmp_path) == 1
    assert "README.md: differs from" in capsys.readouterr().out
    assert not (tmp_path / fill_readme.PICTURE).exists()
    assert fill_readme.main([], tmp_path) == 0
    assert fill_readme.main(["--check"], tmp_path) == 0
    for name in READMES:
        text = (tmp_path / name).read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old" not in text
        assert "| int4 | 1.00 kB | −75 % |" in text
        assert "50.0 %" in text
        lines = [line for line in text.splitlines() if "auto-round" in line or "labkit `" in line]
        assert lines == [
            "| auto-round 1 `50` | 4.30 | 8.58 | +5.1% [+5.1%, +5.1%] | 1.0e-02 |",
            "| labkit `gptq` | 4.50 | 9.03 | +10.5% [+10.5%, +10.5%] | 1.0e-02 |",
        ]


def test_filling_without_results_leaves_the_block_empty(tmp_path):
    results_in(tmp_path)
    (tmp_path / fill_readme.RESULTS).unlink()
    (tmp_path / fill_readme.PEERS).unlink()
    assert fill_readme.main([], tmp_path) == 0
    empty = ["\n".join(fill_readme.marks(one)) for one in MARKS]
    assert (tmp_path / "README.md").read_text() == "\n".join(["before", *empty, "after\n"])


def test_a_readme_without_marks_is_refused():
    with pytest.raises(SystemExit, match="needed once each"):
        fill_readme.filled("no marks", "x", "README.md")


def quick(text):
    for slow, fast in FAST.items():
        text = text.replace(slow, fast)
    return text


def run_in(folder, *command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_something_is_tested():
    commands = "".join(blocks("README.md", "console"))
    assert {"compare", "ask", "screen", "plot", "models", "plans", "doctor", "quantize", "export"} <= set(
        commands.split()
    )
    assert any(slow in commands for slow in FAST)


@pytest.mark.slow
@pytest.mark.skipif(get_spec("pocket").availability() != "here", reason="the pocket model is not in assets")
def test_the_commands_run_as_written(tmp_path):
    told = {}
    for line in "".join(blocks("README.md", "console")).splitlines():
        words = shlex.split(quick(line))
        assert words[0] == "labkit"
        told[words[1]] = run_in(tmp_path, sys.executable, "-m", "labkit", *words[1:])
    measurements = Comparison.load(tmp_path / "results/first").measurements
    assert [m.plan for m in measurements] == ["fp32", "int4"]
    assert (tmp_path / "results/first/report.html").exists()
    assert (tmp_path / "comparison.svg").exists()
    assert "Nothing is missing." in told["doctor"]
    assert "do(action=" in told["ask"]


@pytest.mark.slow
@pytest.mark.skipif(get_spec("pocket").availability() != "here", reason="the pocket model is not in assets")
def test_the_python_lines_run_as_written(tmp_path):
    [code] = blocks("README.md", "python")
    lines = [node for node in ast.parse(code).body if not isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(lines) == 5
    assert "Score(parsed=True" in run_in(tmp_path, sys.executable, "-c", quick(code))
