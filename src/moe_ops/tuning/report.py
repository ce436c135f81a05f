# SPDX-License-Identifier: Apache-2.0
"""Shows the progress of tuning to a person."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Any

logger = logging.getLogger("moe_ops")


class Report:
    """Reports progress to stderr in lines, with a bar where tqdm is installed and stderr is a terminal.

    Without `progress` the lines go to the log.
    """

    def __init__(self, progress: bool) -> None:
        self.progress = progress
        self.bar: Any = None
        self.done = self.total = 0

    def start(self, text: str, total: int) -> None:
        """Say the text, and start a bar of `total` problems."""
        self.line(text)
        self.done, self.total = 0, total
        if self.progress and sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm

                self.bar = tqdm(total=total, desc="moe_ops.tune", file=sys.stderr)

    def step(self, text: str) -> None:
        """Say the text, and count one more problem as done."""
        self.done += 1
        self.line(f"[{self.done}/{self.total}] {text}")
        if self.bar is not None:
            self.bar.update()

    def line(self, text: str) -> None:
        """Say the text above the bar."""
        if not self.progress:
            logger.info("%s", text)
        elif self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def end(self) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
