"""Is every committed notebook what its text says, clean, compared for real, and in pieces one can read?"""

import ast
import re
import shutil
from pathlib import Path
from statistics import median, quantiles

import nbformat
import notebooks
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = list(notebooks.chapters(ROOT / "chapters").values())
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
UNCOMPARED = ("nbval-ignore-output", "nbval-skip")


def committed(path):
    notebook = path.with_suffix(".ipynb")
    assert notebook.is_file(), f"chapters/{notebook.name} is missing: run make sync"
    return nbformat.read(notebook, as_version=4)


def code_cells(path):
    return [cell for cell in committed(path).cells if cell.cell_type == "code" and cell.source.strip()]


def lines_of_code(cell):
    return sum(1 for line in cell.source.splitlines() if line.strip())


def shows_text(cell):
    """Whether nbval has more to compare than `<Figure size ...>`: it leaves images out."""
    for output in cell.outputs:
        text = output.get("text", "") or output.get("data", {}).get("text/plain", "")
        if text.strip() and not text.startswith("<Figure size"):
            return True
    return False


def compared(cell):
    return not set(UNCOMPARED) & set(notebooks.tags(cell)) and shows_text(cell)


def test_there_are_chapters_and_they_are_numbered_from_one():
    assert list(notebooks.chapters(ROOT / "chapters")) == list(range(1, len(CHAPTERS) + 1))
    assert CHAPTERS, "chapters/ holds no N_name.py"


def test_no_notebook_is_without_its_text():
    orphans = [p.name for p in (ROOT / "chapters").glob("*.ipynb") if p.with_suffix(".py") not in CHAPTERS]
    assert orphans == [], "notebooks are generated from N_name.py"


@each_chapter
def test_the_notebook_is_what_its_text_generates(path, tmp_path):
    # In another folder and with a newer file time: content alone decides.
    folder = tmp_path / "chapters"
    folder.mkdir()
    text = Path(shutil.copyfile(path, folder / path.name))
    assert notebooks.differences(text, committed(path)) == []


@each_chapter
def test_a_hand_edited_notebook_is_found_and_the_message_says_what_to_edit(path):
    edited = committed(path)
    place, cell = next((i, c) for i, c in enumerate(edited.cells, 1) if c.cell_type == "code")
    cell.source += "\nprint('edited by hand')"
    (message,) = notebooks.differences(path, edited)
    name = path.stem
    assert message.startswith(
        f"chapters/{name}.ipynb, cell {place} differs from chapters/{name}.py: "
        f"edit chapters/{name}.py and run make sync"
    )
    assert len(notebooks.differences(path, nbformat.from_dict(edited | {"cells": edited.cells[:-1]}))) == 2
    untagged = committed(path)
    next(c for c in untagged.cells if "parameters" in notebooks.tags(c)).metadata.clear()
    assert len(notebooks.differences(path, untagged)) == 1


@each_chapter
def test_generating_twice_gives_the_same_notebook_with_the_committed_ids(path):
    assert notebooks.generate(path) == notebooks.generate(path)
    ids = [cell.id for cell in committed(path).cells]
    assert ids == [cell.id for cell in notebooks.generate(path).cells]
    assert len(set(ids)) == len(ids)


@each_chapter
def test_the_notebook_is_free_of_the_run(path):
    notebook = committed(path)
    assert notebooks.faults(notebook, path.with_suffix(".ipynb").name, ROOT) == []
    counts = [cell.execution_count for cell in code_cells(path)]
    assert counts == list(range(1, len(counts) + 1)), "cells were not executed once each, in order"
    assert '"papermill"' not in path.with_suffix(".ipynb").read_text(encoding="utf-8")


def test_faults_are_found():
    """The test above can fail: one notebook with every fault."""
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": notebooks.KERNEL, "papermill": {}})
    outputs = [
        {"output_type": "stream", "name": "stderr", "text": "2026 E0000 no device\n"},
        {"output_type": "stream", "name": "stdout", "text": f"wrote {ROOT / 'runs'}\nand /tmp/x\n"},
        {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []},
        {"output_type": "display_data", "data": {"text/html": "<a href='/tmp'>"}, "metadata": {}},
    ]
    cell = nbformat.v4.new_code_cell("plt.title(1);", outputs=outputs, metadata={"execution": {}, "tags": []})
    notebook.cells = [nbformat.from_dict(cell)]
    found = "\n".join(notebooks.faults(notebook, "9_x.ipynb", ROOT))
    assert "metadata ['papermill']" in found and "metadata ['execution']" in found
    assert "wrote to stderr" in found and "no device" in found
    assert "ends in a semicolon" in found and "ends in an error" in found and "ValueError" in found
    assert found.count("prints a path of this machine") == 3


