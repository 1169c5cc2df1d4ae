"""The kinds of data: what they read, and what they say when it is wrong."""

import gzip
import os
import re
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from PIL import Image

from coeft.backbones._backbone import Preprocessing
from coeft.config import kinds, settings_class
from coeft.data._data import load_data
from coeft.data._idx import DEBIAN
from coeft.data._images import ImageEncoder
from coeft.data.digits import Digits
from coeft.data.fashion_mnist import FashionMNIST
from coeft.data.hub import Columns, Hub
from coeft.data.image_folder import ImageFolder
from coeft.data.vtab import VTAB
from coeft.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("COEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COEFT_DATA", str(tmp_path / "data"))


@pytest.fixture
def preprocessing():
    def make(size=8):
        half = (0.5, 0.5, 0.5)
        return Preprocessing(image_size=(size, size), mean=half, std=half, interpolation="bicubic", crop_pct=1.0)

    return make


def picture(path: Path, color=(10, 20, 30), size=(6, 5)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def class_tree(root: Path, classes=("cat", "dog"), count=3, start=0) -> Path:
    for c, name in enumerate(classes):
        for i in range(count):
            picture(root / name / f"{i}.png", (start + 10 * c + i, c, i))
    return root


# Settings


@pytest.mark.parametrize("kind", kinds("data"))
def test_yaml_has_the_defaults_of_the_dataclass(kind):
    written = yaml.safe_load((CONF / f"{kind}.yaml").read_text())
    assert next(iter(written)) == "kind" and written["kind"] == kind
    assert written == OmegaConf.to_container(OmegaConf.structured(settings_class("data", kind)))


def test_settings_import_no_torch():
    code = (
        "import sys; from coeft.config import kinds, settings_class\n"
        "for kind in kinds('data'): settings_class('data', kind)\n"
        "assert not {'torch', 'numpy', 'PIL', 'sklearn', 'datasets'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_train": 0}, "data.n_train must be 1 or more, or null, not 0"),
        ({"image_size": -1}, "data.image_size must be 1 or more"),
        ({"batch_size": 0}, "data.batch_size must be 1 or more, not 0"),
        ({"num_workers": -1}, "data.num_workers must be 0 or more"),
        ({"fraction": 1.5}, "data.fraction must be in (0, 1], or null, not 1.5"),
        (
            {"fraction": 0.5, "n_train": 5},
            "data.n_train and data.fraction choose the training samples; set all but one",
        ),
        ({"fraction": 0.5, "shots": 2}, "data.fraction and data.shots choose"),
        ({"shots": 0}, "data.shots must be 1 or more, or null, not 0"),
        ({"on_error": "ignore"}, "data.on_error must be raise or skip, not 'ignore'"),
        ({"resize": "pad"}, "data.resize must be crop, squash or null"),
        ({"interpolation": "bicubik"}, "data.interpolation must be one of bicubic, bilinear, nearest"),
        ({"crop_pct": 0.0}, "data.crop_pct must be in (0, 1]"),
        ({"std": [1.0, 0.0, 1.0]}, "data.std must be positive numbers"),
        ({"mean": [float("nan")]}, "data.mean must be finite"),
        ({"augment": ["flp"]}, "data.augment: no augmentation 'flp'; did you mean flip?"),
        ({"augment": ["flip", "flip"]}, "data.augment names an augmentation twice"),
        ({"splits": {"trian": "train"}}, "data.splits has no key 'trian'; did you mean train?"),
    ],
)
def test_settings_out_of_range(fields, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Digits(**fields)


# Digits


def test_digits():
    from sklearn.datasets import load_digits

    source = Digits().load(0)
    images = load_digits().images
    assert source.train.items.dtype == np.uint8 and source.train.items.shape == (1797, 8, 8)
    assert source.train.items.min() == 0 and source.train.items.max() == 255
    np.testing.assert_allclose(source.train.items, images * 255 / 16, atol=0.5)
    np.testing.assert_array_equal(source.train.labels, load_digits().target)
    assert source.test is None and source.val is None
    with pytest.raises(UserError, match="data.splits.test: digits has no split 'test'; there are train"):
        Digits(splits={"train": "train", "test": "test"}).load(0)
    with pytest.raises(UserError, match="data.splits.train is null: there is nothing to train on"):
        Digits(splits={"train": None}).load(0)
    with pytest.raises(UserError, match="data.splits.train and data.splits.val both name 'train'"):
        Digits(splits={"train": "train", "val": "train"}).load(0)
    with pytest.raises(UserError, match="cv.group=writer: data=digits has no column"):
        Digits().load(0, "writer")


# Fashion-MNIST


def write_idx(path: Path, array: np.ndarray, magic: int | None = None) -> None:
    head = (0x800 + array.ndim if magic is None else magic).to_bytes(4, "big")
    data = head + b"".join(int(n).to_bytes(4, "big") for n in array.shape) + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def idx(tmp_path):
    rng = np.random.default_rng(0)
    for stem, n in (("train", 30), ("t10k", 10)):
        suffix = ".gz" if stem == "train" else ""
        write_idx(tmp_path / "f" / f"{stem}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (n, 28, 28)))
        write_idx(tmp_path / "f" / f"{stem}-labels-idx1-ubyte{suffix}", np.arange(n) % 10)
    return tmp_path / "f"


def test_fashion_mnist_from_idx_files(idx):
    source = FashionMNIST(root=str(idx)).load(0)
    expected = np.random.default_rng(0).integers(0, 256, (30, 28, 28))
    np.testing.assert_array_equal(source.train.items, expected)
    np.testing.assert_array_equal(source.train.labels, np.arange(30) % 10)
    assert source.test is not None and len(source.test) == 10 and source.class_names[9] == "Ankle boot"

    some = FashionMNIST(root=str(idx), classes=[7, 2]).load(0)
    assert some.class_names == ["Sneaker", "Pullover"]
    np.testing.assert_array_equal(some.train.labels, [1, 0] * 3)
    np.testing.assert_array_equal(some.train.items, expected[[2, 7, 12, 17, 22, 27]])
    assert some.train.names[0] == "train[2]"


def test_fashion_mnist_classes_are_checked():
    with pytest.raises(UserError, match="no class 10; labels are 0 to 9"):
        FashionMNIST(classes=[1, 10])
    with pytest.raises(UserError, match="two or more different labels"):
        FashionMNIST(classes=[1])


def test_fashion_mnist_in_the_data_folder(idx, tmp_path):
    (tmp_path / "data").mkdir()
    os.rename(idx, tmp_path / "data" / "fashion-mnist")
    assert len(FashionMNIST().load(0).train) == 30


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03\0\0"), "t10k-images.* is no IDX file"),
        (lambda d: write_idx(d / "t10k-labels-idx1-ubyte", np.zeros(10), magic=2051), "t10k-labels.*starts with 2051"),
        (
            lambda d: (d / "t10k-images-idx3-ubyte").write_bytes((d / "t10k-images-idx3-ubyte").read_bytes()[:-1]),
            "t10k-images.* is truncated: its header says 10 x 28 x 28 = 7,840 bytes, it has 7,839",
        ),
        (
            lambda d: (d / "train-images-idx3-ubyte.gz").write_bytes(
                (d / "train-images-idx3-ubyte.gz").read_bytes()[:-20]
            ),
            "train-images-idx3-ubyte.gz is truncated or damaged",
        ),
        (lambda d: write_idx(d / "t10k-labels-idx1-ubyte", np.zeros(9)), "10 images but .*t10k-labels.* 9 labels"),
        (lambda d: write_idx(d / "t10k-labels-idx1-ubyte", np.full(10, 11)), "label 11 at position 0; expected 0 to 9"),
        (lambda d: (d / "t10k-labels-idx1-ubyte").unlink(), "has no t10k-labels-idx1-ubyte or .*gz"),
        (lambda d: (d / "train-images-idx3-ubyte.gz").unlink(), "data.root=.* has no train-images-idx3-ubyte"),
    ],
)
def test_fashion_mnist_damaged(idx, damage, message):
    damage(idx)
    with pytest.raises(UserError, match=message):
        FashionMNIST(root=str(idx)).load(0)


