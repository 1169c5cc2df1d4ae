"""IDX files, the format of MNIST: big-endian magic number and sizes, then bytes.

Source: yann.lecun.com/exdb/mnist, "FILE FORMATS FOR THE MNIST DATABASE".
"""

import gzip
import os
import zlib
from pathlib import Path

import numpy as np

from coeft.data._folders import existing_folder
from coeft.errors import UserError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PREFIX = {"train": "train", "test": "t10k"}
UNSIGNED_BYTE = 0x08


def data_dir() -> Path:
    """Folder of local data sets: $COEFT_DATA, else coeft/ in the user's data folder."""
    if chosen := os.environ.get("COEFT_DATA"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "coeft"


def find_root(root: str | None) -> Path:
    """The folder that holds the training images.

    Raises:
        UserError: none does.
    """
    if root is not None:
        folder = existing_folder(Path(root).expanduser(), "data.root")
        if _find(folder, "train-images", 3) is None:
            raise UserError(
                f"data.root={root} has no train-images-idx3-ubyte or train-images-idx3-ubyte.gz; "
                "Fashion-MNIST is four such files: train-images, train-labels, t10k-images, t10k-labels"
            )
        return folder
    places = [data_dir() / "fashion-mnist", DEBIAN]
    for folder in places:
        if _find(folder, "train-images", 3) is not None:
            return folder
    looked = " and ".join(str(place) for place in places)
    raise UserError(
        f"Fashion-MNIST is not on this machine (looked in {looked}): install Debian's package "
        "dataset-fashion-mnist (apt install dataset-fashion-mnist), or give the folder of its four IDX files: "
        "data.root=FOLDER"
    )


def _find(folder: Path, stem: str, dimensions: int) -> Path | None:
    """One IDX file, under either spelling, unpacked or not."""
    for separator in ("-", "."):
        for suffix in ("", ".gz"):
            path = folder / f"{stem}{separator}idx{dimensions}-ubyte{suffix}"
            if path.is_file():
                return path
    return None


def read_pair(root: Path, split: str, *, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, H, W) and labels int64 (N,) of the split train or test.

    Raises:
        UserError: a file is missing or broken, or they do not fit each other.
    """
    arrays = []
    paths = []
    for stem, dimensions in ((f"{PREFIX[split]}-images", 3), (f"{PREFIX[split]}-labels", 1)):
        path = _find(root, stem, dimensions)
        if path is None:
            name = f"{stem}-idx{dimensions}-ubyte"
            raise UserError(f"{root} has no {name} or {name}.gz; copy it there, or set data.splits.{split}=null")
        paths.append(path)
        arrays.append(read_idx(path, dimensions))
    images, labels = arrays
    if len(images) != len(labels):
        raise UserError(f"{paths[0]} has {len(images):,} images but {paths[1]} {len(labels):,} labels; copy them again")
    if not len(images):
        raise UserError(f"{paths[0]} has no image")
    if labels.max() >= num_classes:
        raise UserError(
            f"{paths[1]}: label {labels.max()} at position {labels.argmax()}; expected 0 to {num_classes - 1}"
        )
    return images, labels.astype(np.int64)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of an IDX file of unsigned bytes, unpacked if its name ends in .gz.

    Raises:
        UserError: wrong magic number, too few or too many bytes, or damaged compression.
    """
    try:
        data = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); copy it again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    expected = (UNSIGNED_BYTE << 8) + dimensions
    magic = int.from_bytes(data[:4], "big")
    if len(data) < 4 + 4 * dimensions or magic != expected:
        raise UserError(f"{path} is no IDX file of {dimensions} dimensions: it starts with {magic}, not {expected}")
    sizes = tuple(int(size) for size in np.frombuffer(data, ">u4", count=dimensions, offset=4))
    wanted, have = int(np.prod(sizes, dtype=np.int64)), len(data) - 4 - 4 * dimensions
    if have != wanted:
        shape = " x ".join(map(str, sizes))
        what = "is truncated" if have < wanted else "is too long"
        raise UserError(f"{path} {what}: its header says {shape} = {wanted:,} bytes, it has {have:,}; copy it again")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(sizes)
