"""Pools of OOD images: batches of ImageNet 32x32 in every form of pickle, folders of photographs, other data sets."""

import io
import os
import pickle
import re
import struct
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.datasets import pools
from tests.common.payload import Payload
from tests.common.small_file_data import imagenet32_rows, make_imagenet32
from tests.lines import message

RNG = np.random.RandomState(0)
IMAGES = RNG.randint(0, 256, size=(7, 32, 32, 3), dtype=np.uint8)


def taken(pool: pools.Pool, rows=None) -> np.ndarray:
    return np.stack(pool.take(np.arange(pool.size) if rows is None else np.array(rows)))


def of_numpy_1(content: bytes) -> bytes:
    """The pickle that NumPy 1 would have written: its modules were named otherwise."""
    if content[2:3] == b"\x95":  # protocol 4 on: a frame's length, which may be left out
        content = content[:2] + content[11:]
    content = content.replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray")
    content = content.replace(b"\x8c\x13numpy._core.numeric", b"\x8c\x12numpy.core.numeric")
    return content.replace(b"cnumpy._core.", b"cnumpy.core.")


def of_python_2(rows: np.ndarray, protocol: int) -> bytes:
    """A dictionary of the rows as Python 2 with NumPy 1 pickled it: keys and pixels alike are its str, bytes of no encoding."""

    def text(content: bytes) -> bytes:
        if protocol == 0:
            return b"S" + repr(content)[1:].encode() + b"\n"
        head = b"U" + bytes([len(content)]) if len(content) < 256 else b"T" + struct.pack("<i", len(content))
        return head + content

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt" + text(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + b"I0\nI1\ntR(I3\n" + text(b"|") + b"NNNI-1\nI-1\nI0\ntb"
    state = b"(I1\n(I%d\nI%d\nt" % rows.shape + dtype + b"I00\n" + text(rows.tobytes()) + b"tb"
    labels = text(b"labels") + b"(lI1\naI1000\na" + text(b"\xe9") + b"Nd."
    return (b"\x80\x02" if protocol == 2 else b"") + b"(" + text(b"data") + array + state + labels


ROWS = imagenet32_rows(IMAGES)
OF_NUMPY_1 = {"labels": np.ones(7), "data": ROWS, "first": np.int64(3)}
FORMS = {f"protocol {n}": pickle.dumps({"data": ROWS, "labels": [1] * 7}, n) for n in range(6)}
FORMS |= {f"protocol {n} of NumPy 1": of_numpy_1(pickle.dumps(OF_NUMPY_1, n)) for n in range(6)}
FORMS |= {f"protocol {n} of Python 2": of_python_2(ROWS, n) for n in (0, 2)}


@pytest.fixture
def official(tmp_path, monkeypatch) -> Path:
    """A folder of ten small batches, the fourth of which tests replace by IMAGES in some form."""
    make_imagenet32(tmp_path / "imagenet32")
    return tmp_path / "imagenet32"


@pytest.mark.parametrize("form", FORMS)
def test_batches_are_read_in_every_form_of_pickle(official, form):
    assert (b"numpy._core" in FORMS[form]) != (b"numpy.core" in FORMS[form]) == ("of" in form)
    (official / "train_data_batch_4").write_bytes(FORMS[form])
    assert np.array_equal(taken(pools.imagenet32(official), range(8, 15)), IMAGES)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("inside", [True, False], ids=["inside the dictionary", "alone"])
@pytest.mark.parametrize(
    ("call", "named"),
    [((os.system, "touch mark"), r"posix\.system"), ((io.open, "mark", "w"), r"_?io\.open")],
)
def test_other_pickles_are_refused_and_not_run(
    official, tmp_path, monkeypatch, call, named, inside, protocol
):
    monkeypatch.chdir(tmp_path)
    mark, path = tmp_path / "mark", official / "train_data_batch_7"
    content = pickle.dumps({"data": ROWS, "labels": Payload(*call)} if inside else Payload(*call), protocol)
    path.write_bytes(content)
    text = message(pools.imagenet32, official)
    assert text.startswith(f"{path} is damaged, or no batch of ImageNet 32x32 (")
    assert re.search(rf"it names {named}, which no batch does\): get it again$", text)
    assert not mark.exists()
    pickle.loads(content)  # it would have been run
    assert mark.exists()


def naming(module: str, name: str) -> bytes:
    """A pickle of a function."""
    return b"\x80\x04" + b"".join(b"\x8c" + bytes([len(w)]) + w.encode() for w in (module, name)) + b"\x93."


WHOLE = FORMS["protocol 2"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "EOFError"),
        (WHOLE[:300], "truncated"),
        (WHOLE[:-1], "EOFError"),
        (b"<html>not found</html>", "UnpicklingError"),
        (pickle.dumps([ROWS]), "TypeError"),
        (pickle.dumps({"labels": [1]}), "KeyError: 'data'"),
        (pickle.dumps({"data": [[0] * 3072]}), "no attribute 'dtype'"),
        (pickle.dumps({"data": np.zeros((2, 3071), np.uint8)}), r"uint8 \[2, 3071\], expected uint8 \[n, 3072\]"),
        (pickle.dumps({"data": np.zeros(3072, np.uint8)}), r"uint8 \[3072\], expected"),
        (pickle.dumps({"data": np.zeros((2, 3, 32, 32), np.uint8)}), r"uint8 \[2, 3, 32, 32\], expected"),
        (pickle.dumps({"data": np.zeros((2, 3072))}), r"float64 \[2, 3072\], expected"),
        (b"\x80\x02Fno number\n.", "ValueError.*no number"),
        (naming("numpy", "load"), r"it names numpy\.load, which"),
        (naming("numpy._core.multiarray", "fromfile"), r"it names numpy\._core\.multiarray\.fromfile, which"),
        (naming("numpy.core.core.multiarray", "_reconstruct"), r"it names numpy\.core\.core\.multiarray\._reconstruct, which"),
        (naming("numpy._core.multiarray", "_reconstruct.__self__"), r"multiarray\._reconstruct\.__self__, which"),
        (naming("line\nbreak", "os"), r"it names line break\.os, which"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)  # fmt: skip
def test_a_batch_that_is_none_is_refused_in_one_line(official, content, reason):
    path = official / "train_data_batch_10"
    path.write_bytes(content)
    text = message(pools.imagenet32, official)
    assert text.startswith(f"{path} is damaged, or no batch of ImageNet 32x32 (")
    assert re.search(reason, text) and text.endswith("): get it again")


def test_rows_run_through_the_batches_in_the_order_of_their_numbers(tmp_path):
    images = make_imagenet32(tmp_path)
    pool = pools.imagenet32(tmp_path)
    assert pool.size == len(images) == 33
    assert pools.imagenet32_note(1_281_167) == ""
    assert "holds 33 images, ImageNet 32x32 has 1281167: not the" in pools.imagenet32_note(33)
    # across batches, in any order, the last and the first of a batch among them
    for rows in (np.arange(33), RNG.permutation(33), np.array([32, 4, 4, 0])):
        assert np.array_equal(taken(pool, rows), images[rows])
    assert pool.take(np.array([], dtype=np.int64)) == []


def test_a_single_batch_is_in_memory_at_a_time_and_none_afterwards(tmp_path, monkeypatch):
    make_imagenet32(tmp_path)
    read, alive = pools._imagenet32_batch, []

    def watched(path: Path) -> np.ndarray:
        assert all(reference() is None for reference in alive)
        batch = read(path)
        alive.append(weakref.ref(batch))
        return batch

    monkeypatch.setattr(pools, "_imagenet32_batch", watched)
    pool = pools.imagenet32(tmp_path)
    images = pool.take(np.arange(33))
    assert len(alive) == 20 and all(reference() is None for reference in alive)
    assert all(image.base is None and image.flags.c_contiguous for image in images), "copies, not views"
    alive.clear()
    pool.take(np.array([9]))
    assert len(alive) == 1, "batches of which nothing is wanted are not read"


def test_the_npz_release_holds_the_same_images_as_the_pickles(tmp_path):
    make_imagenet32(tmp_path)
    expected = taken(pools.imagenet32(tmp_path))
    before = pools.listing("imagenet32", tmp_path, tmp_path)
    for name in pools.IMAGENET32_FILES:
        content = pickle.loads((tmp_path / name).read_bytes(), encoding="latin1")
        np.savez(tmp_path / f"{name}.npz", data=content["data"], labels=np.array(content["labels"]))
        (tmp_path / name).unlink()
    assert np.array_equal(taken(pools.imagenet32(tmp_path)), expected)
    assert pools.listing("imagenet32", tmp_path, tmp_path) not in (before, None)


def test_a_folder_per_class_is_walked_and_what_is_no_image_left(tmp_path):
    for name in ("b/2.JPG", "a/1.png", "a/c/3.jpeg", "a/._1.png", "a/Thumbs.db", ".hidden/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photograph("RGB").save(tmp_path / name, format="PNG")
    pool = pools.image_folder(tmp_path)
    assert pool.size == len(taken(pool)) == 3
    assert pools._image_names(tmp_path) == ["a/1.png", "a/c/3.jpeg", "b/2.JPG"]
    photograph("RGB").save(tmp_path / "own.png")
    assert pools._image_names(tmp_path) == ["own.png"]


def test_missing_batches_are_named_with_the_folder(tmp_path):
    make_imagenet32(tmp_path)
    for number in (3, 10):
        (tmp_path / f"train_data_batch_{number}").unlink()
    (tmp_path / "train_data_batch_3").mkdir()
    text = message(pools.imagenet32, tmp_path)
    assert f"looked in {tmp_path} for train_data_batch_3, train_data_batch_10 (or .npz); get" in text
    assert "Imagenet32_train.zip" in text and "--ood-dir" in text
    text = message(pools.open_pool, "imagenet32", tmp_path / "data")
    assert f"looked in {tmp_path / 'data' / 'imagenet32'} for train_data_batch_1, " in text


def photograph(mode: str, width: int = 50, height: int = 40) -> Image.Image:
    """Smooth colours with an edge, and half of it transparent where the mode has transparency."""
    y, x = np.mgrid[:height, :width]
    if mode == "I;16":
        return Image.fromarray((x * 200 + y * 300).astype(np.uint16))
    colours = np.stack([x * 5, y * 6, np.where(x > 20, 255, 0), np.where(y > 15, 255, 90)], axis=-1)
    image = Image.fromarray(colours.clip(0, 255).astype(np.uint8))
    return image.convert("RGB").quantize(16) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "1", "RGBA", "I;16"])
