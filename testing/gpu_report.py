# SPDX-License-Identifier: Apache-2.0
"""The report of a run of the GPU suite: what was tested, on what, with which outcome.

`make test-gpu` writes it, from a complete run alone; it is committed. `make gpu-report-check`
(`python -m testing.gpu_report`) warns when the tree has changed since that run, and fails when
tests failed in it. `make release` (`--strict`) fails in both cases.

The report names its tree by a hash over what a GPU run depends on:

- the modules of moe_ops that the run can load: the closure of the implementation table, of `_core`
  and of what the suite imports (import_closure.py), as code without comments and docstrings;
- the op schemas without the texts that pages and errors show;
- the data files of the package, such as the tables of kernel configurations.
"""

import argparse
import ast
import functools
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from testing.code_digest import code_sha256, parse
from testing.import_closure import closure, module_name

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "tests" / "gpu" / "report.json"

# Keys of the op schemas that hold texts for readers. `because` and `advice` end error messages: they
# say why a call was refused and never decide it. `since` is compared when a release is made.
TEXTS = {"summary", "equation", "notes", "source", "doc", "because", "advice", "since"}


def kernel_sha256(root: Path = ROOT) -> str:
    """Return one hash over the names and contents of all that a GPU run depends on."""
    digest = hashlib.sha256()
    for name, content in sorted(digests(root).items()):
        digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()


def digests(root: Path = ROOT) -> dict[str, str]:
    """Return a digest for each module, op schema and data file that a GPU run depends on."""
    return module_digests(root) | schema_digests(root) | data_digests(root)


def module_digests(root: Path = ROOT) -> dict[str, str]:
    """Return a digest for each module of moe_ops that a GPU run can load; needs no PyYAML."""
    return {
        module: code_sha256(file.read_text(encoding="utf-8"))
        for module, file in closure(root, _start(root)).items()
        if module.split(".")[0] == "moe_ops"
    }


def _start(root: Path) -> list[str]:
    package = root / "src" / "moe_ops"
    table = [f for f in package.rglob("*.py") if _fills_the_table(f.read_text(encoding="utf-8"))]
    suite = [root / "tests" / "conftest.py", *(root / "tests" / "gpu").rglob("*.py")]
    return [module_name(root, file) for file in [*table, *package.glob("_core/*.py"), *suite]]


@functools.cache
def _fills_the_table(source: str) -> bool:
    """Tell whether the code names implementations of ops: `op.implement(...)`."""
    return ".implement(" in source and any(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "implement"
        for node in ast.walk(parse(source))
    )


def schema_digests(root: Path = ROOT) -> dict[str, str]:
    """Return a digest for each op schema, taken without its texts."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is 10 times faster
    found = {}
    for file in (root / "op_schemas").glob("*.yaml"):
        document = yaml.load(file.read_text(encoding="utf-8"), loader)
        found[file.relative_to(root).as_posix()] = _sha256(_without_texts(document))
    return found


def _without_texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_texts(v) for key, v in value.items() if key not in TEXTS}
    if isinstance(value, list):
        return [_without_texts(entry) for entry in value]
    return value


def data_digests(root: Path = ROOT) -> dict[str, str]:
    """Return a digest for each JSON file of the package, taken of its values."""
    return {
        file.relative_to(root).as_posix(): _sha256(json.loads(file.read_text(encoding="utf-8")))
        for file in (root / "src" / "moe_ops").rglob("*.json")
    }


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode("ascii")).hexdigest()


def outdated(report: dict[str, Any], root: Path = ROOT) -> str | None:
    """Return how the tree differs from the one that was tested; None if it does not."""
    actual = kernel_sha256(root)
    if report["kernel_sha256"] == actual:
        return None
    return (
        f"the code is not what was tested: kernel_sha256 is {actual}, the report has "
        f"{report['kernel_sha256']}"
    )


def failures(report: dict[str, Any]) -> list[str]:
    """Return why the run of the report was no success; empty if it was one."""
    found = []
    counts = report["counts"]
    if counts["failed"] or report["failures"]:
        found.append(f"{counts['failed']} tests failed: {', '.join(report['failures'][:5])}")
    if not counts["passed"]:
        found.append("no test passed")
    return found


def main(arguments: list[str] | None = None, file: Path = REPORT) -> int:
    """Check the report in `file` and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m testing.gpu_report", description=__doc__)
    parser.add_argument("--strict", action="store_true", help="an outdated report is an error")
    strict = parser.parse_args(arguments).strict
    if not file.is_file():
        print(f"ERROR: {file} does not exist: run 'make test-gpu' on a GPU")
        return 1
    report = json.loads(file.read_text(encoding="utf-8"))
    counts = ", ".join(f"{number} {name}" for name, number in report["counts"].items())
    print(f"{counts} on {report['gpu']}, torch {report['torch']}, Triton {report['triton']}")
    for reason, number in report["skipped"].items():
        print(f"  skipped {number}: {reason}")
    errors, warning = failures(report), outdated(report)
    if warning and strict:
        errors.append(warning)
    elif warning:
        print(f"WARNING: the GPU report is outdated: {warning}")
        print("WARNING: run 'make test-gpu' on a GPU and commit the report before a release")
    for error in errors:
        print(f"ERROR: the GPU report: {error}")
    if errors:
        print("ERROR: run 'make test-gpu' on a GPU and commit the report")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