def test_fashion_mnist_absent_names_both_ways(monkeypatch, tmp_path):
    monkeypatch.setattr("coeft.data._idx.DEBIAN", tmp_path / "nothing")
    with pytest.raises(UserError, match=r"package dataset-fashion-mnist .*data\.root=FOLDER"):
        FashionMNIST().load(0)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian():
    source = FashionMNIST().load(0)
    assert source.test is not None
    assert source.train.items.shape == (60000, 28, 28) and source.test.items.shape == (10000, 28, 28)
    assert np.bincount(source.train.labels).tolist() == [6000] * 10
    assert np.bincount(source.test.labels).tolist() == [1000] * 10


# Image folders


def test_class_folders(tmp_path):
    root = class_tree(tmp_path / "Bilder mit Ö [1]", ("müde Katze", "b", "a"))
    (root / ".hidden").mkdir()
    (root / "a" / ".DS_Store").write_bytes(b"x")
    (root / "a" / "notes.txt").write_text("x")
    picture(root / "b" / "deep" / "z.PNG")
    (root / "b" / "link.png").symlink_to(root / "a" / "0.png")
    (root / "b" / "loop").symlink_to(root / "b")
    source = ImageFolder(root=str(root)).load(0)
    assert source.class_names == ["a", "b", "müde Katze"]
    assert source.train.names == [
        *(f"a/{i}.png" for i in range(3)),
        *(f"b/{i}.png" for i in range(3)), "b/deep/z.PNG", "b/link.png",
        *(f"müde Katze/{i}.png" for i in range(3)),
    ]  # fmt: skip
    assert np.bincount(source.train.labels).tolist() == [3, 5, 3]
    assert source.val is None and source.test is None
    assert source.warnings == ["1 files that are no images of a class are ignored: a/notes.txt"]


