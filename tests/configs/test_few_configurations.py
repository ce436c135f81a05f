# SPDX-License-Identifier: Apache-2.0
"""One model gets few configurations, however many tokens its calls have.

Each configuration is another kernel to compile.
"""

import pytest
import torch

from moe_ops.configs import cache, choose
from moe_ops.configs.device import KNOWN_GPUS
from moe_ops.configs.kernel_config import KernelConfig
from moe_ops.configs.problem import ROWS_BUCKETS, dense_operands, rows_bucket
from moe_ops.tuning import Experts, products_of

MAX_CONFIGURATIONS = 6
MAX_TOKENS = 65536
GPUS = ("A100", "L4", "H100", "H200", "B200", "RTX5090")
# H, I, E, K and flags. The first seven have been measured on an H200.
MODELS: dict[str, tuple[int, int, int, int, dict[str, bool]]] = {
    "qwen3-30b": (2048, 768, 128, 8, {}),
    "olmoe": (2048, 1024, 64, 8, {}),
    "mixtral": (4096, 14336, 8, 2, {}),
    "dsv3": (7168, 2048, 256, 8, {}),
    "gptoss20b without biases": (2880, 2880, 32, 4, {}),
    "fine-grained": (1536, 256, 128, 8, {}),
    "large": (4096, 1024, 128, 8, {}),
    "gpt-oss-120b": (2880, 2880, 128, 4, {"has_bias": True, "transposed": True}),
    "llama4-scout": (5120, 8192, 16, 1, {"transposed": True}),
    "kimi-k2": (7168, 2048, 384, 8, {}),
    "qwen3-next": (2048, 512, 512, 10, {}),
    "odd": (1000, 344, 24, 3, {}),
    "odder": (1001, 345, 24, 3, {}),
}


@pytest.fixture(autouse=True)
def _nothing_tuned(monkeypatch):
    monkeypatch.setenv("MOE_OPS_AUTOTUNE", "0")
    cache.forget()
    yield
    cache.forget()


def experts(model: str, dtype: torch.dtype = torch.bfloat16) -> Experts:
    hidden_size, width, num_experts, top_k, flags = MODELS[model]
    up, down = (2 * width, hidden_size), (hidden_size, width)
    return Experts(num_experts, top_k, up, down, dtype, **flags)


def tokens_of_each_bucket(layer: Experts) -> list[int]:
    """One number of tokens for each range of rows that 1 to MAX_TOKENS tokens fall in."""
    found = {
        rows_bucket(tokens * layer.top_k, layer.num_experts): tokens
        for tokens in range(1, MAX_TOKENS + 1)
    }
    return list(found.values())


@pytest.mark.parametrize("model", MODELS)
def test_a_product_has_at_most_six_configurations(model):
    layer = experts(model)
    for gpu in GPUS:
        device = KNOWN_GPUS[gpu]
        found: dict[tuple[str, int], set[KernelConfig]] = {}
        for tokens in tokens_of_each_bucket(layer):
            for index, (projection, problem) in enumerate(
                products_of(layer, tokens, separate_ops=True, device=device)
            ):
                config = choose.choose(problem, device).config
                found.setdefault((projection, index), set()).add(config)
        # Hopper's activation backward reads by TMA.
        is_at_once = device.capability[0] == 9 and layer.down[1] % 8 == 0
        assert len(found) == (11 if is_at_once else 10)
        for product, configs in found.items():
            assert 1 <= len(configs) <= MAX_CONFIGURATIONS, (gpu, product, configs)


# What differs between the products of a model anyway, whatever their configurations.
OF_THE_PRODUCT = {"EVEN_K", "B_IS_NK", "GATHER_X", "EXPERTS"}


@pytest.mark.parametrize("model", MODELS)
def test_a_kernel_has_at_most_six_tiles_with_their_options(model):
    """One kernel computes several products of a model; together they ask for six at most."""
    pytest.importorskip("triton", exc_type=ImportError)
    from moe_ops._triton.plan import plan

    layer = experts(model)
    for gpu in GPUS:
        device = KNOWN_GPUS[gpu]
        found: dict[tuple[str, bool, bool], set[object]] = {}
        for tokens in tokens_of_each_bucket(layer):
            for _, problem in products_of(layer, tokens, device=device):
                made = plan(problem, dense_operands(problem), device)
                kernel = made.kernel, problem.kind == "backward_dW", made.computes_epilogue
                options = {k: v for k, v in made.options.items() if k not in OF_THE_PRODUCT}
                found.setdefault(kernel, set()).add((made.tile, *sorted(options.items())))
        for kernel, tiles in found.items():
            assert 1 <= len(tiles) <= MAX_CONFIGURATIONS, (gpu, kernel, tiles)


def test_there_are_seven_ranges_of_rows():
    """A product that is tuned in all of them has seven configurations.

    The rules and the table give it at most six, as the tests above say, for some ranges share one.
    """
    assert len(ROWS_BUCKETS) == MAX_CONFIGURATIONS + 1
    assert list(ROWS_BUCKETS) == sorted(set(ROWS_BUCKETS))
