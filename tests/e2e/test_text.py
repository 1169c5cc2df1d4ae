"""Text of a table from the command line: training, evaluation, prediction, adapters; and what wrong rows say."""

import csv
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from models import minilm
from reviews import reviews, write_reviews
from safetensors import safe_open
from small import coeft, command, results

import coeft as library
from coeft.run import Run

SENTIMENT = ["recipe=text/sentiment", f"backbone.name={minilm()}", "trainer.progress=false"]
FAST = ["cv.folds=2", "trainer.max_epochs=1"]
MINILM = ["backbone=minilm", f"backbone.name={minilm()}", "data=table", "trainer.progress=false", "data.batch_size=16"]


def predicted(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[dict[str, str]]:
    """The rows that `coeft predict` writes."""
    capsys.readouterr()
    assert coeft("predict", *arguments) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def transformers_classifier(num_labels: int) -> torch.nn.Module:
    """MiniLM as transformers alone loads it, with a classifier of its own."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=num_labels)


@pytest.fixture(scope="module")
def sentiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two folds over 48 reviews."""
    folder = tmp_path_factory.mktemp("sentiment")
    table = write_reviews(folder / "reviews.csv", 48)
    assert coeft("train", *SENTIMENT, *FAST, f"data.path={table}", f"run_dir={folder / 'run'}") == 0
    return folder / "run"


def test_a_table_is_trained_on_in_folds(sentiment):
    found = results(sentiment)
    assert len(found["folds"]) == 2 and found["mean"] == pytest.approx(np.mean([f["value"] for f in found["folds"]]))
    assert found["adapter_params"] == 6 * 12 * 12 == 864  # six layers of twelve heads
    assert found["trainable_params"] == 864 + 384 * 2 + 2
    assert (sentiment / "plots" / "confusion.png").is_file()
    assert {"accuracy", "f1", "macro_f1", "matthews"} <= set(found["heldout"])


def test_evaluation_repeats_the_numbers_of_training(sentiment, tmp_path):
    from coeft.evaluate import evaluate

    again = evaluate(sentiment, {})
    before = results(sentiment)["heldout"]
    assert list(again["heldout"]) == list(before)
    for name, value in before.items():
        assert again["heldout"][name] == pytest.approx(value, abs=1e-6)
    other = write_reviews(tmp_path / "other.csv", 12, seed=5)
    elsewhere = evaluate(sentiment, {"data.path": str(other)})
    assert elsewhere["heldout"] is None and 0 <= elsewhere["test"]["accuracy"] <= 1


def test_predictions_of_tables_texts_and_standard_input(sentiment, tmp_path, capsys, monkeypatch):
    texts = [text for text, _ in reviews(6, seed=9)]
    (tmp_path / "a.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n".join(texts)))
    ways = [(tmp_path / "a.csv",), (tmp_path / "a.jsonl",), ("-",), tuple(texts)]
    tables = [predicted(capsys, sentiment, *way) for way in ways]
    for rows in tables:
        assert [row["input"] for row in rows] == texts and list(rows[0]) == ["input", "prediction", "neg", "pos"]
        for row, first in zip(rows, tables[0], strict=True):
            assert float(row["pos"]) == pytest.approx(float(first["pos"]), abs=1e-5)
            assert float(row["neg"]) + float(row["pos"]) == pytest.approx(1, abs=1e-5)
            assert row["prediction"] == max(("neg", "pos"), key=lambda name: float(row[name]))
    odd = "~ a//b, and  'this' = that? "
    assert predicted(capsys, sentiment, odd)[0]["input"] == odd  # texts are no paths


def test_the_adapter_gives_the_same_in_transformers(sentiment, tmp_path, capsys):
    from transformers import AutoTokenizer

    assert coeft("export", "adapter", sentiment, "--fold", "1", "--out", tmp_path / "adapter") == 0
    model = library.load_adapter(transformers_classifier(2), tmp_path / "adapter")
    text = "The plot is not dull."
    tokens = AutoTokenizer.from_pretrained(minilm())(text, return_tensors="pt")
    with torch.no_grad():
        shares = model(**tokens).logits.softmax(-1)[0]
    run = Run.open(sentiment)
    folds = []
    for fold in run.folds:
        one = library.load_adapter(transformers_classifier(2), run.adapter(fold))
        with torch.no_grad():
            folds.append(one(**tokens).logits.softmax(-1)[0])
    assert torch.allclose(shares, folds[1], atol=1e-6)
    [row] = predicted(capsys, sentiment, text)
    assert float(row["pos"]) == pytest.approx(float(torch.stack(folds).mean(0)[1]), abs=1e-5)