def test_split_folders_of_usual_and_other_names(tmp_path):
    class_tree(tmp_path / "r" / "train")
    class_tree(tmp_path / "r" / "valid", start=50)
    class_tree(tmp_path / "r" / "holdout", start=100, count=2)
    source = ImageFolder(root=str(tmp_path / "r")).load(0)
    assert source.val is not None and len(source.val) == 6 and source.test is None
    assert source.val.names[0] == "valid/cat/0.png"
    splits = {"train": "auto", "val": None, "test": "holdout"}
    source = ImageFolder(root=str(tmp_path / "r"), splits=splits).load(0)
    assert source.val is None and source.test is not None and len(source.test) == 4
    with pytest.raises(UserError, match=r"data.splits.test: .* has no split 'holdot'; did you mean holdout\?"):
        ImageFolder(root=str(tmp_path / "r"), splits={"train": "train", "test": "holdot"}).load(0)


def test_a_class_may_be_called_train(tmp_path):
    root = class_tree(tmp_path / "r", ("car", "train"))
    assert ImageFolder(root=str(root)).load(0).class_names == ["car", "train"]


def test_labels_of_other_splits_count_in_the_training_classes(tmp_path):
    class_tree(tmp_path / "r" / "train", ("a", "b", "c"))
    class_tree(tmp_path / "r" / "test", ("a", "c"))
    with pytest.raises(UserError, match=r"test lacks 1 of train's 3 classes: b \(data.missing_classes=true"):
        ImageFolder(root=str(tmp_path / "r")).load(0)
    test = ImageFolder(root=str(tmp_path / "r"), missing_classes=True).load(0).test
    assert test is not None and np.bincount(test.labels).tolist() == [3, 0, 3]
    class_tree(tmp_path / "r" / "test", ("bb", "b"))
    with pytest.raises(UserError, match=r"test/bb: train has no class 'bb'; did you mean b\?"):
        ImageFolder(root=str(tmp_path / "r")).load(0)


