"""What label noise and long tails promise, whatever the seed; test_noise_golden.py has the releases' own vectors."""

import random

import numpy as np
import pytest
from numpy.random import RandomState
from scipy.stats import chisquare, truncnorm

from common import noise

K, N = 10, 2000
IMAGES = RandomState(0).randint(0, 256, size=(N, 4, 4, 3), dtype=np.uint8)
LABELS = RandomState(1).permutation(np.arange(N) % K)  # balanced
POSTERIOR = RandomState(2).dirichlet(np.full(K, 0.3), size=N)
GENERATORS = (*noise.NOISE_TYPES, "imb", "sym")


def corrupt(name: str, labels: np.ndarray, rate: float, seed: int = 0) -> np.ndarray:
    """Labels [N] of K classes under any generator's noise."""
    if name in ("imb", "sym"):
        return noise.long_tailed_noise(name, labels, K, rate, random.Random(seed), RandomState(seed))
    if name == "superclass":  # of two superclasses; those of CIFAR-100 have tests of their own
        return noise.superclass(labels, rate, K, seed, superclasses=[c % 2 for c in range(K)])
    return noise.add_noise(name, labels, rate, K, seed, IMAGES[: labels.size], POSTERIOR[: labels.size])


# every generator --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GENERATORS)
def test_rate_0_returns_an_equal_copy(name):
    noisy = corrupt(name, LABELS, 0)
    assert np.array_equal(noisy, LABELS)
    assert not np.shares_memory(noisy, LABELS)


@pytest.mark.parametrize("rate", [float("nan"), -0.1, 1.1])
@pytest.mark.parametrize("name", GENERATORS)
def test_a_rate_outside_0_to_1_is_refused(name, rate):
    with pytest.raises(ValueError, match=f"rate.* {rate}$"):
        corrupt(name, LABELS, rate)


@pytest.mark.parametrize(
    ("labels", "offending"),
    [
        (np.arange(10).reshape(2, 5), r"\(2, 5\)"),
        (np.array(3), r"\(\)"),
        (np.arange(10.0), "float64"),
        (np.array([True, False]), "bool"),
        (np.array(["0", "1"]), "<U1"),
        (np.array([0, 3, 10]), r"\b10$"),
        (np.array([-1, 3, 9]), r"got -1\b"),
    ],
    ids=["2-D", "scalar", "float", "bool", "text", "too large", "negative"],
)
@pytest.mark.parametrize("name", GENERATORS)
def test_unfit_labels_are_refused(name, labels, offending):
    with pytest.raises(ValueError, match=f"labels must be .*{offending}"):
        corrupt(name, labels, 0.5)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_seed_decides_the_labels(name):
    noisy = corrupt(name, LABELS, 0.4, seed=1)
    assert np.array_equal(noisy, corrupt(name, LABELS, 0.4, seed=1))
    assert not np.array_equal(noisy, corrupt(name, LABELS, 0.4, seed=2))


@pytest.mark.parametrize("name", GENERATORS)
def test_the_input_is_left_alone_and_the_global_generators_too(name):
    labels, images = LABELS.copy(), IMAGES.copy()
    before = random.getstate(), np.random.get_state()
    noisy = corrupt(name, labels, 0.4)
    after = random.getstate(), np.random.get_state()
    assert not np.array_equal(noisy, LABELS)
    assert np.array_equal(labels, LABELS)
    assert np.array_equal(images, IMAGES)
    assert before[0] == after[0]
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
@pytest.mark.parametrize("name", GENERATORS)
def test_small_integer_types_give_the_same_int64_labels(name, dtype):
    noisy = corrupt(name, LABELS.astype(dtype), 0.4)
    assert noisy.dtype == np.int64
    assert np.array_equal(noisy, corrupt(name, LABELS, 0.4))


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("symmetric", 1),
        ("pairflip", 1),
        ("oneflip", 1 / K),
        ("symmetric_inclusive", (K - 1) / K),
        ("asymmetric", 1 / 2),
        ("superclass", 1),
        ("imb", 1),
        ("sym", 1),
        *((name, 1) for name in noise.POSTERIOR_TYPES),
    ],
)
def test_the_realised_rate_is_the_share_that_the_kind_of_noise_implies(name, share, rate):
    expected = share * rate
    deviation = np.sqrt(expected * (1 - expected) / N)
    assert noise.realised(LABELS, corrupt(name, LABELS, rate), K).rate == pytest.approx(
        expected, abs=4 * deviation
    )


