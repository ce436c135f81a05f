# SPDX-License-Identifier: Apache-2.0
"""Lists the sizes of models' experts at which the GPU suite runs."""

from typing import NamedTuple


class Model(NamedTuple):
    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    bias: bool = False


MODELS = {
    "qwen3-30b": Model(16384, 2048, 768, 128, 8),
    "olmoe": Model(16384, 2048, 1024, 64, 8),
    "mixtral": Model(8192, 4096, 14336, 8, 2),
    "dsv3": Model(8192, 7168, 2048, 256, 8),
    "gptoss20b": Model(16384, 2880, 2880, 32, 4, bias=True),
    "fine-grained": Model(24576, 1536, 256, 128, 8),
    "large": Model(32768, 4096, 1024, 128, 8),
    "decode-1": Model(1, 2048, 768, 128, 8),
    "decode-8": Model(8, 2048, 768, 128, 8),
    "decode-64": Model(64, 2048, 768, 128, 8),
    "decode-256": Model(256, 2048, 768, 128, 8),
    # E * N * D = 2.4e9 in the first GEMM, with few rows an expert and with many.
    "weights-past-int32": Model(4096, 4096, 2304, 128, 8),
    "decode-past-int32": Model(64, 4096, 2304, 128, 8),
    # R * H = 2.4e9.
    "rows-past-int32": Model(147456, 2048, 64, 8, 8),
}