def test_image_folder_mistakes(tmp_path):
    def load(root, **fields):
        return ImageFolder(root=str(root), **fields).load(0)

    with pytest.raises(UserError, match="data.root is missing: give it as data.root=FOLDER"):
        ImageFolder().load(0)
    class_tree(tmp_path / "animals")
    with pytest.raises(UserError, match=r"data.root=.*animal: no such folder; in .*did you mean animals\?"):
        load(tmp_path / "animal")
    with pytest.raises(UserError, match="no such folder; what exists of it is"):
        load(tmp_path / "x" / "y" / "z")
    with pytest.raises(UserError, match="is a file; give the folder"):
        load(tmp_path / "animals" / "cat" / "0.png")
    (tmp_path / "animals" / "emu").mkdir()
    with pytest.raises(UserError, match=r"animals/emu: the class folder has no image \(it is empty\)"):
        load(tmp_path / "animals")
    (tmp_path / "animals" / "emu" / "x.txt").write_text("")
    with pytest.raises(UserError, match=r"emu: the class folder has no image \(only x.txt\)"):
        load(tmp_path / "animals")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no class folder; expected empty/CLASS/image.jpg"):
        load(tmp_path / "empty")
    picture(tmp_path / "flat" / "a.png")
    with pytest.raises(UserError, match="flat has 1 images but no class folder"):
        load(tmp_path / "flat")
    picture(tmp_path / "undivided" / "train" / "a.png")
    picture(tmp_path / "undivided" / "test" / "a.png")
    with pytest.raises(UserError, match="has test, train, but no train/CLASS/image.jpg"):
        load(tmp_path / "undivided")


def test_groups(tmp_path):
    root = class_tree(tmp_path / "r")
    with pytest.raises(UserError, match="cv.group=patient needs .*groups.csv: a table with the columns path and patie"):
        ImageFolder(root=str(root)).load(0, "patient")
    rows = [f"{c}/{i}.png,p{i}" for c in ("cat", "dog") for i in range(3)]
    table = root / "groups.csv"
    table.write_text("path,patient\n" + "\n".join(rows) + "\n")
    source = ImageFolder(root=str(root)).load(0, "patient")
    assert source.train.groups is not None and source.train.groups.tolist() == ["p0", "p1", "p2"] * 2
    with pytest.raises(UserError, match=r"has no such column; did you mean patient\?"):
        ImageFolder(root=str(root)).load(0, "patiant")
    table.write_text("path,patient\n" + "\n".join(rows[:-1]) + "\n")
    with pytest.raises(UserError, match="no row for 1 of 6 files: dog/2.png"):
        ImageFolder(root=str(root)).load(0, "patient")
    table.write_text("path,patient\n" + "\n".join([*rows, "dog/2.png,p9"]))
    with pytest.raises(UserError, match="row 8: dog/2.png is in group 'p9' and in 'p2'"):
        ImageFolder(root=str(root)).load(0, "patient")
    table.write_text("path,patient\ncat/0.png,\n")
    with pytest.raises(UserError, match="row 2: column patient is empty"):
        ImageFolder(root=str(root)).load(0, "patient")


# VTAB-1k


@pytest.fixture
def vtab(tmp_path):
    task = tmp_path / "vtab-1k" / "cifar"
    lines = []
    for i in range(12):
        picture(task / "images" / "train" / f"{i} x.png", (i, i, i))
        lines.append(f"images/train/{i} x.png {i % 3}")
    (task / "train800.txt").write_text("\n".join(lines[:6]))
    (task / "val200.txt").write_text("\n".join(lines[6:9]) + "\n\n")
    (task / "train800val200.txt").write_text("\n".join(lines[:9]))
    (task / "test.txt").write_text("\n".join(lines[9:]))
    return tmp_path / "vtab-1k"


