# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for every GPU generation, fits its shared memory, and spills little.

No GPU is needed. The kernels are compiled as the launchers would launch them there, with the
configurations that moe_ops chooses and the specialisation that Triton makes.
"""

import importlib
import itertools
import json
import os
import pkgutil
import re
from collections.abc import Iterable
from importlib import resources
from typing import Any
from unittest import mock

import pytest
import torch

import moe_ops
from moe_ops.configs import cache
from moe_ops.configs.device import Device
from moe_ops.configs.kernel_config import (
    KernelConfig,
    KernelConfigBackward_dW,
    KernelConfigBackward_dX,
    KernelConfigForward,
)
from moe_ops.configs.kernel_string import kernel_config
from testing import experts_problem
from testing.gemm_problem import MODES

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles kernels, which TRITON_INTERPRET=1 interprets", allow_module_level=True)
pytest.importorskip("triton", exc_type=ImportError)

from triton.runtime.jit import JITFunction

from moe_ops._triton import gemm, plan, weight_gradient
from moe_ops.quantization.formats import FORMATS
from testing import kernel_calls as calls
from testing.compiled import GPUS, Resources, compiling_for
from testing.kernel_calls import SIZES, Call, Sizes

# This takes minutes if Triton has none of the kernels in its cache.
pytestmark = pytest.mark.slow

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
EVERY_FLAG = ("permute_x-weights-bias", "permute_y-weights-bias")
# So many bytes of a thread's stack do no harm. They are an eighth of its registers, and are cached.
SPILL_LIMIT = 128
# These multiply matrices of 16-bit floats. For sm_75 Triton has only FMA.
TENSOR_CORES = {
    "sm_80": "mma.sync", "sm_86": "mma.sync", "sm_89": "mma.sync", "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma", "sm_120": "mma.sync",
}  # fmt: skip

STORE: dict[str, Any] = {"use_tma_store": True, "warp_specialize": True}
# Configurations for Hopper's ping-pong and cooperative kernels that are not chosen anyway.
PINGPONG = kernel_config(
    KernelConfigForward(use_tma_load_x=True, use_tma_load_w=True, **STORE),
    backward_dW=KernelConfigBackward_dW(
        BLOCK_M=64, BLOCK_N=128, BLOCK_K=128, use_tma_load_dy=True, use_tma_load_x=True, **STORE
    ),
)
SHARED = kernel_config(
    KernelConfigForward(BLOCK_N=256, use_tma_load_x=True, use_tma_load_w=True, **STORE)
)

TALL = kernel_config(
    KernelConfigForward(
        BLOCK_M=192, BLOCK_N=256, use_tma_load_x=True, use_tma_load_w=True, **STORE
    ),
    KernelConfigBackward_dX(
        BLOCK_M=192, BLOCK_K=256, use_tma_load_dy=True, use_tma_load_w=True, **STORE
    ),
)

HOPPER_ALONE = ("cooperative", "tall", "pingpong")

gpus = pytest.mark.parametrize("gpu", GPUS)


@pytest.fixture(autouse=True)
def _nothing_tuned():
    """Ignore what somebody tuned on this machine, since others do not have it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MOE_OPS_AUTOTUNE", "0")
        cache.forget()
        yield
    cache.forget()


def compile_all(device: Device, called: Iterable[Call]) -> list[Resources]:
    with compiling_for(device) as found:
        for call in called:
            call()
    return found


def check(device: Device, named: dict[str, Call], stack: int) -> None:
    """Check that all kernels fit, with at most so many bytes of stack, and name all that do not."""
    wrong = [
        f"{name}: {kernel}"
        for name, call in named.items()
        for kernel in compile_all(device, [call])
        if kernel.shared > device.shared_memory or kernel.stack > stack
    ]
    limits = f"{device.shared_memory} bytes of shared memory, {stack} of stack"
    assert not wrong, "\n".join([f"more than {limits}:", *wrong])


@pytest.mark.parametrize("mode", [{"bias": True}, {"format": "nf4"}])
def test_kernels_beside_tall_ones_have_a_schedule_of_their_own(mode):
    """Their blocks are powers of two, and a tall tile has 192 rows."""
    made = calls.experts(SIZES["prefill-128"], BF16, **mode)
    found = compile_all(GPUS["sm_90"], [made["forward"], made["backward"]])
    assert "grouped_gemm_tall_kernel" in {kernel.kernel for kernel in found}


