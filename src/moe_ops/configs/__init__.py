# SPDX-License-Identifier: Apache-2.0
"""Configure the kernels: block sizes, pipelining, and which copies TMA makes.

kernel_config.py   the dataclasses that a caller writes
kernel_string.py   the string that the ops take in their place
strict_json.py     a reader of JSON, for the string and for tables
device.py          the facts of a GPU
problem.py         one product, as a configuration sees it
specialize.py      the products that the kernels for Hopper compute
footprint.py       the shared memory that a configuration takes
heuristics.py      the rules that compute a configuration
choose.py          the configuration of a launch: the caller's, tuned, shipped or computed
tables/            the shipped configurations, a file for each architecture
cache.py           the configurations tuned on this machine, on disk
"""