def test_vtab_folder(vtab, preprocessing):
    settings = VTAB(name="cifar100", root=str(vtab))
    source = settings.load(0)
    assert source.class_names == ["0", "1", "2"] and source.val is not None and source.test is not None
    assert [len(source.train), len(source.val), len(source.test)] == [6, 3, 3]
    assert source.train.names[4] == "images/train/4 x.png" and source.train.labels[4] == 1
    same = VTAB(name="anything", root=str(vtab / "cifar")).load(0)
    assert same.fingerprint == source.fingerprint
    both = VTAB(name="cifar", root=str(vtab), splits={"train": "train800val200", "test": "test"}).load(0)
    assert len(both.train) == 9 and both.val is None
    data = load_data(settings, seed=0, encoder=ImageEncoder(preprocessing(size=4)))
    assert data.train.images[5, :, 0, 0].tolist() == [5, 5, 5]


def test_vtab_mistakes(vtab):
    def load(name="cifar", root=vtab, **fields):
        return VTAB(name=name, root=str(root), **fields).load(0)

    with pytest.raises(UserError, match=r"no folder cifa, .*data.name=cifa: did you mean cifar\?"):
        load("cifa")
    with pytest.raises(UserError, match="data.name is missing"):
        VTAB(root=str(vtab)).load(0)
    with pytest.raises(UserError, match="train800val200 and a part of it"):
        load(splits={"train": "train800val200", "val": "val200"})
    with pytest.raises(UserError, match="has no split 'val20'; did you mean val200"):
        load(splits={"train": "train800", "val": "val20"})
    with pytest.raises(UserError, match="hub_splits must name train and test"):
        VTAB(hub_splits={"train": "train"})
    task = vtab / "cifar"
    (task / "val200.txt").write_text("images/train/1 x.png 0\nimages/none.png 1\nimages/train/2 x.png two\nalone\n")
    with pytest.raises(UserError) as caught:
        load()
    assert str(caught.value).splitlines() == [
        f"{task}/val200.txt, row 2: no image {task}/images/none.png",
        f"{task}/val200.txt, row 3: label 'two' is not an integer from 0",
        f"{task}/val200.txt, row 4: 'alone'; expected `relative/path label`",
    ]
    (task / "val200.txt").write_text("")
    with pytest.raises(UserError, match="val200.txt is empty"):
        load()
    (task / "val200.txt").unlink()
    with pytest.raises(UserError, match="val200.txt: no such list; .*train800val200"):
        load()


def test_vtab_classes_and_lengths_are_those_of_the_task(vtab):
    def load(**fields):
        return VTAB(name="cifar100", root=str(vtab), **fields).load(0)

    loose, pinned = load(), load(num_classes=3, num_test=3)
    assert pinned.class_names == loose.class_names == ["0", "1", "2"]
    assert [text.partition(": ")[2] for text in pinned.warnings] == [
        "train800 has 6 images, VTAB-1k's has 800: the numbers are not comparable",
        "val200 has 3 images, VTAB-1k's has 200: the numbers are not comparable",
    ]
    assert "test has 3 images, VTAB-1k's has 10,000" in load(num_test=10_000).warnings[-1]
    more = load(num_classes=5)
    assert more.class_names == list("01234")
    assert "labels up to 2, but cifar100 has 5 classes; is this its folder?" in more.warnings[-1]
    with pytest.raises(UserError) as caught:
        load(num_classes=2)
    first, *rest = str(caught.value).splitlines()
    assert first == (
        f"{vtab}/cifar/train800.txt, row 3: label 2, but the task has 2 classes (data.num_classes), labels 0 to 1"
    )
    assert len(rest) == 3
    with pytest.raises(UserError, match="data.num_classes must be 1 or more, or null, not 0"):
        VTAB(num_classes=0)


@pytest.mark.parametrize("task", ["clevr_distance", "dsprites_location", "dsprites_orientation", "smallnorb_azimuth"])
def test_vtab_folders_have_the_short_names_in_use(vtab, task):
    short = {"clevr_distance": "clevr_dist", "smallnorb_azimuth": "smallnorb_azi"}.get(task, task[:12])
    (vtab / "cifar").rename(vtab / short)
    assert len(VTAB(name=task, root=str(vtab)).load(0).train) == 6
    assert len(VTAB(name=short, root=str(vtab)).load(0).train) == 6