def stack_limit(gpu: str, size: str = "training") -> int:
    # For decode-1 a few spilled bytes were faster than fewer programs on an SM.
    return 0 if gpu == "sm_90" and size not in ("uneven", "decode-1") else SPILL_LIMIT


@gpus
def test_every_kernel_compiles(gpu):
    device, dtype = GPUS[gpu], F16
    named = {f"routing {i}": call for i, call in enumerate(calls.routing(SIZES["training"], dtype))}
    for size in ("training", "decode-8"):
        made = calls.grouped_gemm(SIZES[size], dtype, **MODES["permute_x-weights-bias"])
        named.update({f"{size} {name}": call for name, call in made.items()})
    for size in ("training", "prefill-128"):
        made = calls.experts(SIZES[size], dtype)
        named.update({f"{size} experts {name}": call for name, call in made.items()})
    for size in ("training", "prefill-128", "decode-8"):
        made = calls.adapted_experts(SIZES[size], dtype)
        named.update({f"{size} {name}": call for name, call in made.items()})
    for push in (False, True):
        made = calls.expert_parallel(SIZES["training"], dtype, push=push)
        named.update({f"expert parallel {name} {push=}": call for name, call in made.items()})
    if gpu != "sm_75":
        made = calls.quantized_gemm(SIZES["decode-8"], dtype, "nf4")
        named.update({f"quantised {name}": call for name, call in made.items()})
    gather = calls.grouped_gemm(SIZES["training"], dtype, **MODES["permute_y-weights"])
    plain = calls.grouped_gemm(SIZES["training"], F32)
    more = [
        gather["dw"],
        plain["dw"],
        calls.experts(SIZES["training"], dtype, gated=False)["backward"],
        calls.experts(SIZES["uneven"], dtype)["backward"],
        *calls.dequantize_weight(SIZES["training"], dtype, "nf4").values(),
    ]
    if gpu == "sm_90":
        pingpong = calls.experts(SIZES["training"], dtype, kernel_config=PINGPONG)
        shared = calls.grouped_gemm(SIZES["training"], dtype, kernel_config=SHARED)
        more += [pingpong["forward"], pingpong["backward"], shared["forward"]]
    kernels = compile_all(device, [*named.values(), *more])
    names = {kernel.kernel for kernel in kernels}
    assert names == {
        n
        for n in kernels_of_the_package()
        if (gpu == "sm_90" or not any(word in n for word in HOPPER_ALONE))
        and (gpu != "sm_75" or n != "_quantized_fwd_kernel")
    }
    check(device, named, stack_limit(gpu))


@pytest.mark.parametrize(("gpu", "dtype"), [("sm_80", BF16), ("sm_90", F32), ("sm_100", BF16)])
def test_gluon_is_not_imported_for_other_gpus_and_dtypes(gpu, dtype, monkeypatch):
    def refuse() -> None:
        raise AssertionError("Gluon is imported")

    monkeypatch.setattr(plan, "why_no_kernels", refuse)
    for given in (SHARED, TALL):
        for name, call in calls.grouped_gemm(SIZES["training"], dtype, kernel_config=given).items():
            names = " ".join(launched(GPUS[gpu], call))
            assert not any(word in names for word in HOPPER_ALONE), name


@pytest.mark.parametrize("kernel_config", [PINGPONG, SHARED, TALL, None])
def test_a_group_of_warps_meets_before_one_of_its_threads_arrives(kernel_config):
    """They meet at a barrier in the same straight code, even if a loop before it had no steps."""
    gemm = calls.grouped_gemm(SIZES["training"], BF16, kernel_config=kernel_config)
    experts = calls.experts(SIZES["training"], BF16, kernel_config=kernel_config)
    called = [*gemm.values(), experts["forward"], experts["backward"]]
    kernels = [
        k
        for k in compile_all(GPUS["sm_90"], called)
        if any(word in k.kernel for word in HOPPER_ALONE)
    ]
    assert kernels
    for kernel in kernels:
        arrivals = 0
        have_met = False
        for line in kernel.ptx.splitlines():
            if re.search(r"\bbar(rier)?\.sync\s+\w+, 128;", line):
                have_met = True
            elif re.search(r"^\$L__BB|\bbra\b|try_wait", line):
                have_met = False
            elif "mbarrier.arrive.shared" in line:
                arrivals += 1
                assert have_met, f"{kernel.kernel}: {line}"
        # Two groups arrive in their loop and after it. Ping-pong groups also arrive for each other,
        # and tall tiles have three loops.
        assert arrivals == 12 if "tall" in kernel.kernel else arrivals in (4, 6), kernel.kernel


