# SPDX-License-Identifier: Apache-2.0
"""Measurements of operators and networks, as `tools/benchmark.py` prints them."""

from ic_conv.benchmark.measure import Measurement, measure

__all__ = ["Measurement", "measure"]
