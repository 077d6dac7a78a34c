"""Scores of masks in validation: each study by itself, by hand; what nobody outlined counts in none."""

import math

import numpy as np
import pytest
import torch

from draf_dist.models.link import Link
from draf_dist.models.streamed import streamed
from draf_dist.schema.batch import SegmentationTarget
from draf_dist.schema.label import IGNORED
from draf_dist.training.mask_scores import Columns, mask_columns, of_masks, study_scores

# Two passes over four voxels of three structures, which agree on which is most probable, by voxel 0, 1, 1, 2.
FIRST = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.3, 0.5, 0.2], [0.1, 0.3, 0.6]])
SECOND = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.7, 0.2], [0.3, 0.1, 0.6]])
MEAN = (FIRST + SECOND) / 2


def columns(mask: list[list[int]], observed: list[bool] | None = None, weight: list[float] | None = None) -> Columns:
    rows = len(mask)
    passes = [probability.log().T.expand(rows, 3, 4).reshape(rows, 3, 2, 2) for probability in (FIRST, SECOND)]
    target = SegmentationTarget(torch.tensor(mask).view(rows, 2, 2), torch.tensor(observed or [True] * rows))
    found = streamed(passes, Link(exclusive=True))
    scores = study_scores(found, target, torch.tensor(weight or [1.0] * rows), torch.arange(rows))
    return mask_columns(scores, 3, torch.device("cpu"))


def test_a_study_is_scored_by_hand() -> None:
    nll, dice, _ = columns([[0, 1, 2, 2]])
    expected = -sum(math.log(MEAN[voxel, truth]) for voxel, truth in enumerate((0, 1, 2, 2))) / 4
    assert nll.tolist() == pytest.approx([expected])
    # Structure 1: one voxel of two seen and one true. Structure 2: one voxel of one seen and two true.
    assert dice.tolist() == [[pytest.approx(2 / 3), pytest.approx(2 / 3)]]


def test_errors_are_found_by_the_uncertainty_of_each_kind() -> None:
    _, _, auroc = columns([[0, 1, 2, 2]])
    # The third voxel alone is wrong: the entropy of its mean is the largest but for one, its variance the largest along with two.
    entropy = -(MEAN * MEAN.log()).sum(1)
    variance = ((FIRST - SECOND) / 2).square().sum(1)
    for found, values in zip(auroc[0].tolist(), (entropy, variance), strict=True):
        wrong, right = values[2], values[[0, 1, 3]]
        by_hand = ((wrong > right + 1e-4).float() + 0.5 * ((wrong - right).abs() <= 1e-4)).mean().item()
        assert found == pytest.approx(by_hand, abs=1e-6)


def test_voxels_of_which_nobody_says_what_they_are_count_in_no_score() -> None:
    nll, dice, auroc = columns([[0, 1, IGNORED, 2]])
    assert nll.tolist() == pytest.approx([-(math.log(MEAN[0, 0]) + math.log(MEAN[1, 1]) + math.log(MEAN[3, 2])) / 3])
    assert dice.tolist() == [[1.0, 1.0]]
    assert auroc.isnan().all()


def test_studies_without_a_mask_an_image_or_a_known_voxel_are_left_out() -> None:
    mask = [[0, 1, 2, 2], [0, 0, 0, 0], [0, 1, 1, 2], [IGNORED] * 4]
    found = columns(mask, [True, False, True, True], [1.0, 1.0, 0.0, 1.0])
    alone = columns(mask[:1])
    assert all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(found, alone, strict=True))
    none = columns(mask, [False] * 4)
    assert [tuple(part.shape) for part in none] == [(0,), (0, 2), (0, 2)]


def test_numbers_are_means_over_studies_of_what_is_defined() -> None:
    nll, dice = np.array([0.2, 0.4]), np.array([[1.0, np.nan], [0.5, 0.0]])
    auroc = np.array([[np.nan, 0.6], [0.9, 0.8]])
    assert of_masks([nll, dice, auroc]) == pytest.approx(
        {"nll": 0.3, "dice": 0.625, "dice_1": 0.75, "dice_2": 0.0, "error_auroc": 0.9, "error_auroc_epistemic": 0.7}
    )
    assert set(of_masks([nll, dice[:, :1], auroc])) == {"nll", "dice", "error_auroc", "error_auroc_epistemic"}
