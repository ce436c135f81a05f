# SPDX-License-Identifier: Apache-2.0
"""What tests and benchmarks share. Neither imports from the other.

The judges of numbers, which share no code with moe_ops:
    oracle            every op as plain loops in fp64, for small sizes
    reference         every op in fp64 on whole tensors, for any size; held against the oracle
    tolerances        the one table of how far a result may be off
    checks            comparisons: with the oracle, by norm, by row; errors that are alike everywhere

Arguments for calls:
    layouts           values in memory as ops must take them
    strategies        any op's arguments, drawn from its schema
    stored_weights    bytes of quantised weights, for strategies
    every_op          what is tested of every op: names, opcheck, calls with corrupt indices
    gemm_problem      grouped_gemm with gradients at any size, and their check
    experts_problem   fused_experts with gradients at any size, and its check
    quantised_checkpoints  tiny checkpoints as other quantisers save them
    quantized_problem layers of quantised experts, beside the same with plain weights
    boundaries        calls exactly at a boundary: of a tail, of a limit, of a chunk of rows
    masked_routing    routings with experts masked by -inf
    dropped_slots     the check that nobody reads the weights of dropped slots
    model_sizes       sizes of real models' experts
    problem_keys      problems of kernel configurations, written by the words of their keys

Blocks, layers and models:
    moe_block         a small MoE block made of the ops
    ep_ops            ep_dispatch and ep_combine on several ranks, held against the oracle
    ep_problem        an MoE layer on several ranks, beside the same in one process
    layer_models      one MoE block of each transformers model, and a step of it
    layers_problem    our layers on a GPU, and a step of each
    lora_problem      adapters, and a layer that has them
    peft_problem      tiny models with PEFT's adapters
    tiny_models       whole tiny models of transformers
    compat_problem    a call of compat's grouped_gemm
    compat_blocks     compat's blocks, and those of transformers that they stand for

What runs:
    ranks             checks on the ranks of a gloo group, in processes that tests share
    recorders         which ops run, and what they allocate
    largest_floats    how large the floating tensors are that ops make
    launches          which Triton kernels run on a GPU
    compiled          what would be launched on a GPU that is not there, compiled
    kernel_calls      calls of every Triton launcher on meta tensors
    interpreted       the mark of tests in Triton's interpreter
    fake_pools        ranks of one process whose interpreted kernels push rows to each other
    fast_interpreter  quick steps for Triton's interpreter
    on_device         samples on a GPU, and the memory that tests there share
    device_memory     bytes that tensors hold on a GPU
    tuning_fakes      a GPU that is not there, and a clock, for tuning
    pages             runs the Python blocks of a documentation page

Programs:
    corrupt_calls     ops with corrupt indices on a GPU
    guarded_calls     interpreted kernels with corrupt indices, between guard pages
    gpu_report        the report of a run of the GPU suite (gpu_recorder writes it)
    gpu_recorder      the pytest plugin that writes it
    code_digest       digests of code that see no comments, for the report
    import_closure    the modules that a run can load, for the report
    counts            the pytest plugin that counts what a run tested
    release           makes a release: version, op schemas, wheel and sdist
    distributions     builds a release's wheel and sdist, and checks them
    fresh_python      an environment that has everything but moe_ops
"""
