# SPDX-License-Identifier: Apache-2.0
"""What the records of a run are about, by name."""

# The numbers of ranks that have results of their own.
RANKS = (2, 4, 8)
# A record's "what".
EXCHANGE, BLOCK = "exchange", "block"
FORWARD, BOTH = "forward", "forward+backward"
# Parts of an exchange.
DISPATCH, COMBINE = "dispatch", "combine"
# What is timed: transports of our ops, the peer, and what they are held against.
SYMMETRIC, FUNCTIONAL, EXACT = "symmetric", "functional", "exact split"
LINK, ONE_GPU, EXPERTS, RECOMPUTED = "link", "one GPU", "experts alone", "recomputed"

NUM_TOKENS = 8192
# An exchange of so few tokens takes the time that any takes.
FEW_TOKENS = 8
# The shape of the aims that are of one shape, and all that are measured.
MAIN = "qwen3-30b"
NAMES = (MAIN, "dsv3", "gpt-oss-120b")


def part_of(ranks: int) -> str:
    """The name of the run on so many ranks, among the parts of a GPU's results."""
    return f"expert-parallel-{ranks}"
