"""Images to test on are looked at before the first epoch."""

import numpy as np
import pytest
from PIL import Image

from common.datasets.file_lists import FileData, FileSplit, without_bad_images
from common.runs.cli import UserError


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_a_test_image_without_a_head_is_named_before_anything_is_trained(tmp_path, content):
    paths = np.array([b"a.png", b"b.png"])
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    train, test = (FileSplit(tmp_path, paths, np.zeros(2, np.int64), part) for part in ("train", "test"))
    data = FileData("food101n", train, test, 2, ("a", "b"), np.arange(2), 2, np.full(2, -1))
    without_bad_images(data, tmp_path, "error", 0)
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(
        UserError,
        match=r"image 1 of the test list, .*b\.png, is damaged \(.*; 1 of 2 are\): .*--on_bad_image skip",
    ):
        without_bad_images(data, tmp_path, "error", 0)