@pytest.mark.parametrize(
    "use",
    [
        lambda: noise.add_noise("uniform", LABELS, 0.5, K, 0),
        lambda: noise.class_conditional("uniform", LABELS, 0.5, K, 0),
        lambda: noise.transition_matrix("uniform", 0.5, K),
        lambda: noise.long_tailed_noise("uniform", LABELS, K, 0.5, random.Random(0), RandomState(0)),
        lambda: noise.class_counts(N, K, "uniform", 0.5),
    ],
    ids=["add_noise", "class_conditional", "transition_matrix", "long_tailed_noise", "class_counts"],
)
def test_an_unknown_name_is_refused(use):
    with pytest.raises(ValueError, match=r"unknown .*'uniform': choose from"):
        use()


# from a posterior -------------------------------------------------------------------------------------------------------

# by hand: margins 0.5, 0 (class 0 is likelier than the label), 0.7 (classes 0 and 1 are equals), 1
FOUR = np.array([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [1, 0, 0]])
FOUR_LABELS = np.array([0, 1, 2, 0])
FACTORS = {
    "margin1": [0.375, 0.5, 0.255, 0],
    "margin2": [0.875, 1, 0.657, 0],
    "margin3": [1 - 0.875 / 3, 1, 0.489, 0],
}


@pytest.mark.parametrize("name", noise.MARGIN_TYPES)
def test_flip_probabilities_of_four_samples_by_hand(name):
    factors = np.array(FACTORS[name])
    found, targets = noise.margin_flips(name, FOUR_LABELS, 0.25, 3, FOUR)
    assert targets.tolist() == [1, 0, 0, 1]
    assert np.allclose(found, factors / factors.sum(), rtol=0, atol=1e-15)  # their sum is 0.25 x 4
    # a sum of 2.6: the second would be above 1, so the first and the third have 1.6
    found, _ = noise.margin_flips(name, FOUR_LABELS, 0.65, 3, FOUR)
    expected = [1.6 * factors[0] / factors[[0, 2]].sum(), 1, 1.6 * factors[2] / factors[[0, 2]].sum(), 0]
    assert np.allclose(found, expected, rtol=0, atol=1e-15)
    assert noise.margin_flips(name, FOUR_LABELS, 0.75, 3, FOUR)[0].tolist() == [1, 1, 1, 0]
    with pytest.raises(
        ValueError, match=r"^noise rate 0.8 cannot be reached: only 3 of 4 labels have a margin below 1$"
    ):
        noise.margin_flips(name, FOUR_LABELS, 0.8, 3, FOUR)


def test_noisy_labels_of_four_samples_by_hand():
    assert RandomState(0).random_sample(4).round(2).tolist() == [0.55, 0.72, 0.6, 0.54]
    # type I at 0.6: 0.83, 1, 0.57, 0
    assert noise.add_noise("margin1", FOUR_LABELS, 0.6, 3, 0, posterior=FOUR).tolist() == [1, 0, 2, 0]
    assert RandomState(0).randint(1, 3, size=2).tolist() == [1, 2]
    assert noise.add_noise("hard", FOUR_LABELS, 0.5, 3, 0, posterior=FOUR).tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize("rate", [0, 1e-6, 0.1, 0.35, 0.5, 0.7, 0.9, 0.999, 1])
@pytest.mark.parametrize("name", noise.MARGIN_TYPES)
@pytest.mark.parametrize("concentration", [0.05, 0.3, 3])
def test_the_mean_of_the_flip_probabilities_is_the_rate(name, rate, concentration):
    posterior = RandomState(3).dirichlet(np.full(K, concentration), size=N)
    assert posterior.max() < 1
    found, targets = noise.margin_flips(name, LABELS, rate, K, posterior)
    assert abs(found.mean() - rate) < 1e-12 and found.min() >= 0 and found.max() <= 1
    own, rows = posterior[np.arange(N), LABELS], np.arange(N)
    assert (targets != LABELS).all()
    ranked = posterior.argsort(axis=1)
    most, second = ranked[:, -1], ranked[:, -2]
    assert np.array_equal(targets, np.where(most == LABELS, second, most))
    margins = np.maximum(0, own - posterior[rows, targets])
    assert (np.diff(found[margins.argsort()]) <= 1e-15).all(), "the smaller the margin, the likelier"


