"""The READMEs: their files are there, their figures are those of the results, their commands run."""

import ast
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import fill_readme
import pytest

from labkit import phonetap
from labkit.cli.main import build_parser
from labkit.models import get_spec
from labkit.results.comparison import Comparison
from labkit.results.measurement import Measurement

ROOT = Path(__file__).resolve().parents[2]

PAGES = (
    "README",
    "labkit/README",
    *(f"labkit/{room}/README" for room in ("interactive", "loading", "measure", "service")),
)
EDITIONS = tuple(f"{page}{ending}" for page in PAGES for ending in fill_readme.WORDS)
MARKS = (fill_readme.FIGURES, fill_readme.LIBRARIES)
FAST = {
    "--items 200": "--items 4",
    "items=40": "items=4",
    "fp32,bf16,int8,int8-dynamic,int4,nf4,llm-int8": "fp32,int4",
}

[COMMANDS] = [action.choices for action in build_parser()._actions if action.choices]

every_page = pytest.mark.parametrize("page", PAGES)
every_edition = pytest.mark.parametrize("name", EDITIONS)


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name, language):
    """The fenced blocks of `language` that a comment marks as tested."""
    return re.findall(rf"<!-- tested -->\n```{language}\n(.*?)```", text_of(name), re.DOTALL)


def commands_of(name):
    """The tested commands of a page, each as its words; what stands behind # is not part of them."""
    lines = "".join(blocks(name, "console")).splitlines()
    return [shlex.split(quick(line), comments=True) for line in lines]


def listed(name, mark):
    """The lines of the block below ``<!-- mark -->``."""
    [block] = re.findall(rf"<!-- {mark} -->\n```text\n(.*?)```", text_of(name), re.DOTALL)
    return block.splitlines()


def rooms_of(name):
    """``{folder: its line}`` of the tree of rooms, whose indentation says which room is in which."""
    rooms, inside = {}, []
    for line in listed(name, "rooms"):
        room, said = re.split(r"\s{2,}", line.strip(), maxsplit=1)
        depth = (len(line) - len(line.lstrip())) // 2
        inside = [*inside[:depth], room.rstrip("/")]
        assert "/".join(inside) not in rooms, f"{name}: {room} stands twice"
        rooms["/".join(inside)] = said
    return rooms


def rooms():
    """``{folder: first line of its docstring}`` of every folder of labkit that holds a package."""
    package = ROOT / "labkit"
    return {
        path.parent.relative_to(package).as_posix(): first_line(path)
        for path in package.rglob("__init__.py")
        if path.parent != package
    }


def first_line(path):
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert said, f"{path}: no docstring"
    return said.splitlines()[0].rstrip(".").replace("``", "")


def test_the_tree_names_every_room_with_the_first_line_of_its_docstring():
    assert rooms_of("labkit/README.md") == rooms()
    assert len([room for room in rooms() if "/" not in room]) == 13


def test_the_chinese_tree_names_the_same_rooms_in_the_same_order():
    chinese = rooms_of("labkit/README.zh-CN.md")
    assert list(chinese) == list(rooms_of("labkit/README.md"))
    assert all(re.search(r"[\u4e00-\u9fff]", said) for said in chinese.values())


@pytest.mark.parametrize("name", ["labkit/README.md", "labkit/README.zh-CN.md"])
def test_the_layers_are_those_of_the_import_contract(name):
    settings = tomllib.loads(text_of("pyproject.toml"))["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in settings if contract["id"] == "layers"]
    assert listed(name, "layers") == [layer.replace("labkit.", "") for layer in layers]
    assert len(layers) <= 10


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_first_page_is_short_and_leads_to_every_other(name):
    text = text_of(name)
    assert len(text.splitlines()) <= 150
    ending = name.removeprefix("README")
    assert all(f"]({page}{ending})" in text for page in PAGES if page != "README")


@every_page
def test_both_editions_have_the_same_parts_and_commands(page):
    english, chinese = (text_of(page + ending) for ending in fill_readme.WORDS)
    assert [h.count("#") for h in re.findall(r"^#+ ", english, re.M)] == [
        h.count("#") for h in re.findall(r"^#+ ", chinese, re.M)
    ]
    for language in ("console", "python"):
        fenced = [re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) for text in (english, chinese)]
        without_comments = [[re.sub(r" *#.*", "", block) for block in edition] for edition in fenced]
        assert without_comments[0] == without_comments[1]


@every_edition
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)\)", text_of(name)):
        there = target.startswith("https://") or ((ROOT / name).parent / target).exists()
        assert there, f"{name}: {target} is not there"


