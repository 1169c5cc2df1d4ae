"""Wrong data: folders, images of every broken kind, lists, tables, and data sets of the Hub without a network."""

import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from small import TINY
from wrong.case import DIGITS, Case, Maker, both, text_file


def png(red: int = 90, size: int = 16) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (red % 256, 90, 10)).save(file, "PNG")
    return file.getvalue()


def jpeg(red: int = 90) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (red % 256, 90, 10)).save(file, "JPEG")
    return file.getvalue()


def folder(*parts: str, classes: tuple[str, ...] = ("cat", "dog")) -> Maker:
    """An image folder called images, with six images in each class of each part."""

    def make(here: Path) -> None:
        for part in parts or ("",):
            for place, name in enumerate(classes):
                path = here / "images" / part / name
                path.mkdir(parents=True, exist_ok=True)
                for number in range(6):
                    (path / f"{number}.png").write_bytes(png(40 * number + 100 * place))

    return make


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb() -> bytes:
    """A PNG of a hundred bytes that promises 100,000 x 100,000 pixels."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def tiff_of_floats() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8), 7.5, np.float32)).save(file, "TIFF")
    return file.getvalue()


def image(name: str, content: Callable[[], bytes], *words: str, file: str = "x.png") -> Case:
    """One broken image among whole ones."""
    return Case(
        name=f"an image {name}",
        argv=["train", *TINY, "data=image_folder", "data.root=images", "run_dir=out"],
        words=(f"cat/{file}", *words),
        make=both(folder(), lambda here: (here / "images" / "cat" / file).write_bytes(content())),
    )


def images(name: str, make: Maker, *words: str, more: tuple[str, ...] = ()) -> Case:
    """A wrong folder of images."""
    line = ["train", *TINY, "data=image_folder", "data.root=images", "run_dir=out", *more]
    return Case(name=f"images: {name}", argv=line, words=words, make=make)


def links(here: Path) -> None:
    folder()(here)
    (here / "images" / "cat" / "gone.png").symlink_to("nowhere.png")


def moved(old: str, new: str) -> Maker:
    return lambda here: (here / old).rename(here / new)


IMAGES = [
    images("a folder that is not there", folder(), "no such folder", "images", more=("data.root=imges",)),
    images("a file in place of the folder", text_file("images", "x"), "is a file; give the folder"),
    images("an empty folder", lambda here: (here / "images").mkdir(), "has no class folder", "CLASS/image.jpg"),
    images(
        "images without classes", lambda here: text_file("images/a.png", png())(here), "1 images but no class folder"
    ),
    images("an empty class", both(folder(), lambda here: (here / "images" / "emu").mkdir()), "emu", "has no image"),
    images(
        "a share of data with a test split",
        folder("train", "test"),
        "data.test_fraction=0.5",
        "data.splits.test=null",
        more=("data.test_fraction=0.5",),
    ),
    images("a class of other files", both(folder(), text_file("images/emu/a.txt", "x")), "emu", "only a.txt"),
    images("one class", folder(classes=("cat",)), "1 class", "two or more"),
    images(
        "a class of the test split alone",
        both(folder("train", "test"), moved("images/test/dog", "images/test/wolf")),
        "wolf",
        "train has no class",
        "same class folders",
    ),
    images("a split that lacks a class", both(folder("train"), folder("test", classes=("cat",))), "lacks 1", "dog"),
    images("a test split alone", folder("test"), "no train/CLASS/image.jpg"),
    images(
        "a split that does not exist",
        folder("train"),
        "data.splits.val",
        "'dev'",
        "train",
        more=("data.splits.val=dev",),
    ),
    images("the training split as test", folder("train"), "both name 'train'", more=("data.splits.test=train",)),
    images("a group without a table", folder(), "groups.csv", "cv.group=who", more=("cv.group=who",)),
    images(
        "a table of groups without paths",
        both(folder(), text_file("images/groups.csv", "file,who\na,b\n")),
        "no column 'path'",
        more=("cv.group=who",),
    ),
    images(
        "a table of groups without the column",
        both(folder(), text_file("images/groups.csv", "path,whom\na,b\n")),
        "cv.group=who",
        "whom",
        more=("cv.group=who",),
    ),
    images(
        "a table of groups with an empty cell",
        both(folder(), text_file("images/groups.csv", "path,who\na,\n")),
        "row 2",
        "who is empty",
        more=("cv.group=who",),
    ),
    images(
        "a table of groups that lacks images",
        both(folder(), text_file("images/groups.csv", "path,who\ncat/0.png,b\n")),
        "no row for 11 of 12",
        "cat/1.png",
        more=("cv.group=who",),
    ),
    images("a link to nothing", links, "gone.png", "no such file"),
    images("a table in place of a folder", text_file("images", "a,b\n"), "is a file", more=("data.root=images",)),
    image("that is cut off", lambda: png(size=64)[:-40], "truncated"),
    image("that is cut off in its header", lambda: png()[:20], "Truncated"),
    image("without a byte", lambda: b"", "not an image"),
    image("that is text", lambda: b"hello\n", "not an image"),
    image("that is a page of HTML", lambda: b"<!doctype html><html>404</html>", "not an image", file="x.jpg"),
    image("with damaged pixels", lambda: png(size=64).replace(b"IDAT", b"IDAX"), "cat/x.png"),
    image("with a wrong checksum", lambda: png()[:29] + b"\0\0\0\0" + png()[33:], "cat/x.png"),
    image("that is cut off, a JPEG", lambda: jpeg()[:300], "Truncated", file="x.jpg"),
    image("that is a bomb", bomb, "decompression bomb", "89,478,485 allowed", "smaller"),
    image("of no width", lambda: png().replace(struct.pack(">II", 16, 16), struct.pack(">II", 0, 16)), "cat/x.png"),
    image("of floats beyond one", tiff_of_floats, "7.5", "expected 0 to 1", file="x.tif"),
    image(
        "in a format that runs a program", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"
    ),
    image("that is a zip of noise", lambda: zlib.compress(b"x" * 99), "not an image", file="x.webp"),
    image("that is a TIFF without a page", lambda: b"II*\0\x08\0\0\0\0\0\0\0\0\0", "cat/x.tif", file="x.tif"),
    image("that is a GIF without a frame", lambda: b"GIF89a\x10\0\x10\0\0\0\0;", "cat/x.gif", file="x.gif"),
]


def idx(dimensions: tuple[int, ...], data: bytes, kind: int = 8) -> bytes:
    header = bytes([0, 0, kind, len(dimensions)]) + b"".join(struct.pack(">I", size) for size in dimensions)
    return header + data


def fashion(name: str, files: dict[str, bytes], *words: str, more: tuple[str, ...] = ()) -> Case:
    whole = {
        "train-images-idx3-ubyte": idx((20, 4, 4), bytes(320)),
        "train-labels-idx1-ubyte": idx((20,), bytes(range(10)) * 2),
        "t10k-images-idx3-ubyte": idx((10, 4, 4), bytes(160)),
        "t10k-labels-idx1-ubyte": idx((10,), bytes(range(10))),
    }
    written = [text_file(f"mnist/{file}", content) for file, content in {**whole, **files}.items() if content]
    line = ["train", *TINY, "data=fashion_mnist", "data.root=mnist", "run_dir=out", *more]
    return Case(name=f"IDX files: {name}", argv=line, words=words, make=both(*written))


IDX = [
    fashion("none", {"train-images-idx3-ubyte": b""}, "mnist", "no train-images-idx3-ubyte", "four such files"),
    fashion("no labels", {"train-labels-idx1-ubyte": b""}, "no train-labels-idx1-ubyte", "copy it there"),
    fashion("cut off", {"train-images-idx3-ubyte": idx((20, 4, 4), bytes(300))}, "truncated", "320", "copy it again"),
    fashion("too long", {"train-images-idx3-ubyte": idx((20, 4, 4), bytes(999))}, "too long", "320"),
    fashion(
        "sizes that overflow", {"train-images-idx3-ubyte": idx((2**32 - 1,) * 3, bytes(9))}, "truncated", "4294967295"
    ),
    fashion("another type", {"train-images-idx3-ubyte": idx((20, 4, 4), bytes(320), 13)}, "no IDX file", "2051"),
    fashion("fewer labels", {"train-labels-idx1-ubyte": idx((19,), bytes(19))}, "20 images but", "19 labels"),
    fashion("a label too large", {"train-labels-idx1-ubyte": idx((20,), b"\x0b" * 20)}, "label 11", "0 to 9"),
    fashion(
        "damaged compression",
        {"train-images-idx3-ubyte": b"", "train-images-idx3-ubyte.gz": gzip.compress(b"x" * 99)[:-9]},
        "train-images-idx3-ubyte.gz",
        "truncated or damaged",
    ),
    fashion("a class that does not exist", {}, "no class 10", "0 to 9", more=("data.classes=[0,10]",)),
    fashion("one class", {}, "two or more different labels", more=("data.classes=[3]",)),
    fashion("a split that does not exist", {}, "'validation'", "train", more=("data.splits.val=validation",)),
]


def vtab(name: str, lines: str | bytes, *words: str, more: tuple[str, ...] = ()) -> Case:
    made = both(
        *(text_file(f"vtab/tiny/images/{number}.png", png(number)) for number in range(4)),
        text_file("vtab/tiny/train800.txt", lines),
        text_file("vtab/tiny/val200.txt", "images/0.png 0\nimages/1.png 1\n"),
        text_file("vtab/tiny/test.txt", "images/2.png 0\nimages/3.png 1\n"),
    )
    line = ["train", *TINY, "data=vtab", "data.name=tiny", "data.root=vtab", "run_dir=out", *more]
    return Case(name=f"VTAB lists: {name}", argv=line, words=words, make=made)


VTAB = [
    vtab("a line without a label", "images/0.png\n", "train800.txt, row 1", "relative/path label"),
    vtab("a label that is no number", "images/0.png 0\nimages/1.png cat\n", "train800.txt, row 2", "'cat'"),
    vtab("an image that is not there", "images/0.png 0\nimages/9.png 1\n", "row 2", "no image", "9.png"),
    vtab("an empty list", "", "train800.txt is empty", "relative/path label"),
    vtab("bytes that are no text", b"images/\xff.png 0\n", "train800.txt", "UTF-8"),
    vtab("a label beyond all sense", f"images/0.png 0\nimages/1.png {10**18}\n", "train800.txt, row 2", "label"),
    vtab("a task that does not exist", "images/0.png 0\n", "no folder cifar100", more=("data.name=cifar100",)),
    vtab(
        "a list that does not exist", "images/0.png 0\n", "'train900'", "train800", more=("data.splits.train=train900",)
    ),
    vtab(
        "validation within training",
        "images/0.png 0\n",
        "data.splits.val=null",
        more=("data.splits.train=train800val200",),
    ),
]


# Tables, of text and of images.

TEXT = [
    "train",
    "backbone=hf",
    "backbone.name=llama",
    "backbone.pretrained=false",
    "data=table",
    "data.path=t.csv",
    "trainer.max_epochs=1",
    "run_dir=out",
]
GOOD = "text,label\n" + "".join(f"the sky is {word},{word}\n" for word in ["blue", "wet"] * 6)


def table(
    name: str,
    text: str | bytes,
    *words: str,
    more: tuple[str, ...] = (),
    file: str = "t.csv",
    make: Maker | None = None,
) -> Case:
    """A wrong table of texts."""
    made = text_file(file, text) if make is None else both(text_file(file, text), make)
    argv = [*TEXT, f"data.path={file}", *more]
    return Case(name=f"{file.rpartition('.')[2].upper()}: {name}", argv=argv, words=words, make=made, needs=("llama",))


def rows(*items: Any) -> str:
    return "".join(f"{json.dumps(item)}\n" for item in items)


TWO = rows({"text": "the sky", "label": "a"}, {"text": "the sea", "label": "b"})
CHAT = ("task=causal_lm", "data.messages=messages")
ASK = {"role": "user", "content": "sky?"}


def chats(name: str, messages: Any, *words: str) -> Case:
    good = {"messages": [ASK, {"role": "assistant", "content": "blue"}]}
    text = rows(*[good] * 4, {"messages": messages})
    return table(f"chats, {name}", text, "t.jsonl:5", *words, more=CHAT, file="t.jsonl")


def choices(name: str, row: dict[str, Any], *words: str) -> Case:
    good = {"q": "sky?", "c": ["blue", "wet"], "a": 0}
    more = ("task=multiple_choice", "data.input=q", "data.choices=c", "data.label=a")
    return table(f"choices, {name}", rows(*[good] * 4, {**good, **row}), "t.jsonl:5", *words, more=more, file="t.jsonl")


def parquet(columns: dict[str, list[Any]], cut: int | None = None) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()[:cut]


def nested(depth: int) -> str:
    return '{"text": ' + "[" * depth + "]" * depth + ', "label": "a"}\n'


TABLES = [
    table("a file that is not there", GOOD, "data.path=s.csv", "no such file", "t.csv", more=("data.path=s.csv",)),
    table("a file of another kind", "x", "data.path=t.txt", ".csv, .tsv, .jsonl, .parquet", file="t.txt"),
    table("a spreadsheet", b"PK\x03\x04", "data.path=t.xlsx", ".csv", file="t.xlsx"),
    table("a folder without tables", "", "no file of .csv", more=("data.path=d",), make=lambda h: (h / "d").mkdir()),
    table("an empty file", "", "the file is empty"),
    table("a header alone", "text,label\n", "t.csv", "no rows"),
    table("no column of labels", GOOD.replace("label", "lable", 1), "no column 'label'", "lable", "data.label"),
    table("no column of texts", GOOD.replace("text", "body", 1), "no column 'text'", "data.input"),
    table("a column twice", GOOD.replace("text,", "label,", 1), "names 'label' twice"),
    table("semicolons", GOOD.replace(",", ";"), "';'", "commas"),
    table("a cell too many", GOOD + "a,b,c\n", "t.csv:14", "3 cells, the header has 2", "in quotes"),
    table("a cell too few", GOOD + "a\n", "t.csv:14", "1 cell, the header has 2"),
    table("an open quote", GOOD + '"a,b\n', "t.csv:14", "never closed"),
    table("text after a quote", GOOD + '"a"b,c\n', "t.csv:14", 'written twice ("")'),
    table("an empty text", GOOD + ",blue\n", "t.csv:14", "column 'text' is empty"),
    table("an empty label", GOOD + "the sky,\n", "t.csv:14", "column 'label' is empty"),
    table("bytes that are no text", GOOD.encode() + b"caf\xe9,blue\n", "t.csv:14", "UTF-8", "0xe9"),
    table("UTF-16", GOOD.encode("utf-16"), "UTF-16", "save it as UTF-8"),
    table("one class", "text,label\n" + "sky,blue\n" * 9, "1 class", "two or more"),
    table("numbers that are none", "text,label\nsky,1.5\nsea,high\n", "t.csv:3", "'high'", more=("task=regression",)),
    table("numbers without end", "text,label\nsky,1\nsea,inf\n", "t.csv:3", "finite", more=("task=regression",)),
    table(
        "numbers too large", "text,label\nsky,1\n" + "sea,1e300\n" * 9, "t.csv:3", "1e300", more=("task=regression",)
    ),
    table("labels of several in one cell", GOOD, "data.label_separator", more=("task=multi_label",)),
    table(
        "flags that are none",
        "text,a,b\nsky,0,2\n",
        "t.csv:2",
        "not 0 or 1",
        more=("task=multi_label", "data.label=[a,b]"),
    ),
    table(
        "a split of a column that has none",
        GOOD,
        "no column 'part'",
        "data.split_column",
        more=("data.split_column=part",),
    ),
    table(
        "a name of a split without splits",
        GOOD,
        "data.splits.test=dev",
        "data.split_column",
        more=("data.splits.test=dev",),
    ),
    table(
        "a file for tests that is not there",
        GOOD,
        "data.splits.test=s.csv",
        "no such file",
        more=("data.splits.test=s.csv",),
    ),
    table(
        "a label of the test file alone",
        GOOD,
        "s.csv:2",
        "'dry'",
        "blue",
        more=("data.splits.test=s.csv",),
        make=text_file("s.csv", "text,label\nsky,dry\n"),
    ),
    table("a group that is no column", GOOD, "no column 'who'", "cv.group", more=("cv.group=who",)),
    table("two columns for an image", GOOD, "data.input", "must be the name of a column", more=("data.input=[a,b,c]",)),
    table("pairs and a list", GOOD, "data.pair", more=("data.pair=b", "data.input=[a,b]")),
    table("a length of none", GOOD, "data.max_length must be 1 or more", more=("data.max_length=0",)),
    table("settings of images", GOOD, "data.image_size", "leave out", more=("data.image_size=16",)),
    table(
        "a group of one value",
        "text,label,who\n" + "sky,a,me\nsea,b,me\n" * 6,
        "cv.group",
        "who",
        more=("cv.group=who", "cv.folds=3"),
    ),
    Case(
        name="CSV: images that are not there",
        argv=["train", *TINY, "data=table", "data.path=t.csv", "run_dir=out"],
        words=("t.csv:2", "no such image"),
        make=text_file("t.csv", "text,label\na.png,x\nb.png,y\n"),
    ),
    table("no tabs", GOOD, "tabs", file="t.tsv"),
    table("a broken row", TWO + '{"text": "a", label: 1}\n', "t.jsonl:3", "broken JSON", "column 15", file="t.jsonl"),
    table("a row cut off", TWO + '{"text": "a"', "t.jsonl:3", "broken JSON", file="t.jsonl"),
    table("a row that is a list", TWO + "[1]\n", "t.jsonl:3", "holds a list, not an object", file="t.jsonl"),
    table("a JSON list", "[\n" + TWO.replace("}\n", "},\n") + "]", "one object a line", file="t.jsonl"),
    table("a row without a key", TWO + '{"text": "a"}\n', "t.jsonl:3", "no key 'label'", file="t.jsonl"),
    table("a text that is a number", TWO + '{"text": 3, "label": "a"}\n', "t.jsonl:3", "not text", file="t.jsonl"),
    table(
        "a label that is a list", TWO + '{"text": "a", "label": ["b"]}\n', "t.jsonl:3", "not one word", file="t.jsonl"
    ),
    table("brackets a hundred thousand deep", TWO + nested(100_000), "t.jsonl:3", "broken JSON", file="t.jsonl"),
    table(
        "a number of ten thousand digits",
        TWO + f'{{"text": "a", "label": {"9" * 10_000}}}\n',
        "t.jsonl:3",
        "broken JSON",
        file="t.jsonl",
    ),
    table("half a character", TWO + '{"text": "\\ud800", "label": "a"}\n', "t.jsonl:3", "\\ud800", file="t.jsonl"),
    table("a file that is none", "x" * 99, "t.parquet", "not a Parquet file", file="t.parquet"),
    table("cut off", parquet({"text": ["a"] * 9, "label": ["b"] * 9}, -9), "t.parquet", "damaged", file="t.parquet"),
    table("no column of labels", parquet({"text": ["a"] * 9}), "no column 'label'", file="t.parquet"),
    table(
        "an empty cell",
        parquet({"text": ["a", None], "label": ["b", "c"]}),
        "t.parquet:2",
        "is empty",
        file="t.parquet",
    ),
    table(
        "bytes for texts",
        parquet({"text": [b"a", b"b"], "label": ["b", "c"]}),
        "t.parquet:1",
        "not text",
        file="t.parquet",
    ),
    chats("none", [], "'messages' is empty"),
    chats("text", "hello", "messages"),
    chats("a message that is a text", ["hello"], "role"),
    chats("a message without content", [ASK, {"role": "assistant"}], "content"),
    chats("an unknown role", [ASK, {"role": "robot", "content": "blue"}], "assistant"),
    chats("no answer", [ASK], "assistant"),
    chats("content that is a number", [ASK, {"role": "assistant", "content": 3}], "content"),
    choices("one", {"c": ["blue"]}, "1 choices", "2 to 26"),
    choices("an empty one", {"c": ["blue", ""]}, "choice 2 is empty"),
    choices("text", {"c": "blue, wet"}, "must be a list"),
    choices("an answer that is none", {"a": 7}, "'7'", "none of the 2 choices"),
    choices("an empty question", {"q": ""}, "'q'", "empty"),
    table(
        "a prompt without completions",
        TWO,
        "data.completion=COLUMN",
        more=("task=causal_lm", "data.prompt=text"),
        file="t.jsonl",
    ),
    table(
        "chats and prompts",
        TWO,
        "two kinds of data",
        file="t.jsonl",
        more=("task=causal_lm", "data.messages=text", "data.prompt=text", "data.completion=label"),
    ),
    table(
        "a template that is not there",
        TWO,
        "data.chat_template",
        "no.jinja",
        file="t.jsonl",
        more=(*CHAT, "data.chat_template=no.jinja"),
    ),
]


def hub(name: str, overrides: list[str], *words: str, make: Maker | None = None) -> Case:
    return Case(
        name=f"hub: {name}",
        argv=["train", *TINY, "data=hub", "run_dir=out", *overrides],
        words=words,
        make=make,
        environment={"HF_HUB_OFFLINE": "1"},
    )


HUB = [
    hub("no network", ["data.name=uoft-cs/cifar100"], "uoft-cs/cifar100", "HF_HUB_OFFLINE is set", "data.name=FOLDER"),
    hub("no name", [], "data.name is required"),
    hub("a folder that is not there", ["data.name=./nowhere"], "data.name=./nowhere", "no such file or folder"),
    hub("a file of another kind", ["data.name=./t.txt"], "t.txt", ".parquet", make=text_file("t.txt", "x")),
    hub(
        "a file that is none",
        ["data.name=./t.parquet"],
        "t.parquet",
        "cannot be read",
        make=text_file("t.parquet", "x" * 99),
    ),
    hub("an empty folder", ["data.name=./d"], "d", "cannot be read", make=lambda here: (here / "d").mkdir()),
    Case(
        name="hub: the parent of a task of VTAB, and no network",
        argv=["train", *TINY, "data=vtab", "data.name=cifar100", "data.hub_name=uoft-cs/cifar100", "run_dir=out"],
        words=("uoft-cs/cifar100", "HF_HUB_OFFLINE is set", "data.root=FOLDER"),
        environment={"HF_HUB_OFFLINE": "1"},
    ),
    Case(
        name="a model of the hub without a network",
        argv=["train", *DIGITS[5:], "backbone=hf", "backbone.name=google/vit-base-patch16-224"],
        words=("google/vit-base-patch16-224", "HF_HUB_OFFLINE is set", "backbone.weights=FOLDER"),
        environment={"HF_HUB_OFFLINE": "1"},
    ),
]

CASES = [*IMAGES, *IDX, *VTAB, *TABLES, *HUB]