def test_dry_run_tells_of_tokens_duplicates_and_bad_rows(tmp_path, capsys):
    rows = [*reviews(20), reviews(1)[0], ("", "pos"), ("a very " * 40 + "long one", "neg")]
    with (tmp_path / "r.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    arguments = [
        *SENTIMENT,
        f"data.path={tmp_path / 'r.csv'}",
        "data.on_error=skip",
        "data.max_length=32",
        "dry_run=true",
    ]
    assert coeft("train", *arguments, f"run_dir={tmp_path / 'run'}") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "neg 12, pos 10" in said and "samples that occur twice: 1 in train" in said
    assert "r.csv:2 = r.csv:22" in said and "r.csv:23: column 'text' is empty" in said
    assert "max 32; 1 rows cut, the longest has 84" in said and "every method was called" in said
    assert not (tmp_path / "run").exists()


def numbers(path: Path, number: int) -> Path:
    """Pairs of reviews, and how many of the two are positive, from 100 to 104."""
    rng = random.Random(0)
    found = reviews(2 * number, seed=3)
    rng.shuffle(found)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["first", "second", "score"])
        for (one, a), (two, b) in zip(found[::2], found[1::2], strict=True):
            rows.writerow([one, two, 100 + 2 * ((a == "pos") + (b == "pos"))])
    return path


def test_numbers_of_pairs_are_learnt_in_their_own_units(tmp_path, capsys):
    table = numbers(tmp_path / "pairs.csv", 40)
    run = tmp_path / "run"
    chosen = ["task=regression", "data.input=[first,second]", "data.label=score", "peft=coeff", "trainer.max_epochs=2"]
    assert coeft("train", *MINILM, *chosen, f"data.path={table}", "data.n_test=10", f"run_dir={run}") == 0
    found = results(run)
    assert found["metric"] == "mse" and found["adapter_params"] == 864
    assert set(found["test"]) == {"loss", "mae", "mse", "pearson", "spearman"}
    assert found["test"]["mse"] < 10  # of the raw outputs of an unscaled head it would be 10,000
    manifest = json.loads((run / "adapter" / "coeft.json").read_text())
    mean, deviation = manifest["scale"]
    assert 100 < mean < 104 and 1 < deviation < 2
    assert found["test"]["loss"] == pytest.approx(found["test"]["mse"] / deviation**2, rel=1e-5)
    assert (run / "plots" / "predictions.png").is_file()

    rows = predicted(capsys, run, table)
    assert list(rows[0]) == ["input", "prediction"] and len(rows) == 40 and " | " in rows[0]["input"]
    values = np.array([float(row["prediction"]) for row in rows])
    assert 98 < values.min() and values.max() < 106
    from transformers import AutoTokenizer

    model = library.load_adapter(transformers_classifier(1), run / "adapter")
    pair = rows[0]["input"].split(" | ")
    with torch.no_grad():
        value = model(**AutoTokenizer.from_pretrained(minilm())(*pair, return_tensors="pt")).logits
    assert float(value) == pytest.approx(values[0], rel=1e-4)

    assert coeft("export", "model", run, "--out", tmp_path / "model") == 0  # which compares its outputs itself
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert 95 < float(file.get_tensor("classifier.bias")) < 109  # the scale is in the weights

    from coeft.evaluate import evaluate

    assert evaluate(run, {})["test"] == pytest.approx(found["test"], rel=1e-4)
    capsys.readouterr()
    assert coeft("predict", run, "one text alone") == 2
    assert "takes pairs of texts: give a table with the columns 'first' and 'second'" in capsys.readouterr().err


