"""The notebooks are a course: each runs from top to bottom, is committed without outputs, and is listed."""

import ast
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.name for path in NOTEBOOKS]
LONGEST_CELL = 10

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)


def cells(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def test_numbers_run_from_00_without_a_gap():
    assert [int(name[:2]) for name in NAMES] == list(range(len(NAMES)))
    assert all(re.fullmatch(r"\d\d_[a-z0-9]+(_[a-z0-9]+)+\.ipynb", name) for name in NAMES)


@each
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    """In a copy of the folder, so that what a notebook writes does not end up in the repository."""
    folder = tmp_path / "notebooks"
    shutil.copytree(path.parent, folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "results"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(folder / path.name, as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1))
    assert any(
        output.output_type == "display_data" or "data" in output for cell in ran for output in cell.outputs
    )


@each
def test_is_valid_and_without_outputs(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    for cell in cells(path, "code"):
        assert cell.outputs == []
        assert cell.execution_count is None


@each
def test_begins_with_a_title_what_you_will_learn_minutes_and_needs(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert first.source.startswith(f"# {path.name[:2]} · ")
    for promised in ("What you will learn", "**Minutes:**", "**Needs:**"):
        assert promised in first.source


@each
def test_calls_the_lab_and_defines_nothing_long(path):
    for cell in cells(path, "code"):
        assert len(cell.source.splitlines()) <= LONGEST_CELL, cell.source
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.ClassDef), cell.source


@each
def test_what_is_shown_stands_at_the_end_of_its_cell_where_jupyter_shows_it(path):
    for cell in cells(path, "code"):
        top = ast.parse(cell.source).body
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Expr) and "show." in ast.unparse(node):
                assert ast.unparse(node) == ast.unparse(top[-1]), cell.source


@each
def test_every_code_cell_has_a_sentence_before_it(path):
    kinds = [cell.cell_type for cell in nbformat.read(path, as_version=4).cells]
    assert "codecode" not in "".join(kinds)


@each
def test_has_a_question_with_a_hidden_answer_and_a_recap(path):
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    assert "<details><summary>Answer</summary>" in text
    assert "## Recap" in text


@each
def test_has_an_exercise_that_a_cell_checks_and_a_link_to_the_next(path):
    code = "\n".join(cell.source for cell in cells(path, "code"))
    assert f'course.check("{path.name[:2]}-' in code
    last = cells(path, "markdown")[-1].source
    following = NAMES[NAMES.index(path.name) + 1 :][:1] or ["README.md"]
    assert f"]({following[0]})" in last


@each
def test_links_lead_somewhere(path):
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_the_readme_lists_every_notebook_in_order_with_its_minutes():
    listed = (ROOT / "notebooks/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[.*?\]\((\d\d_\w+\.ipynb)\) \| ([^|]+) \| (\d+) \| ([^|]+) \|$", listed, re.M)
    assert [name for name, *_ in rows] == NAMES
    for name, learned, minutes, needs in rows:
        title = nbformat.read(ROOT / "notebooks" / name, as_version=4).cells[0].source
        assert re.search(r"\*\*Minutes:\*\* (\d+)", title)[1] == minutes, name
        assert len(learned) > 20
        assert needs.strip()