@every_edition
def test_programs_and_make_targets_that_are_named_exist(name):
    text, targets = text_of(name), text_of("Makefile")
    for program in re.findall(r"(?:tests/peers|\.ci)/\w+\.\w+|assets/[\w/-]+\.sh", text):
        assert (ROOT / program).exists(), f"{name}: {program} is not there"
    for target in re.findall(r"(?:^|`)(?:\S+=\S+ )?make ([a-z][a-z-]*)", text, re.M):
        assert re.search(rf"^{target}:", targets, re.M), f"{name}: make {target} is not in the Makefile"
    code = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    code += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    for command in re.findall(r"^labkit ([a-z][a-z-]*)", "\n".join(code), re.M):
        assert command in COMMANDS, f"{name}: labkit {command} is no command"


def test_figures_are_those_of_the_results():
    old = [
        path.as_posix()
        for path, wanted in fill_readme.wanted().items()
        if ((ROOT / path).read_text(encoding="utf-8") if (ROOT / path).exists() else None) != wanted
    ]
    assert not old, f"not as assets/results says: {old}; run `make readme`"


@every_edition
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
    for name, mark in held():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(["before", "\nold\n".join(fill_readme.marks(mark)), "after\n"]))


def held():
    """Each page that holds marks, and which."""
    return [(page + ending, mark) for mark, page in fill_readme.PAGES.items() for ending in fill_readme.WORDS]


def test_filling_writes_figures_and_checking_writes_nothing(tmp_path, capsys):
    results_in(tmp_path)
    assert fill_readme.main(["--check"], tmp_path) == 1
    assert "README.md: differs from" in capsys.readouterr().out
    assert not (tmp_path / fill_readme.PICTURE).exists()
    assert fill_readme.main([], tmp_path) == 0
    assert fill_readme.main(["--check"], tmp_path) == 0
    for name, mark in held():
        text = (tmp_path / name).read_text()
        assert text.startswith("before\n")
        assert text.endswith("after\n")
        assert "old" not in text
        if mark == fill_readme.FIGURES:
            assert "| int4 | 1.00 kB | −75 % |" in text
            assert "50.0 %" in text
            continue
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
    for name, mark in held():
        assert (tmp_path / name).read_text() == "\n".join(["before", *fill_readme.marks(mark), "after\n"])


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


def hits(screen, ask, answer):
    """Does ``answer``, printed by the command ``ask``, hit what it asks for on the screen that ``screen`` draws?"""
    [item] = phonetap.items(split="typed", count=1, seed=int(screen[screen.index("--seed") + 1]), part="test")
    assert item.target in ask[-1], "ask for the target that `labkit screen` suggests"
    return phonetap.score(item, answer.splitlines()[0]).success


def test_something_is_tested():
    commands = {words[1] for page in PAGES for words in commands_of(f"{page}.md")}
    assert {
        "compare",
        "ask",
        "screen",
        "plot",
        "models",
        "plans",
        "doctor",
        "fit",
        "quantize",
        "export",
    } <= commands
    assert all(any(slow in text_of(f"{page}.md") for page in PAGES) for slow in FAST)


@pytest.mark.slow
@pytest.mark.skipif(get_spec("pocket").availability() != "here", reason="the pocket model is not in assets")
@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(f"{page}.md")])
def test_the_commands_run_as_written(page, tmp_path):
    lines, printed = {}, {}
    for words in commands_of(f"{page}.md"):
        assert words[0] == "labkit"
        lines[words[1]] = words
        printed[words[1]] = run_in(tmp_path, sys.executable, "-m", "labkit", *words[1:])
    if "compare" in lines:
        measurements = Comparison.load(tmp_path / "results/first").measurements
        assert [m.plan for m in measurements] == ["fp32", "int4"]
        assert (tmp_path / "results/first/report.html").exists()
    if "plot" in lines:
        assert (tmp_path / "comparison.svg").exists()
    if "doctor" in lines:
        assert "Nothing is missing." in printed["doctor"]
    if "ask" in lines:
        assert hits(lines["screen"], lines["ask"], printed["ask"]), printed["ask"]


@pytest.mark.slow
@pytest.mark.skipif(get_spec("pocket").availability() != "here", reason="the pocket model is not in assets")
def test_the_python_lines_run_as_written(tmp_path):
    [code] = [block for page in PAGES for block in blocks(f"{page}.md", "python")]
    lines = [node for node in ast.parse(code).body if not isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(lines) == 5
    assert "Score(parsed=True" in run_in(tmp_path, sys.executable, "-c", quick(code))
