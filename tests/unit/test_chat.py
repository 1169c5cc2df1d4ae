"""Records as tokens: which of them are learnt."""

from typing import Any

import pytest
from tiny_lm import BRACKETS, CHATML, MARKED, NAMES, OPENED, THINKING, TURNS, tiny_tokenizer

from coeft.data._chat import Rendered, Renderer
from coeft.errors import UserError

CHAT = [
    {"role": "user", "content": "What is the colour of the sky?"},
    {"role": "assistant", "content": "The sky is blue."},
    {"role": "user", "content": "Is water wet?"},
    {"role": "assistant", "content": "yes, very"},
]
SYSTEM = [{"role": "system", "content": "Answer in one word."}, *CHAT]


def learnt(renderer: Renderer, row: Rendered) -> list[str]:
    """The runs of tokens that the loss is taken of, as text."""
    runs: list[list[int]] = []
    before = False
    for token, mark in zip(row.input_ids, row.learnt, strict=True):
        if mark and not before:
            runs.append([])
        if mark:
            runs[-1].append(token)
        before = mark
    return [renderer.tokenizer.decode(run) for run in runs]


def text(renderer: Renderer, row: Rendered) -> str:
    return renderer.tokenizer.decode(row.input_ids)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "markers"])
@pytest.mark.parametrize("messages", [CHAT, SYSTEM], ids=["turns", "system"])
def test_of_a_chat_the_answers_with_their_end_of_turn_are_learnt(template: str, messages: list[Any]) -> None:
    renderer = Renderer(tiny_tokenizer(chat_template=template))
    row = renderer.render({"messages": messages})
    assert learnt(renderer, row) == ["The sky is blue.<|im_end|>", "yes, very<|im_end|>"]
    assert text(renderer, row) == renderer.tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize(
    ("template", "kind", "answers"),
    [
        (BRACKETS, "bytes", [" The sky is blue. </s>", " yes, very </s>"]),
        (TURNS, "bytes", ["The sky is blue.<end_of_turn>", "yes, very<end_of_turn>"]),
        (THINKING, "bytes", ["The sky is blue.<|im_end|>", "<think>\n\n</think>\n\nyes, very<|im_end|>"]),
        (NAMES, "bytes", ["The sky is blue.\n", "yes, very\n</s>"]),
    ],
    ids=["brackets", "turns", "thinking", "names"],
)
def test_of_templates_of_other_families(template: str, kind: str, answers: list[str]) -> None:
    renderer = Renderer(tiny_tokenizer(kind, chat_template=template))
    row = renderer.render({"messages": CHAT})
    assert learnt(renderer, row) == answers
    written = renderer.tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text(renderer, row) == written + ("</s>" if template is NAMES else "")


def test_a_chat_whose_tokenizer_puts_a_space_before_every_text_has_the_tokens_of_the_whole() -> None:
    renderer = Renderer(tiny_tokenizer("spaces", chat_template=CHATML))
    row = renderer.render({"messages": CHAT})
    whole = renderer.tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert list(row.input_ids) == renderer.tokenizer(whole, add_special_tokens=False).input_ids
    assert [run.strip() for run in learnt(renderer, row)] == ["The sky is blue.<|im_end|>", "yes, very<|im_end|>"]


def test_a_template_that_asks_otherwise_than_it_writes_is_an_error_that_says_the_ways_out() -> None:
    renderer = Renderer(tiny_tokenizer(chat_template=OPENED))
    with pytest.raises(UserError, match=r"message 2 as the continuation.*generation.*data\.chat_template=FILE"):
        renderer.render({"messages": CHAT})
    assert all(Renderer(tiny_tokenizer(chat_template=OPENED), loss_on="all").render({"messages": CHAT}).learnt)


