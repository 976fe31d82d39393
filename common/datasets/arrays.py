"""NumPy files read as plain arrays only, with every way they can be damaged turned into one kind of error."""

import zipfile
import zlib
from pathlib import Path

import numpy as np


def read_npy(path: Path) -> np.ndarray:
    """The array of a .npy file. ValueError: damaged, of another format, or holding Python objects."""
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (EOFError, MemoryError, OverflowError) as error:
        raise ValueError(f"damaged: {error}") from None


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a .npz file by name. ValueError: damaged, of another format, or holding Python objects."""
    if not zipfile.is_zipfile(path):
        raise ValueError("damaged or no .npz file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    # zipfile: RuntimeError where a damaged entry seems to be encrypted, or compressed in a way it does not know
    except (
        EOFError,
        MemoryError,
        OverflowError,
        KeyError,
        RuntimeError,
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f"damaged: {error}") from None
    strange = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if strange:
        raise ValueError(f"{strange[0]} in it is no array")
    return arrays


def is_integer(array: np.ndarray) -> bool:
    """Whole numbers, signed or not; neither booleans nor time spans."""
    return array.dtype.kind in "iu"
