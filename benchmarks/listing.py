"""Loading a folder of many small files twice: listing it, hashing its files, and both together.

    python benchmarks/listing.py [--files 100000] [--classes 100] [--folder DIR]

The first time lists every folder and reads every file; the second asks each folder and each file for its times alone.
Only the ratios carry over to another machine. The files are in the system's memory both times, so that a disk or a
network would make the first time, and the ratio, larger. Nothing of the user's own cache is touched.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from coeft.data import _listing
from coeft.data._decode import extensions
from coeft.data.image_folder import ImageFolder


def main() -> None:
    """Print the seconds of both times, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--bytes", type=int, default=2000)
    parser.add_argument("--folder", help="where the files are made, and deleted again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.environ["COEFT_CACHE"] = str(Path(folder) / "cache")
        root = Path(folder) / "data"
        make(root, options.files, options.classes, options.bytes)
        time.sleep(_listing.SETTLED / 1e9 + 0.1)  # younger times are not relied on
        extensions()  # Pillow reads its list of formats once
        first, second = load(root), load(root)
        changed = root / "class 0" / "new.png"
        changed.write_bytes(b"new")
        after = load(root)
        assert first["samples"] == second["samples"] == options.files and after["samples"] == options.files + 1
        keys = [key for key in first if key != "samples"]
        print(json.dumps({
            "files": options.files, "classes": options.classes, "bytes": options.bytes,
            "seconds": {name: {key: round(found[key], 3) for key in keys}
                        for name, found in (("first", first), ("second", second), ("one file more", after))},
            "ratio first/second": {key: round(first[key] / second[key], 1) for key in keys},
        }, indent=2))  # fmt: skip


def make(root: Path, files: int, classes: int, size: int) -> None:
    """Files with different contents, in class folders; they are not decoded here."""
    for label in range(classes):
        (root / f"class {label}").mkdir(parents=True)
        for number in range(label, files, classes):
            content = number.to_bytes(8, "little") * (size // 8)
            (root / f"class {label}" / f"{number}.png").write_bytes(content)


def load(root: Path) -> dict[str, Any]:
    """Seconds to find the samples and to hash them, and those of them that the processor worked for this process."""
    clock, cpu = [time.perf_counter()], [time.process_time()]
    source = ImageFolder(root=str(root)).load(0)
    clock.append(time.perf_counter())
    cpu.append(time.process_time())
    samples = len(source.train.digests)
    clock.append(time.perf_counter())
    cpu.append(time.process_time())
    return {
        "list": clock[1] - clock[0],
        "hash": clock[2] - clock[1],
        "both": clock[2] - clock[0],
        "list, processor": cpu[1] - cpu[0],
        "both, processor": cpu[2] - cpu[0],
        "samples": samples,
    }


if __name__ == "__main__":
    main()
