"""VTAB-1k's list files, and the same numbers of images from the Hub."""

from pathlib import Path

import numpy as np

from coeft.data._folders import existing_folder, visible
from coeft.data._source import Source, Split
from coeft.data.vtab import VTAB
from coeft.errors import UserError, near
from coeft.seeding import derive

# task -> the short name that its folder has in the common copies
SHORT = {
    "cifar100": "cifar",
    "clevr_distance": "clevr_dist",
    "dsprites_location": "dsprites_loc",
    "dsprites_orientation": "dsprites_ori",
    "smallnorb_azimuth": "smallnorb_azi",
    "smallnorb_elevation": "smallnorb_ele",
}
ALIASES = SHORT | {short: task for task, short in SHORT.items()}
LENGTHS = {"train800": 800, "val200": 200, "train800val200": 1000}  # list -> images that it names
LARGEST = 99_999  # label; every number up to the largest is a class
PROBLEMS = 10  # wrong lines that one message names


def from_folder(settings: VTAB, task: str, chosen: dict[str, str | None]) -> Source:
    """A task in the folder format. Its classes are 0 .. num_classes - 1, else 0 .. the largest label in the lists used.

    Raises:
        UserError: a folder, list or image is missing, a line is wrong, or a label is beyond the task's classes.
    """
    assert settings.root is not None
    folder = _task_folder(existing_folder(Path(settings.root).expanduser(), "data.root"), task, chosen)
    count = settings.num_classes
    problems: list[str] = []
    splits: dict[str, Split | None] = {}
    for part, name in chosen.items():
        splits[part] = None if name is None else _read_list(folder, name, count, problems)
    if problems:
        more = [f"and {len(problems) - PROBLEMS} more"] if len(problems) > PROBLEMS else []
        raise UserError("\n".join([*problems[:PROBLEMS], *more]))
    highest = max(int(split.labels.max()) for split in splits.values() if split is not None)
    train = splits["train"]
    assert train is not None
    class_names = [str(label) for label in range(count or highest + 1)]
    lengths = {name: len(split) for name, split in zip(chosen.values(), splits.values(), strict=True) if name and split}
    warnings = _other_lengths(lengths, settings.num_test, f"{folder}: ")
    if count is not None and highest < count - 1:
        warnings.append(
            f"{folder}: the lists have labels up to {highest}, but {task} has {count} classes; is this its folder?"
        )
    return Source(train=train, val=splits["val"], test=splits["test"], class_names=class_names, warnings=warnings)


def check_lists(settings: VTAB, task: str, chosen: dict[str, str | None]) -> None:
    """Look for a task's folder and lists; what they say is read later.

    Raises:
        UserError: one is missing.
    """
    assert settings.root is not None
    folder = _task_folder(existing_folder(Path(settings.root).expanduser(), "data.root"), task, chosen)
    for name in chosen.values():
        if name is not None:
            _list_file(folder, name)


def _other_lengths(lengths: dict[str, int], num_test: int | None, where: str) -> list[str]:
    """Warnings about lists that do not have VTAB-1k's numbers of images."""
    official = LENGTHS | ({} if num_test is None else {"test": num_test})
    return [
        f"{where}{name} has {length:,} images, VTAB-1k's has {official[name]:,}: the numbers are not comparable"
        for name, length in lengths.items()
        if name in official and length != official[name]
    ]


def _task_folder(root: Path, task: str, chosen: dict[str, str | None]) -> Path:
    """root itself, if it holds a list that is used, or its folder of the task."""
    names = [task, *([ALIASES[task]] if task in ALIASES else [])]
    for name in names:
        if (root / name).is_dir():
            return root / name
    if any((root / f"{split}.txt").is_file() for split in chosen.values()):
        return root
    tasks = [path.name for path in visible(root) if path.is_dir()]
    raise UserError(
        f"data.root={root} has no folder {' or '.join(names)}, and no {chosen['train']}.txt of its own; "
        f"data.name={task}: {near(task, tasks)}"
    )


