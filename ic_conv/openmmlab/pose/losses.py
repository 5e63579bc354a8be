# SPDX-License-Identifier: Apache-2.0
"""The tag loss of associative embedding without a Python loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.registry import MODELS
from mmpose.models.losses import AssociativeEmbeddingLoss
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@MODELS.register_module()
class VectorizedAssociativeEmbeddingLoss(AssociativeEmbeddingLoss):
    """Pulls the tags of one person together and pushes those of different people apart.

    Per image, with m_n the mean tag of person n: ``pull = mean_n mean_k (t_nk - m_n)^2`` and
    ``push = push_loss_factor * mean_{n != p} exp(-(m_n - m_p)^2)``.
    MMPose's loss has the same gradient; its push counts each person paired with itself too, which adds the
    constant push_loss_factor / (N - 1).

    Dimension letters: B images, N people, K joints, L tag values per joint.

    Args:
        loss_weight: factor of both losses.
        push_loss_factor: further factor of the push loss.
        reduction: over the images of a batch: ``sum``, as MMPose 1.x, or ``mean``, as the published training.

    Raises:
        ValueError: another reduction.

    Source: Newell et al., Associative Embedding, NIPS 2017, equation 1.

    Example:
        >>> loss = VectorizedAssociativeEmbeddingLoss()
        >>> people = torch.tensor([[[0, 1], [3, 1]], [[5, 1], [6, 0]]])  # 2 people, 2 joints
        >>> pull, push = loss(torch.zeros(1, 2, 4, 4), [people])
    """

    def __init__(
        self, loss_weight: float = 1.0, push_loss_factor: float = 0.5, reduction: str = "sum"
    ) -> None:
        super().__init__(loss_weight, push_loss_factor)
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be sum or mean, got {reduction!r}")
        self.reduction = reduction

    def forward(self, tags: Tensor, keypoint_indices: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
        """The pull and the push loss of a batch.

        Args:
            tags: tag maps, (B, L*K, H, W).
            keypoint_indices: per image (N_b, K, 2) integers: place y*W+x, and whether it counts.
        """
        indices = pad_sequence(list(keypoint_indices), batch_first=True)  # padding people have no joints
        place, visible = indices[..., 0], indices[..., 1].to(tags.dtype)
        batch, people, joints = place.shape
        maps = tags.reshape(batch, -1, joints, tags.shape[-2] * tags.shape[-1])  # B, L, K, HW
        # B, L, K, N -> B, N, K, L
        joint_tags = maps.gather(3, place.mT[:, None].expand(-1, maps.shape[1], -1, -1)).permute(0, 3, 2, 1)

        weight = (visible / visible.sum(2, keepdim=True).clamp(min=1)).unsqueeze(-1)
        mean = (joint_tags * weight).sum(2)  # B, N, L
        spread = ((joint_tags - mean[:, :, None]) ** 2 * weight).sum(2).mean(2)  # B, N
        real = visible.any(2).to(tags.dtype)
        count = real.sum(1)
        pull = spread.sum(1) / count.clamp(min=1)

        distance = (mean[:, :, None] - mean[:, None]) ** 2  # B, N, N, L
        pairs = (
            real[:, :, None] * real[:, None] * (1 - torch.eye(people, dtype=tags.dtype, device=tags.device))
        )
        push = (torch.exp(-distance).sum(3) * pairs).sum((1, 2)) / (count * (count - 1)).clamp(min=1)

        scale = self.loss_weight / (batch if self.reduction == "mean" else 1)
        return pull.sum() * scale, push.sum() * scale * self.push_loss_factor