@pytest.mark.parametrize(
    ("gpu", "dtype", "mode", "is_gated"),
    [
        ("sm_90", BF16, {}, True),
        ("sm_90", F16, {"activation": "gelu_tanh", "bias": True, "transposed": True}, True),
        ("sm_90", F32, {}, False),
        ("sm_90", BF16, {"activation": "gelu"}, False),
        ("sm_90", BF16, {"interleaved": True}, False),
        ("sm_90", BF16, {"gated": False}, False),
        ("sm_80", BF16, {}, False),
        ("sm_100", BF16, {}, False),
    ],
)
def test_what_computes_the_down_projections_backward(gpu, dtype, mode, is_gated):
    """If a kernel has the activation's backward on top, that one kernel does it."""
    names = launched(GPUS[gpu], calls.experts(SIZES["training"], dtype, **mode)["backward"])
    assert names.count("expert_down_bwd_pingpong_kernel") == is_gated
    assert names.count("_expert_activation_bwd_kernel") == (not is_gated)


@pytest.mark.parametrize("size", ["training", "uneven"])
def test_the_down_projections_backward_makes_one_schedule(size):
    """It makes one even if descriptors do not fit its operands. Two kernels then do the same."""
    loads = {"use_tma_load_dy": True, "use_tma_load_w": True}
    config = KernelConfigBackward_dX(BLOCK_K=128, BLOCK_N=64, **loads, **STORE)
    made = calls.experts(SIZES[size], BF16, kernel_config=kernel_config(backward_dX=config))
    names = launched(GPUS["sm_90"], made["backward"])
    is_at_once = size == "training"
    assert names.count("expert_down_bwd_pingpong_kernel") == is_at_once
    assert names.count("_expert_activation_bwd_kernel") == (not is_at_once)
    # The gradient of x makes one more.
    assert names.count("tile_schedule_kernel") == 2


def launched(device: Device, call: Call) -> list[str]:
    """Return the names of the kernels that the call launches, without compiling them."""
    names: list[str] = []

    def listed(kernel: Any, *args: Any, **kwargs: Any) -> None:
        names.append(kernel.fn.__name__)

    with compiling_for(device), mock.patch.object(JITFunction, "run", listed):
        call()
    return names


def kernels_of_the_package() -> set[str]:
    """Return the names of all functions that a launcher launches."""
    names = set()
    for module in pkgutil.walk_packages(moe_ops.__path__, "moe_ops."):
        if module.name.endswith(".kernels") or module.name.startswith("moe_ops._triton.kernels."):
            names |= {
                n for n in vars(importlib.import_module(module.name)) if n.endswith("_kernel")
            }
    return names


@pytest.mark.parametrize(
    ("gpu", "mode"), [(gpu, m) for gpu in GPUS for m in (MODES if gpu == "sm_90" else EVERY_FLAG)]
)
def test_training(gpu, mode):
    """The dtype is bf16 or what the GPU has. sm_90 gets all combinations and transposed weights."""
    dtype = F16 if gpu == "sm_75" else BF16
    layouts = (False, True) if gpu == "sm_90" else (False,)
    named = {
        f"{name}{' transposed' if transposed else ''}": call
        for transposed in layouts
        for name, call in calls.grouped_gemm(
            SIZES["training"], dtype, transposed=transposed, **MODES[mode]
        ).items()
    }
    check(GPUS[gpu], named, stack_limit(gpu))


