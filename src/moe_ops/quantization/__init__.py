# SPDX-License-Identifier: Apache-2.0
"""Quantised weights of experts.

codes.py    how bytes become numbers
scales.py   how stored tensors become scales
format.py   codes, scales and blocks make a format
formats/    one file for each format, and the table of them
packed.py   a quantised weight as plain tensors
"""
