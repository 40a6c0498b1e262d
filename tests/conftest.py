"""What the tests share: tools/ on the path, and figures that are told at the end whatever pytest captures."""

import os
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))


@pytest.fixture
def tell(request):
    """`tell("recsys_common: 2,100 lines")` prints a figure of this repository under the tests."""
    return lambda line: request.node.user_properties.append(("figure", line))  # travels from a worker with its report


def pytest_terminal_summary(terminalreporter):
    """The figures, and the seconds of the whole `make test`, above pytest's own closing line."""
    reports = [each for kind in ("passed", "failed") for each in terminalreporter.stats.get(kind, [])]
    lines = [line for each in reports if each.when == "call" for name, line in each.user_properties if name == "figure"]
    if "TESTS_STARTED" in os.environ:
        lines.append(f"make test: {time.time() - int(os.environ['TESTS_STARTED']):.0f} s in all")
    for line in lines:
        terminalreporter.write_line(line)
