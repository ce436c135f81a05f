# SPDX-License-Identifier: Apache-2.0
"""How the kernels are configured: block sizes, pipelining, which copies the TMA engine makes.

kernel_config.py   the dataclasses that a caller writes, and their form as one string
choose.py          which configuration a launch gets: the caller's, a tuned, a shipped, a computed
tables/            what is shipped, a file for each GPU
cache.py           what was tuned on this machine, on disk
"""
