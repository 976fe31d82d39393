"""The cases recorded from the authors' code."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.random import RandomState
from PIL import Image
from torch import Tensor, nn

from common import noise
from common.datasets import pools
from common.gpu import policies
from common.gpu.device import Device
from common.gpu.policies import AutoAugmentDraws
from common.pretraining.simclr import SimCLR
from manifold_dividemix import losses, outliers
from manifold_dividemix.choices import Lambdas, removal_count, split_epochs
from manifold_dividemix.mixematch import Views, confident, guess_labels, mix, refine_labels, step_loss
from manifold_dividemix.networks import Network, make_encoder
from manifold_dividemix.outliers import kept_samples, knn_scores
from manifold_dividemix.selection import clean_probability, divide, normalised
from manifold_dividemix.training import all_logits, top_accuracy
from tests.manifold_dividemix.toy import names, sklearn_knn_scores, toy_from

PAPER = "manifold_dividemix"
CPU = Device(torch.device("cpu"), "fp32", "")


def parts(case) -> list[dict[str, np.ndarray]]:
    """The sub-cases a/..., b/... of a case, or the case itself."""
    letters = sorted({name.split("/")[0] for name in case.arrays if "/" in name})
    return [
        {name.split("/", 1)[1]: value for name, value in case.arrays.items() if name.startswith(f"{letter}/")}
        for letter in letters
    ] or [case.arrays]


def tensors(arrays, *wanted: str) -> list[Tensor]:
    return [torch.from_numpy(np.asarray(arrays[name])) for name in wanted]


def close(actual, expected, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    expected = torch.as_tensor(np.asarray(expected))
    actual = actual if isinstance(actual, Tensor) else torch.as_tensor(np.asarray(actual))
    torch.testing.assert_close(actual.detach().to(expected.dtype), expected, rtol=rtol, atol=atol)


# data and noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cifar_corruption", "cifar10_noise"])
def test_corruption_to_the_last_image_label_and_draw(golden, kind):
    for case in golden(PAPER, kind):
        noise_type = case.description.get("mode", "sym")
        for part in parts(case):
            clean, rng = part["clean_labels"].astype(np.int64), RandomState(noise.OPEN_SET_SEED)
            id_ratio, ood_ratio = float(part["id_ratio"]), float(part["ood_ratio"])
            chosen = noise.open_set(len(clean), ood_ratio, int(part["ood_pool_size"]), rng)
            assert np.array_equal(chosen.positions, part["ood_index"])
            assert np.array_equal(chosen.source, part["ood_source_row"])
            cached = RandomState()
            cached.set_state(rng.get_state())
            assert np.array_equal(cached.random_sample(3), part["next_numpy_uniforms_cached"])
            python = random.Random(int(part["py_seed"]))
            classes = int(clean.max()) + 1
            noisy = noise.in_distribution_noise(
                noise_type, clean, chosen.positions, id_ratio, ood_ratio, classes, rng, python
            )
            assert np.array_equal(noisy, part["noisy_labels"])
            assert np.array_equal(rng.random_sample(3), part["next_numpy_uniforms_fresh"])


def test_transition_matrix_noise(golden):
    for case in golden(PAPER, "asymmetric_noise"):
        rate = float(case["rate"])
        for name, ours in (
            ("100", noise.next_in_group(np.arange(100) // noise.BLOCK, rate)),
            ("10", case["matrix10"]),  # not a noise of ours: the draws alone
            ("10_uniform", noise.transition_matrix("symmetric", rate, 10)),
        ):
            assert np.allclose(ours, case[f"matrix{name}"], rtol=0, atol=1e-15)
            labels = case[f"labels{name.partition('_')[0]}"]
            drawn = noise.by_matrix(labels, ours, RandomState(int(case["random_state"])))
            assert np.array_equal(drawn, case[f"noisy{name}"]), (case.name, name)


def test_a_folder_of_photographs_as_pool(golden, tmp_path):
    for case in golden(PAPER, "places_pool"):
        file_names = case["names_sorted"].tolist()
        folder = tmp_path / case.name
        folder.mkdir()
        for number in RandomState(0).permutation(len(file_names)):  # the order in which files appear is none
            Image.fromarray(case[f"src_{number:03d}"]).save(folder / file_names[number], format="PNG")
        pool = pools.image_folder(folder)
        assert pool.size == int(case["n_files"])
        chosen = noise.open_set(50000, float(case["ood_ratio"]), pool.size, RandomState(noise.OPEN_SET_SEED))
        assert np.array_equal(chosen.positions, case["ood_index"])
        replaced = pools.resized(pool.take(chosen.source), (32, 32, 3))
        assert np.array_equal(replaced, case["replaced_images"]), case.name


SIGNED = ("shearX", "shearY", "translateX", "translateY", "color", "contrast", "sharpness", "brightness")


def test_auto_augment(golden):
    for case in golden(PAPER, "autoaugment"):
        image = torch.from_numpy(case["image"]).movedim(-1, -3)[None]
        for name in case.arrays:
            operation, _, rest = name.partition("_")
            level, _, sign = rest.partition("_")
            if sign not in ("pos", "neg"):
                continue
            magnitudes = policies.AUTO_AUGMENT_MAGNITUDES.get(operation, np.zeros(10))
            amount = float(magnitudes[int(level)])
            assert amount == pytest.approx(float(case[f"mag_{operation}_{level}"]), rel=1e-12)
            chosen = [(policies.AUTO_AUGMENT_OPERATIONS, operation, amount, 1 if sign == "pos" else -1)]
            made = policies.make_operations(chosen, image.shape[1:], image.device)
            ours = made.apply(image, np.zeros((1, 1), dtype=np.int64))
            assert torch.equal(ours[0].movedim(0, -1), torch.from_numpy(case[name])), (case.name, name)
        seeds = case["policy_python_seeds"].tolist()
        draws = [_drawn_policy(random.Random(seed)) for seed in seeds]
        draws = AutoAugmentDraws(*(torch.tensor(of) for of in zip(*draws, strict=True)))
        ours = policies.apply_auto_augment(image.expand(len(seeds), -1, -1, -1), draws)
        assert torch.equal(ours.movedim(1, -1), torch.from_numpy(case["policy_outputs"])), case.name


def _drawn_policy(rng: random.Random) -> tuple[int, list[bool], list[int]]:
    """What the release's policy draws from Python's generator for one image: sub-policy, which operations, signs."""
    number = rng.randint(0, len(policies.CIFAR10_POLICY) - 1)
    applied, signs = [], []
    for operation, probability, _ in policies.CIFAR10_POLICY[number]:
        applied.append(rng.random() < probability)
        signs.append(rng.choice([-1, 1]) if applied[-1] and operation in SIGNED else 1)
    return number, applied, signs


def test_listing_splits_into_labelled_and_unlabelled(golden):
    """How the lists are read is tested with the loader."""
    for case in golden(PAPER, "miniimagenet_listing"):
        clean, keep = torch.from_numpy(case["clean_prob"]), torch.from_numpy(case["keep"]).bool()
        # the case gives the flag, not the threshold: any between the two groups gives it
        flags = torch.from_numpy(case["pred_clean"])
        labelled, unlabelled = divide(torch.where(flags, 0.9, 0.1), keep, 0.3)
        assert labelled.tolist() == case["labelled_index"].tolist()
        assert unlabelled.tolist() == case["unlabelled_index"].tolist()
        close(clean[labelled], case["labelled_prob"])


# networks -------------------------------------------------------------------------------------------------------------


def grid(*shape: int) -> list[Tensor]:
    """The indices of each place, by dimension."""
    return torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")


def fixed_weights(network: nn.Module) -> nn.Module:
    """The closed-form weights of the case, in eval mode."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            outputs, inputs, height, width = module.weight.shape
            o, i, h, w = grid(*module.weight.shape)
            angle = 1.3 * o + 0.7 * i + 0.5 * h + 0.3 * w + outputs / 64
            module.weight.data = (math.sqrt(2 / (inputs * height * width)) * torch.sin(angle)).float()
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            (c,) = grid(module.num_features)
            module.weight.data = (1 + 0.1 * torch.cos(c)).float()
            module.bias.data = (0.05 * torch.sin(c)).float()
            module.running_mean = (0.1 * torch.sin(0.5 * c)).float()
            module.running_var = (1 + 0.2 * torch.cos(0.3 * c)).float()
        elif isinstance(module, nn.Linear):
            o, i = grid(*module.weight.shape)
            module.weight.data = (torch.cos(0.9 * o + 0.4 * i) / math.sqrt(module.in_features)).float()
            module.bias.data = (0.01 * o[:, 0]).float()
    return network.eval()


