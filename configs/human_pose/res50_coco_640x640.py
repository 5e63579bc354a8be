# SPDX-License-Identifier: Apache-2.0

"""Bottom-up pose estimation with the plain ResNet-50."""

_base_ = "./_base_/ae_coco_640x640.py"
