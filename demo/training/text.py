# SPDX-License-Identifier: Apache-2.0
"""Read the text to train on, as bytes, and make batches of it."""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from training.settings import MIN_HELDOUT_BYTES, Settings
from training.startup import fail

VOCAB_SIZE = 256  # a token is a byte
NUM_HELDOUT_WINDOWS = 128


class Text(NamedTuple):
    """Hold the two sides of the split as bytes (uint8), and a checksum of both."""

    train: Tensor
    heldout: Tensor
    checksum: int


def read_text() -> Text:
    """Read the sources of Python's standard library and hold out one file in twenty.

    A file's name decides on which side it is. The split is the same on every machine.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    train, heldout = bytearray(), bytearray()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if skipped.isdisjoint(name.parts):
            is_heldout = zlib.crc32(name.as_posix().encode()) % 20 == 0
            (heldout if is_heldout else train).extend(path.read_bytes())
    if len(train) < 1_000_000 or len(heldout) < MIN_HELDOUT_BYTES:
        fail(f"too few Python sources to train on in {root}")
    return make_text(train, heldout)


def make_text(train: bytearray, heldout: bytearray) -> Text:
    """Make a Text of the bytes, which it shares."""
    return Text(
        torch.frombuffer(train, dtype=torch.uint8),
        torch.frombuffer(heldout, dtype=torch.uint8),
        zlib.crc32(heldout, zlib.crc32(train)),
    )


def windows(text: Tensor, starts: Tensor, settings: Settings) -> Tensor:
    """Return the windows of text that begin at starts, as token ids (len(starts), context)."""
    positions = starts[:, None] + torch.arange(settings.context)
    return text[positions].long().to(settings.device)


def training_batch(text: Text, settings: Settings, step: int) -> Tensor:
    """Draw the batch of a step. Seed and step decide it: --resume needs no generator's state."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    num_starts = len(text.train) - settings.context + 1
    starts = torch.randint(num_starts, (settings.batch_size,), generator=generator)
    return windows(text.train, starts, settings)


def heldout_batches(text: Text, settings: Settings) -> tuple[Tensor, ...]:
    """Spread windows evenly over the held-out text. Every evaluation is on these bytes."""
    starts = torch.linspace(0, len(text.heldout) - settings.context, NUM_HELDOUT_WINDOWS).long()
    return windows(text.heldout, starts, settings).split(settings.batch_size)


def bigram_entropy(batches: Sequence[Tensor]) -> float:
    """Compute H(next byte | byte) of the held-out windows from their own counts, in nats per byte.

    No bigram model has a lower loss on these bytes, not even one that is fitted to them. A fairer
    bar is one fitted to the training text. Its loss is higher.
    """
    tokens = torch.cat(tuple(batches))
    pairs = (tokens[:, :-1] * VOCAB_SIZE + tokens[:, 1:]).flatten()
    probs = torch.bincount(pairs, minlength=VOCAB_SIZE**2).double() / pairs.numel()
    probs = probs.view(VOCAB_SIZE, VOCAB_SIZE)
    return (torch.special.entr(probs).sum() - torch.special.entr(probs.sum(1)).sum()).item()
