# SPDX-License-Identifier: Apache-2.0
"""How often the rules choose what tuning chose.

The numbers are facts of the table and of the code. Who changes either writes down the new ones: they
should grow.
"""

from typing import NamedTuple

from moe_ops.configs import choose
from moe_ops.configs.device import KNOWN_GPUS
from moe_ops.configs.heuristics import heuristic
from moe_ops.configs.kernel_config import KernelConfig
from testing.problem_keys import problem_of

H200 = KNOWN_GPUS["H200"]
TUNED = choose.shipped((9, 0))


class Kernel(NamedTuple):
    """What a configuration asks for, but for the order of tiles and the descriptors."""

    warp_specialize: bool
    tile: tuple[int, int, int]
    num_warps: int
    num_stages: int
    programs_per_sm: int
    epilogue_subtile: int

    @classmethod
    def of(cls, config: KernelConfig) -> "Kernel":
        return cls(*(getattr(config, name) for name in cls._fields))


def test_the_rules_agree_with_most_of_the_table():
    tuned = {problem_of(key): Kernel.of(config) for key, config in TUNED.items()}
    computed = {problem: Kernel.of(heuristic(problem, H200)) for problem in tuned}
    assert len(tuned) == 92
    assert sum(computed[problem] == kernel for problem, kernel in tuned.items()) == 65
    # The same kernel in the same tile, perhaps with another depth.
    alike = [computed[problem][:2] == kernel[:2] for problem, kernel in tuned.items()]
    assert sum(alike) == 73
