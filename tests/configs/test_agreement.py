# SPDX-License-Identifier: Apache-2.0
"""How often the rules, and the nearest neighbour, choose what tuning chose.

The numbers are facts of the table and of the code. Who changes either writes down the new ones: they
should grow.
"""

from typing import NamedTuple

from moe_ops.configs import choose
from moe_ops.configs.device import KNOWN_GPUS
from moe_ops.configs.heuristics import heuristic
from moe_ops.configs.kernel_config import KernelConfig
from moe_ops.configs.neighbour import nearest
from moe_ops.configs.problem import Problem, problem_of

H200 = KNOWN_GPUS["H200"]
TUNED = choose.shipped((9, 0))
# A model's up and down projection, as (E, N, D).
MODELS = {
    "qwen3-30b": ((128, 1536, 2048), (128, 2048, 768)),
    "olmoe": ((64, 2048, 2048), (64, 2048, 1024)),
    "mixtral": ((8, 28672, 4096), (8, 4096, 14336)),
    "dsv3": ((256, 4096, 7168), (256, 7168, 2048)),
    "gptoss20b": ((32, 5760, 2880), (32, 2880, 2880)),
    "fine-grained": ((128, 512, 1536), (128, 1536, 256)),
    "large": ((128, 2048, 4096), (128, 4096, 1024)),
}


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


def model_of(problem: Problem) -> str:
    sizes = (problem.num_experts, problem.out_features, problem.in_features)
    (found,) = (name for name, projections in MODELS.items() if sizes in projections)
    return found


def neighbour_of_another_model(problem: Problem) -> KernelConfig | None:
    """The nearest neighbour, if this model had not been tuned."""
    others = {
        key: config
        for key, config in TUNED.items()
        if model_of(problem_of(key)) != model_of(problem)
    }
    near = nearest(problem, others, H200)
    return None if near is None else others[near]


def test_the_rules_agree_with_most_of_the_table():
    tuned = {problem_of(key): Kernel.of(config) for key, config in TUNED.items()}
    computed = {problem: Kernel.of(heuristic(problem, H200)) for problem in tuned}
    assert len(tuned) == 92
    assert sum(computed[problem] == kernel for problem, kernel in tuned.items()) == 65
    # The same kernel in the same tile, perhaps with another depth.
    alike = [computed[problem][:2] == kernel[:2] for problem, kernel in tuned.items()]
    assert sum(alike) == 82


def test_neighbours_agree_as_often_as_the_rules():
    """Over what has a neighbour among the other models. The rules know this table, and so gain."""
    near, computed = [], []
    for key, config in TUNED.items():
        problem = problem_of(key)
        neighbour = neighbour_of_another_model(problem)
        if neighbour is not None:
            near.append(Kernel.of(neighbour) == Kernel.of(config))
            computed.append(Kernel.of(heuristic(problem, H200)) == Kernel.of(config))
    assert (len(near), sum(near), sum(computed)) == (60, 53, 45)
