"""data.shots: as many training samples of each class, drawn from the seed, from every kind of data with classes."""

import csv
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from coeft.data._data import draw
from coeft.data._settings import ImageData
from coeft.data._source import Source, Split
from coeft.data.digits import Digits
from coeft.data.fashion_mnist import FashionMNIST
from coeft.data.hub import Hub, RowColumns
from coeft.data.image_folder import ImageFolder
from coeft.data.table import Table
from coeft.data.vtab import VTAB
from coeft.errors import UserError

SIZES = {"ape": 5, "bee": 9, "cat": 6}  # images of each class
Made = tuple[ImageData, Source]


def pictures(folder: Path) -> list[tuple[str, str]]:
    """File, relative to the folder, and class of every image."""
    rows = []
    for number, (name, size) in enumerate(SIZES.items()):
        (folder / name).mkdir(parents=True)
        for i in range(size):
            Image.new("RGB", (4, 4), (number, i, 7)).save(folder / name / f"{i}.png")
            rows.append((f"{name}/{i}.png", name))
    return rows


def write(path: Path, header: tuple[str, str], rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def digits(folder: Path, shots: int) -> Made:
    settings = Digits(shots=shots)
    return settings, settings.load(0)


def image_folder(folder: Path, shots: int) -> Made:
    pictures(folder / "train")
    settings = ImageFolder(root=str(folder), shots=shots)
    return settings, settings.load(0)


def table_of_images(folder: Path, shots: int) -> Made:
    path = write(folder / "images.csv", ("file", "label"), pictures(folder))
    settings = Table(path=str(path), input="file", shots=shots)
    return settings, settings.load(0, modality="image")


def table_of_texts(folder: Path, shots: int) -> Made:
    rows = [(f"{name} number {i}", name) for name, size in SIZES.items() for i in range(size)]
    settings = Table(path=str(write(folder / "texts.csv", ("text", "label"), rows)), shots=shots)
    return settings, settings.load(0)


def vtab(folder: Path, shots: int) -> Made:
    classes = list(SIZES)
    lines = [f"{path} {classes.index(name)}" for path, name in pictures(folder / "pets")]
    (folder / "pets" / "train800.txt").write_text("\n".join(lines))
    settings = VTAB(name="pets", root=str(folder), splits={"train": "train800"}, shots=shots)
    return settings, settings.load(0)


def hub(folder: Path, shots: int) -> Made:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(SIZES))})
    labels = [name for name, size in SIZES.items() for _ in range(size)]
    columns = {"text": [f"row {i}" for i in range(len(labels))], "label": labels}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(columns, features)).save_to_disk(str(folder / "d"))
    settings = Hub(name=str(folder / "d"), columns=RowColumns(), shots=shots)
    return settings, settings.load(0, modality="text")


def fashion_mnist(folder: Path, shots: int) -> Made:
    """Its 60,000 images are a package of Debian's; a source of the same form is enough here."""
    labels = np.repeat(np.arange(10), 7)
    split = Split(items=np.zeros((70, 4, 4), np.uint8), labels=labels, names=[str(i) for i in range(70)])
    return FashionMNIST(shots=shots), Source(train=split, class_names=[str(i) for i in range(10)])


KINDS: list[Callable[[Path, int], Made]] = [
    digits, image_folder, table_of_images, table_of_texts, vtab, hub, fashion_mnist,
]  # fmt: skip


def names(made: Made, seed: int) -> set[str]:
    """The training samples that are drawn."""
    train = draw(*made, seed)[0]["train"]
    assert train is not None
    return set(train.names)


@pytest.mark.parametrize("make", KINDS)
def test_shots_are_balanced_follow_the_seed_and_are_drawn_again_alike(make, tmp_path: Path) -> None:
    settings, source = make(tmp_path, 3)
    train = draw(settings, source, 0)[0]["train"]
    assert train is not None and np.bincount(train.labels).tolist() == [3] * len(source.class_names)
    assert len(set(train.names)) == len(train) and set(train.names) < set(source.train.names)
    assert names((settings, source), 0) == set(train.names)
    assert names((settings, source), 1) != set(train.names)


def test_fewer_shots_are_some_of_more() -> None:
    source = Digits().load(0)
    drawn = [names((Digits(shots=shots), source), 5) for shots in (1, 2, 4, 8, 16)]
    assert [len(samples) for samples in drawn] == [10, 20, 40, 80, 160]
    assert all(fewer < more for fewer, more in zip(drawn, drawn[1:], strict=False))


def test_other_parts_stay_whole_and_apart() -> None:
    source = Digits().load(0)
    splits, _ = draw(Digits(shots=2, n_val=100, n_test=200), source, 0)
    assert [len(split or []) for split in splits.values()] == [20, 100, 200]
    taken = [set(split.names) for split in splits.values() if split is not None]
    assert len(set.union(*taken)) == 320


def test_too_few_samples_name_the_classes_and_their_counts(tmp_path: Path) -> None:
    settings, source = image_folder(tmp_path, 6)
    with pytest.raises(UserError, match=r"data.shots=6 .*: ape has 5; set it to 5 or less$"):
        draw(settings, source, 0)
    few = r"data.shots=9 is more than some classes have to train on: ape has 5, cat has 6; set it to 5 or less$"
    with pytest.raises(UserError, match=few):
        draw(ImageFolder(root=settings.root, shots=9), source, 0)  # type: ignore[attr-defined]
    bare = Source(train=source.train, class_names=[*SIZES, "dog"])
    with pytest.raises(UserError, match="dog has 0; leave these classes out of the data"):
        draw(ImageFolder(root=settings.root, shots=1), bare, 0)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("target", "label"), [("number", "2.5"), ("classes", "a;b")], ids=["numbers", "several labels"]
)
def test_samples_without_a_class_of_their_own_have_no_shots(target: str, label: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", ("text", "label"), [(f"t{i}", label) for i in range(8)])
    settings = Table(path=str(path), label_separator=";" if target == "classes" else None, shots=2)
    with pytest.raises(UserError, match="have no single class to learn; data.n_train"):
        draw(settings, settings.load(0, modality="text", target=target), 0)
