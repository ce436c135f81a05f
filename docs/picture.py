# SPDX-License-Identifier: Apache-2.0
"""Draw the way of a token to its experts and back: docs/images/token_order.svg.

    python docs/picture.py [FILE]

The arrows are computed from the routing below, as routing_indices computes them. The file follows
the reader's light or dark theme by itself, and it holds no font and no picture.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

FILE = Path(__file__).resolve().parent / "images" / "token_order.svg"

NUM_EXPERTS = 3
TOPK_IDS = ((0, 2), (1, 0), (2, 1), (0, 1))
NAMESPACE = "http://www.w3.org/2000/svg"
FOLLOWED = 2  # the token whose way is drawn thick
TOP_K = len(TOPK_IDS[0])

WIDTH, HEIGHT, SIDE, LABELS = 616, 500, 44, 494
# The y coordinates of the stages, from above.
TOKENS, ROWS, EXPERTS, RESULTS, OUTPUTS = 26, 156, 230, 344, 474

STYLE = """
text { font: 15px system-ui, sans-serif; fill: #1f2328; text-anchor: middle; }
.stage { font-weight: 600; text-anchor: start; }
.op, .number { font-family: ui-monospace, monospace; font-size: 13px; }
.op { text-anchor: start; fill: #57606a; }
rect { stroke: #57606a; stroke-width: 1; fill: #eaeef2; }
.e0 { fill: #b6d7ff; } .e1 { fill: #ffd8a8; } .e2 { fill: #c3e6b8; }
path { fill: none; stroke: #8c959f; stroke-width: 1.3; }
.followed { stroke: #cf222e; stroke-width: 3; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .op { fill: #9aa4af; }
  rect { stroke: #9aa4af; fill: #30363d; }
  .e0 { fill: #1c4a80; } .e1 { fill: #7a4a12; } .e2 { fill: #2b5a2b; }
  path { stroke: #6e7681; } .followed { stroke: #ff7b72; }
}
"""


def gather_indices() -> list[int]:
    """Return the slot of each row in expert order: by expert, and by slot within an expert."""
    ids = [expert for token in TOPK_IDS for expert in token]
    return sorted(range(len(ids)), key=lambda slot: (ids[slot], slot))


def expert_of(slot: int) -> int:
    """Return the expert that a slot chose."""
    return TOPK_IDS[slot // TOP_K][slot % TOP_K]


def token_x(token: int) -> float:
    """Return the middle of a token's square."""
    return 118 + token * 92


def row_x(row: int, slot: int) -> float:
    """Return the middle of a row's square; a gap stands between two experts."""
    return 26 + row * 52 + expert_of(slot) * 26


def square(x: float, y: float, text: str, kind: str = "") -> str:
    """Return a square around (x, y) with its text."""
    return (
        f'<rect class="{kind}" x="{x - SIDE / 2}" y="{y - SIDE / 2}" width="{SIDE}" '
        f'height="{SIDE}" rx="6"/><text x="{x}" y="{y + 5}">{text}</text>'
    )


def arrow(x: float, y: float, to_x: float, to_y: float, followed: bool) -> str:
    """Return a curve from the lower edge of a square to the upper edge of another."""
    middle = (y + to_y) / 2
    kind = "followed" if followed else "other"
    return (
        f'<path class="{kind}" d="M{x} {y + SIDE / 2}C{x} {middle} {to_x} {middle} '
        f'{to_x} {to_y - SIDE / 2}"/>'
    )


def arrows() -> Iterator[str]:
    """Yield the arrows, those of the followed token last, on top of the others."""
    rows = list(enumerate(gather_indices()))
    for row, slot in sorted(rows, key=lambda item: item[1] // TOP_K == FOLLOWED):
        token, x = slot // TOP_K, row_x(row, slot)
        followed = token == FOLLOWED
        yield arrow(token_x(token), TOKENS, x, ROWS, followed)
        yield arrow(x, ROWS, x, RESULTS, followed)
        yield arrow(x, RESULTS, token_x(token), OUTPUTS, followed)


def experts() -> Iterator[str]:
    """Yield a wide box for each expert, over the columns of its rows."""
    rows = list(enumerate(gather_indices()))
    for expert in range(NUM_EXPERTS):
        middles = [row_x(row, slot) for row, slot in rows if expert_of(slot) == expert]
        left, right = middles[0] - SIDE / 2, middles[-1] + SIDE / 2
        middle = (left + right) / 2
        yield (
            f'<rect class="e{expert}" x="{left}" y="{EXPERTS}" width="{right - left}" '
            f'height="54" rx="6"/><text x="{middle}" y="{EXPERTS + 23}">expert {expert}</text>'
            f'<text class="number" x="{middle}" y="{EXPERTS + 43}">{len(middles)} rows</text>'
        )


def labels() -> Iterator[str]:
    """Yield the names of the stages, and of the ops between them."""
    for y, text in (
        (TOKENS, "token order"),
        (ROWS, "expert order"),
        (RESULTS, "expert order"),
        (OUTPUTS, "token order"),
    ):
        yield f'<text class="stage" x="{LABELS}" y="{y + 5}">{text}</text>'
    for middle, text in (
        ((TOKENS + ROWS) / 2 - 8, "routing_indices"),
        ((TOKENS + ROWS) / 2 + 12, "permute"),
        (EXPERTS + 14, "grouped_gemm"),
        (EXPERTS + 32, "activation"),
        (EXPERTS + 50, "grouped_gemm"),
        ((RESULTS + OUTPUTS) / 2 + 5, "unpermute"),
    ):
        yield f'<text class="op" x="{LABELS}" y="{middle}">{text}</text>'


def picture() -> str:
    """Return the whole SVG."""
    parts = [
        f'<svg xmlns="{NAMESPACE}" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">',
        "<title>The way of a token from token order to expert order and back</title>",
        f"<style>{STYLE}</style>",
        *arrows(),
        *experts(),
    ]
    for token in range(len(TOPK_IDS)):
        parts.append(square(token_x(token), TOKENS, f"x{token}"))
        parts.append(square(token_x(token), OUTPUTS, f"y{token}"))
    for row, slot in enumerate(gather_indices()):
        for y, letter in ((ROWS, "x"), (RESULTS, "h")):
            text = f"{letter}{slot // TOP_K}"
            parts.append(square(row_x(row, slot), y, text, f"e{expert_of(slot)}"))
    return "\n".join([*parts, *labels(), "</svg>"]) + "\n"


if __name__ == "__main__":
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    file.write_text(picture(), encoding="utf-8")
