# SPDX-License-Identifier: Apache-2.0
"""The benchmark of expert parallelism on several ranks, and the costs that predict its times."""
