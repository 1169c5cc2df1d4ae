"""Small data in the formats that recipes take, and small models in the place of theirs: every recipe in a second."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reviews import reviews
from sounds import tones

from coeft.cli.compose import Composition, compose, encode
from coeft.cli.recipes import read_recipe
from coeft.config import TrainConfig

HERE = "tests/recipe_data.py"
SIDE = 8  # pixels of the images
TASK = {"train800": 8, "val200": 4, "train800val200": 12, "test": 4}  # list of VTAB-1k -> images here
MANY, SOME = 20, 5  # runs of a suite that takes long to compose, and how many of them are enough for most tests
Fields = dict[str, Any]


@cache
def composed(name: str, whole: bool = False) -> Composition:
    """A shipped recipe as it stands; of a suite of many runs the first ones, unless it is wanted whole."""
    line = [f"recipe={name}"]
    suite = read_recipe(name).body.get("suite", {})
    if len(suite) > MANY and not whole:
        line.append(f"suite={encode(dict(list(suite.items())[:SOME]))}")
    [composition] = compose(line)
    return composition


def small(config: TrainConfig, folder: Path) -> TrainConfig:
    """A recipe's config with a small backbone and small data of the same format, for one epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    return replace(
        config,
        backbone=replace(config.backbone, **_backbone(config, folder)),
        data=replace(config.data, **_data(config, folder)),
        trainer=replace(config.trainer, max_epochs=1, threads=1, progress=False),
        cv=replace(config.cv, folds=min(2, config.cv.folds)),
    )


def _data(config: TrainConfig, folder: Path) -> Fields:
    kind = config.data.kind
    if kind not in MAKERS:
        pytest.fail(f"recipe {config.recipe}: no small data of kind {kind}; add a function to MAKERS in {HERE}")
    return MAKERS[kind](config, folder)


def _backbone(config: TrainConfig, folder: Path) -> Fields:
    settings = config.backbone
    if settings.kind == "timm":
        architecture = settings.name.partition(".")[0]
        for beginning, options in TIMM.items():
            if architecture.startswith(beginning):
                made = options(settings)
                name = made.pop("name", settings.name)
                kept = {**settings.options, **made}
                return {"name": name, "pretrained": False, "weights": None, "options": kept}
        pytest.fail(f"recipe {config.recipe}: nobody knows how {settings.name} is made small; add it to TIMM in {HERE}")
    if settings.name not in HF:
        pytest.fail(f"recipe {config.recipe}: nobody makes a small {settings.name}; add a function to HF in {HERE}")
    if not (folder.parent / "models" / HF[settings.name].__name__).is_dir():
        HF[settings.name](folder.parent / "models" / HF[settings.name].__name__)
    return {"name": str(folder.parent / "models" / HF[settings.name].__name__)}


# Models


def _vit(settings: Any) -> Fields:
    """Of vit_mini the depth alone: methods ask for widths that they can divide."""
    return {"depth": 1} if "embed_dim" in settings.options else {"depth": 1, "embed_dim": 64, "num_heads": 4}


def _efficientnet(settings: Any) -> Fields:
    return {"name": "test_efficientnet"}