def test_vtab_from_a_parent_data_set_says_that_the_split_is_not_official(tmp_path, preprocessing):
    import datasets

    def table(count):
        images = [Image.new("RGB", (4, 4), (i % 256, i // 256, 7)) for i in range(count)]
        features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=list("abcd"))})
        return datasets.Dataset.from_dict({"img": images, "fine_label": [i % 4 for i in range(count)]}, features)

    datasets.DatasetDict({"train": table(1100), "test": table(12)}).save_to_disk(str(tmp_path / "d"))
    columns = Columns(image="img", label="fine_label")
    settings = VTAB(name="cifar100", hub_name=str(tmp_path / "d"), hub_columns=columns)
    source = settings.load(3)
    assert source.val is not None and source.test is not None
    assert np.bincount(source.train.labels).tolist() == [200] * 4
    assert np.bincount(source.val.labels).tolist() == [50] * 4 and len(source.test) == 12
    assert not set(source.train.names) & set(source.val.names)
    assert "not the official VTAB-1k split" in source.warnings[0] and len(source.warnings) == 1
    exact = replace(settings, num_classes=4, num_test=13)
    assert exact.load(3).warnings[1].endswith("test has 12 images, VTAB-1k's has 13: the numbers are not comparable")
    with pytest.raises(UserError, match=r"has 4 classes, but VTAB-1k's task cifar100 has 100 \(data.num_classes\)"):
        replace(settings, num_classes=100).load(3)
    assert settings.load(3).train.names == source.train.names != settings.load(4).train.names
    both = VTAB(
        name="cifar100", hub_name=str(tmp_path / "d"), hub_columns=columns, splits={"train": "train800val200"}
    ).load(3)
    assert set(both.train.names) == set(source.train.names) | set(source.val.names)
    with pytest.raises(UserError, match="data.hub_splits.test=tset: .* has no such split; did you mean test"):
        VTAB(
            name="c", hub_name=str(tmp_path / "d"), hub_columns=columns, hub_splits={"train": "train", "test": "tset"}
        ).load(0)


def test_vtab_without_copy_or_hub_name():
    with pytest.raises(UserError, match=r"data\.root=FOLDER.*train800\.txt.*data\.hub_name=NAME"):
        VTAB(name="cifar100").load(0)


# Hugging Face data sets


