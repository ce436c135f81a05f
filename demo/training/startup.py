# SPDX-License-Identifier: Apache-2.0
"""Start a program, before torch is imported, and end it with an exit status."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

# Let waiting threads sleep. Spinning, libgomp's default, is a third faster if every core is free for
# this, and several times slower if one is not. libgomp reads it when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def fail(message: str) -> NoReturn:
    """Exit as a command does that cannot do what it is asked to."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def packages(advice: str) -> Iterator[None]:
    """Exit with one line if an import in the block fails."""
    try:
        yield
    except ModuleNotFoundError as missing:
        fail(f"no package {missing.name} here; {advice}")
    except ImportError as error:
        fail(str(error))


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Exit with the status that main returns, or with 130 after Ctrl-C."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
