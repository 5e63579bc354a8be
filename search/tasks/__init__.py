# SPDX-License-Identifier: Apache-2.0
"""What a supernet is trained for: centre heat maps (detection-like) or classification."""

from search.tasks.base import Task
from search.tasks.classification import Classification
from search.tasks.detection import Detections, average_precision
from search.tasks.heatmap import CenterHeatmap
from search.tasks.wrap import wrap

__all__ = ["CenterHeatmap", "Classification", "Detections", "Task", "average_precision", "wrap"]
