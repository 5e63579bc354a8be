# SPDX-License-Identifier: Apache-2.0
"""The head's losses equal the definition; every kind of test finds the same people."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("mmpose")
from mmengine.structures import InstanceData, PixelData
from mmpose.structures import PoseDataSample

from ic_conv.openmmlab.pose import TrainableAssociativeEmbedding, TrainableAssociativeEmbeddingHead
from tests.openmmlab.pose import reference
from tests.openmmlab.pose.test_codec import FLIPS, apart, codec, people, tag_maps

CODEC = {"type": "TrainableAssociativeEmbedding", "input_size": (96, 64), "heatmap_size": (24, 16)}


class PassingHead(TrainableAssociativeEmbeddingHead):
    """Takes the maps that a network would give as its features."""

    def forward(self, feats: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return feats


def head(**options: Any) -> PassingHead:
    tag_loss = {"type": "VectorizedAssociativeEmbeddingLoss", "loss_weight": 0.001}
    return PassingHead(8, 17, deconv_out_channels=None, tag_loss=tag_loss, decoder=CODEC, **options)


def sample(keypoints: np.ndarray, visible: np.ndarray, mask: np.ndarray | None = None) -> PoseDataSample:
    encoded = codec().encode(keypoints, visible)
    fields = {"heatmaps": torch.tensor(encoded["heatmaps"])}
    if mask is not None:
        fields["heatmap_mask"] = torch.tensor(mask)
    labels = InstanceData(keypoint_indices=torch.tensor(encoded["keypoint_indices"]))
    return PoseDataSample(
        gt_fields=PixelData(**fields), gt_instance_labels=labels, metainfo={"flip_indices": FLIPS}
    )


@pytest.mark.parametrize("counts", [(3, 1), (2, 0), (0, 0)])
def test_losses_equal_the_definition(counts: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    truth = [people(count, seed) for seed, count in enumerate(counts)]
    masks = rng.random((2, 1, 16, 24)) > 0.2
    heatmaps, tags = rng.random((2, 2, 17, 16, 24)).astype(np.float32)
    samples = [sample(*annotation, mask) for annotation, mask in zip(truth, masks, strict=True)]
    losses = head().loss((torch.tensor(heatmaps), torch.tensor(tags)), samples)

    targets, indices = zip(*(reference.targets(*annotation, (24, 16)) for annotation in truth), strict=True)
    pull, push = reference.tag_losses(tags, list(indices))
    expected = {
        "loss_kpt": reference.heatmap_loss(heatmaps, np.stack(targets), masks),
        "loss_pull": 0.001 * pull,
        "loss_push": 0.001 * push,
    }
    assert {key: loss.item() for key, loss in losses.items()} == pytest.approx(expected, abs=1e-6)


def test_the_mask_may_be_missing() -> None:
    maps = torch.zeros(1, 17, 16, 24)
    truth = people(2)
    expected = np.mean(codec().encode(*truth)["heatmaps"] ** 2)
    assert head().loss((maps, maps), [sample(*truth)])["loss_kpt"].item() == pytest.approx(expected)


def test_heatmaps_of_another_size_are_an_error() -> None:
    maps = torch.zeros(1, 17, 32, 48)
    with pytest.raises(ValueError, match=r"\(1, 17, 32, 48\) must have the targets' shape \(1, 17, 16, 24\)"):
        head().loss((maps, maps), [sample(*people(1))])


def maps_of(keypoints: np.ndarray, scale: float = 1) -> tuple[Tensor, Tensor]:
    """What a perfect network gives for the image at a scale."""
    size = (int(96 * scale), int(64 * scale))
    encoded = codec(size).encode((keypoints + 0.5) * scale - 0.5)
    tags = tag_maps(encoded["keypoint_indices"], (size[0] // 4, size[1] // 4))
    return torch.tensor(encoded["heatmaps"])[None], tags[None]


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("multiscale", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_every_kind_of_test_finds_the_same_people(flip: bool, multiscale: bool, restore: bool) -> None:
    keypoints = apart()
    mirrored = keypoints[:, FLIPS] * [-1, 1] + [95, 0]
    levels: list[Any] = []
    for scale in (1, 2, 0.5) if multiscale else (1,):
        level = maps_of(keypoints, scale)
        levels.append([level, maps_of(mirrored, scale)] if flip else level)
    test_cfg = {"flip_test": flip, "multiscale_test": multiscale, "restore_heatmap_size": restore}
    test_cfg["output_heatmaps"] = True
    metainfo = [PoseDataSample(metainfo={"flip_indices": FLIPS})]
    (found,), (maps,) = head().predict(levels if multiscale else levels[0], metainfo, test_cfg)
    places = found.keypoints[np.argsort(found.keypoints[:, :, 0].mean(1))]
    assert places.shape == keypoints.shape
    # scales see blobs of another size, and resizing rounds them off
    assert np.abs(places - keypoints).max() < (0.05 if not (multiscale or restore) else 1.2)
    assert maps.heatmaps.shape == ((17, 64, 96) if restore else (17, 16, 24))
    assert maps.tags.shape[0] == (34 if flip else 17)


def test_maps_of_the_flipped_image_are_flipped_back_joint_by_joint() -> None:
    level = torch.rand(2, 1, 17, 16, 24).unbind()
    mirrored = [maps[:, FLIPS].flip(-1) for maps in level]
    sample = PoseDataSample(metainfo={"flip_indices": FLIPS})
    _, (maps,) = head().predict((level, mirrored), [sample], {"flip_test": True, "output_heatmaps": True})
    torch.testing.assert_close(maps.heatmaps, level[0][0])
    torch.testing.assert_close(maps.tags, level[1][0].repeat(2, 1, 1))


def test_the_decoder_is_the_codec_as_it_is() -> None:
    built = TrainableAssociativeEmbeddingHead(8, 17, decoder=CODEC).decoder
    assert isinstance(built, TrainableAssociativeEmbedding) and built.heatmap_size == (24, 16)
