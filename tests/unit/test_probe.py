"""Probes agree with scikit-learn, and leave out only what their scores rule out."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from graftstack.sweep import probe
from graftstack.sweep.probe import MAX_DIM, PENALTIES, ProbeScore, hopeless, knn_accuracy, pooled, ridge_accuracy

Rows = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> Rows:
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(pixels).float(), torch.from_numpy(labels).long()
    return x[:1200], y[:1200], x[1200:], y[1200:]


def classes(rows: Rows, num_classes: int) -> Rows:
    train_x, train_y, val_x, val_y = rows
    train, val = train_y < num_classes, val_y < num_classes
    return train_x[train], train_y[train], val_x[val], val_y[val]


def reference_ridge(rows: Rows) -> float:
    """The same selection of the penalty and the same final fit, by scikit-learn."""
    train_x, train_y, val_x, val_y = (part.double().numpy() for part in rows)
    fitted, held_out = (part.numpy() for part in probe._held_out_rows(len(train_x)))

    def accuracy(share: float, fit: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
        model = make_pipeline(StandardScaler(), RidgeClassifier(alpha=share * len(fit), solver="cholesky"))
        return float(model.fit(train_x[fit], train_y[fit]).score(x, y))

    best = max(reversed(PENALTIES), key=lambda share: accuracy(share, fitted, train_x[held_out], train_y[held_out]))
    return accuracy(best, np.arange(len(train_x)), val_x, val_y)


@pytest.mark.parametrize("num_rows", [1200, 300, 50])
@pytest.mark.parametrize("num_classes", [2, 10])
def test_ridge_is_scikit_learns_with_more_rows_than_features_and_with_fewer(
    digits: Rows, num_classes: int, num_rows: int
) -> None:
    train_x, train_y, val_x, val_y = classes(digits, num_classes)
    rows = train_x[:num_rows], train_y[:num_rows], val_x, val_y
    assert ridge_accuracy(*rows, num_classes) == pytest.approx(reference_ridge(rows), abs=1.5 / len(val_y))


def test_ridge_doesnt_mind_how_features_are_scaled_and_shifted(digits: Rows) -> None:
    train_x, train_y, val_x, val_y = digits
    scale = torch.logspace(-3, 3, train_x.shape[1])
    moved = ridge_accuracy(train_x * scale + 5, train_y, val_x * scale + 5, val_y, 10)
    assert moved == pytest.approx(ridge_accuracy(*digits, 10), abs=0.005)


def test_the_validation_rows_have_no_say_in_the_fit(digits: Rows) -> None:
    train_x, train_y, val_x, val_y = digits
    each = [ridge_accuracy(train_x, train_y, val_x[[row]], val_y[[row]], 10) for row in range(50)]
    assert np.mean(each) == pytest.approx(ridge_accuracy(train_x, train_y, val_x[:50], val_y[:50], 10))


@pytest.mark.parametrize("num_neighbors", [1, 5, 20])
def test_neighbours_vote_as_in_scikit_learn(digits: Rows, num_neighbors: int) -> None:
    train_x, train_y, val_x, val_y = digits
    reference = KNeighborsClassifier(num_neighbors, metric="cosine", weights=lambda far: np.exp((1 - far) / 0.07))
    expected = reference.fit(train_x, train_y).score(val_x, val_y)
    found = knn_accuracy(*digits, 10, num_neighbors=num_neighbors)
    assert found == pytest.approx(expected, abs=1.5 / len(val_y))


def test_few_rows_are_enough(digits: Rows) -> None:
    train_x, train_y, val_x, val_y = digits
    for num_rows in (1, 2, 4, 7):
        few = train_x[:num_rows], train_y[:num_rows], val_x, val_y
        assert 0.0 < ridge_accuracy(*few, 10) < 1.0
        assert 0.0 < knn_accuracy(*few, 10) < 1.0


def test_features_that_say_nothing_score_like_a_guess(digits: Rows) -> None:
    train_x, train_y, val_x, val_y = digits
    constant = torch.full_like(train_x, 0.1), train_y, torch.full_like(val_x, 0.1), val_y
    assert ridge_accuracy(*constant, 10) < 0.2
    noise = torch.randn(train_x.shape, generator=torch.Generator().manual_seed(0))
    assert ridge_accuracy(noise, train_y, noise[: len(val_y)], val_y, 10) < 0.2
    assert knn_accuracy(noise, train_y, noise[: len(val_y)], val_y, 10) < 0.2


def test_features_that_arent_finite_score_nothing(digits: Rows) -> None:
    train_x, train_y, val_x, val_y = digits
    broken = train_x.clone()
    broken[3, 3] = float("nan")
    assert ridge_accuracy(broken, train_y, val_x, val_y, 10) == 0.0
    assert knn_accuracy(broken, train_y, val_x, val_y, 10) == 0.0


def test_maps_tokens_and_vectors_become_vectors() -> None:
    maps = torch.randn(3, 8, 5, 5)
    torch.testing.assert_close(pooled(maps), maps.mean(dim=(2, 3)))
    torch.testing.assert_close(pooled(maps.permute(0, 2, 3, 1)), maps.mean(dim=(2, 3)))
    tokens = torch.randn(3, 7, 16).bfloat16()
    torch.testing.assert_close(pooled(tokens), tokens.float().mean(dim=1))
    vectors = torch.randn(3, MAX_DIM)
    assert torch.equal(pooled(vectors), vectors)


def test_long_vectors_are_shortened_alike_in_every_batch_and_keep_their_angles() -> None:
    vectors = torch.randn(40, 9000, generator=torch.Generator().manual_seed(0)) + 0.5
    short = pooled(vectors)
    assert short.shape == (40, MAX_DIM)
    torch.testing.assert_close(torch.cat([pooled(vectors[:7]), pooled(vectors[7:])]), short)
    exact, kept = (torch.nn.functional.normalize(x, dim=1) for x in (vectors, short))
    assert (exact @ exact.T - kept @ kept.T).abs().max() < 0.15


def scores(backbone: str, *accuracies: float) -> list[ProbeScore]:
    """The scores of boundaries 0, 1, ...; ridge finds what neighbours don't."""
    return [ProbeScore(backbone, depth, accuracy, accuracy - 0.3) for depth, accuracy in enumerate(accuracies)]


