"""The Chinese edition: the same code cells, every word translated, made by the tool, and out of date only visibly."""

import json
import re
import shutil
from pathlib import Path

import make_chinese
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]

NAMES = make_chinese.names()
each = pytest.mark.parametrize("name", NAMES)


def cells(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def test_nothing_is_missing_or_out_of_date(capsys):
    assert make_chinese.main(["--check"]) == 0, capsys.readouterr().out


@each
def test_code_cells_are_those_of_the_english_notebook(name):
    english, chinese = ROOT / "notebooks" / f"{name}.ipynb", ROOT / "notebooks/zh" / f"{name}.ipynb"
    assert [c.source for c in cells(chinese, "code")] == [c.source for c in cells(english, "code")]
    ids = [[c.id for c in nbformat.read(path, as_version=4).cells] for path in (english, chinese)]
    assert ids[0] == ids[1]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells(chinese, "code"))


@each
def test_words_are_chinese_and_code_in_them_is_kept(name):
    english = {c.id: c.source for c in cells(ROOT / "notebooks" / f"{name}.ipynb", "markdown")}
    for cell in cells(ROOT / "notebooks/zh" / f"{name}.ipynb", "markdown"):
        assert re.search(r"[\u4e00-\u9fff]", cell.source), cell.id
        blocks = [
            re.findall(r"```(?:python|console)\n(.*?)```", text, re.S)
            for text in (english[cell.id], cell.source)
        ]
        assert blocks[0] == blocks[1], cell.id
        folded = [len(re.findall("<details>", text)) for text in (english[cell.id], cell.source)]
        assert folded[0] == folded[1], cell.id


@each
def test_a_plan_is_called_the_same_wherever_the_english_speaks_of_one(name):
    english = make_chinese.markdown(name)
    for id, (_, chinese) in make_chinese.texts(ROOT / f"notebooks/zh/text/{name}.md").items():
        assert "计划" not in chinese, id
        words = re.sub(r"```.*?```|`[^`]*`|plans by itself|plan ahead", "", english[id], flags=re.S)
        assert "方案" in chinese or not re.search(r"\bplans?\b", words), id


@each
def test_links_lead_to_chinese_notebooks_and_the_table_lists_them(name):
    folder = ROOT / "notebooks/zh"
    listed = (folder / "README.md").read_text(encoding="utf-8")
    assert f"]({name}.ipynb)" in listed
    text = "\n".join(cell.source for cell in cells(folder / f"{name}.ipynb", "markdown"))
    for target in re.findall(r"\]\(([^)#]+)\)", text + listed):
        assert target.startswith("https://") or (folder / target).exists(), target


def test_what_else_is_chinese_calls_a_plan_the_same():
    pages = [path for ending in ("py", "zh-CN.md") for path in (ROOT / "labkit").rglob(f"*.{ending}")]
    for path in ("README.zh-CN.md", "notebooks/zh/README.md", *pages):
        assert "计划" not in (ROOT / path).read_text(encoding="utf-8"), path


def small_course(folder, words="# 标题\n"):
    (folder / "notebooks/zh/text").mkdir(parents=True)
    notebook = {
        "nbformat": 4, "nbformat_minor": 5, "metadata": {},
        "cells": [
            {"id": "title", "cell_type": "markdown", "source": "# Title", "metadata": {}},
            {"id": "code", "cell_type": "code", "source": "1", "metadata": {}, "outputs": [], "execution_count": None},
        ],
    }  # fmt: skip
    (folder / "notebooks/00_a_b.ipynb").write_text(json.dumps(notebook))
    (folder / "notebooks/zh/text/00_a_b.md").write_text(f"<!-- cell: title -->\n{words}")
    return notebook


def test_changed_english_is_named_and_nothing_is_made_until_it_is_accepted(tmp_path, capsys):
    notebook = small_course(tmp_path)
    made = tmp_path / "notebooks/zh/00_a_b.ipynb"
    assert make_chinese.main([], tmp_path) == 1
    assert make_chinese.main(["--accept"], tmp_path) == 0
    assert json.loads(made.read_text())["cells"][0]["source"] == "# 标题"
    notebook["cells"][0]["source"] = "# Another title"
    (tmp_path / "notebooks/00_a_b.ipynb").write_text(json.dumps(notebook))
    capsys.readouterr()
    assert make_chinese.main([], tmp_path) == 1
    assert "00_a_b: the English of title has changed since it was translated" in capsys.readouterr().out
    assert make_chinese.main(["--accept"], tmp_path) == 0


def test_missing_words_strange_cells_and_edited_notebooks_are_named(tmp_path, capsys):
    small_course(tmp_path)
    make_chinese.main(["--accept"], tmp_path)
    made = tmp_path / "notebooks/zh/00_a_b.ipynb"
    made.write_text(made.read_text().replace('"1"', '"2"'))
    assert make_chinese.main(["--check"], tmp_path) == 1
    assert "is not what 00_a_b.ipynb and its words make" in capsys.readouterr().out
    (tmp_path / "notebooks/zh/text/00_a_b.md").write_text("<!-- cell: other -->\n字\n")
    assert make_chinese.main(["--check"], tmp_path) == 1
    told = capsys.readouterr().out
    assert "the cell title has no Chinese words" in told
    assert "there is no cell other" in told
    shutil.rmtree(tmp_path / "notebooks/zh/text")
    assert make_chinese.main(["--check"], tmp_path) == 1
    assert "00_a_b.md is missing" in capsys.readouterr().out
