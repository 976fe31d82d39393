"""NumPy files read as plain arrays only; every kind of damage becomes a ValueError."""

import struct
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
    # zipfile raises RuntimeError if a damaged entry looks encrypted or compressed by an unknown method
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


def read_pt(path: Path) -> dict[str, np.ndarray]:
    """The vectors of a file of torch.save, by name; a single one is called "". Reads only NumPy arrays and tensors.

    CIFAR-N's official files are pickles of NumPy vectors. ValueError: damaged, or holding other objects, which are not loaded.
    """
    import pickle  # noqa: PLC0415  (only for its error; nothing is unpickled freely)

    import torch  # noqa: PLC0415

    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    reconstruct, scalar = multiarray._reconstruct, multiarray.scalar
    allowed = [
        *(
            (made, f"numpy.{core}.multiarray.{made.__name__}")
            for core in ("core", "_core")
            for made in (reconstruct, scalar)
        ),
        *(np.ndarray, np.dtype),
        *(kind for name in np.dtypes.__all__ if issubclass(kind := getattr(np.dtypes, name), np.dtype)),
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            "damaged, or it holds other objects than NumPy arrays and tensors, which are not loaded"
        ) from None
    except (
        EOFError,
        KeyError,
        IndexError,
        RuntimeError,
        TypeError,
        AttributeError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f"damaged: {' '.join(str(error).split())[:100]}") from None
    columns = content if isinstance(content, dict) else {"": content}
    arrays = {str(name): np.asarray(value) for name, value in columns.items()}
    strange = [name for name, array in arrays.items() if array.dtype.kind == "O"]
    if strange:
        raise ValueError(f"{strange[0]!r} in it is no array")
    return arrays


def is_integer(array: np.ndarray) -> bool:
    """Whole numbers, signed or not; neither booleans nor time spans."""
    return array.dtype.kind in "iu"
