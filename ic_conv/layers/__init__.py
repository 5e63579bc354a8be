# SPDX-License-Identifier: Apache-2.0
"""Layers whose parts have dilations of their own."""

from ic_conv.layers.cvolution2d import CVolution2d
from ic_conv.layers.ic_conv2d import ICConv2d
from ic_conv.layers.involution2d import Involution2d

__all__ = ["CVolution2d", "ICConv2d", "Involution2d"]
