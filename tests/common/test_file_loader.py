"""Mini-batches of image files: the transforms, the order, the draws, workers and processes, damaged images."""

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import decode_jpeg

from common import datasets
from common.datasets.file_lists import FileSplit, require_heads
from common.datasets.image_cache import build_caches, open_caches
from common.datasets.images import batch_memory, in_workers
from common.gpu import augment, decode
from common.gpu.loader import FileBatches
from common.runs import cli
from common.runs.cli import UserError
from tests.common.small_file_data import make_food101n, plant
from tests.lines import message
from tests.pretend_card import CARD, PretendCard, usable

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TRAIN = augment.random_resized_crop_and_flip(32)
PLAIN = augment.resize_and_center_crop(36, 32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """12 training and 6 test images."""
    root = tmp_path_factory.mktemp("food")
    make_food101n(root)
    return datasets.load_food101n(root)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batches(split, batch_size: int, transform=TRAIN, **options) -> FileBatches:
    """FileBatches on the CPU; in this process unless told otherwise."""
    options = {"workers": 0, "device": torch.device("cpu"), **options}
    return FileBatches(split, batch_size, transform, mean=MEAN, std=STD, **options)


def whole_pass(made) -> tuple[torch.Tensor, torch.Tensor]:
    """All views [k, N, 3, H, W] and positions [N] of a pass."""
    views, index = zip(*made, strict=True)
    return torch.cat([torch.stack(v) for v in views], dim=1), torch.cat(index)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_plain(made: FileBatches, split) -> None:
    """The views of a pass are the normalised images of the positions beside them."""
    for (view,), index in made:
        pixels = torch.stack([PLAIN(split.read(i)) for i in index.tolist()])
        assert torch.equal(view, augment.normalise(pixels, torch.tensor(MEAN), torch.tensor(STD)))
        assert (view.dtype, index.dtype) == (torch.float32, torch.int64)
        assert view.is_contiguous(memory_format=torch.channels_last)


def test_the_test_transform_agrees_with_the_released_composition(golden):
    for case in golden("afm", "eval_transform"):
        image = torch.from_numpy(case["image"]).permute(2, 0, 1)
        cut = augment.resize_and_center_crop()(image)
        assert cut.dtype == torch.uint8
        output = augment.normalise(cut[None], torch.tensor(MEAN), torch.tensor(STD))[0].numpy()
        assert output.shape == tuple(case["output_shape"])
        np.testing.assert_allclose(output[:, ::8, ::8], case["output_every_8th"], rtol=0, atol=0.03)
        np.testing.assert_allclose(output.mean(axis=(1, 2)), case["output_mean"], rtol=0, atol=0.01)
        np.testing.assert_allclose(output.std(axis=(1, 2)), case["output_std"], rtol=0, atol=0.01)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_pass_has_every_image_in_order_normalised(data, workers):
    made = batches(data.train, 5, PLAIN, workers=workers)
    assert len(made) == 3
    for _ in range(2):  # the workers stay for the second pass
        found = list(made)
        assert [index.tolist() for _, index in found] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]
        assert_plain(found, data.train)


def test_a_shuffled_pass_has_every_image_once_in_an_order_of_its_own(data):
    made = batches(data.train, 5, PLAIN, shuffle=True, generator=generator())
    orders = [whole_pass(made)[1].tolist() for _ in range(3)]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    again = batches(data.train, 5, PLAIN, shuffle=True, generator=generator())
    assert [whole_pass(again)[1].tolist() for _ in range(3)] == orders
    assert_plain(made, data.train)


def test_a_smaller_last_batch_can_be_dropped(data):
    made = batches(data.train, 5, shuffle=True, drop_last=True, generator=generator())
    assert len(made) == 2 and [len(index) for _, index in made] == [5, 5]
    assert len(batches(data.train, 6, drop_last=True, generator=generator())) == 2


CUT = "images cannot be cut into 4 equal pieces"


@pytest.mark.parametrize(
    ("batch_size", "options", "line"),
    [
        (13, {"drop_last": True}, "a batch of 13 is more than all 12 images"),
        (9, {"drop_last": True, "world": 4}, f"a batch of 9 {CUT}"),
        (9, {"shuffle": True, "world": 4}, f"a batch of 9 {CUT}"),
        (10, {"shuffle": True, "world": 4}, f"a batch of 10 {CUT}"),
        (5, {"decoded_on": "gpu"}, "leave one out, it or --device cpu"),
    ],
)
def test_batches_that_cannot_be_made_are_refused(data, batch_size, options, line):
    assert line in message(batches, data.train, batch_size, generator=generator(), **options)


def noise(_: torch.Tensor) -> torch.Tensor:
    """In place of a transform: draws and nothing else."""
    return torch.randint(256, (3, 4, 4)).to(torch.uint8)


