"""From files to uint8 pixels: decoding, resizing as timm does, the cache, subsets, augmentation."""

import json
import multiprocessing
import pickle
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from coeft.backbones._backbone import Preprocessing
from coeft.data import _cache, _decode
from coeft.data._data import Data, balanced, load_data, load_inputs, proportional
from coeft.data._decode import load_image, pixels, to_mode
from coeft.data._entries import cache_info, clear_cache
from coeft.data._images import ImageEncoder, image_inputs, resolve_preprocessing
from coeft.data._part import Part
from coeft.data._settings import ImageData
from coeft.data._source import Source, Split
from coeft.data._transforms import Augment, Normalize
from coeft.data.digits import Digits
from coeft.data.image_folder import ImageFolder
from coeft.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocessing(size=(8, 8), **changes) -> Preprocessing:
    plain = Preprocessing(image_size=size, mean=MEAN, std=STD, interpolation="bicubic", crop_pct=1.0)
    return replace(plain, **changes)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


def noise(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def tree(root: Path, per_class=(4, 4, 4), splits=("train", "test"), suffix=".png") -> Path:
    for s, split in enumerate(splits):
        for c, count in enumerate(per_class):
            (root / split / f"c{c}").mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(noise(9 + i, 12, seed=1000 * s + 100 * c + i))
                image.save(root / split / f"c{c}" / f"{i}{suffix}")
    return root


@pytest.fixture
def decodes(monkeypatch) -> list:
    """Grows by one item with each image that is decoded."""
    calls: list = []

    def counted(item, preprocessing):
        calls.append(item)
        return pixels(item, preprocessing)

    monkeypatch.setattr(_cache, "pixels", counted)
    return calls


# Resizing


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest"])
@pytest.mark.parametrize(
    ("size", "crop_pct", "resize"),
    [
        ((24, 24), 0.875, "crop"), ((24, 24), 1.0, "crop"), ((17, 17), 0.9, "crop"), ((20, 28), 0.875, "crop"),
        ((28, 20), 0.95, "crop"), ((24, 24), 1.0, "squash"), ((20, 28), 1.0, "squash"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("original", [(37, 53), (53, 37), (24, 24), (9, 31), (101, 100), (200, 33)])
def test_pixels_equal_timms_evaluation_transform(interpolation, size, crop_pct, resize, original):
    image = Image.fromarray(noise(*original))
    transform = timm.data.create_transform(
        (3, *size), crop_pct=crop_pct, crop_mode="squash" if resize == "squash" else "center",
        interpolation=interpolation, mean=MEAN, std=STD, normalize=False,
    )  # fmt: skip
    expected = transform(image)
    assert expected.dtype == torch.uint8
    chosen = preprocessing(size, crop_pct=crop_pct, resize=resize, interpolation=interpolation)
    np.testing.assert_array_equal(pixels(np.asarray(image), chosen), expected.numpy())


def test_normalised_pixels_equal_timms(tmp_path):
    Image.fromarray(noise(40, 50)).save(tmp_path / "a.jpg", quality=90)
    transform = timm.data.create_transform((3, 32, 32), crop_pct=0.9, interpolation="bicubic", mean=MEAN, std=STD)
    expected = transform(Image.open(tmp_path / "a.jpg").convert("RGB"))
    part = load_inputs(image_inputs([tmp_path / "a.jpg"]), ImageEncoder(preprocessing((32, 32), crop_pct=0.9)))
    ours = Normalize(MEAN, STD)(torch.from_numpy(part.images))
    torch.testing.assert_close(ours[0], expected, rtol=0, atol=1e-6)


def test_one_channel_models_get_gray():
    gray = preprocessing((6, 6), mean=(0.5,), std=(0.5,))
    expected = np.asarray(Image.fromarray(noise(6, 6)).convert("L"))
    np.testing.assert_array_equal(pixels(noise(6, 6), gray)[0], expected)
    assert load_data(Digits(), seed=0, encoder=ImageEncoder(gray)).train.images.shape[1:] == (1, 6, 6)


def test_gray_arrays_become_three_equal_channels():
    source = Digits().load(0)
    part = load_data(Digits(), seed=0, encoder=ImageEncoder(preprocessing((8, 8)))).train
    for channel in range(3):
        np.testing.assert_array_equal(part.images[:, channel], source.train.items)


# Decoding


def test_colour_modes(tmp_path):
    rgb = noise(5, 7)

    def read(image: Image.Image, name: str, **options) -> np.ndarray:
        image.save(tmp_path / name, **options)
        return np.asarray(to_mode(load_image(tmp_path / name), "RGB"))

    np.testing.assert_array_equal(read(Image.fromarray(rgb), "rgb.png"), rgb)
    gray = noise(5, 7, channels=1)
    np.testing.assert_array_equal(read(Image.fromarray(gray), "gray.png"), np.stack([gray] * 3, -1))

    alpha = np.concatenate([rgb, np.zeros((5, 7, 1), np.uint8)], -1)
    alpha[0, :, 3] = 255
    shown = read(Image.fromarray(alpha), "alpha.png")
    np.testing.assert_array_equal(shown[0], rgb[0])
    assert (shown[1:] == 255).all()  # transparent over white, whatever colour lies below

    palette = Image.fromarray(rgb).quantize(8)
    expected = np.asarray(palette.convert("RGB")).copy()
    np.testing.assert_array_equal(read(palette, "palette.png"), expected)
    index = np.asarray(palette)
    expected[index == 2] = 255
    np.testing.assert_array_equal(read(palette, "palette_alpha.png", transparency=2), expected)

    deep = np.linspace(0, 65535, 35).reshape(5, 7).astype(np.uint16)
    shown = read(Image.fromarray(deep), "deep.png")
    np.testing.assert_allclose(shown[..., 0], deep / 257, atol=0.5 + 1e-9)
    floats = np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7)
    np.testing.assert_allclose(read(Image.fromarray(floats), "f.tiff")[..., 1], floats * 255, atol=0.51)
    with pytest.raises(ValueError, match="pixels of mode F from -1 to 0; expected 0 to 1"):
        read(Image.fromarray(floats - 1), "g.tiff")
    black_white = read(Image.fromarray(gray > 127), "bw.png")
    np.testing.assert_array_equal(black_white[..., 2], np.where(gray > 127, 255, 0))
    assert read(Image.fromarray(rgb).convert("CMYK"), "cmyk.tiff").shape == (5, 7, 3)


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned 90 degrees clockwise
    Image.fromarray(noise(4, 9)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "a.png")), np.rot90(noise(4, 9), -1))


def huge_png(path: Path) -> None:
    """A PNG whose header promises 40000 x 40000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


def test_unreadable_files(tmp_path, monkeypatch):
    root = tree(tmp_path / "r", suffix=".jpg")
    settings = ImageFolder(root=str(root))
    whole = (root / "train" / "c1" / "2.jpg").read_bytes()
    (root / "train" / "c1" / "2.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (root / "train" / "c0" / "0.jpg").write_text("no image")
    huge_png(root / "test" / "c0" / "big.png")
    (root / "test" / "c0" / "gone.png").symlink_to(root / "nowhere.png")
    # Other libraries switch this on for the whole process.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(UserError) as caught:
        load_data(settings, seed=0, encoder=ImageEncoder(preprocessing()))
    first, *lines = str(caught.value).splitlines()
    assert first.startswith("2 images cannot be read; repair or remove, or set data.on_error=skip")
    assert lines[0] == "  train/c0/0.jpg: not an image in a format that Pillow reads"
    assert lines[1].startswith("  train/c1/2.jpg: ") and "truncated" in lines[1].lower()
    assert lines[2].startswith("2 images cannot be read")  # those of the test split, in the same message
    assert lines[3].startswith("  test/c0/big.png: refused as a decompression bomb") and len(lines) == 5
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True

    data = load_data(replace(settings, on_error="skip"), seed=0, encoder=ImageEncoder(preprocessing()))
    assert data.test is not None
    assert len(data.train) == 10 and len(data.test) == 12
    assert "train/c1/2.jpg" not in data.train.names and len(data.train.images) == 10
    bomb, gone = data.skipped[2:]
    assert bomb.startswith("test/c0/big.png: refused as a decompression bomb")
    assert gone == "test/c0/gone.png: no such file"
    summary = data.summary()
    assert len(summary["unreadable"]) == 4 and summary["splits"]["train"]["classes"] == {"c0": 3, "c1": 3, "c2": 4}
    assert any("4 unreadable images left out" in warning for warning in summary["warnings"])
    # The entry that lacks them is not taken for a good one, and is not decoded twice.
    with pytest.raises(UserError, match="2 images cannot be read") as again_caught:
        load_data(settings, seed=0, encoder=ImageEncoder(preprocessing()))
    assert str(again_caught.value) == str(caught.value)
    kept = data.train.images.copy()
    again = load_data(replace(settings, on_error="skip"), seed=0, encoder=ImageEncoder(preprocessing()))
    np.testing.assert_array_equal(again.train.images, kept)
    assert again.skipped == data.skipped and again.fingerprint == data.fingerprint


def test_nothing_readable(tmp_path):
    root = tree(tmp_path / "r", (1, 1), splits=("train",))
    for path in root.rglob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(UserError, match="no image of the train split can be read; the first: train/c0/0.png"):
        load_data(ImageFolder(root=str(root), on_error="skip"), seed=0, encoder=ImageEncoder(preprocessing()))


def test_many_unreadable_files_stop_early_and_keep_the_message_short(tmp_path):
    root = tmp_path / "r" / "a"
    root.mkdir(parents=True)
    for i in range(300):
        (root / f"{i:03}.png").write_bytes(b"x")
    with pytest.raises(UserError, match="^at least 256 images cannot be read") as caught:
        load_inputs(image_inputs([root]), ImageEncoder(preprocessing()))
    assert len(str(caught.value).splitlines()) == 11


def test_formats_that_run_programs_are_refused():
    assert ".jpg" in _decode.extensions() and ".webp" in _decode.extensions()
    assert not {".eps", ".ps", ".wmf", ".h5"} & _decode.extensions()
    with pytest.raises(ValueError, match="not an image in a format"):
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")


# Cache


def test_a_second_run_decodes_nothing(tmp_path, decodes, cache):
    settings = ImageFolder(root=str(tree(tmp_path / "r")))
    first = load_data(settings, seed=0, encoder=ImageEncoder(preprocessing()))
    assert len(decodes) == 24
    before = first.train.images.copy()
    shutil.copytree(tmp_path / "r", tmp_path / "moved")
    for root in ("r", "moved"):  # what counts is the content
        again = load_data(replace(settings, root=str(tmp_path / root)), seed=0, encoder=ImageEncoder(preprocessing()))
        assert len(decodes) == 24 and again.fingerprint == first.fingerprint
        np.testing.assert_array_equal(again.train.images, before)

    for changed in ((9, 9), preprocessing(interpolation="nearest"), preprocessing(resize="squash")):
        chosen = changed if isinstance(changed, Preprocessing) else preprocessing(changed)
        load_data(settings, seed=0, encoder=ImageEncoder(chosen))
    assert len(decodes) == 4 * 24
    other_colours = preprocessing(mean=(0.0, 0.0, 0.0))
    load_data(settings, seed=0, encoder=ImageEncoder(other_colours))
    assert len(decodes) == 4 * 24  # normalisation acts later

    Image.fromarray(noise(9, 9, seed=77)).save(tmp_path / "r" / "train" / "c0" / "0.png")
    changed_file = load_data(settings, seed=0, encoder=ImageEncoder(preprocessing()))
    assert len(decodes) == 4 * 24 + 12 and changed_file.fingerprint != first.fingerprint
    assert not list(cache.glob(".*.[!l]*")), "temporary folders are left"


@pytest.mark.parametrize("damage", ["flip", "truncate", "meta", "json", "checks", "missing"])
def test_a_damaged_entry_is_built_again(tmp_path, decodes, cache, damage):
    settings = ImageFolder(root=str(tree(tmp_path / "r", splits=("train",))))
    before = load_data(settings, seed=0, encoder=ImageEncoder(preprocessing())).train.images.copy()
    [entry] = [path for path in cache.iterdir() if path.is_dir()]
    file = entry / "pixels.npy"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-1000] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-1])
    elif damage == "meta":
        (entry / "meta.json").unlink()
    elif damage == "json":
        (entry / "meta.json").write_text("[1, 2")
    elif damage == "checks":
        (entry / "checks.npy").write_bytes(b"")
    else:
        file.unlink()
    again = load_data(settings, seed=0, encoder=ImageEncoder(preprocessing())).train
    assert len(decodes) == 24
    np.testing.assert_array_equal(again.images, before)
    load_data(settings, seed=0, encoder=ImageEncoder(preprocessing()))
    assert len(decodes) == 24


def test_what_a_killed_process_left_in_the_cache_goes_when_its_entry_is_built(tmp_path, decodes, cache):
    settings = ImageFolder(root=str(tree(tmp_path / "r", splits=("train",))))
    load_data(settings, seed=0, encoder=ImageEncoder(preprocessing()))
    [entry] = [path for path in cache.iterdir() if path.is_dir()]
    entry.rename(cache / f".{entry.name}.killed")
    other = cache / ".another-entry.killed"  # another process may be building it
    other.mkdir()
    load_data(settings, seed=0, encoder=ImageEncoder(preprocessing()))
    assert len(decodes) == 24
    assert {path.name for path in cache.iterdir() if path.is_dir()} == {entry.name, other.name}


def test_cache_info_and_clear(tmp_path, cache):
    empty = {"folder": str(cache.parent), "files": 0, "bytes": 0, "limit": 100 * 10**9, "entries": []}
    assert cache_info() == empty
    assert clear_cache() == (0, 0)
    data = load_data(ImageFolder(root=str(tree(tmp_path / "r"))), seed=0, encoder=ImageEncoder(preprocessing()))
    info = cache_info()
    assert {entry["made_from"] for entry in info["entries"]} == {"image_folder, train, 8x8", "image_folder, test, 8x8"}
    assert all(
        entry["samples"] == 12 and entry["kind"] == "images" and entry["bytes"] > 12 * 3 * 64
        for entry in info["entries"]
    )
    data.train.fetch([0])
    assert clear_cache() == (info["files"], info["bytes"]) and cache_info()["files"] == 0
    assert data.train.images.shape == (12, 3, 8, 8)  # what is mapped stays


def test_small_arrays_need_no_file(cache):
    load_data(Digits(), seed=0, encoder=ImageEncoder(preprocessing((16, 16))))
    assert not cache.exists()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COEFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="image cache .* cannot be written: .*set COEFT_CACHE=FOLDER"):
        load_data(ImageFolder(root=str(tree(tmp_path / "r"))), seed=0, encoder=ImageEncoder(preprocessing()))


def test_a_full_disk_is_said_before(tmp_path, monkeypatch, cache):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match="needs 0 MB and has 0 MB free; make room"):
        load_data(ImageFolder(root=str(tree(tmp_path / "r"))), seed=0, encoder=ImageEncoder(preprocessing()))


def _load_in_process(root: str, queue) -> None:
    queue.put(load_data(ImageFolder(root=root), seed=0, encoder=ImageEncoder(preprocessing())).train.images.sum())


def test_processes_at_the_same_time(tmp_path):
    root = str(tree(tmp_path / "r", (30, 30)))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_load_in_process, args=(root, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    sums = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    expected = load_data(ImageFolder(root=root), seed=0, encoder=ImageEncoder(preprocessing())).train.images.sum()
    assert sums == [expected] * 3 and [worker.exitcode for worker in workers] == [0, 0, 0]


def test_a_part_sent_to_a_worker_holds_paths_not_pixels(tmp_path):
    root = tree(tmp_path / "r")
    part = load_data(ImageFolder(root=str(root)), seed=0, encoder=ImageEncoder(preprocessing((64, 64)))).train
    before = part.images
    sent = pickle.dumps(part)
    assert len(sent) < before.nbytes / 10
    np.testing.assert_array_equal(pickle.loads(sent).images, before)


def test_threads_change_nothing(tmp_path, monkeypatch):
    root = str(tree(tmp_path / "r", (40, 40)))
    results = []
    for workers in (0, 1, 5):
        monkeypatch.setenv("COEFT_CACHE", str(tmp_path / f"cache{workers}"))
        data = load_data(ImageFolder(root=root, num_workers=workers), seed=0, encoder=ImageEncoder(preprocessing()))
        results.append(data.train.images)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


# Parts and subsets


def test_parts_share_pixels(tmp_path):
    data = load_data(ImageFolder(root=str(tree(tmp_path / "r"))), seed=0, encoder=ImageEncoder(preprocessing()))
    assert data.test is not None
    both = Part.joined([data.train.subset([3, 1]), data.test])
    assert len(both) == 14 and both.names.tolist()[:3] == ["train/c0/3.png", "train/c0/1.png", "test/c0/0.png"]
    expected = np.concatenate([data.train.images[[3, 1]], data.test.images])
    np.testing.assert_array_equal(both.images, expected)
    np.testing.assert_array_equal(both.fetch([13, 0, 5]), expected[[13, 0, 5]])
    np.testing.assert_array_equal(both.subset([5, 0]).images, expected[[5, 0]])
    np.testing.assert_array_equal(both.subset([5, 0]).labels, both.labels[[5, 0]])


labels_of_any_size = st.lists(st.integers(0, 3), min_size=1, max_size=60).map(np.array)


@given(labels=labels_of_any_size, seed=st.integers(0, 5), data=st.data())
@settings(max_examples=60, deadline=None)
def test_balanced_draws(labels, seed, data):
    order = balanced(labels, 4, seed)
    assert sorted(order) == list(range(len(labels)))
    count = data.draw(st.integers(1, len(labels)))
    have, there = np.bincount(labels[order[:count]], minlength=4), np.bincount(labels, minlength=4)
    for label in range(4):  # a class is behind the largest one only if it has no more
        assert have[label] >= have.max() - 1 or have[label] == there[label]


@given(labels=labels_of_any_size, seed=st.integers(0, 5), data=st.data())
@settings(max_examples=60, deadline=None)
def test_proportional_draws(labels, seed, data):
    order = proportional(labels, 4, seed)
    assert sorted(order) == list(range(len(labels)))
    count = data.draw(st.integers(1, len(labels)))
    have, there = np.bincount(labels[order[:count]], minlength=4), np.bincount(labels, minlength=4)
    assert np.abs(have - there * count / len(labels)).max() <= 2


def test_subsets_are_balanced_nested_and_follow_the_seed():
    def load(seed=0, **fields) -> Data:
        return load_data(Digits(**fields), seed=seed, encoder=ImageEncoder(preprocessing()))

    hundred = load(n_train=100)
    assert np.bincount(hundred.train.labels).tolist() == [10] * 10
    assert sorted(np.bincount(load(n_train=25).train.labels)) == [2] * 5 + [3] * 5
    assert set(load(n_train=25).train.names) < set(hundred.train.names)
    assert load(n_train=100).fingerprint == hundred.fingerprint != load(seed=1, n_train=100).fingerprint
    everything = load()
    position = {name: i for i, name in enumerate(everything.train.names)}
    chosen = [position[name] for name in hundred.train.names]
    assert chosen == sorted(chosen)
    np.testing.assert_array_equal(hundred.train.images, everything.train.images[chosen])

    tenth = load(fraction=0.1)
    expected = np.bincount(everything.train.labels) / 10
    assert len(tenth.train) == 180 and np.abs(np.bincount(tenth.train.labels) - expected).max() < 1

    parts = load(n_val=200, n_test=300, n_train=500)
    assert parts.val is not None and parts.test is not None
    names = [set(part.names) for part in (parts.train, parts.val, parts.test)]
    assert [len(group) for group in names] == [500, 200, 300] and len(set.union(*names)) == 1000
    assert np.bincount(parts.val.labels).tolist() == [20] * 10

    with pytest.raises(UserError, match="data.n_train=1798 is more than the 1,797 samples of the train split; set it"):
        load(n_train=1798)
    with pytest.raises(UserError, match="data.n_train=1700 is more than the 1,597 samples"):
        load(n_val=200, n_train=1700)
    with pytest.raises(UserError, match="data.n_val=1797 is more than the 1,796 samples"):
        load(n_val=1797)


def test_n_test_takes_from_the_splits_own_images(tmp_path):
    data = load_data(
        ImageFolder(root=str(tree(tmp_path / "r")), n_test=3, n_train=6), seed=0, encoder=ImageEncoder(preprocessing())
    )
    assert data.test is not None
    assert data.test.labels.tolist() == [0, 1, 2] and all(name.startswith("test/") for name in data.test.names)
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(UserError, match="data.n_test=13 is more than the 12 samples of the test split"):
        load_data(ImageFolder(root=str(tmp_path / "r"), n_test=13), seed=0, encoder=ImageEncoder(preprocessing()))


def test_summary_counts_duplicates(tmp_path):
    root = tree(tmp_path / "r")
    shutil.copy(root / "train" / "c0" / "0.png", root / "test" / "c1" / "same.png")
    shutil.copy(root / "train" / "c0" / "0.png", root / "train" / "c2" / "same.png")
    summary = load_data(ImageFolder(root=str(root)), seed=0, encoder=ImageEncoder(preprocessing())).summary()
    assert summary["duplicates"] == {"train": 1, "test": 0, "train/test": 1}
    assert summary["duplicate_names"] == {
        "train": ["train/c0/0.png = train/c2/same.png"],
        "train/test": ["train/c0/0.png = test/c1/same.png"],
    }
    assert summary["splits"]["val"] is None
    json.dumps(summary)


def test_classes_without_training_images_are_said(caplog):
    data = load_data(Digits(n_train=8), seed=0, encoder=ImageEncoder(preprocessing()))
    assert "2 of 10 classes have no training sample" in data.warnings[0] and data.warnings[0] in caplog.text


def test_fingerprint_sees_labels_names_and_pixels():
    def source(pixel=0, label=0, name="a", where="x") -> str:
        items = np.full((2, 3, 3), pixel, np.uint8)
        split = Split(items=items, labels=np.array([label, 1]), names=[where, "y"])
        return Source(train=split, class_names=[name, "b"]).fingerprint

    assert source() == source(where="elsewhere")
    assert len({source(), source(pixel=1), source(label=1), source(name="c")}) == 4


def test_resolve_preprocessing():
    backbone = preprocessing((224, 224), crop_pct=0.9)
    assert resolve_preprocessing(Digits(), backbone) == backbone
    settings = Digits(
        image_size=32, resize="squash", interpolation="nearest", mean=[0.0, 0.1, 0.2], std=[1, 1, 2], crop_pct=0.5
    )
    assert resolve_preprocessing(settings, backbone) == Preprocessing(
        image_size=(32, 32), resize="squash", interpolation="nearest", mean=(0.0, 0.1, 0.2), std=(1.0, 1.0, 2.0),
        crop_pct=0.5,
    )  # fmt: skip
    with pytest.raises(UserError, match="data.mean has 1 values, but the backbone takes 3 channels"):
        resolve_preprocessing(Digits(mean=[0.5]), backbone)


def test_inputs_of_predict(tmp_path, caplog):
    root = tree(tmp_path / "r", (2, 1), ("train",))
    part = load_inputs(image_inputs([root / "train" / "c1" / "0.png", root]), ImageEncoder(preprocessing()))
    assert part.labels.tolist() == [-1] * 4
    assert part.names.tolist() == [
        str(root / "train" / name) for name in ("c1/0.png", "c0/0.png", "c0/1.png", "c1/0.png")
    ]
    np.testing.assert_array_equal(part.images[0], part.images[3])
    with pytest.raises(UserError, match="nowhere.png: no such file or folder"):
        load_inputs(image_inputs([tmp_path / "nowhere.png"]), ImageEncoder(preprocessing()))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: the folder has no image"):
        load_inputs(image_inputs([tmp_path / "empty"]), ImageEncoder(preprocessing()))
    with pytest.raises(UserError, match="no input"):
        load_inputs(image_inputs([]), ImageEncoder(preprocessing()))
    (root / "bad.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"1 image cannot be read; .*\n  .*bad.png: not an image"):
        load_inputs(image_inputs([root]), ImageEncoder(preprocessing()))
    assert (
        len(load_inputs(image_inputs([root]), ImageEncoder(preprocessing()), "skip")) == 3
        and "bad.png left out" in caplog.text
    )


def test_settings_are_abstract():
    with pytest.raises(NotImplementedError):
        ImageData().load(0)


# Augmentation


def batch(count=64, height=16, width=16, channels=3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, channels, height, width), dtype=np.uint8))


@pytest.mark.parametrize("names", [["flip"], ["random_resized_crop"], ["randaugment"], ["flip", "randaugment"]])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_is_uint8_seeded_and_differs_between_images(names, channels):
    part = preprocessing((16, 16), mean=MEAN[:channels], std=STD[:channels])
    augment = Augment(names, part)
    same = batch(1, channels=channels).expand(48, -1, -1, -1)
    torch.manual_seed(0)
    first = augment(same)
    assert first.dtype == torch.uint8 and first.shape == same.shape
    assert len(torch.unique(first.flatten(1), dim=0)) > 1
    torch.manual_seed(0)
    torch.testing.assert_close(augment(same), first, rtol=0, atol=0)
    torch.manual_seed(1)
    assert not torch.equal(augment(same), first)
    augment.eval()
    assert torch.equal(augment(same), same)
    assert not list(augment.state_dict()) and not list(Normalize(MEAN, STD).state_dict())


def test_half_of_the_images_are_flipped():
    images = batch(1000)
    torch.manual_seed(0)
    out = Augment(["flip"], preprocessing((16, 16)))(images)
    flipped = (out == images.flip(-1)).flatten(1).all(1)
    unchanged = (out == images).flatten(1).all(1)
    assert (flipped ^ unchanged).all() and 430 < int(flipped.sum()) < 570  # 500 +- 4.4 standard deviations


def test_random_crops_have_the_models_size_and_keep_order():
    images = batch(6, 20, 20)
    torch.manual_seed(0)
    assert Augment(["random_resized_crop"], preprocessing((12, 14)))(images).shape == (6, 3, 12, 14)
    plain = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 16, 16)
    out = Augment(["random_resized_crop"], preprocessing((16, 16)))(plain)
    assert torch.equal(out, plain)


def test_no_augmentation_is_the_identity():
    images = batch(3)
    assert Augment([], preprocessing())(images) is images


@pytest.mark.parametrize("act", ["changed", "vanished"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_file_that_changes_between_hash_and_decoding_is_named(act, on_error, tmp_path, cache, monkeypatch) -> None:
    """Else other pixels would stand in the cache under the hash of what was there before."""
    root = tree(tmp_path / "data")
    path = root / "train" / "c1" / "2.png"
    key = _cache._key

    def and_then(split, wanted) -> str:
        found = key(split, wanted)
        if "train/c1/2.png" in split.names:
            Image.fromarray(noise(30, 30)).save(path) if act == "changed" else path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(_cache, "_key", and_then)
    with pytest.raises(UserError, match="c1/2.png") as caught:
        load_data(ImageFolder(root=str(root), on_error=on_error), seed=0, encoder=ImageEncoder(preprocessing()))
    if (act, on_error) != ("vanished", "raise"):
        assert "changed while it was read" in str(caught.value) and "start again" in str(caught.value)
    assert len(list(cache.glob("*/meta.json"))) == 1  # of the test split


def test_a_cache_that_is_cleared_takes_nothing_from_what_is_open(tmp_path, cache) -> None:
    settings = ImageFolder(root=str(tree(tmp_path / "data")))
    data = load_data(settings, seed=0, encoder=ImageEncoder(preprocessing()))
    assert data.test is not None
    other = pickle.loads(pickle.dumps(data.test))  # as a worker process gets it
    wanted = data.train.images.copy()
    clear_cache()
    np.testing.assert_array_equal(data.train.images, wanted)
    assert data.test.images.shape[0] == 12
    with pytest.raises(UserError, match="cleared meanwhile.*coeft resume"):
        _ = other.images
