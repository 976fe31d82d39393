"""Small data sets made on the spot, in the layouts of Food-101N with Food-101, Clothing1M, mini-ImageNet, mini-WebVision with
ILSVRC12's validation images, and ImageNet 32x32.
"""

import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from common.datasets.clothing1m import CLASSES as CLOTHES
from common.datasets.file_lists import FileSplit

DISHES = ("apple_pie", "baby_back_ribs", "baklava", "beef_tartare", "beignets", "bibimbap", "waffles")
SIZE = (48, 40)  # width and height


def write_image(path: Path, label: int, rng: np.random.Generator, size: tuple[int, int] = SIZE) -> None:
    """A JPEG in the colour of its class, with a smooth pattern of its own."""
    angle = 2 * np.pi * label / 7 + np.array([0, 2, 4]) * np.pi / 3
    colour = 128 + 70 * np.cos(angle)
    pattern = rng.normal(0, 25, size=(5, 6, 3))
    coarse = np.clip(colour + pattern, 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)


def make_food101n(root: Path, classes=3, per_class=4, test_per_class=2, seed=0, size=SIZE) -> None:
    """Food-101N_release and food-101 below root. The first two images of each class are verified right and wrong."""
    rng = np.random.default_rng(seed)
    train, test = root / "Food-101N_release", root / "food-101"
    keys: dict[str, list[str]] = {"train": [], "test": []}
    for label, name in enumerate(DISHES[:classes]):
        for _ in range(per_class):
            keys["train"].append(f"{name}/{rng.bytes(16).hex()}.jpg")
            write_image(train / "images" / keys["train"][-1], label, rng, size)
        for number in range(test_per_class):
            keys["test"].append(f"{name}/{1000 + number}")
            write_image(test / "images" / f"{keys['test'][-1]}.jpg", label, rng, size)
    right, wrong = keys["train"][::per_class], keys["train"][1::per_class]
    head = "class_name/key\tverification_label"
    write_lines(train / "meta/classes.txt", ["class_name", *DISHES[:classes]])
    write_lines(train / "meta/imagelist.tsv", ["class_name/key", *keys["train"]])
    write_lines(train / "meta/verified_train.tsv", [head, *(f"{key}\t1" for key in right)])
    write_lines(train / "meta/verified_val.tsv", [head, *(f"{key}\t0" for key in wrong)])
    write_lines(test / "meta/classes.txt", list(DISHES[:classes]))
    write_lines(test / "meta/test.txt", keys["test"])


def make_clothing1m(root: Path, classes=3, per_class=4, clean_per_class=2, seed=0) -> None:
    """Clothing1M below root: per_class noisy images, and clean_per_class ones in each of the three clean lists.

    The first noisy image of each class has the label of the next class, and so has the noisy label of the first clean
    training image; the second clean training image has its right label as noisy label too.
    """
    rng = np.random.default_rng(seed)
    noisy, clean = [], []
    lists: dict[str, list[str]] = {
        part: [] for part in ("noisy_train", "clean_train", "clean_val", "clean_test")
    }
    for label in range(classes):
        for part, keys in lists.items():
            for number in range(per_class if part == "noisy_train" else clean_per_class):
                name = f"{rng.integers(10**9)},{rng.integers(10**9)}.jpg"
                key = f"images/{rng.integers(10)}/{rng.integers(100)}/{name}"
                write_image(root / key, label, rng)
                keys.append(key)
                wrong_or_right = (label + (number == 0)) % classes
                if part == "noisy_train" or (part == "clean_train" and number < 2):
                    noisy.append(f"{key} {wrong_or_right}")
                if part != "noisy_train":
                    clean.append(f"{key} {label}")
    for part, keys in lists.items():
        write_lines(root / f"{part}_key_list.txt", keys)
    write_lines(root / "noisy_label_kv.txt", noisy)
    write_lines(root / "clean_label_kv.txt", clean)
    write_lines(root / "category_names_eng.txt", list(CLOTHES))


def make_mini_imagenet(root: Path, classes=4, per_class=3, test_per_class=1, seed=0) -> None:
    """mini-ImageNet below root with the lists red 0.2 and blue 0.4: per_class training images of each class, of many sizes.

    In the red list the first image of each class is one of the web, which shows the next class; in the blue list the first
    image of each class has the label of the next class. The other images of the two lists are the same.
    """
    rng = np.random.default_rng(seed)
    lists: dict[str, list[str]] = {"red_noise_nl_0.2": [], "blue_noise_nl_0.4": [], "clean_validation": []}

    def image(folder: str, name: str, shown: int) -> str:
        width, height = (int(side) for side in rng.integers(24, 72, size=2))
        write_image(root / folder / name, shown, rng, (width, height))
        return name

    for label in range(classes):
        wrong = (label + 1) % classes
        clean = [image("all_images", f"n{label:08}_{number}.JPEG", label) for number in range(per_class)]
        of_web = image("all_images", f"{rng.bytes(5).hex()}.png", wrong)
        lists["red_noise_nl_0.2"] += [f"{name} {label}" for name in (of_web, *clean[1:])]
        lists["blue_noise_nl_0.4"] += [f"{clean[0]} {wrong}", *(f"{name} {label}" for name in clean[1:])]
        for number in range(test_per_class):
            name = image(f"validation/{label}", f"n{label:08}_{1000 + number}.JPEG", label)
            lists["clean_validation"].append(f"{name} {label}")
    for name, lines in lists.items():
        write_lines(root / "split" / name, lines)