@pytest.mark.parametrize(
    ("gpu", "mode"),
    [(gpu, m) for gpu in GPUS for m in (experts_problem.MODES if gpu == "sm_90" else ("gpt-oss",))],
)
def test_training_of_experts(gpu, mode):
    dtype = F16 if gpu == "sm_75" else BF16
    flags = experts_problem.MODES[mode]
    sizes = {"training": (False, True), "decode-8": (False,), "uneven": (False,)}
    for size, layouts in sizes.items():
        for transposed in layouts:
            made = calls.experts(SIZES[size], dtype, transposed=transposed, **flags)
            named = {f"{size} {name} {transposed=}": call for name, call in made.items()}
            check(GPUS[gpu], named, stack_limit(gpu, size))


@gpus
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("ranks", [(16, 16), (0, 64), (64, 0)], ids=str)
def test_training_of_adapters(gpu, ranks, wide):
    dtype = F32 if wide else F16 if gpu == "sm_75" else BF16
    made = calls.adapted_experts(SIZES["training"], dtype, ranks=ranks)
    check(GPUS[gpu], made, stack_limit(gpu))


@pytest.mark.parametrize("limit", [None, 7.0])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu", "relu_squared", "swiglu_oai"])
def test_the_activations_backward_on_top_of_a_product_does_not_spill(activation, limit):
    made = calls.experts(SIZES["training"], BF16, activation=activation, activation_limit=limit)
    kernels = compile_all(GPUS["sm_90"], [made["backward"]])
    stack = {k.stack for k in kernels if k.kernel == "expert_down_bwd_pingpong_kernel"}
    assert stack == {0}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("limit", [None, 7.0])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "swiglu_oai"])
def test_the_up_projection_of_a_model_with_biases_does_not_spill(activation, limit, interleaved):
    """gpt-oss is such a model. The kernel for Hopper serves it without tuning."""
    made = calls.experts(
        SIZES["training"], BF16, activation=activation, activation_limit=limit,
        interleaved=interleaved, bias=True,
    )  # fmt: skip
    kernels = compile_all(GPUS["sm_90"], [made["inference"], made["forward"]])
    stack = [k.stack for k in kernels if k.kernel == "expert_up_pingpong_kernel"]
    assert stack == [0, 0]


@pytest.mark.parametrize("gpu", ["sm_90", "sm_100"])
def test_a_bias_keeps_nothing_from_being_loaded_ahead(gpu):
    """Triton pipelines no flattened loop whose sum begins with a bias. Ours has as many loads."""
    config = kernel_config(
        KernelConfigForward(
            BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, num_warps=8, num_stages=4, flatten=True,
            use_tma_load_w=True, use_tma_store=True,
        )
    )  # fmt: skip

    def loads(**flags: bool) -> int:
        made = calls.grouped_gemm(
            SIZES["training"], BF16, kernel_config=config, permute_x=True, **flags
        )
        kernels = compile_all(GPUS[gpu], [made["forward"]])
        (kernel,) = (k for k in kernels if k.kernel == "grouped_gemm_kernel")
        return len(
            re.findall(r"cp\.async\.c[ag]\.shared|cp\.async\.bulk\.tensor\.\dd\.shared", kernel.ptx)
        )

    assert loads(bias=True) == loads() >= 4


FEW_ROWS = ("decode-1", "decode-8", "decode-32", "prefill-64")


@pytest.mark.parametrize(("gpu", "size"), [(gpu, size) for gpu in GPUS for size in FEW_ROWS])
def test_quantised_weights(gpu, size):
    """GPUs without FP8 decode it too. sm_90 gets more dtypes."""
    dtypes = [BF16, F16, F32] if gpu == "sm_90" else [F16 if gpu == "sm_75" else BF16]
    for dtype, format in itertools.product(dtypes, FORMATS):
        flags = MODES["permute_x-weights-bias"]
        made = calls.quantized_gemm(SIZES[size], dtype, format, **flags)
        experts = calls.experts(SIZES[size], dtype, format=format)
        decodes = "_quantized_fwd_kernel" in launched(GPUS[gpu], made["forward"])
        # Before sm_80 a tile of it does not fit the registers.
        assert decodes == (gpu != "sm_75")
        named = {
            f"{format} {dtype} forward": made["forward"],
            f"{format} {dtype} experts": experts["inference"],
        }
        check(GPUS[gpu], named, stack_limit(gpu, size))