def test_a_tokenizer_without_a_chat_template_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(UserError, match=r"no chat template.*data\.chat_template=FILE"):
        Renderer(tiny_tokenizer()).render({"messages": CHAT})
    own = Renderer(tiny_tokenizer(chat_template=CHATML))
    assert learnt(own, own.render({"messages": CHAT})) == ["The sky is blue.<|im_end|>", "yes, very<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "a"}], "no message of the assistant"),
        ([], "must be a list"),
        ([{"role": "user"}, CHAT[1]], r"message 1 \(user\) has no content"),
        (["a"], "message 1 must be a mapping"),
        ([{"role": "user", "content": [{"type": "text"}]}, CHAT[1]], "content must be text, not list"),
        ([CHAT[1]], "begins with the assistant"),
        ("[{", "not JSON"),
    ],
)
def test_chats_that_are_none(messages: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Renderer(tiny_tokenizer(chat_template=CHATML)).render({"messages": messages})


def test_what_a_template_refuses_is_the_users_error() -> None:
    with pytest.raises(UserError, match="refuses the messages.*Only user and assistant"):
        Renderer(tiny_tokenizer(chat_template=BRACKETS)).render({"messages": SYSTEM})


@pytest.mark.parametrize("kind", ["bytes", "spaces"])
def test_of_a_pair_the_completion_and_the_end_of_text_are_learnt(kind: str) -> None:
    renderer = Renderer(tiny_tokenizer(kind, bos=True))
    row = renderer.render({"prompt": "Is fire cold? Answer:", "completion": " no."})
    assert [run.strip() for run in learnt(renderer, row)] == ["no.</s>"]
    whole = renderer.tokenizer("Is fire cold? Answer: no.").input_ids
    assert list(row.input_ids) == [*whole, 2]
    assert row.count == sum(row.learnt)


def test_a_completion_that_would_join_the_prompts_last_word_keeps_its_own_tokens() -> None:
    renderer = Renderer(tiny_tokenizer())
    prompt = "The sk"
    row = renderer.render({"prompt": prompt, "completion": "y is"})
    assert (
        row.input_ids[: len(renderer.prompt({"prompt": prompt}).input_ids)]
        == renderer.prompt({"prompt": prompt}).input_ids
    )
    assert learnt(renderer, row) == ["y is</s>"]
    with pytest.raises(UserError, match="end the prompt where a word ends"):
        Renderer(tiny_tokenizer("spaces")).render({"prompt": prompt, "completion": "y is"})


@pytest.mark.parametrize("bos", [False, True])
def test_the_beginning_of_text_comes_once(bos: bool) -> None:
    renderer = Renderer(tiny_tokenizer(bos=bos, chat_template=TURNS))
    begins = [
        renderer.render({"prompt": "a", "completion": "b"}).input_ids,
        renderer.render({"prompt": "<s>a", "completion": "b"}).input_ids,
        renderer.render({"text": "a"}).input_ids,
        renderer.prompt({"prompt": "<s>a"}).input_ids,
    ]
    assert [row.count(1) for row in begins] == [int(bos), 1, int(bos), 1]
    for row in (renderer.render({"messages": CHAT}).input_ids, renderer.prompt({"messages": CHAT[:1]}).input_ids):
        assert row.count(1) == 1 and row[0] == 1  # the template writes it


@pytest.mark.parametrize("template", [CHATML, MARKED, BRACKETS, TURNS, THINKING, NAMES])
def test_a_model_generates_from_the_tokens_it_was_trained_to_continue(template: str) -> None:
    renderer = Renderer(tiny_tokenizer(chat_template=template))
    prompt = renderer.prompt({"messages": CHAT})
    row = renderer.render({"messages": CHAT})
    assert row.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert not row.learnt[len(prompt.input_ids) - 1] and row.learnt[len(prompt.input_ids)]
    assert (prompt.text, prompt.expected) == ("Is water wet?", "yes, very")


def test_a_prompt_without_an_answer_expects_nothing() -> None:
    renderer = Renderer(tiny_tokenizer(chat_template=CHATML))
    prompt = renderer.prompt({"messages": CHAT[:3]})
    assert prompt.expected is None
    assert renderer.tokenizer.decode(prompt.input_ids).endswith("Is water wet?<|im_end|>\n<|im_start|>assistant\n")
    assert renderer.prompt({"prompt": "a", "completion": " b"}).expected == " b"


def test_everything_can_be_learnt() -> None:
    renderer = Renderer(tiny_tokenizer(bos=True, chat_template=CHATML), loss_on="all")
    for record in ({"messages": SYSTEM}, {"prompt": "a", "completion": "b"}):
        row = renderer.render(record)
        assert all(row.learnt) and row.count == len(row.input_ids) - 1


def test_plain_text_is_learnt_wholly_and_ended() -> None:
    renderer = Renderer(tiny_tokenizer(bos=True))
    row = renderer.render({"text": "The sky is blue."})
    assert learnt(renderer, row) == ["The sky is blue.</s>"]
    assert row.input_ids[0] == 1


def test_long_rows_lose_their_end_and_say_how_much() -> None:
    record = {"prompt": "Is fire cold?", "completion": " no, it is not."}
    whole = Renderer(tiny_tokenizer()).render(record)
    first = whole.learnt.index(True)
    row = Renderer(tiny_tokenizer(), max_length=first + 2).render(record)
    assert row.input_ids == whole.input_ids[: first + 2] and row.cut == len(whole.input_ids) - first - 2
    assert row.input_ids[-1] != 2  # the model must not learn to stop there
    with pytest.raises(UserError, match=rf"cut to data\.max_length={first}.*nothing of the completion"):
        Renderer(tiny_tokenizer(), max_length=first).render(record)


@pytest.mark.parametrize(
    "record", [{"prompt": "a", "completion": ""}, {"text": ""}, {"prompt": "a", "completion": None}]
)
def test_nothing_to_learn_is_an_error(record: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="empty|missing"):
        Renderer(tiny_tokenizer()).render(record)


@pytest.mark.parametrize(
    ("template", "stops"), [(None, ["</s>"]), (CHATML, ["</s>", "<|im_end|>"]), (BRACKETS, ["</s>"]), (NAMES, ["</s>"])]
)
def test_an_answer_ends_at_the_end_of_text_and_of_the_turn(template: str | None, stops: list[str]) -> None:
    renderer = Renderer(tiny_tokenizer(chat_template=template))
    assert renderer.tokenizer.convert_ids_to_tokens(renderer.stop_tokens()) == stops
