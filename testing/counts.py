# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that counts what a run tested: `pytest -p testing.counts`.

A suite that became faster shows with it that it did not become smaller. It counts tests that
passed, the examples of hypothesis that passed, and the graphs that torch.compile made in the tests'
own processes.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

_totals: Counter[str] = Counter()


def graphs() -> int:
    """Return how many graphs torch.compile has made in this process."""
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def examples(item: pytest.Item) -> int:
    """Return how many examples hypothesis says have passed."""
    statistics = getattr(item, "hypothesis_statistics", "")
    return sum(int(number) for number in re.findall(r"(\d+) passing,", statistics))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = graphs()
    result = yield
    after = graphs()
    # A test may have set the counter back.
    item.user_properties.append(("graphs", after - before if after >= before else after))
    item.user_properties.append(("examples", examples(item)))
    return result


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # A worker of pytest-xdist sends its reports on: they are counted there alone.
    if report.when == "call" and report.passed:
        _totals["tests"] += 1
        for name, number in report.user_properties:
            if name in {"graphs", "examples"}:
                assert isinstance(number, int)
                _totals[name] += number


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counted = ", ".join(f"{_totals[name]} {name}" for name in ("tests", "examples", "graphs"))
    terminalreporter.write_line(f"counted: {counted}")