def test_photographs_are_resized_first_and_made_rgb_then(tmp_path, mode):
    photograph(mode).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == mode
        expected = image.resize((32, 32), Image.Resampling.BILINEAR).convert("RGB")
        otherwise = image.convert("RGB").resize((32, 32), Image.Resampling.BILINEAR)
    found = pools.image_folder(tmp_path).take(np.array([0]))
    assert np.array_equal(found[0], np.asarray(expected))
    assert (mode in ("RGB", "L")) == np.array_equal(np.asarray(expected), np.asarray(otherwise))


def test_a_folder_is_the_images_in_it_by_name(tmp_path):
    names = ["b.jpg", "a10.png", "a2.PNG", "Z.JPEG", "c.Jpg", "é.bmp", "_.ppm"]
    for number, name in enumerate(names):
        kind = Path(name).suffix[1:].upper().replace("JPG", "JPEG")
        Image.new("RGB", (40, 30), (20 * number, 0, 0)).save(tmp_path / name, format=kind)
    for other in ("places365_test.txt", "a.jpg.part", "README", ".DS_Store", "jpg"):
        (tmp_path / other).write_text("no image")
    (tmp_path / "more").mkdir()
    photograph("RGB").save(tmp_path / "more" / "deeper.png")
    pool = pools.open_pool("place365", Path("/nowhere"), tmp_path)
    assert pool.size == len(names)
    order = [int(number) for number in np.round(taken(pool)[:, 10, 10, 0] / 20)]
    assert [names[number] for number in order] == sorted(names)


