"""Is the repository fit to be cloned: lock, layout, no traces of a machine, files that can be copied out?"""

import ast
import fnmatch
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "recsys_common"
MODULE_FILES = sorted(path for path in MODULE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def git_files():
    """Tracked files, and those that would be."""
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip(f"not a git checkout: {listing.stderr.strip()}")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def locked():
    """requirements.txt as (name, version, marker, hashes), one a package."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    parts = [re.fullmatch(r"([\w.-]+)==(\S+)( ; [^-]*?)?((?: +--hash=sha256:[0-9a-f]{64})+) *", x) for x in lines]
    broken = [line[:80] for line, part in zip(lines, parts, strict=True) if part is None]
    assert broken == [], "not `name==version ; marker --hash=...`: no address, no option, no package without hash"
    return [(part[1], part[2], part[3], part[4]) for part in parts]


# The environment ---------------------------------------------------------------------------------------


def test_every_locked_package_has_its_hash_and_no_address():
    packages = {name: version for name, version, _, _ in locked()}
    assert len(packages) > 100
    assert {"tensorflow", "tf-keras", "tensorflow-recommenders", "papermill", "nbval", "bqemulator"} <= set(packages)


def test_the_lock_holds_what_pyproject_asks_for():
    versions = {name: version for name, version, _, _ in locked()}
    extras = PROJECT["optional-dependencies"]
    asked = PROJECT["dependencies"] + extras["embedded"] + extras["book"] + extras["test"]
    for requirement in asked:
        name = re.match(r"[\w.-]+", requirement)[0]
        pinned = re.search(r"==([\w.]+)", requirement)
        if name != "recsys-common":
            assert name in versions, f"{name} is not in requirements.txt: make lock"
            assert not pinned or versions[name].startswith(pinned[1].rstrip("*")), f"{requirement}: make lock"


def test_conda_gets_the_same_environment():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, packages = conda["dependencies"]
    assert python == "python " + PROJECT["requires-python"]
    assert pip == "pip" and packages == {"pip": ["--requirement requirements.txt"]}


def test_make_and_continuous_integration_know_the_same_pythons():
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()
    assert f"(3, {low}) <= sys.version_info[:2] < (3, {high})" in (ROOT / "tools/environment.sh").read_text()
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == [f"3.{low}", f"3.{int(high) - 1}"]
    assert {"run": "make test"} in workflow["jobs"]["test"]["steps"]
    assert "make --keep-going test" in (ROOT / ".ci/run").read_text() and os.access(ROOT / ".ci/run", os.X_OK)


def test_a_bug_report_asks_for_chapter_cell_scale_and_environment():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text(encoding="utf-8"))
    required = {x["id"] for x in form["body"] if x.get("validations", {}).get("required")}
    assert required >= {"chapter", "cell", "command", "environment"}


# What is committed -------------------------------------------------------------------------------------


def test_no_trace_of_a_machine_or_a_registry():
    # The hosts are in pieces, so that this file does not hold what it looks for.
    registries = "py" + r"pi\.org|python" + r"hosted\.|npm" + r"js\.(?:com|org)|conda\." + "anaconda"
    folders = r"(?<![\w.~$}>-])/(?:home|root|Users|work)/\w" + "|" + re.escape(str(ROOT)) + r"\b"
    found = []
    for path in git_files():
        text = path.read_bytes().decode("utf-8", errors="replace")
        for match in re.finditer(f"{registries}|{folders}", text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{path.relative_to(ROOT)}, line {line}: {text[match.start() :][:60]!r}")
    assert found == []


def test_no_large_file_and_no_ratings_are_committed():
    files = git_files()
    assert [str(path) for path in files if path.stat().st_size > 1_500_000] == []
    data = {str(path.relative_to(ROOT)) for path in files if path.is_relative_to(ROOT / "data")}
    assert [name for name in data if not fnmatch.fnmatch(name, "data/sample/*") and name != "data/README.md"] == []


def test_ruff_reads_the_chapters_and_leaves_notebooks_alone():
    ruff = [str(Path(sys.executable).with_name("ruff")), "check", "--show-files", "."]
    shown = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    chapters = {str(path) for path in (ROOT / "chapters").glob("*.py")}
    assert chapters <= set(shown)
    assert not [name for name in shown if name.endswith(".ipynb")]


def test_every_command_of_the_readme_is_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, flags=re.M))
    for document in ("README.md", "CONTRIBUTING.md", "data/README.md"):
        if not (ROOT / document).is_file():
            continue
        text = (ROOT / document).read_text(encoding="utf-8")
        code = re.findall(r"```[^`]*```|^ {4}[^\n]*|`[^`\n]+`", text, flags=re.M)
        commands = re.findall(r"\bmake ([a-z][\w-]*)", "\n".join(code))
        unknown = [c for c in commands if c not in targets and not re.fullmatch(r"chapter-(\d+|N)", c)]
        assert unknown == [], f"{document} names commands that the Makefile has not"
    listed = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, check=True).stdout
    assert [t for t in targets if f"make {t} " not in listed] == [], "every target says what it does: `## ...`"


# The module --------------------------------------------------------------------------------------------


def needs(path):
    """The files that a docstring's `Needs:` paragraph names, found beside the file or at the module's top."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree) or ""
    if docstring and len(tree.body) == 1:
        return set()  # a folder's `__init__.py` that only says what the folder is
    paragraph = re.search(r"^Needs:(.*?)(?:\n\s*\n|\Z)", docstring, flags=re.M | re.S)
    assert paragraph, f"{path.relative_to(ROOT)}: its docstring has no `Needs:` line"
    found = set()
    for name in re.findall(r"[\w./-]+(?:\.py\b|\.sql\b|\.json\b|/)", paragraph[1]):
        place = next((top / name for top in (path.parent, MODULE) if (top / name).exists()), None)
        assert place, f"{path.relative_to(ROOT)}: Needs names {name}, which is not there"
        found |= {f for f in place.rglob("*.*") if f.suffix in (".py", ".sql")} if place.is_dir() else {place}
    return found


def imports_tensorflow(path):
    tops = ast.parse(path.read_text(encoding="utf-8")).body if path.suffix == ".py" else []
    names = [a.name for node in tops if isinstance(node, ast.Import) for a in node.names]
    names += [node.module or "" for node in tops if isinstance(node, ast.ImportFrom)]
    return any(name.split(".")[0] in ("tensorflow", "tensorflow_recommenders", "tf_keras") for name in names)


# Imports each copy in one process, so that TensorFlow is paid for once; the copies that need none come first.
IMPORT_COPIES = """
import importlib, json, sys
failures, loaded = [], None
for folder, module, with_tensorflow in json.load(sys.stdin):
    for name in [name for name in sys.modules if name.split(".")[0] == "recsys_common"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        found = importlib.import_module(module).__file__
        if not found.startswith(folder):
            failures.append(f"{module}: imported from {found}, not from its copy")
    except Exception as error:
        failures.append(f"{module}: {type(error).__name__}: {error}")
    sys.path.remove(folder)
    if not with_tensorflow and "tensorflow" in sys.modules and loaded is None:
        loaded = module
print(json.dumps([failures, loaded]))
"""


def test_each_file_of_the_module_can_be_copied_out_with_what_it_needs(tmp_path):
    tasks = []
    for path in MODULE_FILES:
        parts = path.relative_to(MODULE).with_suffix("").parts
        folder = tmp_path / "-".join(parts)
        copies = {path} | needs(path)
        for file in copies:
            copy = folder / "recsys_common" / file.relative_to(MODULE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        module = ".".join(["recsys_common", *parts]).removesuffix(".__init__")
        tasks.append((str(folder), module, any(map(imports_tensorflow, copies))))
    tasks.sort(key=lambda task: task[2])
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_COPIES],
        cwd=tmp_path,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_USE_LEGACY_KERAS": "1"},
        input=json.dumps(tasks),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    failures, loaded = json.loads(done.stdout.splitlines()[-1])
    assert failures == []
    assert loaded is None, f"{loaded} loads TensorFlow by a way of its own"


def code_lines(path):
    """Lines of a file that hold code: no blank lines, comments or docstrings, which we would not want fewer of."""
    text = path.read_text(encoding="utf-8")
    prose = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    held = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            held |= set(range(token.start[0], token.end[0] + 1))
    return len(held - prose)


def test_the_module_stays_small(tell):
    """300 lines of code a file, and 10,000 for ten chapters, without models/ and datasets/ (readers, the simulator)."""
    code = {str(path.relative_to(MODULE)): code_lines(path) for path in MODULE_FILES}
    counted = {name: lines for name, lines in code.items() if not name.startswith(("models/", "datasets/"))}
    raw = sum(len((MODULE / name).read_text(encoding="utf-8").splitlines()) for name in code if "models/" not in name)
    count = sum(counted.values())
    tell(f"recsys_common: {count:,} lines of code without models/ and datasets/ (10,000 at most); {raw:,} lines in all")
    assert 0 < count < 10_000
    # Files that are copied alone: a format with its writer, reader and checks; a pipeline with all that orders it.
    most = {"record_batches.py": 450, "input_pipeline.py": 350}
    assert {name: lines for name, lines in code.items() if lines > most.get(name, 300)} == {}