def encoder(config: Any, model: Any, folder: Path) -> None:
    from tiny_lm import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    special = {"vocab_size": len(tokenizer), "max_position_embeddings": 140, "pad_token_id": 0}
    model(config(**sizes, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    encoder(BertConfig, BertModel, folder)


def roberta(folder: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    encoder(RobertaConfig, RobertaModel, folder)


def llama(folder: Path) -> None:
    from tiny_chat import tiny_llama

    tiny_llama(folder, max_position_embeddings=2048)


TIMM: dict[str, Callable[[Any], Fields]] = {"vit_": _vit, "efficientnet_": _efficientnet}
HF: dict[str, Callable[[Path], None]] = {
    "FacebookAI/roberta-base": roberta,
    "sentence-transformers/all-MiniLM-L6-v2": bert,
    "HuggingFaceTB/SmolLM2-135M-Instruct": llama,
}

# Data


def picture(number: int, label: int) -> Image.Image:
    """An image whose colour tells its class."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 90, (SIDE, SIDE, 3)) + 80 * np.array([label % 2, label // 2 % 2, label // 4 % 2])
    return Image.fromarray(pixels.astype(np.uint8))


def digits(config: TrainConfig, folder: Path) -> Fields:
    return {"n_train": 40}


def fashion_mnist(config: TrainConfig, folder: Path) -> Fields:
    """The four files in the format of MNIST."""
    for stem, count in (("train", 40), ("t10k", 10)):
        labels = np.arange(count) % 10
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28))
        for name, array in ((f"{stem}-images-idx3-ubyte", pixels), (f"{stem}-labels-idx1-ubyte", labels)):
            head = (0x800 + array.ndim).to_bytes(4, "big") + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (folder / name).write_bytes(head + array.astype(np.uint8).tobytes())
    return {"root": str(folder), "n_val": config.data.n_val and 10}


def vtab(config: TrainConfig, folder: Path) -> Fields:
    vtab_task(folder, config.data.name, config.data.num_classes)
    return {"root": str(folder)}


def vtab_task(root: Path, task: str, num_classes: int, classes: int = 2) -> None:
    """A task in VTAB-1k's folder format; all lists together name `classes` classes, the last one among them."""
    labels = [*range(min(classes, num_classes) - 1), num_classes - 1]
    folder = root / task
    (folder / "images").mkdir(parents=True)
    lists: dict[str, list[str]] = {}
    for name in ("train800", "val200", "test"):
        for number in range(TASK[name]):
            path = f"images/{name} {number}.png"
            picture(number, number % len(labels)).save(folder / path)
            lists.setdefault(name, []).append(f"{path} {labels[number % len(labels)]}")
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def image_folder(config: TrainConfig, folder: Path) -> Fields:
    """Two classes with as many images as the recipe has shots, at least three."""
    for split, count in (("train", config.data.shots or 3), ("test", 2)):
        for label, name in enumerate(("ape", "bee")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                picture(number, label).save(folder / split / name / f"{number}.png")
    return {"root": str(folder)}


def audio_folder(config: TrainConfig, folder: Path) -> Fields:
    """Two classes of tones, a quarter of a second each."""
    tones(folder / "tones", 2, 6, 0.25)
    return {"root": str(folder / "tones"), "seconds": 0.25, "image_size": 32}


def hub(config: TrainConfig, folder: Path) -> Fields:
    """A data set with the splits and columns that the recipe names, as save_to_disk writes it."""
    import datasets

    columns, target = config.data.columns, config.task.target
    is_text = config.backbone.kind == "hf"
    label = datasets.ClassLabel(names=["no", "yes"]) if target == "class" else datasets.Value("float32")
    texts = [name for name in (columns.text, columns.pair) if name]
    features = {columns.label: label}
    features |= dict.fromkeys(texts, datasets.Value("string")) if is_text else {columns.image: datasets.Image()}

    def table(count: int) -> Any:
        rows: Fields = {columns.label: [row % 2 for row in range(count)]}
        if is_text:
            rows |= {name: [text for text, _ in reviews(count)] for name in texts}
        else:
            rows[columns.image] = [picture(row, row % 2) for row in range(count)]
        return datasets.Dataset.from_dict(rows, datasets.Features(features))

    sizes = {"train": 2 * (config.data.shots or 8), "val": 4, "test": 6}
    names = {part: part if name == "auto" else name for part, name in config.data.splits.items()}
    splits = {name: table(sizes[part]) for part, name in names.items() if name is not None}
    datasets.DatasetDict(splits).save_to_disk(str(folder / "data"))
    return {"name": str(folder / "data")}


def table(config: TrainConfig, folder: Path) -> Fields:
    """A file, or of a folder the files that the splits name, with the columns that the recipe names."""
    files = [name for name in config.data.splits.values() if name not in (None, "auto")]
    if not files:
        path = folder / Path(config.data.path).name
        _rows(config, path)
        return {"path": str(path)}
    for name in files:
        _rows(config, folder / name)
    return {"path": str(folder)}


def _rows(config: TrainConfig, path: Path) -> None:
    from tiny_chat import chats, questions, write

    data, target = config.data, config.task.target
    if data.messages is not None:
        chats(path, 16)
    elif data.choices is not None:
        keys = {"question": data.input, "choices": data.choices, "answer": data.label}
        questions(path, 16)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        write(path, [{keys[key]: value for key, value in row.items()} for row in rows])
    elif data.completion is not None:
        write(path, [{data.prompt: f"Say {number}.", data.completion: "One two three."} for number in range(24)])
    elif target == "class" and isinstance(data.input, str) and isinstance(data.label, str):
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([(data.input, data.label), *reviews(24)])
    else:
        pytest.fail(f"recipe {config.recipe}: nobody makes a table for its columns; add them to _rows in {HERE}")


MAKERS: dict[str, Callable[[TrainConfig, Path], Fields]] = {
    "audio_folder": audio_folder,
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "hub": hub,
    "image_folder": image_folder,
    "table": table,
    "vtab": vtab,
}
