# SPDX-License-Identifier: Apache-2.0
"""The report of a run of the GPU suite: what was tested, on what, with which outcome.

`make test-gpu` writes it, from a complete run alone; it is committed. `make gpu-report-check`
(`python -m testing.gpu_report`) fails when the kernels in the tree are not those that were tested.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "tests" / "gpu" / "report.json"

# Files of an op's folder that a GPU never runs.
NOT_KERNELS = ("__init__.py", "op.py", "pytorch.py")


def kernel_files(root: Path = ROOT) -> list[Path]:
    """What decides which code runs on the GPU: kernels, launchers, configs."""
    package = root / "src" / "moe_ops"
    files = list(package.glob("_triton/*.py"))
    files += package.glob("_triton/kernels/*.py")
    files += (f for f in package.glob("configs/**/*") if f.suffix in {".py", ".json", ".yaml"})
    files += (f for f in package.glob("ops/*/*.py") if f.name not in NOT_KERNELS)
    return sorted(file for file in files if file.is_file())


def kernel_sha256(root: Path = ROOT) -> str:
    """One hash over the names and contents of the kernel files."""
    digest = hashlib.sha256()
    for file in kernel_files(root):
        content = hashlib.sha256(file.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
        digest.update(f"{file.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def problems(report: dict[str, Any], root: Path = ROOT) -> list[str]:
    """Why the report does not speak for the kernels of the tree; empty where it does."""
    found = []
    actual = kernel_sha256(root)
    if report["kernel_sha256"] != actual:
        found.append(
            f"the kernels are not those that were tested: kernel_sha256 is {actual}, the report "
            f"has {report['kernel_sha256']}"
        )
    counts = report["counts"]
    if counts["failed"] or report["failures"]:
        found.append(f"{counts['failed']} tests failed: {', '.join(report['failures'][:5])}")
    if not counts["passed"]:
        found.append("no test passed")
    return found


def main() -> int:
    if not REPORT.is_file():
        print(f"{REPORT.relative_to(ROOT)} does not exist: run 'make test-gpu' on a GPU")
        return 1
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    found = problems(report)
    for line in found:
        print(f"{REPORT.relative_to(ROOT)}: {line}")
    if found:
        print("run 'make test-gpu' on a GPU and commit the report")
        return 1
    counts = ", ".join(f"{number} {name}" for name, number in report["counts"].items())
    print(f"{counts} on {report['gpu']}, torch {report['torch']}, Triton {report['triton']}")
    for reason, number in report["skipped"].items():
        print(f"  skipped {number}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