def test_images_views_and_passes_have_draws_of_their_own(data):
    made = batches(data.train, 4, noise, views=3, generator=generator())
    (first, index), (second, _) = whole_pass(made), whole_pass(made)
    assert index.tolist() == list(range(12))
    views = torch.cat([first, second]).flatten(0, 1)
    assert len(views.unique(dim=0)) == len(views) == 2 * 3 * 12


@pytest.mark.skipif(not usable(), reason="a card is there, or this torch has no CUDA in it")
@pytest.mark.parametrize("workers", [0, 2])
def test_decoding_on_a_card_takes_the_same_images_with_the_same_draws(tmp_path, monkeypatch, capsys, workers):
    make_food101n(tmp_path)
    split = datasets.load_food101n(tmp_path).train
    image = Image.open(split.path(1))
    image.save(split.path(2), format="PNG")  # neither is for nvJPEG
    image.convert("CMYK").save(split.path(5), format="JPEG")
    image.convert("L").save(split.path(6), format="JPEG", comment=b"refused")
    taken = []

    def as_nvjpeg(files, mode, device):
        if any(b"refused" in file.numpy().tobytes() for file in files):
            raise RuntimeError("nvjpegDecodeBatched failed")
        taken.extend(files)
        return [decode_jpeg(file, mode=mode).to(device) for file in files]

    monkeypatch.setattr("torchvision.io.decode_jpeg", as_nvjpeg)
    options = {"views": 2, "shuffle": True, "workers": workers}
    wanted = whole_pass(batches(split, 5, generator=generator(), **options))
    with PretendCard(ROOT):
        made = batches(split, 5, generator=generator(), device=CARD, decoded_on="gpu", **options)
        found = [part.cpu() for part in whole_pass(made)]
        made._pixels.close()
    decode._warn.cache_clear()
    assert capsys.readouterr().err.count("nvJPEG refuses a file (nvjpegDecodeBatched failed)") == 1
    # a card resizes in floating point: one level of 255
    assert torch.equal(found[1], wanted[1]) and len(taken) == 12 - 3
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1.01 / 255 / min(STD))


def test_without_generator_every_pass_draws_the_same(data):
    made = batches(data.train, 4)
    assert same(whole_pass(made), whole_pass(made))
    with pytest.raises(ValueError, match="shuffling needs a generator"):
        batches(data.train, 4, shuffle=True)


def test_neither_workers_nor_batch_size_change_a_view(data):
    expected = None
    for workers, batch_size in ((0, 4), (1, 4), (2, 4), (2, 1), (0, 12)):
        made = batches(data.train, batch_size, views=2, shuffle=True, generator=generator(3), workers=workers)
        found = [whole_pass(made) for _ in range(2)]
        expected = expected or found
        assert all(same(a, b) for a, b in zip(expected, found, strict=True)), (workers, batch_size)


