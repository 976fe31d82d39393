"""Images to test on are looked at before the first epoch."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.datasets.file_lists import FileSplit, require_heads
from common.gpu.loader import FileBatches
from common.runs.cli import UserError


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
    options = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "device": torch.device("cpu"), "workers": 0}
    with pytest.raises(UserError, match=line):
        FileBatches(test, 2, lambda image: image, **options)
