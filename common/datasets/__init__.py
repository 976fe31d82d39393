"""Data sets: `load(name, root)` gives train and test splits with clean labels, `labels_of(file, ...)` observed ones.

`load_food101n`, `load_clothing1m`, `load_mini_imagenet` and `load_webvision` give lists of image files with their given labels;
`image_cache` makes small copies, `decoded` one array of all images. `load_folder` reads your own images, `from_arguments` the
data set that the flags of a script name.

Terms. digits: scikit-learn's copy of the UCI optical digits, CC BY 4.0, shipped with scikit-learn. MNIST:
LeCun, Cortes and Burges, usually quoted as CC BY-SA 3.0. Fashion-MNIST: Zalando, MIT. CIFAR-10/100:
Krizhevsky 2009, no licence stated, cite the report. Food-101 (Bossard et al. 2014): its images come from Foodspotting and are
not owned by its authors; for research, as scientific fair use. Food-101N (Lee et al. 2018, CleanNet): for research, from its
project page. Clothing1M (Xiao et al. 2015): given out by its authors on request, for non-commercial research. mini-ImageNet
with controlled noisy web labels (CNWL; Jiang et al. 2020, "Beyond Synthetic Noise: Deep Learning on Controlled Noisy
Labels"): annotations by Google, CC BY 4.0; the images come from web search and belong to their owners; for research. WebVision
1.0 (Li et al. 2017): images from Google and Flickr, which belong to their owners; for non-commercial research. ILSVRC12's
validation images (Russakovsky et al. 2015): for non-commercial research, on registration at image-net.org. Only the digits are
part of the installation. This repository holds no other data set.
"""

from common.datasets.clothing1m import load_clothing1m
from common.datasets.file_check import ALIASES, FILE_NAMES, check, load_files, source
from common.datasets.file_lists import FileData, FileSplit, relabelled
from common.datasets.folder import from_arguments, load_folder
from common.datasets.food101n import load_food101n
from common.datasets.given_labels import labels_of, read_decisions, read_labels, without_removed
from common.datasets.in_memory import NAMES, Data, Split, download, load
from common.datasets.limit import limited, limited_test
from common.datasets.mini_imagenet import decoded, load_mini_imagenet
from common.datasets.observed import kept_images, observed_labels
from common.datasets.webvision import load_webvision

__all__ = [
    "ALIASES",
    "FILE_NAMES",
    "NAMES",
    "Data",
    "FileData",
    "FileSplit",
    "Split",
    "check",
    "decoded",
    "download",
    "from_arguments",
    "kept_images",
    "labels_of",
    "limited",
    "limited_test",
    "load",
    "load_clothing1m",
    "load_files",
    "load_folder",
    "load_food101n",
    "load_mini_imagenet",
    "load_webvision",
    "observed_labels",
    "read_decisions",
    "read_labels",
    "relabelled",
    "source",
    "without_removed",
]
