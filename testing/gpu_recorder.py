# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin that writes the report of a complete run of the GPU suite."""

import collections
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from testing.gpu_report import REPORT, kernel_sha256, module_digests

ENVIRONMENT_VARIABLE = "MOE_OPS_GPU_REPORT"
LOADED = "loaded modules of moe_ops"


def report_path() -> Path | None:
    """Where the run's report is to go; None where none is asked for."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    return Path(named).absolute() if named else None


def is_worker(config: Any) -> bool:
    """Tell whether pytest-xdist started this process."""
    return hasattr(config, "workerinput")


def loaded_modules() -> set[str]:
    """Return the names of the moe_ops modules that this process has imported."""
    return {name for name in sys.modules if name.split(".")[0] == "moe_ops"}


def plugin(config: Any, path: Path) -> "Recorder | LoadedModules":
    """Return what this process needs for the report to get to `path`."""
    return LoadedModules(config) if is_worker(config) else Recorder(config, path)


class LoadedModules:
    """Sends the names of the modules that a worker imported to the process that started it."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def pytest_sessionfinish(self) -> None:
        self.config.workeroutput[LOADED] = sorted(loaded_modules())


class Recorder:
    """Collects the outcomes of a run and writes the report of a complete one.

    Lives in the process that starts the workers, or in the only one.
    """

    def __init__(self, config: Any, path: Path) -> None:
        self.config = config
        self.path = path
        self.started = time.monotonic()
        # Before the tests: what is edited meanwhile was not tested.
        self.sha256 = kernel_sha256()
        self.covered = set(module_digests())
        self.loaded: set[str] = set()
        self.collected: set[str] = set()
        self.outcomes: dict[str, str] = {}
        self.reasons: collections.Counter[str] = collections.Counter()
        self.message = ""

    def pytest_collection_finish(self, session: Any) -> None:
        self.collected.update(item.nodeid for item in session.items)

    # The hook exists only where xdist is installed.
    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.collected.update(ids)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        # A worker that crashed says nothing; the test that crashed it has failed.
        if error is None:
            self.loaded.update(node.workeroutput[LOADED])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
        elif report.skipped and self.outcomes.get(report.nodeid) != "failed":
            self.outcomes[report.nodeid] = "skipped"
            reason = (
                report.longrepr[2] if isinstance(report.longrepr, (tuple, list)) else "expected"
            )
            self.reasons[reason.removeprefix("Skipped: ")] += 1
        elif report.when == "call":
            self.outcomes.setdefault(report.nodeid, "passed")

    def pytest_sessionfinish(self, session: Any, exitstatus: int) -> None:
        obstacle = self._obstacle(int(exitstatus))
        if obstacle is not None:
            self.message = f"no report written: {obstacle}"
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self._report(), indent=2) + "\n", encoding="utf-8")
        self.message = f"report written: {self.path}"

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(self.message)

    def _obstacle(self, exitstatus: int) -> str | None:
        """Why this was not a complete run; None where it was."""
        option = self.config.option
        selecting = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf")
        chosen = [name for name in selecting if getattr(option, name, None)]
        if chosen:
            return f"the run was of a selection ({', '.join(chosen)})"
        roots = {Path(str(argument)).resolve() for argument in self.config.args}
        if roots != {REPORT.parent}:
            return "the run was not of tests/gpu"
        if exitstatus not in {0, 1}:
            return f"the run ended early, exit status {exitstatus}"
        missing = self.collected - set(self.outcomes)
        if missing or not self.collected:
            return f"{len(missing)} of {len(self.collected)} tests did not run"
        if self.sha256 != kernel_sha256():
            return "the code changed during the run"
        if uncovered := (self.loaded | loaded_modules()) - self.covered:
            names = ", ".join(sorted(uncovered))
            return f"the tests loaded modules that the report's hash does not cover: {names}"
        return None

    def _report(self) -> dict[str, Any]:
        count = collections.Counter(self.outcomes.values())
        return {
            "kernel_sha256": self.sha256,
            **machine(),
            "counts": {name: count[name] for name in ("passed", "failed", "skipped")},
            "skipped": dict(sorted(self.reasons.items())),
            "failures": sorted(name for name, o in self.outcomes.items() if o == "failed"),
            "seconds": round(time.monotonic() - self.started, 1),
        }


def machine() -> dict[str, Any]:
    """The GPU and the versions of a run."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "gpus": torch.cuda.device_count(),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "python": platform.python_version(),
    }


def _driver() -> str:
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return "unknown: no nvidia-smi"
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.split("\n", maxsplit=1)[0].strip() or f"unknown: {done.stderr.strip()}"
