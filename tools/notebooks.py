"""What is a chapter, as text and as a notebook?

A chapter is `chapters/N_name.py` in jupytext's py:percent format, the only side edited by hand. Everything
here goes from that text to the notebook beside it, never back, and never looks at a file's time:

    parameters(path)          the names and defaults of its `parameters` cell, read without running anything
    generate(path)            the notebook, not executed
    clean(executed)           the executed notebook without the noise of the run
    differences(path, nb)     where a committed notebook departs from its text
    faults(nb, name, root)    what may not be committed: stderr, errors, paths of this machine, leftovers

Needs: nothing else
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
PARAMETERS_CELL = re.compile(
    r'^# %%[^\n]*tags=\[[^\]\n]*"parameters"[^\]\n]*\][^\n]*\n(.*?)(?=^# %%|\Z)', re.MULTILINE | re.DOTALL
)


def chapters(folder: Path) -> dict[int, Path]:
    """The chapters of a folder by number; files that are not `N_name.py` are no chapters."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*.py")):
        match = re.fullmatch(r"(\d+)_\w+", path.stem)
        if match and int(match[1]) in found:
            raise ValueError(f"{path} and {found[int(match[1])]} are both chapter {match[1]}: rename one")
        if match:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def title(path: Path) -> str:
    """`chapters/2_data_export.py` -> `2 data export`."""
    return path.stem.replace("_", " ")


def parameters(path: Path) -> dict[str, bool | int | float | str]:
    """The names and default values of a chapter's one `parameters` cell.

    Raises ValueError where there is not exactly one such cell, or where it holds anything but
    `NAME = literal` lines: papermill passes flat literals and nothing else.
    """
    text = path.read_text(encoding="utf-8")
    cells = list(PARAMETERS_CELL.finditer(text))
    if len(cells) != 1:
        raise ValueError(f'{path}: {len(cells)} cells start with `# %% tags=["parameters"]`, expected one')
    first_line = text.count("\n", 0, cells[0].start(1))
    defaults: dict[str, bool | int | float | str] = {}
    try:
        statements = ast.parse(cells[0][1]).body
    except SyntaxError as error:
        raise ValueError(f"{path}, line {first_line + error.lineno}: {error.msg}") from None
    for statement in statements:
        where = f"{path}, line {first_line + statement.lineno}"
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case _:
                raise ValueError(f"{where}: {ast.unparse(statement)!r} is not `NAME = literal`")
        try:
            default = ast.literal_eval(value)
        except ValueError:
            default = None
        if not isinstance(default, bool | int | float | str):
            raise ValueError(f"{where}: {name} must be a number, a string, True or False")
        defaults[name] = default
    return defaults


def generate(path: Path):
    """The notebook (an nbformat node) of one chapter's text, with a banner that says which file to edit."""
    import jupytext
    import nbformat

    notebook = jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent")
    banner = f"<sub>Generated from [{path.name}]({path.name}) by `make sync`: edit that file.</sub>"
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(banner))
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": tags(cell)} if tags(cell) else {})
        # The id follows from the text, so that an edit changes one id and a second generation changes none.
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    return notebook


def tags(cell) -> list[str]:
    """The tags of a cell; nbval's and papermill's are among them."""
    return list(cell.metadata.get("tags", []))


def clean(executed, path: Path):
    """The notebook generated from `path` with the outputs of `executed` and nothing else of the run."""
    notebook = generate(path)
    count = 0
    for cell, run in zip(notebook.cells, executed.cells, strict=True):
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = run.outputs
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
            if "metadata" in output:
                output.metadata.clear()
    return notebook


def write(notebook, path: Path) -> None:
    """Writes a notebook beside `path` and renames it into place, so that a kill leaves the old one."""
    import nbformat

    beside = path.with_name(path.name + ".part")
    nbformat.write(notebook, beside)
    beside.replace(path)


def differences(path: Path, committed) -> list[str]:
    """Where a committed notebook is not what its chapter's text generates: source, cell type or tags."""
    text = f"{path.parent.name}/{path.name}"
    notebook = text.removesuffix(".py") + ".ipynb"
    wanted = [(cell.cell_type, cell.source, tags(cell)) for cell in generate(path).cells]
    found = [(cell.cell_type, cell.source, tags(cell)) for cell in committed.cells]
    lines = [
        f"{notebook}, cell {number} differs from {text}: edit {text} and run make sync\n"
        f"  the notebook has {_short(have)}, the text {_short(want)}"
        for number, (want, have) in enumerate(zip(wanted, found, strict=False), 1)
        if want != have
    ]
    if len(wanted) != len(found):
        lines.append(f"{notebook} has {len(found)} cells, {text} {len(wanted)}: edit {text} and run make sync")
    return lines


def _short(cell: tuple[str, str, list[str]]) -> str:
    kind, source, cell_tags = cell
    first = next((line for line in source.splitlines() if line.strip()), "")
    return f"a {kind} cell tagged {cell_tags} that starts {first[:60]!r}"


def faults(notebook, name: str, root: Path) -> list[str]:
    """What in an executed notebook may not be committed, one line a fault.

    `root` is the checkout: its own absolute path may not stand in the notebook, nor any home folder.
    """
    found = []
    machine_path = re.compile(re.escape(str(root)) + r"|(?<![\w.])/(?:home|root|Users|tmp|work|var/folders)\b")
    extra = set(notebook.metadata) - {"kernelspec", "language_info"}
    if extra:
        found.append(f"{name}: metadata {sorted(extra)} beyond the kernel")
    for number, cell in enumerate(notebook.cells, 1):
        where = f"{name}, cell {number}"
        extra = set(cell.metadata) - {"tags"}
        if extra:
            found.append(f"{where}: metadata {sorted(extra)} beyond the tags")
        if cell.cell_type == "code" and cell.source.rstrip().endswith(";"):
            found.append(f"{where} ends in a semicolon, which nbval does not heed: write `_ = ...`")
        for output in cell.get("outputs", []):
            text = _text(output)
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"{where} wrote to stderr, which nbval would compare: {text.strip()[:300]!r}")
            if output.output_type == "error":
                found.append(f"{where} ends in an error, print it instead: {text.strip()[:300]!r}")
            for match in machine_path.finditer(text):
                found.append(f"{where} prints a path of this machine: {text[match.start() :][:80]!r}")
    return found


def _text(output) -> str:
    """Everything textual of one output; images are left out."""
    parts = [output.get("text", ""), output.get("ename", ""), output.get("evalue", "")]
    parts += [value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
    return "\n".join(part if isinstance(part, str) else json.dumps(part) for part in parts)