def make_webvision(
    root: Path, classes=4, per_class=6, test_per_class=2, seed=0, size=SIZE, by_synset: bool = False
) -> None:
    """mini-WebVision below root: per_class training images, and test_per_class in WebVision's and in ILSVRC12's test images.

    The classes of the training list are mixed; the first image of each class shows the next class. Classes from 700 on stand in
    both lists, but none of their images is there. by_synset: ILSVRC12's folders are named by synset, whose order by name is not
    that of the class ids, and info/synsets.txt is there.
    """
    rng = np.random.default_rng(seed)
    train, test = ["google/q1401/beyond.jpg 700"], ["val000001.jpg 999"]
    synsets = [f"n{2000000 - 1000 * k:08}" for k in range(1000)]
    for number in range(per_class):
        for label in range(classes):
            path = f"google/q{2 * label + number % 2 + 1:04}/{rng.bytes(6).hex()}.jpg"
            write_image(root / path, (label + (number == 0)) % classes, rng, size)
            train.append(f"{path} {label}")
        train.append(f"google/q{1402 + number}/beyond.jpg {701 + number % 299}")
    for _ in range(test_per_class):
        for label in range(classes):
            name = f"val{len(test) + 1:06}.jpg"
            write_image(root / "val_images_256" / name, label, rng, size)
            test.append(f"{name} {label}")
            folder = root / "imagenet/val" / (synsets[label] if by_synset else str(label))
            write_image(folder / f"ILSVRC2012_val_{len(test):08}.JPEG", label, rng, size)
    write_lines(root / "info/train_filelist_google.txt", train)
    write_lines(root / "info/val_filelist.txt", test)
    if by_synset:
        write_lines(root / "info/synsets.txt", [f"{synset} a thing, or another" for synset in synsets])


def make_doubtful_webvision(root: Path, classes: int, per_class: int, test_per_class: int = 2) -> None:
    """make_webvision's with training images whose colours overlap: networks disagree, and selections change with the epochs."""
    make_webvision(root, classes, per_class, test_per_class)
    rng = np.random.default_rng(1)
    for path in image_files(root / "google"):
        colour = np.asarray(Image.open(path)).mean(axis=(0, 1))
        pattern = rng.normal(0, 30, size=3) + rng.normal(0, 60, size=(5, 6, 3))
        coarse = np.clip(128 + (colour - 128) / 2 + pattern, 0, 255).astype(np.uint8)
        Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC).save(path, quality=90)


def make_imagenet32(folder: Path, sizes=(3, 1, 4, 2, 5, 3, 6, 2, 4, 3), seed: int = 0) -> np.ndarray:
    """The ten training batches of ImageNet 32x32 with so many images each; returns all, uint8 [N, 32, 32, 3]."""
    images = np.random.RandomState(seed).randint(0, 256, size=(sum(sizes), 32, 32, 3), dtype=np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for number, own in enumerate(np.split(images, np.cumsum(sizes)[:-1]), start=1):
        content = {"data": imagenet32_rows(own), "labels": [1] * len(own), "mean": np.zeros(3072)}
        (folder / f"train_data_batch_{number}").write_bytes(pickle.dumps(content, protocol=2))
    return images


def imagenet32_rows(images: np.ndarray) -> np.ndarray:
    """uint8 [n, 32, 32, 3] as a batch file has them: uint8 [n, 3072], all red values first, then green, then blue."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write_lines(path: Path, lines: list[str]) -> None:
    """A text file of these lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file."""
    return path.read_text(encoding="utf-8").splitlines()


def labelled(split: FileSplit) -> list[tuple[str, int]]:
    """Path, relative to the split's folder, and label of each image."""
    return list(zip((path.decode() for path in split.paths.tolist()), split.labels.tolist(), strict=True))


def image_files(folder: Path) -> list[Path]:
    """All images below a folder, in order."""
    return sorted(folder.rglob("*.jpg"))


def plant(path: Path, kind: str) -> None:
    """Make of an image a missing, empty, truncated or no image at all; or the same grey, CMYK, palette or 16-bit picture."""
    content = path.read_bytes()
    damaged = {"empty": b"", "truncated": content[: len(content) // 2], "text": b"<html>gone</html>"}
    if kind == "missing":
        path.unlink()
    elif kind in damaged:
        path.write_bytes(damaged[kind])
    else:
        image = Image.open(path).convert({"grey": "L", "cmyk": "CMYK", "palette": "P"}[kind])
        image.save(path, format="PNG" if kind == "palette" else "JPEG")
