"""Label noise against vectors recorded from the authors' releases: equal to the last label."""

import random

import numpy as np
import pytest

from common import noise


@pytest.mark.parametrize("noise_type", noise.CLASS_CONDITIONAL)
def test_class_conditional_noise(golden, noise_type):
    for case in golden("me_momentum", f"noise_{noise_type}"):
        rate, num_classes = float(case["rate"]), int(case["num_classes"])
        noisy = noise.class_conditional(noise_type, case["clean"], rate, num_classes, int(case["seed"]))
        assert np.array_equal(noisy, case["noisy"]), case.name
        matrix = noise.transition_matrix(noise_type, rate, num_classes)
        assert np.allclose(matrix, case["transition"], atol=1e-15)
        realised = noise.realised(case["clean"], noisy, num_classes).rate
        assert realised == pytest.approx(float(case["realised_rate"]))


def test_instance_dependent_noise(golden):
    for case in golden("me_momentum", "noise_instance"):
        noisy = noise.instance_dependent(
            case["images"], case["clean"], float(case["rate"]), int(case["num_classes"]), int(case["seed"]),
            std=float(case["norm_std"]),
        )  # fmt: skip
        assert np.array_equal(noisy, case["noisy"]), case.name


def test_noise_at_benchmark_size(golden):
    for case in golden("me_momentum", "full"):
        size, num_classes = int(case["N"]), int(case["num_classes"])
        images = np.zeros((size, *case["image_shape"]), np.uint8)
        labels = np.arange(size) % num_classes
        noise_type, rate = case.description["noise_type"], float(case["rate"])
        noisy = noise.add_noise(noise_type, labels, rate, num_classes, int(case["seed"]), images)
        assert np.array_equal(noisy, case["noisy"]), case.name


def test_dividemix_noise(golden):
    names = {"sym": "symmetric_inclusive", "asym": "asymmetric"}
    for case in golden("sanm", "noise"):
        num_classes = 100 if case.description["dataset"] == "cifar100" else 10
        noise_type, rate = names[case.description["mode"]], float(case["noise_rate"])
        noisy = noise.add_noise(noise_type, case["clean_labels"], rate, num_classes, int(case["python_seed"]))
        assert np.array_equal(noisy, case["noisy_labels"]), case.name


def test_long_tailed_noise(golden):
    for case in golden("sfa", "ltnoise"):
        num_classes = int(case["num_classes"])
        python_rng, rng = random.Random(int(case["py_seed"])), np.random.RandomState(int(case["np_seed"]))
        kept = noise.long_tailed(case["source_labels"], case["class_counts"], rng)
        assert np.array_equal(kept, case["kept_index"]), case.name
        mode = "sym" if "offset_draws" in case.arrays else "imb"
        clean = case["source_labels"][kept]
        noisy = noise.long_tailed_noise(mode, clean, num_classes, float(case["noise_ratio"]), python_rng, rng)
        assert np.array_equal(noisy, case["noisy_label"]), case.name
        assert np.array_equal(np.bincount(noisy, minlength=num_classes), case["counts_after_noise"])


def columns(case, *names: str) -> zip:
    """The rows of a table whose columns are arrays of a case."""
    return zip(*(case[name] for name in names), strict=True)


def test_class_counts(golden):
    for case in golden("sfa", "class_counts"):
        rows = columns(case, "total", "num_classes", "imb_type", "imb_factor", "counts")
        for total, num_classes, imb_type, imb_factor, expected in rows:
            counts = noise.class_counts(int(total), int(num_classes), str(imb_type), float(imb_factor))
            given = expected >= 0
            assert np.array_equal(counts[: given.sum()], expected[given]), (case.name, imb_type, imb_factor)


def test_web_class_budget(golden):
    for case in golden("sfa", "web_class_budget"):
        rows = columns(case, "num_classes", "raw_count", "imb_type", "imb_factor", "budget")
        for num_classes, raw, imb_type, imb_factor, expected in rows:
            budget = noise.web_class_budget(raw[:num_classes], str(imb_type), float(imb_factor))
            assert np.array_equal(budget, expected[:num_classes]), (case.name, imb_type, imb_factor)