def saved(name: str) -> bytes:
    file = io.BytesIO()
    photograph("RGB").save(file, format=name)
    return file.getvalue()


def with_byte(content: bytes, position: int, value: int) -> bytes:
    return content[:position] + bytes([value]) + content[position + 1 :]


PNG, JPEG, PPM = saved("png"), saved("jpeg"), saved("ppm")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jpg", b"", "is no image of a known format"),
        ("web_page.jpg", b"<html>gone</html>", "is no image of a known format"),
        ("truncated.jpg", JPEG[:-30], "truncated"),
        ("truncated.png", PNG[: len(PNG) // 2], "truncated"),
        ("spoilt.png", with_byte(PNG, PNG.index(b"IDAT") + 4, 0), "broken data stream"),
        ("wrong_length.png", with_byte(PNG, PNG.index(b"IDAT") - 1, 0), "broken PNG file"),
        ("truncated.ppm", PPM[:40], "truncated|not enough"),
        ("spoilt.ppm", PPM.replace(b"255", b"\xea55", 1), "invalid literal for int"),
        ("too_big.bmp", b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 30000, 30000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(9),
         "exceeds limit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_damaged_photograph_is_named_in_one_line(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    text = message(pools.image_folder(tmp_path).take, np.array([0]))
    assert text.startswith(f"{tmp_path / name} is ") and text.endswith(": mend or remove it")
    assert re.search(reason, text.replace(name, "")), text
    assert text.count(str(tmp_path)) == 1


def test_a_folder_without_images_is_refused_with_its_path(tmp_path):
    (tmp_path / "places365").mkdir()
    (tmp_path / "places365" / "a.txt").touch()
    for root in (tmp_path, tmp_path / "nowhere"):
        text = message(pools.open_pool, "place365", root)
        assert f"no images found in {root / 'places365'}: put" in text and "--ood-dir" in text


def test_the_listing_tells_files_by_name_and_size(tmp_path):
    folder, seen = tmp_path / "places365", []
    for _ in range(2):  # without the folder, and without an image in it
        assert pools.listing("place365", tmp_path) is None
        folder.mkdir(exist_ok=True)
        (folder / "notes.txt").write_text("1")
    for number, name in enumerate((b"a.jpg", b"a.jpg", b"b.jpg", b"\xff.jpg")):
        for path in folder.glob("*.jpg"):
            path.unlink()
        (folder / os.fsdecode(name)).write_bytes(b"1" if number == 0 else b"22")
        seen.append(pools.listing("place365", tmp_path))
        (folder / "notes.txt").write_text("of no matter" * number)
        assert pools.listing("place365", tmp_path / "x", folder) == seen[-1]
    assert None not in seen and len(set(seen)) == 4


def test_a_data_set_lends_its_training_images(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for path, first in (("own.npz", 0), ("elsewhere/cifar10.npz", 2)):
        train, test = IMAGES[first : first + 5], np.delete(IMAGES, range(first, first + 5), axis=0)
        labels = {"train_labels": np.arange(5), "test_labels": np.arange(2)}
        np.savez(tmp_path / path, train_images=train, test_images=test, **labels)
    pool = pools.open_pool("own", tmp_path)
    assert pool.size == 5
    assert np.array_equal(taken(pool, [4, 0, 4]), IMAGES[[4, 0, 4]])
    assert np.array_equal(taken(pools.open_pool("cifar10", tmp_path, tmp_path / "elsewhere")), IMAGES[2:])


def test_an_unknown_pool_lists_what_there_is(tmp_path):
    text = message(pools.open_pool, "imagenet", tmp_path)
    assert text.startswith("--corruption imagenet: unknown data set imagenet")
    for word in ("cifar10", "imagenet32", "place365", "photographs", str(tmp_path / "imagenet.npz")):
        assert word in text
    text = message(pools.open_pool, "cifar10", tmp_path)
    assert text.startswith("cifar10 not found") and "place365" not in text


def test_scikit_learns_photographs_are_patches_that_use_all_greys():
    pool = pools.open_pool("photographs", Path("/nowhere"))
    images = taken(pool)
    assert images.shape == (2 * (427 // 16) * (640 // 16), 8, 8, 1) and images.dtype == np.uint8
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) > 2000
    assert np.array_equal(images, taken(pools.photographs())), "the same every time"
    # the patch at the second row and third column of the second photograph, by hand
    from sklearn.datasets import load_sample_images  # noqa: PLC0415

    patch = Image.fromarray(load_sample_images().images[1][16:32, 32:48])
    grey = np.asarray(patch.resize((8, 8), Image.Resampling.BILINEAR).convert("L")).astype(int)
    expected = (grey - grey.min()) * 255 // (grey.max() - grey.min())
    assert np.array_equal(images[1040 + 40 + 2, ..., 0], expected)


@pytest.mark.parametrize(
    "shape", [(32, 32, 3), (28, 28, 1), (8, 8, 1), (84, 84, 3), (20, 12, 3), (12, 20, 1)], ids=str
)
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_images_are_resized_first_and_get_the_channels_of_the_training_images_then(shape, channels):
    source = [*IMAGES[:, :, :20, :channels], np.full((5, 9, channels), 77, np.uint8)]
    found = pools.resized(source, shape)
    assert found.shape == (8, *shape) and found.dtype == np.uint8
    for pixels, ours in zip(source, found, strict=True):
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        image = image.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
        image = image.convert("L" if shape[2] == 1 else "RGB")
        assert np.array_equal(ours, np.asarray(image).reshape(shape))
    assert (found[-1] == 77).all()
    assert pools.resized([], shape).shape == (0, *shape)
    if shape == (32, 32, 3):  # of the right shape: as they are
        whole = IMAGES[..., :channels]
        assert np.array_equal(pools.resized(list(whole), shape), np.broadcast_to(whole, IMAGES.shape))
