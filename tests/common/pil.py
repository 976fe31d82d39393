"""Batches of images by way of PIL."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def image_by_image(images: Tensor, function: Callable[[Image.Image, int], Image.Image]) -> Tensor:
    """function(PIL image, number) of each image of a batch uint8 [N, C, H, W], as a batch again."""
    results = []
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        made = np.array(function(image, i))
        results.append(made.reshape(*made.shape[:2], -1))
    return torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2)
