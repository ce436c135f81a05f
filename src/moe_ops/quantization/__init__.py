# SPDX-License-Identifier: Apache-2.0
"""Quantised weights of experts: formats, how to make and adopt them, and the module that stores one.

codes.py         how bytes become numbers
scales.py        how stored tensors become scales
format.py        codes, scales and blocks make a format
formats/         one file for each format, and the table of them
storage.py       a quantised weight as plain tensors
adopt.py, bitsandbytes.py   other libraries' tensors
weight.py        QuantizedWeight
quantize.py      quantize_weight
"""

from moe_ops.quantization.quantize import quantize_weight
from moe_ops.quantization.weight import QuantizedWeight

__all__ = ["QuantizedWeight", "quantize_weight"]
