# SPDX-License-Identifier: Apache-2.0
"""Lists routings with experts masked by -inf, whose right answers can be seen by eye."""

INF = float("inf")

# logits, top_k, selection_bias, arguments after it up to group_score, the ids.
CASES = {
    "masked expert in the best group's second place": (
        [3.0, -INF, 1.0, 1.0], 1, None, ("softmax", False, False, 2, 1, "top2_sum"), [2],
    ),
    "masked by the bias": (
        [3.0, 0.0, -1.0, -1.0], 1, [0.0, -INF, 0.0, 0.0],
        ("sigmoid", True, False, 2, 1, "top2_sum"), [2],
    ),
    "masked experts come before excluded groups": (
        [0.0, 0.0, 0.0, 0.0, 5.0, 1.0, 1.0, 1.0], 3, [0.0] * 5 + [-INF] * 3,
        ("sigmoid", True, True, 2, 1, "max"), [4, 5, 6],
    ),
    "groups of one expert have no second": (
        [1.0, 3.0, 2.0], 2, None, ("softmax", True, False, 3, 2, "top2_sum"), [1, 2],
    ),
    "more experts than are not masked": (
        [-INF, 1.0, -INF, 2.0], 3, None, ("softmax", False, False, 1, 1, "max"), [3, 1, 0],
    ),
}  # fmt: skip