@pytest.mark.parametrize("name", noise.MARGIN_TYPES)
def test_labels_flip_to_the_most_likely_other_class_and_the_more_seldom_the_larger_the_margin(name):
    posterior = RandomState(4).dirichlet(np.full(3, 0.5), size=30000)
    labels = posterior.argmax(axis=1)
    noisy = noise.add_noise(name, labels, 0.4, 3, 0, posterior=posterior)
    flips = noisy != labels
    assert np.array_equal(noisy[flips], posterior.argsort(axis=1)[flips, 1])
    probabilities, _ = noise.margin_flips(name, labels, 0.4, 3, posterior)
    order = np.sort(posterior, axis=1)
    thirds = np.array_split((order[:, 2] - order[:, 1]).argsort(), 3)
    shares = [flips[third].mean() for third in thirds]
    assert shares == pytest.approx([probabilities[third].mean() for third in thirds], abs=0.02)
    assert shares[0] > shares[1] + 0.03 and shares[1] > shares[2] + 0.03


def test_a_seed_gives_nested_flips_at_growing_rates():
    few, many = (noise.add_noise("margin1", LABELS, rate, K, 5, posterior=POSTERIOR) for rate in (0.2, 0.5))
    assert np.array_equal(many[few != LABELS], few[few != LABELS])


@pytest.mark.parametrize("rate", [0.1, 0.25, 1])
def test_hard_noise_takes_the_labels_of_the_smallest_posterior_and_draws_any_other_class(rate):
    noisy = corrupt("hard", LABELS, rate)
    own = POSTERIOR[np.arange(N), LABELS]
    changed = noisy != LABELS
    assert changed.sum() == rate * N
    assert own[changed].max() <= own[~changed].min(initial=1)
    offsets = (noisy - LABELS)[changed] % K
    assert chisquare(np.bincount(offsets, minlength=K)[1:]).pvalue > 0.01
    equal = np.full((N, K), 1 / K)
    assert np.flatnonzero(
        noise.add_noise("hard", LABELS, 0.1, K, 0, posterior=equal) != LABELS
    ).tolist() == list(range(200))


@pytest.mark.parametrize(
    ("posterior", "reason"),
    [
        (None, "noise needs a posterior"),
        (POSTERIOR[1:], rf"of shape \[{N}, {K}\], got float64 of shape \[{N - 1}, {K}\]"),
        (POSTERIOR[:, 1:], rf"got float64 of shape \[{N}, {K - 1}\]"),
        (POSTERIOR.ravel(), rf"got float64 of shape \[{N * K}\]"),
        (POSTERIOR > 0, "got bool"),
        (np.where(np.arange(N)[:, None] == 5, np.nan, POSTERIOR), "NaN or infinity, first in row 5"),
        (np.where(np.arange(N)[:, None] == 6, np.inf, POSTERIOR), "NaN or infinity, first in row 6"),
        (np.where(np.arange(N)[:, None] == 7, 0.2, POSTERIOR), "row 7 has the sum 2 "),
        (
            np.concatenate([POSTERIOR[:8], np.eye(K)[[0]] * 2 - np.eye(K)[[1]], POSTERIOR[9:]]),
            "row 8 .* minimum -1",
        ),
    ],
)
@pytest.mark.parametrize("name", ["margin1", "hard"])
def test_an_unfit_posterior_is_refused(name, posterior, reason):
    with pytest.raises(ValueError, match=reason):
        noise.add_noise(name, LABELS, 0.4, K, 0, posterior=posterior)


def test_one_class_is_too_few_and_rows_may_be_rounded():
    for name in noise.POSTERIOR_TYPES:
        with pytest.raises(ValueError, match=f"^{name} noise needs at least 2 classes, got 1$"):
            noise.add_noise(name, np.zeros(3, dtype=int), 0.5, 1, 0, posterior=np.ones((3, 1)))
        rounded = noise.add_noise(name, LABELS, 0.4, K, 0, posterior=POSTERIOR.round(4).astype(np.float16))
        assert np.mean(rounded == corrupt(name, LABELS, 0.4)) > 0.9
        assert noise.add_noise(name, LABELS[:0], 0.5, K, 0, posterior=POSTERIOR[:0]).shape == (0,)