def _read_list(folder: Path, name: str, num_classes: int | None, problems: list[str]) -> Split:
    file = _list_file(folder, name)
    items: list[Path] = []
    labels: list[int] = []
    names: list[str] = []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text: {error}") from None
    for row, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        path, *label = line.strip().rsplit(maxsplit=1)
        if not label:
            problems.append(f"{file}, row {row}: {line.strip()!r}; expected `relative/path label`")
        elif not (label[0].isascii() and label[0].isdigit()):
            problems.append(f"{file}, row {row}: label {label[0]!r} is not an integer from 0")
        elif len(label[0]) > len(str(LARGEST)) or int(label[0]) > LARGEST:
            problems.append(f"{file}, row {row}: label {label[0][:20]} is more than {LARGEST:,}; labels count classes")
        elif num_classes is not None and int(label[0]) >= num_classes:
            problems.append(
                f"{file}, row {row}: label {label[0]}, but the task has {num_classes} classes (data.num_classes), "
                f"labels 0 to {num_classes - 1}"
            )
        elif not (folder / path).is_file():
            problems.append(f"{file}, row {row}: no image {folder / path}")
        else:
            items.append(folder / path)
            labels.append(int(label[0]))
            names.append(path)
    if not items and not problems:
        raise UserError(f"{file} is empty; expected lines of `relative/path label`")
    return Split(items=items, labels=np.array(labels, np.int64), names=names)


def _list_file(folder: Path, name: str) -> Path:
    file = folder / f"{name}.txt"
    if not file.is_file():
        lists = [path.stem for path in visible(folder) if path.suffix == ".txt"]
        raise UserError(f"{file}: no such list; {near(name, lists)}")
    return file


def from_hub(settings: VTAB, task: str, chosen: dict[str, str | None], seed: int) -> Source:
    """As many images as VTAB-1k has, drawn from the parent data set; not VTAB's own choice.

    Raises:
        UserError: no data set is named, it cannot be had, or it has too few images.
    """
    folder = f"data.root=FOLDER, where FOLDER/{task}/ holds train800.txt, val200.txt, test.txt and the images they name"
    if settings.hub_name is None:
        raise UserError(
            f"VTAB-1k task {task}: give a local copy, {folder}, or a data set on the Hub, data.hub_name=NAME"
        )

    from coeft.data._hub import load_hub, read_splits

    tables = load_hub(
        settings.hub_name,
        config=settings.hub_config,
        revision=None,
        cache_dir=None,
        ways=f"give a local copy: {folder}",
    )
    from coeft.data._data import balanced  # imports torch, so after the network has answered

    wanted: dict[str, str | None] = {"train": settings.hub_splits["train"], "val": None}
    wanted["test"] = settings.hub_splits["test"] if "test" in chosen.values() else None
    for part, split_name in wanted.items():
        if split_name is not None and split_name not in tables:
            raise UserError(
                f"data.hub_splits.{part}={split_name}: {settings.hub_name} has no such split; "
                f"{near(split_name, tables)}"
            )
    splits, classes = read_splits(
        tables,
        wanted,
        image=settings.hub_columns.image,
        label=settings.hub_columns.label,
        group=None,
        keys=("data.hub_columns.image", "data.hub_columns.label"),
    )
    pool = splits["train"]
    assert pool is not None
    if settings.num_classes is not None and len(classes) != settings.num_classes:
        raise UserError(
            f"{settings.hub_name} has {len(classes)} classes, but VTAB-1k's task {task} has {settings.num_classes} "
            "(data.num_classes): it is not its parent data set; give another data.hub_name, or a local copy: " + folder
        )
    if len(pool) < 1000:
        raise UserError(f"{settings.hub_name} has {len(pool)} training images; VTAB-1k takes 1,000")
    order = balanced(pool.labels, len(classes), derive(seed, "vtab", task))[:1000]
    ours = {"train800": order[:800], "val200": order[800:], "train800val200": order}
    made: dict[str, Split | None] = {}
    for part, name in chosen.items():
        if name is None:
            made[part] = None
        else:
            made[part] = splits["test"] if name == "test" else pool.subset(np.sort(ours[name]))
    train = made["train"]
    assert train is not None
    warning = (
        f"{task}: 800 + 200 training images drawn from {settings.hub_name} with seed {seed}, class-balanced; "
        "this is not the official VTAB-1k split, so numbers are not comparable with published ones"
    )
    test = {"test": len(made["test"])} if made["test"] is not None else {}
    warnings = [warning, *_other_lengths(test, settings.num_test, f"{settings.hub_name}: ")]
    return Source(train=train, val=made["val"], test=made["test"], class_names=classes, warnings=warnings)
