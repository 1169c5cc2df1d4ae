"""Multiple choice: what is read from records, and how choices are scored."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from tiny_hf import tiny_model
from tiny_lm import CHATML, tiny_tokenizer

from coeft.backbones._hf import describe
from coeft.data._choices import ChoiceRenderer, Question, choices_of, collate_choices, own_labels, read_answer
from coeft.data.hub import Hub, RowColumns
from coeft.data.table import Table
from coeft.errors import UserError
from coeft.tasks.multiple_choice import MultipleChoice

COLOURS = ["red", "deep blue", "2"]


@pytest.mark.parametrize(
    ("value", "labels", "first", "right"),
    [
        (1, None, 0, 1),
        (1, None, 1, 0),
        ("1", None, 1, 0),
        ("2", None, 0, 2),  # the text of a choice before its number
        (2, None, 0, 2),
        ("B", None, 0, 1),
        ("b", None, 1, 1),
        (" deep blue ", None, 0, 1),
        ("C", ["A", "C", "D"], 0, 1),
        ("3", ["1", "2", "3"], 0, 2),
        (True, None, 0, 1),
    ],
)
def test_the_right_choice_is_named_in_many_ways(value: Any, labels: Any, first: int, right: int) -> None:
    assert read_answer(value, COLOURS, labels, first=first) == right


@pytest.mark.parametrize(("value", "first"), [("D", 0), (3, 0), (0, 1), ("", 0), (None, 0), ("green", 0), ("-1", 0)])
def test_an_answer_that_is_no_choice_is_refused(value: Any, first: int) -> None:
    with pytest.raises(UserError, match="is none of the 3 choices"):
        read_answer(value, COLOURS, first=first)


def test_choices_come_in_lists_columns_and_as_arc_has_them() -> None:
    arc = {"text": ["red", "blue"], "label": ["1", "2"]}
    for record in (
        {"choices": ["red", "blue"]},
        {"choices": '["red", "blue"]'},
        {"choices": arc},
        {"choice_0": "red", "choice_1": "blue"},
    ):
        assert choices_of(record) == ["red", "blue"]
    assert own_labels({"choices": arc}) == ["1", "2"] and own_labels({"choices": ["red"]}) is None


def test_tables_and_data_sets_have_questions(tmp_path: Path) -> None:
    rows = [
        {"sentence": "It is _.", "option1": "wet", "option2": "dry", "answer": "2"},
        {"sentence": "He is _.", "option1": "old", "option2": "new", "answer": "1"},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"path": str(file), "input": "sentence", "choices": ["option1", "option2"]}
    source = Table(**options, label="answer", first_choice=1).load(0, modality="text", target="choice")
    assert source.train.labels.tolist() == [1, 0] and source.class_names == []
    assert source.train.items[0] == {"question": "It is _.", "choice_0": "wet", "choice_1": "dry"}
    with pytest.raises(UserError, match=r"pairs.jsonl:1: column 'answer': the answer '2' is none of the 2 choices"):
        Table(**options, label="answer").load(0, modality="text", target="choice")
    with pytest.raises(UserError, match="data.choices is missing"):
        Table(path=str(file), input="sentence").load(0, modality="text", target="choice")

    arc = {"text": ["wet", "dry", "hot"], "label": ["A", "B", "C"]}
    pd.DataFrame({"question": ["Is it?"] * 2, "choices": [arc] * 2, "key": ["C", "A"]}).to_parquet(
        tmp_path / "a.parquet"
    )
    hub = Hub(name=str(tmp_path / "a.parquet"), columns=RowColumns(text="question", choices="choices", label="key"))
    train = hub.load(0, modality="text", target="choice").train
    assert train.labels.tolist() == [2, 0]
    assert choices_of(train.items[1]) == ["wet", "dry", "hot"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (["red"], "1 choices: there must be 2 to 26"),
        (["red", " "], "choice 2 is empty"),
        ("red, blue", "must be a list such as"),
        (None, "must be a list such as"),
    ],
)
def test_choices_that_are_none(choices: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choices_of({"choices": choices})


@pytest.mark.parametrize("chat", [False, True])
def test_a_question_becomes_a_sequence_for_each_choice(chat: bool) -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    question = ChoiceRenderer(tokenizer, chat=chat).render({"question": "What is the sky? ", "choices": COLOURS})
    again = Question.from_flat(*(np.array(column) for column in question.flat()))
    assert again == question
    assert question.sizes == (3, 9, 1)
    for (tokens, count), choice in zip(question.sequences, COLOURS, strict=True):
        before = tokenizer.decode(tokens[:-count])
        assert tokenizer.decode(tokens[-count:]) == (choice if chat else f" {choice}")
        asked = "<|im_start|>user\nWhat is the sky? <|im_end|>\n<|im_start|>assistant\n"
        assert before == (asked if chat else "What is the sky?")


def test_a_long_question_loses_its_beginning() -> None:
    tokenizer = tiny_tokenizer()
    renderer = ChoiceRenderer(tokenizer, max_length=12)
    question = renderer.render({"question": "What is the sky? " * 9, "choices": COLOURS})
    assert max(len(tokens) for tokens, _ in question.sequences) == 12
    assert tokenizer.decode(question.sequences[0][0]).endswith("the sky? red")
    with pytest.raises(UserError, match="does not fit"):
        renderer.render({"question": "What?", "choices": ["red", "never ever " * 9]})


@pytest.mark.parametrize("normalise", ["byte", "token"])
def test_scores_are_log_likelihoods_over_lengths(normalise: str) -> None:
    """Each choice by itself, by the plain formula; questions with two and three choices in one batch."""
    tokenizer = tiny_tokenizer(bos=True)
    backbone = describe(tiny_model("llama", vocab_size=len(tokenizer)))
    renderer = ChoiceRenderer(tokenizer)
    asked = [("What is the sky?", COLOURS, 1), ("Is water wet, or what is it?", ["yes", "no, never"], 0)]
    questions = [renderer.render({"question": text, "choices": choices}) for text, choices, _ in asked]
    inputs = collate_choices(questions, 0)
    batch = inputs | {"labels": torch.tensor([right for _, _, right in asked])}
    task = MultipleChoice(normalise=normalise).build(0)
    with torch.no_grad():
        scores = task.forward(backbone, inputs, batch, training=False)
        nats, tokens, hits, plain_hits = 0.0, 0, 0, 0
        for row, (text, choices, right) in zip(scores, asked, strict=True):
            expected, plain = [], []
            for choice in choices:
                before = tokenizer(text).input_ids
                ids = [*before, *tokenizer(f" {choice}", add_special_tokens=False).input_ids]
                shares = F.log_softmax(backbone.model(input_ids=torch.tensor([ids])).logits[0].double(), -1)
                total = sum(float(shares[place - 1, ids[place]]) for place in range(len(before), len(ids)))
                length = len(choice.encode()) if normalise == "byte" else len(ids) - len(before)
                plain.append(total)
                expected.append(total / length)
                if choice == choices[right]:
                    nats, tokens = nats - total, tokens + len(ids) - len(before)
            torch.testing.assert_close(row[: len(choices)].tolist(), expected, rtol=1e-4, atol=1e-5)
            assert torch.isinf(row[len(choices) :]).all()
            hits += int(np.argmax(expected) == right)
            plain_hits += int(np.argmax(plain) == right)
        assert float(task.loss(scores, batch, training=False)) == pytest.approx(nats / tokens, rel=1e-4)
        assert task.weight(batch) == tokens
        metrics = task.metrics()
        task.update(metrics, scores, batch)
        found, _ = task.compute(metrics)
        assert found == {"accuracy": hits / 2, "accuracy_unnormalised": plain_hits / 2}
    learning = task.forward(backbone, inputs, batch, training=True)  # the right choices alone
    assert (torch.isfinite(learning).sum(1) == 1).all()
    assert float(task.loss(learning, batch, training=True).detach()) == pytest.approx(nats / tokens, rel=1e-4)
    task.loss(learning, batch, training=True).backward()
    assert all(torch.isfinite(p.grad).all() for p in backbone.model.parameters() if p.grad is not None)


def test_predictions_are_letters_with_shares() -> None:
    task = MultipleChoice().build(0)
    logits = torch.full((2, 26), -torch.inf)
    logits[0, :2] = torch.tensor([0.0, 1.0])
    logits[1, :3] = torch.tensor([2.0, 0.0, 0.0])
    header, rows = task.table(task.scores(logits), [])
    assert header == ["prediction", "A", "B", "C"]
    assert [row[0] for row in rows] == ["B", "A"]
    assert rows[0][3] == "" and float(rows[0][1]) + float(rows[0][2]) == pytest.approx(1)