# class-conditional ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_type", noise.CLASS_CONDITIONAL)
def test_realised_transitions_follow_the_transition_matrix(noise_type):
    labels = np.arange(20000) % K
    noisy = noise.class_conditional(noise_type, labels, 0.45, K, seed=0)
    expected = noise.transition_matrix(noise_type, 0.45, K)
    assert np.allclose(expected.sum(axis=1), 1)
    matrix = noise.realised(labels, noisy, K).matrix
    assert np.allclose(matrix, expected, atol=0.05)  # 2000 per class: more than 4 standard deviations
    assert (matrix[expected == 0] == 0).all()


@pytest.mark.parametrize(("noise_type", "kept"), [("symmetric", 0), ("symmetric_inclusive", 1 / K)])
def test_only_inclusive_symmetric_noise_may_draw_the_true_class(noise_type, kept):
    share = np.mean(corrupt(noise_type, LABELS, 1.0) == LABELS)
    assert share == pytest.approx(kept, abs=0.03 * (kept > 0))


@pytest.mark.parametrize("noise_type", ["symmetric", "oneflip"])
def test_too_few_classes_are_refused(noise_type):
    with pytest.raises(ValueError, match=f"{noise_type} .*got 1$"):
        noise.transition_matrix(noise_type, 0.5, 1)


@pytest.mark.parametrize("rate", [0.4, 1.0])
def test_asymmetric_noise_moves_labels_along_the_map_only(rate):
    noisy = corrupt("asymmetric", LABELS, rate)
    changed = noisy != LABELS
    assert all(
        noise.CIFAR10_LOOK_ALIKES[a] == b for a, b in zip(LABELS[changed], noisy[changed], strict=True)
    )
    moved = np.bincount(LABELS[changed], minlength=K)[list(noise.CIFAR10_LOOK_ALIKES)]
    assert moved / (N // K) == pytest.approx(rate, abs=0.15)


def test_asymmetric_noise_needs_the_classes_of_its_map():
    with pytest.raises(ValueError, match=r"needs 10 classes, got 5"):
        noise.asymmetric(np.arange(5), 1.0, num_classes=5, seed=0)
    labels = np.array([3, 11, 3, 11])
    found = noise.asymmetric(labels, 1.0, num_classes=13, seed=0, look_alikes={11: 12})
    assert found.tolist() == [3, 12, 3, 12]


def test_instance_noise_refuses_pixels_that_are_no_numbers():
    with pytest.raises(ValueError, match="NaN"):
        noise.instance_dependent(np.full((4, 3), np.nan), np.arange(4), 0.2, 4, seed=0)


@pytest.mark.parametrize(("total", "num_classes"), [(50, 0), (-1, 10)])
def test_class_counts_refuses_no_classes_and_a_negative_total(total, num_classes):
    with pytest.raises(ValueError, match=f"got {total} and {num_classes}"):
        noise.class_counts(total, num_classes, "exp", 0.1)


# instance-dependent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.97])
def test_instance_noise_flips_as_often_as_the_truncated_normal_says(rate):
    # near 0 and 1 the truncation moves the mean: 0.10 at rate 0.05
    expected = truncnorm.mean((0 - rate) / 0.1, (1 - rate) / 0.1, loc=rate, scale=0.1)
    deviation = np.sqrt(expected * (1 - expected) / N)
    noisy = corrupt("instance", LABELS, rate)
    assert noise.realised(LABELS, noisy, K).rate == pytest.approx(expected, abs=4 * deviation)


def test_instance_noise_mistakes_equal_images_for_the_same_class():
    labels = np.full(N, 3)
    same = noise.instance_dependent(np.repeat(IMAGES[:1], N, axis=0), labels, 0.5, K, seed=0)
    various = noise.instance_dependent(IMAGES, labels, 0.5, K, seed=0)
    largest = [
        np.bincount(noisy[noisy != 3], minlength=K).max() / (noisy != 3).sum() for noisy in (same, various)
    ]
    assert largest[0] > 0.95
    assert largest[1] < 0.9


def test_instance_noise_needs_an_image_per_label():
    with pytest.raises(ValueError, match="needs the images"):
        noise.add_noise("instance", LABELS, 0.5, K, 0)
    with pytest.raises(ValueError, match="7 and 2000"):
        noise.add_noise("instance", LABELS, 0.5, K, 0, images=IMAGES[:7])


# realised ---------------------------------------------------------------------------------------------------------------


def test_realised_rate_and_matrix_of_a_hand_made_example():
    clean, noisy = np.array([0, 0, 0, 0, 1, 3, 3, 3]), np.array([0, 0, 1, 3, 1, 3, 0, 0])
    rate, matrix = noise.realised(clean, noisy, 4)
    assert rate == 0.5
    expected = [
        [1 / 2, 1 / 4, 0, 1 / 4],
        [0, 1, 0, 0],
        [0, 0, 0, 0],
        [2 / 3, 0, 0, 1 / 3],
    ]  # class 2 is absent
    assert np.allclose(matrix, expected)
    assert matrix.dtype == np.float64


def test_realised_of_no_labels_is_rate_0():
    rate, matrix = noise.realised(np.array([], int), np.array([], int), 3)
    assert rate == 0
    assert np.array_equal(matrix, np.zeros((3, 3)))


def test_realised_refuses_vectors_of_different_length():
    with pytest.raises(ValueError, match="2000 and 1999"):
        noise.realised(LABELS, LABELS[1:], K)


# long tails -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_classes", "imb_factor", "total"),
    [
        *((10, 0.1, 20431), (10, 0.05, 17023), (10, 0.02, 13996), (10, 0.01, 12406)),
        *((100, 0.1, 19573), (100, 0.05, 15907), (100, 0.02, 12608), (100, 0.01, 10847)),
    ],
)
def test_exponential_class_counts_of_cifar(num_classes, imb_factor, total):
    counts = noise.class_counts(50000, num_classes, "exp", imb_factor)
    assert counts.sum() == total
    assert (np.diff(counts) <= 0).all()
    assert counts[0] == 50000 // num_classes
    assert counts[-1] == pytest.approx(counts[0] * imb_factor, abs=1)