def test_a_restored_generator_goes_on_bit_for_bit(data):
    draws = generator(5)
    made = batches(data.train, 5, shuffle=True, generator=draws, workers=1)
    whole_pass(made)
    state = draws.get_state()
    expected = [whole_pass(made) for _ in range(2)]
    other = generator(99)
    resumed = batches(data.train, 5, shuffle=True, generator=other)
    other.set_state(state)
    assert all(same(a, whole_pass(resumed)) for a in expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_global_generators_are_left_alone(data, workers):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    whole_pass(batches(data.train, 5, views=2, shuffle=True, generator=generator(), workers=workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_a_pass_left_early_is_followed_by_a_whole_one(data):
    made, alone = (batches(data.train, 2, shuffle=True, generator=generator(), workers=w) for w in (2, 0))
    for each in (made, alone):
        next(iter(each))
    assert same(whole_pass(made), whole_pass(alone))
    with pytest.raises(RuntimeError, match="another pass"):
        for _ in alone:
            next(iter(alone))


def filled(number: int) -> torch.Tensor:
    """In place of the views of a batch."""
    return batch_memory((2, 3)).fill_(number)


def test_workers_use_the_same_memory_again_and_never_that_of_the_result_in_use():
    passes = in_workers(filled, range(16), 2)
    places = []
    for _ in range(2):
        for number, result in enumerate(passes):
            places.append(result.data_ptr())
            if number < 8:
                time.sleep(0.01)  # as a step does: the workers run ahead as far as they may
            assert result.unique().tolist() == [number]
    assert len(set(places)) == 6
    passes.close()


@pytest.mark.parametrize("world", [2, 4])
def test_processes_train_on_the_pieces_of_the_batches_of_one(data, world):
    options = {"shuffle": True, "drop_last": True, "views": 2}
    alone, *ranks = (
        list(batches(data.train, 4, generator=generator(), rank=rank, world=count, **options))
        for rank, count in [(0, 1), *((rank, world) for rank in range(world))]
    )
    assert len(alone) == 3
    for one, *pieces in zip(alone, *ranks, strict=True):
        assert same(whole_pass(pieces), whole_pass([one]))


def test_processes_share_an_evaluation_batch_by_batch(data):
    alone = list(batches(data.train, 5, PLAIN))
    for rank in (0, 1):
        made = batches(data.train, 5, PLAIN, rank=rank, world=2)
        own = list(made)
        assert len(own) == len(made) == 2 - rank
        assert all(same(whole_pass([a]), whole_pass([b])) for a, b in zip(own, alone[rank::2], strict=True))
    idle = batches(data.train, 5, PLAIN, rank=3, world=4, workers=1)
    assert (len(idle), list(idle), list(idle)) == (0, [], [])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("truncated", r"is damaged \(.+\): use --on_bad_image skip"),
        ("missing", r"cannot be read \(No such file"),
    ],
)
def test_a_bad_image_ends_in_one_line_with_its_position_and_path(tmp_path, workers, kind, reason):
    make_food101n(tmp_path)
    split = datasets.load_food101n(tmp_path).train
    plant(split.path(7), kind)
    made = batches(split, 2, workers=workers)
    with pytest.raises(UserError, match=f"^image 7 of the train list, {split.path(7)}, {reason}") as error:
        whole_pass(made)
    assert not multiprocessing.active_children()  # although the traceback is still there
    assert "\n" not in str(error.value)


def kill(_: torch.Tensor) -> torch.Tensor:
    """In place of a transform: the end of the process that calls it."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_a_users_error(data):
    with pytest.raises(cli.WorkerDied, match=r"DataLoader worker .*: out of memory\? use fewer --workers"):
        whole_pass(batches(data.train, 5, kill, workers=1))


def test_a_worker_that_dies_while_its_parent_does_something_else_is_one_too(data):
    @cli.script
    def main(_):
        for _ in batches(data.train, 4, noise, workers=1):
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
            while True:  # torch raises in the midst of it
                time.sleep(0.01)

    with pytest.raises(cli.WorkerDied) as error:
        main([])
    assert error.value.status == 1 and not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ((torch.Tensor, "share_memory_"), r"No space left on device.*--shm-size, or use --workers 0"),
        ((multiprocessing, "Lock"), r"workers cannot be started \(No space .*--shm-size, or use --workers 0"),
    ],
    ids=["images", "workers"],
)
def test_too_little_shared_memory_is_a_users_error(data, monkeypatch, place, line):
    def no_room(*_):
        if place[0] is multiprocessing:
            raise OSError(errno.ENOSPC, "No space left on device")
        raise RuntimeError("unable to allocate shared memory for </torch_1>: No space left on device (28)")

    monkeypatch.setattr(*place, no_room)
    with pytest.raises(UserError, match=line) as error:
        whole_pass(batches(data.train, 5, noise, workers=2))
    assert error.value.status == 2 and not multiprocessing.active_children()


@pytest.mark.parametrize("way", [KeyboardInterrupt, SystemExit, ValueError])
def test_workers_end_with_their_script_though_the_error_is_kept(data, way):
    @cli.script
    def main(_):
        for _ in batches(data.train, 4, noise, workers=2):
            raise way

    with pytest.raises(way) as kept:
        main([])
    assert kept.traceback and not multiprocessing.active_children()


def group(_: torch.Tensor) -> torch.Tensor:
    """In place of a transform: 1 where it runs in its parent's process group, else 0."""
    return torch.full((3, 1, 1), os.getpgid(0) == os.getpgid(os.getppid()), dtype=torch.uint8)


def test_a_signal_to_the_process_group_does_not_reach_the_workers(data):
    """Ctrl-C, and a job scheduler's SIGTERM: the run then ends in its own time."""
    made = batches(data.train, 5, group, workers=1)
    lowest = augment.normalise(torch.zeros(1, 3, 1, 1), made.mean, made.std)
    assert torch.equal(whole_pass(made)[0][0], lowest.expand(12, 3, 1, 1))


def test_a_cache_stands_in_for_the_files(data, tmp_path):
    build_caches(tmp_path, data)
    caches = open_caches(tmp_path, data)
    transform = augment.resize_and_center_crop()
    from_files = whole_pass(batches(data.test, 4, transform))
    assert same(from_files, whole_pass(batches(data.test, 4, transform, cache=caches["test"], workers=2)))
    with pytest.raises(ValueError, match="a cache of 6 images for a split of 12"):
        batches(data.train, 4, cache=caches["test"])
    on_card = {"device": CARD, "decoded_on": "gpu", "cache": caches["train"]}
    assert "leave one out, it or --image_cache" in message(batches, data.train, 5, **on_card)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_a_test_image_without_a_head_is_named_before_anything_is_trained(tmp_path, content):
    paths = np.array([b"a.png", b"b.png"])
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    train, test = (FileSplit(tmp_path, paths, np.zeros(2, np.int64), part) for part in ("train", "test"))
    require_heads(test)
    (tmp_path / "b.png").write_bytes(content)
    require_heads(train)
    line = r"image 1 of the test list, .*b\.png, is damaged \(.*; 1 of 2 are\): .*--on_bad_image skip"
    with pytest.raises(UserError, match=line):
        batches(test, 2)
