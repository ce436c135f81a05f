# SPDX-License-Identifier: Apache-2.0
"""The text that is trained on, as bytes, and the batches made of it."""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from training.startup import fail

if TYPE_CHECKING:
    from training.settings import Settings

VOCAB_SIZE = 256  # a token is a byte
NUM_HELDOUT_WINDOWS = 128
MIN_HELDOUT_BYTES = 50_000


class Text(NamedTuple):
    """What is read, in bytes (uint8)."""

    train: Tensor
    heldout: Tensor
    checksum: int


def read_text() -> Text:
    """The sources of Python's standard library, one file in twenty held out.

    Its name decides on which side a file is: the split is by file, and the same on every machine.
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
    return Text(
        torch.frombuffer(train, dtype=torch.uint8),
        torch.frombuffer(heldout, dtype=torch.uint8),
        zlib.crc32(heldout, zlib.crc32(train)),
    )


def windows(text: Tensor, starts: Tensor, settings: Settings) -> Tensor:
    """The windows of text that begin at starts, as token ids (len(starts), context)."""
    positions = starts[:, None] + torch.arange(settings.context)
    return text[positions].long().to(settings.device)


def training_batch(text: Text, settings: Settings, step: int) -> Tensor:
    """The batch of a step. Seed and step decide it: resuming needs no generator's state."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    num_starts = len(text.train) - settings.context + 1
    starts = torch.randint(num_starts, (settings.batch_size,), generator=generator)
    return windows(text.train, starts, settings)


def heldout_batches(text: Text, settings: Settings) -> tuple[Tensor, ...]:
    """Windows spread evenly over the held-out text. Every evaluation is on these bytes."""
    starts = torch.linspace(0, len(text.heldout) - settings.context, NUM_HELDOUT_WINDOWS).long()
    return windows(text.heldout, starts, settings).split(settings.batch_size)


def bigram_entropy(batches: Sequence[Tensor]) -> float:
    """H(next byte | byte) of the held-out windows, from their own counts, in nats per byte.

    No bigram model has a lower loss on these bytes, not even one fitted to them; one fitted to the
    training text, which would be the fairer bar, has a higher loss.
    """
    tokens = torch.cat(tuple(batches))
    pairs = (tokens[:, :-1] * VOCAB_SIZE + tokens[:, 1:]).flatten()
    probs = torch.bincount(pairs, minlength=VOCAB_SIZE**2).double() / pairs.numel()
    probs = probs.view(VOCAB_SIZE, VOCAB_SIZE)
    return (torch.special.entr(probs).sum() - torch.special.entr(probs.sum(1)).sum()).item()