def test_step_and_none_class_counts():
    assert noise.class_counts(60, 6, "step", 0.2).tolist() == [10, 10, 10, 2, 2, 2]
    assert noise.class_counts(60, 6, "none", 0.2).tolist() == [10] * 6


@pytest.mark.parametrize("imb_factor", [0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("imb_type", ["exp", "step", "none"])
def test_an_imbalance_outside_0_to_1_is_refused(imb_type, imb_factor):
    with pytest.raises(ValueError, match=f"imb_factor .*{imb_factor}$"):
        noise.class_counts(N, K, imb_type, imb_factor)


def test_web_class_budget_follows_the_rank_of_a_class_and_never_exceeds_what_it_has():
    # the curve is 10, 5, 2; the ranks are class 1, 0, 2
    assert noise.web_class_budget(np.array([4, 10, 3]), "exp", 0.25).tolist() == [4, 10, 2]


def test_long_tailed_keeps_the_counts_in_blocks_of_one_class():
    counts = noise.class_counts(N, K, "exp", 0.1)
    kept = noise.long_tailed(LABELS, counts, RandomState(0))
    assert np.array_equal(LABELS[kept], np.repeat(np.arange(K), counts))
    assert len(np.unique(kept)) == len(kept)
    assert np.array_equal(kept, noise.long_tailed(LABELS, counts, RandomState(0)))
    assert not np.array_equal(kept, noise.long_tailed(LABELS, counts, RandomState(1)))


def test_long_tailed_keeps_all_of_a_class_that_has_too_few():
    labels = np.array([2, 0, 0, 2, 2, 0])
    kept = noise.long_tailed(labels, np.array([2, 4, 9]), RandomState(0))
    assert labels[kept].tolist() == [0, 0, 2, 2, 2]
    assert sorted(kept[2:]) == [0, 3, 4]


@pytest.mark.parametrize("rate", [0.1, 0.333, 0.5, 1.0])
@pytest.mark.parametrize("mode", ["imb", "sym"])
def test_long_tailed_noise_changes_exactly_int_rate_n_labels(mode, rate):
    labels = np.repeat(np.arange(K), noise.class_counts(N, K, "exp", 0.1))
    assert (corrupt(mode, labels, rate) != labels).sum() == int(rate * len(labels))


@pytest.mark.parametrize("mode", ["imb", "sym"])
def test_long_tailed_noise_draws_the_other_classes_by_size_or_evenly(mode):
    counts = noise.class_counts(50000, K, "exp", 0.1)
    labels = np.repeat(np.arange(K), counts)
    noisy = corrupt(mode, labels, 0.5)
    weights = counts if mode == "imb" else np.ones(K)
    for c in range(K):
        drawn = np.delete(np.bincount(noisy[labels == c], minlength=K), c)
        expected = np.delete(weights, c) / np.delete(weights, c).sum() * drawn.sum()
        assert chisquare(drawn, expected).pvalue > 1e-4, f"class {c}"


@pytest.mark.parametrize("mode", ["imb", "sym"])
def test_long_tailed_noise_needs_a_second_class_to_flip_to(mode):
    with pytest.raises(ValueError, match="at least 2 classes"):
        corrupt(mode, np.full(20, 4), 0.5)
    assert corrupt(mode, np.full(20, 4), 0).tolist() == [4] * 20


@pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) >= "2.5.0",
    reason="NumPy 2.5 draws otherwise where a probability is 0",
)
@pytest.mark.parametrize("noise_type", noise.CLASS_CONDITIONAL)
@pytest.mark.parametrize("rate", [0.05, 0.2, 0.5, 0.55, 1.0])
@pytest.mark.parametrize("num_classes", [3, 10, 100])
def test_class_conditional_noise_equals_numpys_own_multinomial_label_by_label(noise_type, rate, num_classes):
    labels = np.random.RandomState(100).randint(0, num_classes, 1000)
    matrix, rng = noise.transition_matrix(noise_type, rate, num_classes), np.random.RandomState(3)
    plain = [rng.multinomial(1, matrix[label]).argmax() for label in labels]
    assert noise.class_conditional(noise_type, labels, rate, num_classes, seed=3).tolist() == plain