@each_chapter
def test_one_parameters_cell_of_flat_literals(path):
    defaults = notebooks.parameters(path)
    assert set(defaults) >= {"SCALE", "DATASET", "DATA_DIR", "SEED"}
    assert defaults["SCALE"] == "small" and type(defaults["SEED"]) is int
    assert not Path(defaults["DATA_DIR"]).is_absolute()
    assert all(name.isupper() for name in defaults)


@pytest.mark.parametrize(
    "cell, told",
    [
        ("", "0 cells start with"),
        ('# %% tags=["parameters"]\nA = 1\n# %% tags=["parameters"]\nB = 2\n', "2 cells start with"),
        ('# %% tags=["parameters"]\nA = 1\nB = [1, 2]\n', "line 3: B must be a number"),
        ('# %% tags=["parameters"]\nimport os\n', "line 2: 'import os' is not `NAME = literal`"),
        ('# %% tags=["parameters"]\nA = 2 * 3\n', "line 2: A must be a number"),
        ('# %% tags=["parameters"]\nA = = 3\n', "line 2: invalid syntax"),
    ],
)
def test_other_parameters_cells_are_refused(tmp_path, cell, told):
    (tmp_path / "1_x.py").write_text(cell)
    with pytest.raises(ValueError, match=re.escape(told)):
        notebooks.parameters(tmp_path / "1_x.py")


@each_chapter
def test_the_last_code_cell_records_the_metrics(path):
    assert "metrics" in code_cells(path)[-1].source


@each_chapter
def test_most_outputs_are_compared_the_main_result_always(path, tell):
    shown = [cell for cell in code_cells(path) if cell.outputs]
    share = sum(map(compared, shown)) / len(shown)
    tell(f"{path.stem}: nbval compares {share:.0%} of {len(shown)} outputs")
    assert share >= 0.6, "too many cells are tagged as this machine's measurements, or show only an image"
    main = [cell for cell in shown if "main-result" in notebooks.tags(cell)]
    assert main, 'tag the cell of the main result table: # %% tags=["main-result"]'
    assert all(map(compared, main)), "the main result must be compared"


@each_chapter
def test_cells_are_short_and_prose_leads(path, tell):
    lengths = [lines_of_code(cell) for cell in code_cells(path)]
    prose = sum(len(c.source.split()) for c in committed(path).cells if c.cell_type == "markdown")
    ninth = quantiles(lengths, n=10)[-1]
    tell(
        f"{path.stem}: {len(lengths)} code cells of {median(lengths):g} lines (median), "
        f"{prose / sum(lengths):.1f} words of prose a line of code"
    )
    assert max(lengths) <= 30, f"the longest code cell has {max(lengths)} lines"
    assert 3 <= median(lengths) <= 6 and ninth < 20


@each_chapter
def test_a_notebook_defines_almost_nothing_itself(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    trees = [ast.parse(re.sub(r"^[%!].*", "", cell.source, flags=re.M)) for cell in code_cells(path)]
    defined = [node.name for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]
    assert len(defined) <= 2, f"{defined}: what is used again belongs to recsys_common"


@each_chapter
def test_every_figure_has_a_text_for_those_who_cannot_see_it(path):
    prose = "\n".join(cell.source for cell in committed(path).cells if cell.cell_type == "markdown")
    assert re.findall(r"!\[\s*\]\([^)]*\)", prose) == []
    assert [tag for tag in re.findall(r"<img[^>]*>", prose) if not re.search(r'alt="[^"]+"', tag)] == []


@each_chapter
def test_code_that_the_text_shows_is_code_that_runs(path):
    prose = "\n".join(cell.source for cell in committed(path).cells if cell.cell_type == "markdown")
    shown = "\n".join(re.findall(r"```python\n(.*?)```", prose, flags=re.S)).splitlines()
    run = {line.strip() for cell in code_cells(path) for line in cell.source.splitlines()}
    assert [line for line in shown if line.strip() and line.strip() not in run] == []
