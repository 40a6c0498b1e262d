"""How does the benchmark of a chapter end? It runs the chapter, which reads the figures, and adds its seconds to them.

Not a benchmark itself: `make bench` passes over files that begin with an underscore.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from recsys_common import scale

ROOT = Path(__file__).resolve().parent.parent


def finish(chapter: int, content: dict, readme: Callable[[dict, str], str]) -> None:
    """Write the result file, run the chapter, add its seconds and memory, and bring the README up to date.

    Args:
      readme: (result file, text of README.md) -> the text with the file's figures in their places.
    """
    path = ROOT / "benchmarks" / f"{content['name']}.json"
    scale.write_json(path, content)
    book = [sys.executable, str(ROOT / "tools/book.py"), "run", str(chapter), "--force"]
    subprocess.run(book, check=True, stdout=subprocess.DEVNULL)
    run = json.loads((ROOT / "runs" / "small" / f"chapter-{chapter}" / "run.json").read_text())
    name = f"chapter {chapter}"
    content["rows"] = [row for row in content["rows"] if not row["case"].startswith(name)]
    content["rows"] += [
        {"case": name, "value": run["seconds"], "unit": "s"},
        {"case": f"{name}: peak memory", "value": run["peak_memory_mb"], "unit": "MB"},
    ]
    print(scale.write_json(path, content))
    page = ROOT / "README.md"
    page.write_text(readme(content, page.read_text()))


def quoted(text: str, name: str, lines: list[str], chapter: int, seconds: float | None) -> str:
    """README.md with a result file's lines in the place marked for it, and the seconds of a chapter in its row."""
    block = "\n".join(lines)
    mark = f"from benchmarks/{name}.json"
    text = re.sub(rf"(<!-- {mark}.*?-->\n).*?(<!-- end -->)", rf"\g<1>{block}\n\g<2>", text, flags=re.S)
    if seconds is None:
        return text
    return re.sub(rf"(\| \[{chapter} .*?\|.*?\|.*?\|) [^|]* \|", rf"\g<1> {seconds:.0f} |", text, count=1)