# superclasses -----------------------------------------------------------------------------------------------------------

FINE = RandomState(2).permutation(np.arange(10000) % 100)


def test_cifar100_has_20_superclasses_of_5_classes():
    superclasses = np.array(noise.CIFAR100_SUPERCLASSES)
    assert np.bincount(superclasses).tolist() == [5] * 20
    # aquatic mammals: beaver, dolphin, otter, seal, whale; trees: maple, oak, palm, pine, willow (Krizhevsky 2009)
    assert np.flatnonzero(superclasses == 0).tolist() == [4, 30, 55, 72, 95]
    assert np.flatnonzero(superclasses == 17).tolist() == [47, 52, 56, 59, 96]


@pytest.mark.parametrize("rate", [0.2, 0.4, 1.0])
def test_superclass_noise_changes_int_rate_n_labels_to_another_class_of_the_superclass(rate):
    noisy = noise.add_noise("superclass", FINE, rate, 100, seed=3)
    changed, of = noisy != FINE, np.array(noise.CIFAR100_SUPERCLASSES)
    assert changed.sum() == int(rate * len(FINE))
    assert np.array_equal(of[noisy], of[FINE])


def test_superclass_noise_draws_the_other_classes_alike():
    noisy = noise.superclass(FINE, 1.0, 100, seed=0)
    of = np.array(noise.CIFAR100_SUPERCLASSES)
    place = np.array([np.sum(of[:c] == of[c]) for c in range(100)])  # of a class among the five
    counts = np.bincount(5 * place[FINE] + place[noisy], minlength=25).reshape(5, 5)
    assert (np.diag(counts) == 0).all()
    assert chisquare(counts[~np.eye(5, dtype=bool)].reshape(5, 4), axis=1).pvalue.min() > 1e-3


@pytest.mark.parametrize(("rate", "seed"), [(0.4, 0), (0.4, 123), (0.999, 7), (1.0, 1)])
def test_superclass_noise_draws_in_the_order_of_a_plain_loop(rate, seed):
    labels, rng = FINE[:1500], random.Random(seed)
    order = list(range(len(labels)))
    rng.shuffle(order)
    corrupted, plain = set(order[: int(rate * len(labels))]), []
    for i, label in enumerate(labels.tolist()):
        own = noise.CIFAR100_SUPERCLASSES[label]
        others = [c for c in range(100) if noise.CIFAR100_SUPERCLASSES[c] == own and c != label]
        plain.append(rng.choice(others) if i in corrupted else label)
    assert noise.superclass(labels, rate, 100, seed).tolist() == plain


def test_a_class_alone_in_its_superclass_keeps_its_label():
    labels = np.array([0, 1, 2, 2, 0, 1])
    found = noise.superclass(labels, 1.0, 3, seed=0, superclasses=(0, 1, 0))
    assert found.tolist() == [2, 1, 0, 0, 2, 1]


def test_superclasses_of_another_number_of_classes_are_refused():
    with pytest.raises(ValueError, match="100 classes, got 10"):
        noise.add_noise("superclass", LABELS, 0.4, K, 0)
    with pytest.raises(ValueError, match="2 classes, got 3"):
        noise.superclass(np.arange(3), 0.4, 3, 0, superclasses=(0, 0))
