# SPDX-License-Identifier: Apache-2.0
"""Bottom-up pose estimation by associative embedding, trained and tested on MMPose 1.x."""

from ic_conv.openmmlab.pose.codec import TrainableAssociativeEmbedding
from ic_conv.openmmlab.pose.dataset import BottomupCocoDataset
from ic_conv.openmmlab.pose.estimator import BottomupPyramidEstimator
from ic_conv.openmmlab.pose.grouping import group_by_tags
from ic_conv.openmmlab.pose.head import TrainableAssociativeEmbeddingHead
from ic_conv.openmmlab.pose.losses import VectorizedAssociativeEmbeddingLoss
from ic_conv.openmmlab.pose.preprocessor import PyramidPreprocessor
from ic_conv.openmmlab.pose.transforms import BottomupPyramid, PackBottomupInputs, UnannotatedMask

__all__ = [
    "BottomupCocoDataset",
    "BottomupPyramid",
    "BottomupPyramidEstimator",
    "PackBottomupInputs",
    "PyramidPreprocessor",
    "TrainableAssociativeEmbedding",
    "TrainableAssociativeEmbeddingHead",
    "UnannotatedMask",
    "VectorizedAssociativeEmbeddingLoss",
    "group_by_tags",
]