def test_several_labels_in_folds(tmp_path, capsys):
    tags = [{"text": text, "tags": [label] + (["film"] if "film" in text else [])} for text, label in reviews(40)]
    table = tmp_path / "tags.jsonl"
    table.write_text("\n".join(map(json.dumps, tags)))
    run = tmp_path / "run"
    chosen = ["task=multi_label", "data.label=tags", "peft=lora", *FAST]
    assert coeft("train", *MINILM, *chosen, f"data.path={table}", f"run_dir={run}") == 0
    found = results(run)
    assert found["metric"] == "micro_f1" and found["mean"] == pytest.approx(found["heldout"]["micro_f1"])
    names = {"exact_match", "loss", "macro_f1", "mean_average_precision", "micro_f1", "per_class_f1"}
    assert set(found["heldout"]) == names and len(found["heldout"]["per_class_f1"]) == 3
    assert (run / "plots" / "per_class_f1.png").is_file()
    [row] = predicted(capsys, run, "The film is dull.")
    assert list(row) == ["input", "prediction", "film", "neg", "pos"]
    assert row["prediction"] == ";".join(name for name in ("film", "neg", "pos") if float(row[name]) > 0.5)
    from coeft.evaluate import evaluate

    again = evaluate(run, {})["heldout"]
    assert again["micro_f1"] == pytest.approx(found["heldout"]["micro_f1"], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.csv", "txt,label\na,x\n", "r.csv has no column 'text' (data.input); did you mean txt?"),
        ("r.csv", "text,label\nok,x\n,y\n", "  r.csv:3: column 'text' is empty"),
        ("r.csv", 'text,label\nok,x\n"open,y\n', '  r.csv:3: a quote (") is opened and never closed'),
        ("r.csv", "text,label\nok,x\na,b,c\n", "  r.csv:3: 3 cells, the header has 2"),
        ("r.csv", b"text,label\nok,x\ncaf\xe9,y\n", "  r.csv:3: not UTF-8: byte 0xe9"),
        ("r.jsonl", '{"text": "a", "label": 1}\n{"text": "b"\n', "  r.jsonl:2: broken JSON: Expecting ',' delim"),
        ("r.jsonl", '{"text": "a", "label": 1}\n["b", 2]\n', "  r.jsonl:2: holds a list, not an object"),
        ("r.csv", "", "r.csv: the file is empty"),
        ("r.csv", "text,label\n", "r.csv: the table has no rows"),
        ("r.txt", "text,label\n", "r.txt: not a file of .csv, .tsv, .jsonl, .parquet"),
        ("r.csv", None, "r.csv: no such file"),
    ],
)  # fmt: skip
def test_wrong_tables_are_told_with_file_and_row(tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert coeft("train", *SENTIMENT, f"data.path={path}", f"run_dir={tmp_path / 'run'}") == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_a_wrong_row_and_an_unknown_label_in_a_process_of_its_own(tmp_path):
    train = write_reviews(tmp_path / "train.csv", 10)
    (tmp_path / "test.csv").write_text("text,label\nfine,pos\nodd,poss\n,neg\n")
    done = command("train", *SENTIMENT, f"data.path={train}", "data.splits.test=test.csv", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "test.csv:3: label 'poss' is not among the training split's classes; did you mean pos?" in done.stderr
    assert "test.csv:4: column 'text' is empty" in done.stderr


@pytest.mark.slow
def test_coeff_beats_the_head_alone_on_reviews(tmp_path):
    """The command of the recipe, five folds, in a process of its own."""
    table = write_reviews(tmp_path / "reviews.csv", 300)
    found = {}
    for name in ("coeff", "none"):
        run = tmp_path / name
        done = command("train", *SENTIMENT, f"data.path={table}", f"peft={name}", f"run_dir={run}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "mean ± sd" in done.stderr and done.stdout.splitlines()[-1] == str(run)
        found[name] = results(run)
    assert found["coeff"]["adapter_params"] == 864 and len(found["coeff"]["folds"]) == 5
    assert found["coeff"]["mean"] > found["none"]["mean"] + 0.1  # measured: 0.857 and 0.700
    assert found["coeff"]["std"] is not None
