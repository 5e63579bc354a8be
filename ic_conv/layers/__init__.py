# SPDX-License-Identifier: Apache-2.0
"""Layers whose parts have dilations of their own."""

from ic_conv.layers.ic_conv2d import ICConv2d

__all__ = ["ICConv2d"]
