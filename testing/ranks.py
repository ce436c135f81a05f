# SPDX-License-Identifier: Apache-2.0
"""Runs checks on the ranks of a process group, in processes that many checks share.

A process that imports torch costs 3 s, so a test session starts those of each world size once:

    def check(rank, world_size, how): ...    # of the test module, raises where something is wrong

    def test_it(ranks):
        ranks(2).run(check, how="eager")

Every rank imports the test module by its path and calls the check. The default process group is
there, of gloo or NCCL. A check that destroys a group is their last (`run_last`). After a failure the
processes are ended, and the next check gets new ones. They are always killed: a Python that ends
while a thread of gloo frees a tensor aborts (pytorch#190489).
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

ROOT = Path(__file__).parents[1]
# A collective that waits longer has lost a rank. A check that compiles takes some 20 s.
TIMEOUT = 60


class Ranks:
    """Processes, one for each rank of a world; with NCCL each has the GPU of its number."""

    def __init__(self, world_size: int, backend: str = "gloo") -> None:
        self.world_size, self.backend = world_size, backend
        self._processes: list[subprocess.Popen[str]] = []

    def run(self, check: Callable[..., None], **arguments: Any) -> None:
        """Call check(rank, world_size, **arguments) on every rank; what JSON holds can be given.

        Raises:
            AssertionError: a rank raised, or ended. Its traceback is the text.
        """
        if not self._processes:
            self._start()
        job = json.dumps([check.__code__.co_filename, check.__name__, arguments])
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(job + "\n")
            process.stdin.flush()
        answers = [self._answer(process) for process in self._processes]
        if any(answers):
            self.end()
            raise AssertionError("\n".join(f"rank {i}: {a}" for i, a in enumerate(answers) if a))

    def run_last(self, check: Callable[..., None], **arguments: Any) -> None:
        """Do the same, and end the processes: for a check that destroys a process group.

        DTensor caches a mesh with what it derived, and takes an equal mesh for it later, though the
        group of the first is gone.
        """
        self.run(check, **arguments)
        self.end()

    def _answer(self, process: "subprocess.Popen[str]") -> str:
        assert process.stdout is not None
        # A check may print. Its answer is the first line that is JSON.
        for line in process.stdout:
            if line.startswith('{"error": '):
                return json.loads(line)["error"]
        return f"ended with {process.wait()}"

    def _start(self) -> None:
        store = Path(tempfile.mkdtemp()) / "store"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        self._processes = [
            subprocess.Popen(
                [
                    sys.executable, "-m", "testing.ranks", str(store), str(rank),
                    str(self.world_size), self.backend,
                ],
                env=environment, cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )
            for rank in range(self.world_size)
        ]  # fmt: skip

    def end(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate()
        self._processes = []


@contextmanager
def all_ranks() -> Iterator[Callable[[int], Ranks]]:
    """Yield a function that returns the Ranks of a world size, always the same ones."""
    started: dict[int, Ranks] = {}
    try:
        yield lambda world_size: started.setdefault(world_size, Ranks(world_size))
    finally:
        for ranks in started.values():
            ranks.end()


def init(
    store: Path | str,
    rank: int,
    world_size: int,
    timeout: float = TIMEOUT,
    backend: str = "gloo",
) -> None:
    """Make the default process group."""
    if backend == "nccl":
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )  # fmt: skip


def main(store: str, rank: int, world_size: int, backend: str) -> None:
    torch.set_num_threads(1)
    init(store, rank, world_size, backend=backend)
    modules: dict[str, Any] = {}
    for line in sys.stdin:
        file, name, arguments = json.loads(line)
        error = ""
        try:
            if file not in modules:
                modules[file] = _module(file)
            torch.manual_seed(0)
            if "torch._dynamo" in sys.modules:
                torch._dynamo.reset()
            getattr(modules[file], name)(rank, world_size, **arguments)
        except BaseException:  # noqa: BLE001 - the other side raises it
            error = traceback.format_exc()
        print(json.dumps({"error": error}), flush=True)
        if error:
            break


def _module(file: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
