"""Mixtures of two Gaussians, against scikit-learn's."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture

from detectors.methods.mixture import fit_mixtures, thresholds


def random_scores(generator: np.random.Generator, kind: int) -> np.ndarray:
    """Uniform, skewed, of two heaps, or with many equal ones."""
    count = int(generator.integers(4, 101))
    if kind == 0:
        return generator.uniform(0.05, 1, count)
    if kind == 1:
        return generator.beta(2, 6, count) * 0.95 + 0.05
    if kind == 2:
        wrong = generator.random(count) < 0.7
        return np.where(wrong, generator.beta(2, 8, count), generator.beta(8, 2, count)) * 0.95 + 0.05
    return generator.choice([0.1, 0.2, 0.5, 0.9], count)


def of_sklearn(scores: np.ndarray) -> tuple[GaussianMixture, np.ndarray]:
    """Begun as the official code does: the random start is replaced by all that is given."""
    column = scores.astype(np.float64)[:, None]
    start = {"weights_init": [0.5, 0.5], "means_init": [[column.min()], [column.max()]], "init_params": "random"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of equal scores it says that they are
        return GaussianMixture(2, precisions_init=[[[1.0]], [[1.0]]], **start).fit(column), column


def test_a_thousand_random_vectors_are_fitted_as_by_scikit_learn():
    generator = np.random.default_rng(0)
    vectors = [random_scores(generator, number % 4).astype(np.float32) for number in range(1000)]
    scores = torch.zeros(len(vectors), 100)
    for row, vector in enumerate(vectors):
        places = generator.permutation(100)[: len(vector)]  # empty ones may lie anywhere
        places.sort()
        scores[row, places] = torch.from_numpy(vector)
    found, chosen = fit_mixtures(scores.double(), scores > 0), thresholds(scores)
    above = 0
    for row, vector in enumerate(vectors):
        theirs, column = of_sklearn(vector)
        np.testing.assert_allclose(found.means[row, :, 0], theirs.means_[:, 0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.variances[row, :, 0], theirs.covariances_[:, 0, 0], rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(found.weights[row, :, 0], theirs.weights_, rtol=1e-9, atol=1e-12)
        upper = theirs.predict(column) == 1
        above += upper.any()
        if upper.any():
            density = np.where(upper, theirs.score_samples(column), -np.inf)
            at = density[vector == float(chosen[row])].max()
            assert at == pytest.approx(density.max(), abs=1e-9)
        else:
            assert chosen[row] == 0
    assert above > 900


def test_a_threshold_is_a_score_of_the_upper_heap():
    low, high = [0.06, 0.08, 0.1, 0.12], [0.82, 0.86, 0.9]
    assert thresholds(torch.tensor([[*low, *high, 0.0]]))[0] in torch.tensor(high)


def test_few_or_equal_scores_give_no_threshold():
    scores = torch.tensor([[0.9, 0.1, 0.8, 0.0, 0.0], [0.0] * 5, [0.5] * 5, [0.9, 0.1, 0.85, 0.88, 0.0]])
    assert (thresholds(scores) > 0).tolist() == [False, False, False, True]


def test_groups_do_not_see_each_other():
    generator = np.random.default_rng(1)
    scores = torch.from_numpy(generator.uniform(0.05, 1, (6, 30)).astype(np.float32))
    alone = torch.cat([thresholds(row[None]) for row in scores])
    assert torch.equal(thresholds(scores), alone)