@pytest.mark.parametrize("gpu", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("format", FORMATS)
def test_quantised_weights_are_decoded_between_loads_and_tensor_cores(gpu, format):
    """Nothing goes through Triton's pipeline: it would copy each number of the table alone."""
    dtype = BF16 if format == "fp8_block" else torch.float16
    call = calls.quantized_gemm(SIZES["decode-8"], dtype, format)["forward"]
    (kernel,) = (k for k in compile_all(GPUS[gpu], [call]) if k.kernel == "_quantized_fwd_kernel")
    assert "mma.sync" in kernel.ptx
    assert "cp.async" not in kernel.ptx
    # A thread loads 16 bytes of codes at a time.
    assert re.search(r"ld\.global\S*\.v4\.b32", kernel.ptx)
    has_fp8 = GPUS[gpu].capability >= (8, 9)
    assert ("e4m3" in kernel.ptx) == (has_fp8 and format == "fp8_block")


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("format", FORMATS)
def test_one_row_of_quantised_weights_goes_through_no_barrier(gpu, format):
    """A step looks up and sums within a warp. Triton's pipeline waits once for what it brought."""
    dtype = BF16 if format == "fp8_block" else torch.float16
    call = calls.quantized_gemm(SIZES["decode-1"], dtype, format)["forward"]
    (kernel,) = (k for k in compile_all(GPUS[gpu], [call]) if k.kernel == "_quantized_fwd_kernel")
    assert kernel.warps == 1
    assert "mma" not in kernel.ptx
    # Rows of x, and where they are wide enough rows of codes.
    assert re.search(r"cp\.async\.c[ag]\.shared", kernel.ptx)
    assert "shfl" in kernel.ptx
    assert kernel.ptx.count("bar.sync") <= 6


def test_one_table_of_nested_scales_serves_both_projections():
    for format, tables in {"nf4": 1, "mxfp4": 0}.items():
        call = calls.experts(SIZES["decode-1"], BF16, format=format)["inference"]
        kernels = launched(GPUS["sm_90"], call)
        assert kernels.count("_quantized_fwd_kernel") == 2
        assert kernels.count("_dequantize_write_table_kernel") == tables


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("format", ["nf4", "mxfp4", "int4"])
@pytest.mark.parametrize("size", ["decode-1", "decode-8"])
def test_tensor_cores_take_numbers_of_four_bits_where_they_are_decoded(gpu, format, size):
    """It shows that K_WIDTH is that of this Triton: with another one each step has 96 shuffles more."""
    call = calls.quantized_gemm(SIZES[size], BF16, format)["forward"]
    (kernel,) = (k for k in compile_all(GPUS[gpu], [call]) if k.kernel == "_quantized_fwd_kernel")
    assert kernel.warps == 1
    # A step of 256 numbers of 16 rows, 16 at a time.
    assert kernel.ptx.count("mma.sync") == 16
    assert "cp.async" not in kernel.ptx
    # The rows of the product change their layout, once.
    assert kernel.ptx.count("bar.sync") <= 1
    assert re.search(r"ld\.global\S*\.v4\.b32", kernel.ptx)
    # A thread looks up 128 numbers a step. The rest are those that find a tile.
    looked_up = 128 if format == "nf4" else 0
    assert looked_up <= kernel.ptx.count("shfl.sync") <= looked_up + 32
    assert ("prmt" in kernel.ptx) or format == "nf4"


@pytest.mark.parametrize("gpu", TENSOR_CORES)
def test_tensor_cores_and_descriptors_are_used(gpu):
    device = GPUS[gpu]
    for name, call in calls.grouped_gemm(SIZES["training"], BF16).items():
        ptx = "".join(kernel.ptx for kernel in compile_all(device, [call]))
        assert TENSOR_CORES[gpu] in ptx, name
        assert ("cp.async.bulk.tensor" in ptx) == device.has_tma, name


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_dependent_launch(gpu):
    """It is used only if it is asked for and the GPU has it."""
    for follows in (False, True):
        config = KernelConfigForward(16, 64, 128, 4, 3, flatten=False, launch_pdl=follows)
        made = calls.grouped_gemm(SIZES["decode-8"], BF16, kernel_config=kernel_config(config))
        ptx = compile_all(GPUS[gpu], [made["forward"]])[-1].ptx
        for instruction in ("griddepcontrol.wait", "griddepcontrol.launch_dependents"):
            assert (instruction in ptx) == (follows and gpu == "sm_90")


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_kernels_of_few_tokens_begin_while_the_one_before_ends(gpu):
    """All four of a decoding step do, and none of a training step."""
    found = compile_all(GPUS[gpu], [calls.experts(SIZES["decode-1"], BF16)["inference"]])
    assert len(found) == 4
    for kernel in found:
        for instruction in ("griddepcontrol.wait", "griddepcontrol.launch_dependents"):
            assert kernel.ptx.count(instruction) == (gpu == "sm_90"), kernel.kernel
    found = compile_all(GPUS[gpu], [calls.experts(SIZES["training"], BF16)["inference"]])
    assert not any("griddepcontrol" in kernel.ptx for kernel in found)


@gpus
@pytest.mark.parametrize("size", [size for size in SIZES if size != "training"])
def test_sizes(gpu, size):
    # sm_90 gets both modes.
    for mode in EVERY_FLAG[0 if gpu == "sm_90" else 1 :]:
        made = calls.grouped_gemm(SIZES[size], F16, **MODES[mode])
        check(GPUS[gpu], {f"{mode} {n}": call for n, call in made.items()}, stack_limit(gpu, size))


@gpus
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_fp32(gpu, precision, monkeypatch):
    if precision == "tf32" and gpu == "sm_75":
        pytest.skip("no tf32 before compute capability 8.0")
    for module in (gemm, weight_gradient):
        monkeypatch.setattr(module, "precision", lambda dtype: precision)
    named = calls.grouped_gemm(SIZES["training"], F32, **MODES["permute_y-weights-bias"])
    check(GPUS[gpu], named, stack_limit(gpu))
    used = "tf32" in compile_all(GPUS[gpu], [named["forward"]])[-1].ptx
    assert used == (precision == "tf32")


TABLES = resources.files("moe_ops.configs") / "tables"
TABLE_NAMES = sorted(file.name for file in TABLES.iterdir()) if TABLES.is_dir() else []


@pytest.mark.parametrize("table", TABLE_NAMES)
def test_shipped_tables(table):
    """Each configuration of a table is compiled once, with the flags of its first problem."""
    configs = cache.parse_table((TABLES / table).read_text(encoding="utf-8"))
    device = GPUS[table.removesuffix(".json")]
    first: dict[tuple[str, KernelConfig], str] = {}
    for key, config in configs.items():
        kind, *_ = key.split()
        first.setdefault((f"{kind} gated" if key.endswith("gated") else kind, config), key)
    named: dict[str, Call] = {}
    for (name, config), key in first.items():
        kind, *_ = name.split()
        # kernel_config() writes it like this.
        named[key] = call_of(key, json.dumps({kind: config.to_dict()}))
    check(device, named, 0)


def call_of(key: str, config: str) -> Call:
    """Return the launch that a Problem.key describes."""
    kind, dtype, *sizes, rows = key.split()[:6]
    flags = key.split()[6:]
    num_experts, out_features, in_features = (int(size[1:]) for size in sizes)
    is_forward = kind == "forward"
    num_rows = int(rows.removeprefix("rows")) * num_experts
    if "gated" in flags:
        # These are the sizes of the up projection, or of the down projection's backward.
        up = (out_features, in_features) if is_forward else (2 * in_features, out_features)
        block = Sizes(num_rows, 1, num_experts, *up)
        made = calls.experts(block, getattr(torch, dtype), kernel_config=config)
        return made["forward" if is_forward else "backward"]
    made = calls.grouped_gemm(
        Sizes(num_rows, 1, num_experts, out_features, in_features),
        getattr(torch, dtype),
        permute_x=("gather" if is_forward else "scatter") in flags,
        permute_y=("scatter" if is_forward else "gather") in flags,
        weights="scale" in flags,
        bias="bias" in flags,
        transposed="transposed" in flags,
        kernel_config=config,
    )  # fmt: skip
    name = {"forward": "forward", "backward_dX": "dx", "backward_dW": "dw"}[kind]
    return made["dx-dots" if "dots" in flags else name]
