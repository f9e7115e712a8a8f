"""Splits against the published vectors and counts."""

from __future__ import annotations

import numpy as np
import pytest

from harness.splits import make_split
from harness.types import UserError

COCO = np.arange(118_287) + 1_000_000  # ids in file order stand for positions

LABELED = {
    1: (1174, 1175, 1174, 1174, 1175),
    2: (2329, 2346, 2342, 2337, 2343),
    5: (5764, 5772, 5756, 5766, 5762),
    10: (11285, 11261, 11234, 11262, 11235),
}


@pytest.mark.parametrize("percent", LABELED)
def test_stac_counts(percent: int) -> None:
    counts = tuple(len(make_split(COCO, percent, fold, "stac").labeled_ids) for fold in range(1, 6))
    assert counts == LABELED[percent]


def test_first_draws() -> None:
    stac = np.random.RandomState(1).choice(len(COCO), 1182)
    assert stac[:5].tolist() == [98539, 77708, 5192, 98047, 50057]
    assert np.isin(COCO[stac], make_split(COCO, 1, 1, "stac").labeled_ids).all()
    first = COCO[[105285, 107335, 49358, 65744, 101669]]
    assert np.isin(first, make_split(COCO, 0.01, 1, "soft_teacher").labeled_ids).all()
    assert np.random.RandomState(1).choice(len(COCO), 11, replace=False)[:5].tolist() == (first - 1_000_000).tolist()


def test_no_image() -> None:
    with pytest.raises(UserError, match="less than one"):
        make_split(range(80), 1)
