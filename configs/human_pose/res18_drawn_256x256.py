# SPDX-License-Identifier: Apache-2.0

"""Bottom-up pose estimation with the plain ResNet-18, on a CPU."""

_base_ = "./_base_/ae_drawn_256x256.py"
