# SPDX-License-Identifier: Apache-2.0
"""How the kernels are configured: block sizes, pipelining, which copies the TMA engine makes.

kernel_config.py   the dataclasses that a caller writes
kernel_string.py   the string that the ops take in their place
strict_json.py     a reader of JSON, for the string and for tables
device.py          the facts of a GPU
problem.py         one product as a configuration sees it
specialize.py      which products the kernels for Hopper compute
footprint.py       the shared memory that a configuration takes
heuristics.py      a configuration by rules
choose.py          which configuration a launch gets: the caller's, a tuned, a shipped, a computed
tables/            what is shipped, a file for each GPU
cache.py           what was tuned on this machine, on disk
"""