def relative(actual: Tensor, expected: np.ndarray) -> None:
    expected = torch.from_numpy(expected)
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-3


def size_of(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def test_network(golden):
    for case in golden(PAPER, "model_forward"):
        facts = case.description["facts"]
        classes = case["logits"].shape[1]
        network = fixed_weights(Network(make_encoder(), 512, classes))
        h = network(torch.from_numpy(case["x"]))
        relative(h, case["embedding"])
        relative(network.project(h), case["projection"])
        relative(network.classify(h), case["logits"])
        relative(network.project(h / 2), case["projection_of_half_embedding"])
        relative(network.classify(h / 2), case["logits_of_half_embedding"])
        ssl = fixed_weights(SimCLR(make_encoder(), 512, 128))
        relative(ssl(torch.from_numpy(case["x"])), case["ssl_output"])

        assert size_of(network.encoder) == facts["backbone_18_params"]
        assert sum(b.numel() for b in network.encoder.buffers()) == facts["backbone_18_buffers"]
        for classes_ in (10, 14, 100):
            expected = facts[f"classifier_18_{classes_}classes_params"]
            assert size_of(Network(make_encoder(), 512, classes_)) == expected
        assert size_of(make_encoder("resnet34")) == facts["backbone_34_params"]
        assert size_of(ssl) == facts["ssl_18_mlp_params"]
        assert len(network.state_dict()) == facts["state_tensor_count_classifier"]
        assert len(network.head()) == facts["head_group_tensors"]
        assert len(list(network.encoder.parameters())) == facts["backbone_group_tensors"]


# losses and schedules -------------------------------------------------------------------------------------------------


def test_symmetric_cross_entropy(golden):
    for case in golden(PAPER, "sce_loss"):
        for part in parts(case):
            logits, labels, targets = tensors(part, "logits", "labels", "soft_targets")
            logits.requires_grad_()
            hard = losses.symmetric_cross_entropy(logits, labels)
            close(hard, part["hard_each"])
            close(hard.mean(), part["hard_mean"])
            close(torch.autograd.grad(hard.mean(), logits)[0], part["grad_hard_mean"])
            soft = losses.soft_symmetric_cross_entropy(logits, targets)
            close(soft, part["soft_each"])
            close(soft.mean(), part["soft_mean"])
            close(torch.autograd.grad(soft.mean(), logits)[0], part["grad_soft_mean"])
            forward = losses.soft_cross_entropy(logits, targets)
            close(0.3 * forward + 2 * (soft - forward), part["soft_each_a0.3_b2"])


def test_warm_up_loss(golden):
    for case in golden(PAPER, "warmup_loss"):
        logits, labels, index = tensors(case, "logits", "labels", "index")
        each = losses.symmetric_cross_entropy(logits, labels)
        kept = torch.from_numpy(case["removed_flag"] == 0)[index]
        close(each, case["per_sample"])
        close(losses.warm_up_loss(each, kept, "sample", 1), case["loss_intended"])
        close(losses.warm_up_loss(each, kept, "batch", 1), case["loss_released"])


def test_semi_supervised_losses(golden):
    for case in golden(PAPER, "semi_loss"):
        for part in parts(case):
            of_x, of_u = (tensors(part, f"logits_{side}", f"targets_{side}", f"mask_{side}") for side in "xu")
            of_x[0].requires_grad_(), of_u[0].requires_grad_()
            loss_x, loss_u = losses.labelled_loss(*of_x), losses.unlabelled_loss(*of_u)
            close(loss_x, part["Lx"])
            close(loss_u, part["Lu"])
            grad_x, grad_u = torch.autograd.grad(loss_x + 3 * loss_u, [of_x[0], of_u[0]])
            close(grad_x, part["grad_logits_x"])
            close(grad_u, part["grad_logits_u_times3"])


def test_contrastive_loss(golden):
    for case in golden(PAPER, "supcon_loss"):
        for part in parts(case):
            features, labels, pairs = tensors(part, "features", "labels", "pair_mask")
            features.requires_grad_()
            temperature, (images, views) = float(part["temperature"]), features.shape[:2]
            factor = temperature / float(part["base_temperature"])
            log_p = losses.view_log_probabilities(features, temperature)

            def loss(pairs: Tensor, log_p=log_p, views=views) -> Tensor:
                """The mean over anchors of the mean over positives, by pairs of images [B, B]."""
                positive = pairs.to(log_p.dtype).repeat(views, views).fill_diagonal_(0)
                return -((positive * log_p).sum(dim=1) / positive.sum(dim=1)).mean()

            same = torch.eye(images)
            unsupervised = loss(same) if views > 2 else losses.contrastive_loss(features, temperature)
            close(factor * unsupervised, part["loss_unsup"])
            gradient = torch.autograd.grad(factor * unsupervised, features, retain_graph=True)[0]
            close(gradient, part["grad_unsup"], atol=1e-5)
            # the release's other forms, which training does not use
            close(factor * loss(same), part["loss_unsup"])
            close(factor * loss(labels[:, None] == labels), part["loss_labels"])
            close(factor * loss(pairs), part["loss_mask"])
            first = torch.eye(images).repeat(1, views).fill_diagonal_(0)
            each = (first * log_p[:images]).sum(dim=1) / first.sum(dim=1)
            close(-factor * each.mean(), part["loss_unsup_one"])


def test_ramp(golden):
    for case in golden(PAPER, "linear_rampup"):
        ours = [[losses.ramp_up(at, warm) for at in case["current"]] for warm in case["warmup"].tolist()]
        close(ours, case["value"])


def test_learning_rates(golden):
    for case in golden(PAPER, "cosine_lr"):
        for part in parts(case):
            epochs = int(part["epochs"])
            bases = float(part["base_head"]), float(part["base_backbone"])
            ours = [[losses.learning_rate(e, base, epochs) for base in bases] for e in range(epochs)]
            close(np.array(ours), part["lr"], atol=1e-12)


# outliers and split ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, outliers.CHUNK])
def test_outlier_scores_and_who_is_removed(chunk, golden, monkeypatch):
    monkeypatch.setattr(outliers, "CHUNK", chunk)
    for case in golden(PAPER, "knn_ood"):
        for letter in sorted({name.split("_")[0] for name in case.arrays}):
            features = torch.from_numpy(case[f"{letter}_features"])
            expected, top = torch.from_numpy(case[f"{letter}_scores"]), int(case[f"{letter}_top"])
            for scores in (knn_scores(features), sklearn_knn_scores(features)):
                torch.testing.assert_close(scores.double(), expected, rtol=0, atol=1e-5)
                removed = ~kept_samples(scores, top)
                assert removed.int().tolist() == case[f"{letter}_removed"].tolist(), (case.name, letter)


def test_removal_schedule(golden):
    for case in golden(PAPER, "removal_schedule"):
        for part in parts(case):
            epochs, size, ratio = int(part["epochs"]), int(part["n_samples"]), float(part["remove_ood"])
            schedule = int(part["warmup"]), int(part["interval"]), bool(part["clustering"])
            splits = split_epochs(epochs, *schedule)
            assert splits == part["split_epochs"].tolist()
            factor = 10 if str(part["script"]) == "cifar" else 1
            counts = [removal_count(e, size, ratio, factor, splits) for e in range(epochs)]
            assert counts == part["removed_at_epoch"].tolist()


def test_split(golden):
    for case in golden(PAPER, "gmm_split"):
        for part in parts(case):
            logits, labels = tensors(part, "logits", "labels")
            each = F.cross_entropy(logits, labels, reduction="none")
            close(normalised(each), part["norm_loss"])
            clean = clean_probability(each, seed=0)
            close(clean, part["clean_prob"], rtol=0, atol=2e-3)
            threshold, kept = float(part["threshold"]), torch.ones(len(labels), dtype=torch.bool)
            labelled, unlabelled = divide(clean, kept, threshold)
            chosen = torch.zeros(len(labels), dtype=torch.bool)
            chosen[labelled] = True
            assert sorted([*labelled.tolist(), *unlabelled.tolist()]) == list(range(len(labels)))
            sure = np.abs(part["clean_prob"] - threshold) > 2e-3
            assert sure.mean() > 0.9 and np.array_equal(chosen.numpy()[sure], part["labelled"][sure])


# a step, the test ------------------------------------------------------------------------------------------------------


def test_mixematch_step(golden):
    for case in golden(PAPER, "mixematch_step"):
        for part in parts(case):
            network = toy_from(part)
            x, u = (
                Views(
                    tuple(tensors(part, f"{side}_view1", f"{side}_view2")),
                    tuple(tensors(part, f"{side}_view3", f"{side}_view4")),
                )
                for side in "xu"
            )
            labels, clean, permutation = tensors(part, "labels", "clean_prob", "mix_perm")
            arg = {name[4:]: float(value) for name, value in part.items() if name.startswith("arg_")}
            temperature, threshold = arg["temperature"], arg["conf_threshold"]
            guessed = guess_labels(network, u.weak, temperature)
            refined = refine_labels(network, x.weak, labels, clean, temperature)
            close(guessed, part["out_targets_u"])
            close(refined, part["out_targets_x"])
            close(confident(guessed, threshold), part["out_conf_mask_u"])

            lam = float(part["mix_lambda"])
            close(mix(torch.cat([*x.strong, *u.strong]), lam, permutation), part["out_mixed_input"])
            targets = torch.cat([refined, refined, guessed, guessed])
            close(mix(targets, lam, permutation), part["out_mixed_target"])
            embeddings = torch.cat([network(view) for view in (*x.strong, *u.strong)])
            close(mix(embeddings, lam, permutation), part["out_mixed_embedding"])

            epoch, step, steps = (int(arg[n]) for n in ("epoch", "step_in_epoch", "steps_per_epoch"))
            ramp = losses.ramp_up(losses.position(epoch, step, steps, "released"), int(arg["warmup_epochs"]))
            close(ramp * arg["lambda_u"], part["out_ramped_lambda_u"])
            close(ramp * arg["lambda_ue"], part["out_ramped_lambda_ue"])
            loss = step_loss(
                network,
                (x, labels, clean),
                u,
                lambdas=Lambdas(*(arg[f"lambda_{name}"] for name in Lambdas._fields)),
                ramp=ramp,
                lam=lam,
                permutation=permutation,
                temperature=temperature,
                threshold=threshold,
            )
            expected = ("total", "Lx", "Lu", "Lxe", "Lue", "contrastive", "penalty")
            for ours, name in zip(loss, expected, strict=True):
                close(ours, part[f"out_{name}"], rtol=1e-5)
            close(losses.balance_penalty(torch.from_numpy(part["out_logits_input"])), part["out_penalty"])

            loss.total.backward()
            parameters = dict(network.named_parameters())
            graded = {t: o for t, o in names().items() if f"grad_{t}" in part}
            assert len(graded) == len(parameters)
            for theirs, ours in graded.items():
                close(parameters[ours].grad, part[f"grad_{theirs}"], rtol=1e-4, atol=1e-5)


def test_top_accuracy(golden):
    for case in golden(PAPER, "topk_accuracy"):
        logits, labels = tensors(case, "logits", "labels")
        for k in (1, 5):
            assert top_accuracy(logits, labels, k) == pytest.approx(float(case[f"top{k}"][0]), rel=1e-6)

        class Given(nn.Module):
            """Its images are embeddings, its embeddings logits."""

            def forward(self, images: Tensor) -> Tensor:
                return images

            classify = forward

        rows = torch.arange(len(logits))
        batches = [((logits[index],), index) for index in rows.split(5)]
        together = all_logits(Given(), batches, len(logits), logits.shape[1], CPU)
        assert top_accuracy(together, labels) == pytest.approx(float(case["top1_batched5"]), rel=1e-6)