@pytest.fixture
def parquet(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "kind": datasets.ClassLabel(names=["x", "y"]),
            "text_kind": datasets.Value("string"),
            "number": datasets.Value("int64"),
            "patient": datasets.Value("int64"),
        }
    )
    for name, n in (("train", 8), ("validation", 4), ("test", 4)):
        rows = {
            "picture": [Image.new("RGB", (5, 4), (i, 100, n)) for i in range(n)],
            "kind": [i % 2 for i in range(n)],
            "text_kind": ["pq"[i % 2] for i in range(n)],
            "number": [[10, 9][i % 2] for i in range(n)],
            "patient": [i // 2 for i in range(n)],
        }
        (tmp_path / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features).to_parquet(str(tmp_path / "set" / f"{name}-0.parquet"))
    return tmp_path / "set"


def test_hub_reads_local_parquet(parquet, tmp_path, preprocessing):
    hub = {"cache_dir": str(tmp_path / "hf")}
    settings = Hub(name=str(parquet), columns=Columns(image="picture", label="kind"), **hub)
    source = settings.load(0, "patient")
    assert source.class_names == ["x", "y"] and source.val is not None and source.test is not None
    assert [len(source.train), len(source.val), len(source.test)] == [8, 4, 4]
    assert source.train.groups is not None and source.train.groups.tolist() == ["0", "0", "1", "1", "2", "2", "3", "3"]
    data = load_data(settings, seed=0, encoder=ImageEncoder(preprocessing(size=4)))
    assert data.train.images[:, :, 0, 0].tolist() == [[i, 100, 8] for i in range(8)]

    texts = Hub(name=str(parquet), columns=Columns(image="picture", label="text_kind"), **hub).load(0)
    assert texts.class_names == ["p", "q"] and texts.train.labels.tolist() == [0, 1] * 4
    numbers = Hub(name=str(parquet), columns=Columns(image="picture", label="number"), **hub).load(0)
    assert numbers.class_names == ["9", "10"] and numbers.train.labels.tolist() == [1, 0] * 4
    one = Hub(name=str(parquet / "train-0.parquet"), columns=Columns(image="picture", label="kind"), **hub).load(0)
    assert len(one.train) == 8 and one.test is None


def test_hub_mistakes(parquet, tmp_path):
    def load(group=None, splits=None, **columns):
        fields = {} if splits is None else {"splits": splits}
        settings = Hub(
            name=str(parquet),
            cache_dir=str(tmp_path / "hf"),
            columns=Columns(**{"image": "picture", "label": "kind"} | columns),
            **fields,
        )
        return settings.load(0, group)

    with pytest.raises(UserError, match=r"data.columns.image=pictur: split train has no such column; did you mean"):
        load(image="pictur")
    with pytest.raises(UserError, match=r"data.columns.label=knd: .*did you mean kind"):
        load(label="knd")
    with pytest.raises(UserError, match=r"cv.group=patent: .*did you mean patient"):
        load(group="patent")
    with pytest.raises(UserError, match=r"data.columns.image=number holds .*no images; columns of images: picture"):
        load(image="number")
    with pytest.raises(UserError, match=r"data.splits.test: .* has no split 'tset'; did you mean test"):
        load(splits={"train": "train", "test": "tset"})
    with pytest.raises(UserError, match="no such file or folder"):
        Hub(name="./nowhere").load(0)
    with pytest.raises(UserError, match="data.name is missing"):
        Hub().load(0)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="nothing cannot be read as a data set"):
        Hub(name=str(tmp_path / "nothing")).load(0)
    (tmp_path / "t.txt").write_text("")
    with pytest.raises(UserError, match=r"not a file of \.parquet"):
        Hub(name=str(tmp_path / "t.txt")).load(0)


def test_hub_labels_that_are_missing_or_unknown(tmp_path):
    import datasets

    def save(train, test):
        def table(labels):
            images = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(len(labels))]
            features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
            return datasets.Dataset.from_dict({"image": images, "label": labels}, features)

        folder = tmp_path / f"d{len(list(tmp_path.iterdir()))}"
        datasets.DatasetDict({"train": table(train), "test": table(test)}).save_to_disk(str(folder))
        return Hub(name=str(folder))

    with pytest.raises(UserError, match="split train, row 1: column label has no label"):
        save(["a", None], ["a"]).load(0)
    with pytest.raises(UserError, match="split test, row 1: label 'c' is not among the classes"):
        save(["a", "b"], ["a", "c"]).load(0)


def test_hub_without_network_says_both_ways_out_quickly(tmp_path, monkeypatch):
    asked = []

    def unreachable(*arguments, **named):
        asked.append(threading.current_thread() is threading.main_thread())
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    with pytest.raises(UserError) as caught:
        Hub(name="nobody/absent", config="c", cache_dir=str(tmp_path)).load(0)
    assert asked and not any(asked)  # only the question with a time limit, not the six of `datasets` in 23 seconds
    text = str(caught.value)
    assert "data set nobody/absent, configuration c is not in the local cache" in text
    assert "cannot be reached" in text and "data.name=FOLDER" in text and len(text.splitlines()) == 1
    with pytest.raises(UserError, match=r"data set o/n .*run once with a network, or give a local copy: data\.root="):
        VTAB(name="cifar100", hub_name="o/n").load(0)


def test_hub_that_does_not_answer_is_not_waited_for(monkeypatch, tmp_path):
    answer = threading.Event()
    monkeypatch.setattr("coeft.data._hub.ANSWER_WITHIN", 0.2)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **k: answer.wait())
    try:
        with pytest.raises(UserError, match="cannot be reached \\(no answer within 0.2 seconds\\)"):
            Hub(name="nobody/absent", cache_dir=str(tmp_path)).load(0)
    finally:
        answer.set()
