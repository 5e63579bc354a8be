# SPDX-License-Identifier: Apache-2.0
"""Inception convolution: layers and backbones that use dilation patterns."""

from ic_conv.pattern import DilationPattern, LayerPattern

__all__ = ["DilationPattern", "LayerPattern"]