def test_a_depth_that_loses_what_shallower_features_have_is_hopeless() -> None:
    found = hopeless(scores("resnet18", 0.3, 0.8, 0.75, 0.5), margin=0.1)
    assert found == {
        ("resnet18", 3): "features at freeze_depth=3 score 0.500, those at freeze_depth=1 0.800: "
        "more than prune_margin=0.1 better"
    }


def test_a_shallow_depth_is_never_hopeless_for_what_deeper_ones_know() -> None:
    assert hopeless(scores("resnet18", 0.1, 0.2, 0.5, 0.9), margin=0.1) == {}


def test_what_either_probe_finds_counts() -> None:
    found = [ProbeScore("vit", 0, ridge=0.8, knn=0.2), ProbeScore("vit", 1, ridge=0.2, knn=0.78)]
    assert hopeless(found, margin=0.1) == {}


def test_a_backbone_far_behind_is_hopeless_at_every_depth() -> None:
    found = hopeless([*scores("far", 0.3, 0.5), *scores("near", 0.3, 0.7), *scores("best", 0.3, 0.9)], margin=0.15)
    assert found.keys() == {("far", 0), ("far", 1)}
    assert set(found.values()) == {
        "features of far score 0.500 at best, those of best at freeze_depth=1 0.900: "
        "more than twice prune_margin=0.15 better"
    }


def test_the_order_of_the_scores_doesnt_matter() -> None:
    all_scores = [*scores("a", 0.3, 0.9, 0.4), *scores("b", 0.3, 0.4)]
    assert hopeless(all_scores[::-1], margin=0.1) == hopeless(all_scores, margin=0.1)
    assert len(hopeless(all_scores, margin=0.1)) == 3


@pytest.mark.parametrize("seed", range(50))
def test_the_best_is_never_left_out(seed: int) -> None:
    draw = np.random.default_rng(seed)
    found = [ProbeScore(name, depth, *draw.random(2)) for name in "abc" for depth in range(5)]
    best = max(found, key=lambda score: score.best)
    for margin in (0.0, 0.1, 1.0):
        assert (best.backbone, best.depth) not in hopeless(found, margin=margin)
    assert hopeless([], margin=0.1) == {}
