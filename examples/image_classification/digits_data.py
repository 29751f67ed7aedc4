"""The handwritten digits that ship with scikit-learn, as images for a `Trainer`, in fixed splits."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import Dataset

IMAGE_SIZE = 32
TEST_IMAGES = 597
HELD_OUT_IMAGES = 200
_SPLIT_SEED = 0


class Images(Dataset):
    """Images `[N, 1, 32, 32]`, float32, with labels `[N]`, in the form that Transformers models take."""

    def __init__(self, pixel_values: torch.Tensor, labels: torch.Tensor):
        self.pixel_values = pixel_values
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


class Digits(NamedTuple):
    """`train` and `test` are for final runs; `fit` and `held_out` are parts of `train`, for choosing a recipe."""

    train: Images
    test: Images
    fit: Images
    held_out: Images


def digits() -> Digits:
    """The 1,797 images of 8 x 8 pixels, always in the same splits, stratified by digit.

    1,200 train images, 200 of them held out, and 597 test images; resized to 32 x 32 (bilinear), and normalized with
    mean and standard deviation of the train images.
    """
    raw = load_digits()
    everything = np.arange(len(raw.target))
    train, test = _split(everything, raw.target, TEST_IMAGES)
    fit, held_out = _split(train, raw.target, HELD_OUT_IMAGES)
    pixels = torch.tensor(raw.images, dtype=torch.float32)[:, None]
    pixels = torch.nn.functional.interpolate(pixels, size=IMAGE_SIZE, mode="bilinear")
    pixels = (pixels - pixels[train].mean()) / pixels[train].std()
    labels = torch.tensor(raw.target)
    return Digits(*(Images(pixels[part], labels[part]) for part in (train, test, fit, held_out)))


def _split(indices: np.ndarray, labels: np.ndarray, second: int) -> list[np.ndarray]:
    """Split `indices` into two parts, stratified by digit; the second part has `second` of them."""
    return train_test_split(indices, test_size=second, stratify=labels[indices], random_state=_SPLIT_SEED)
