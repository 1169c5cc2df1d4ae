"""Language models: packed texts are separate texts, losses and log-likelihoods are those of the whole logits."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_hf import FAMILIES, VOCAB, tiny_model
from torch import Tensor, nn

from coeft.adapt import Stack
from coeft.backbones._backbone import Backbone
from coeft.backbones._hf import describe
from coeft.data._packing import collate, collate_packed
from coeft.data._tokens import IGNORED
from coeft.errors import UserError
from coeft.generate import Decoding, Teller, generate, left_padded
from coeft.methods.coeff import Coeff
from coeft.tasks._language import check_packing, log_likelihoods, logits_at, predicted, token_losses

PACKED = ["llama", "qwen3", "gemma3", "gpt2"]
RUNS = [(family, implementation) for family in PACKED for implementation in ("eager", "sdpa")]
PAD = 0
# their forward hands no positions to the function that builds masks (transformers 5.23)
NOT_PACKED = ("opt", "gpt_oss")

Text = tuple[np.ndarray, np.ndarray]


def backbone_of(family: str, implementation: str = "", *, coeff: bool = False) -> Backbone:
    """A small random model, with random coefficients if asked."""
    model = tiny_model(family, implementation or ("sdpa" if FAMILIES[family].sdpa else "eager"))
    backbone = describe(model)
    if coeff:
        stack = Stack({"coeff": Coeff(dropout=0.0)})
        stack.attach(backbone, 0)
        draw = torch.Generator().manual_seed(0)
        for parameter in stack.attachments[0].parameters.values():
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=draw)
    model.eval()
    return backbone


def model_of(family: str, *, coeff: bool = False) -> nn.Module:
    return backbone_of(family, coeff=coeff).model


def texts(*lengths: int, seed: int = 0) -> list[Text]:
    """Random tokens; about half of each text is learnt, its last token always."""
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        learnt = rng.random(length) < 0.5
        learnt[-1] = True
        made.append((rng.integers(3, VOCAB, length), learnt))
    return made


def alone(model: nn.Module, text: Text) -> Tensor:
    """Logits of one text by itself, (T, vocabulary)."""
    return model(input_ids=torch.from_numpy(text[0])[None]).logits[0]


@pytest.mark.parametrize("coeff", [False, True], ids=["plain", "coeff"])
@pytest.mark.parametrize(("family", "implementation"), RUNS)
@torch.no_grad()
def test_packed_texts_have_the_logits_of_the_texts_alone(family: str, implementation: str, coeff: bool) -> None:
    backbone = backbone_of(family, implementation, coeff=coeff)
    model = backbone.model
    rows = [texts(9, 1, 7), texts(2, 8, seed=1)]  # longer than the window of the sliding layers; the second padded
    batch = collate_packed(rows, PAD)
    assert batch["input_ids"].shape == (2, 17)
    everywhere = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    logits = logits_at(backbone, batch, everywhere).view(2, 17, -1)
    for row, packed in zip(rows, logits, strict=True):
        expected = torch.cat([alone(model, text) for text in row])
        torch.testing.assert_close(packed[: len(expected)], expected, rtol=1e-5, atol=1e-5)
    check_packing(backbone)


@pytest.mark.parametrize("family", NOT_PACKED)
def test_families_whose_masks_know_no_positions_are_refused(family: str) -> None:
    with pytest.raises(UserError, match=r"task\.packing=true: .*see each other; set task\.packing=false"):
        check_packing(backbone_of(family))


def test_a_model_that_does_not_keep_packed_texts_apart_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of("llama")
    forward = backbone.model.forward

    def caching(input_ids: Tensor, position_ids: Any = None) -> Any:  # with a cache, which transformers then makes
        return forward(input_ids=input_ids, position_ids=position_ids, use_cache=True)

    monkeypatch.setattr(backbone.model, "forward", caching)
    with pytest.raises(UserError, match=r"LlamaForCausalLM lets texts that share a row see each other"):
        check_packing(backbone)
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=24, n_layer=1, n_head=2, initializer_range=0.3)
    backbone = describe(transformers.BloomForCausalLM(config))
    with pytest.raises(UserError, match=r"task\.packing=true: BloomForCausalLM"):
        check_packing(backbone)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_loss_of_a_step_is_its_mean_over_tokens_whatever_the_rows(family: str) -> None:
    """Padded rows, packed rows and single texts give one sum, that of the plain formula, and its gradient."""
    given = texts(9, 4, 6, seed=3)
    sums, counts, gradients = [], [], []
    packed = collate_packed([given], PAD)
    for batches in ([collate(given, PAD)], [packed], [collate([text], PAD) for text in given], None):
        backbone = backbone_of(family, coeff=True)
        model = backbone.model
        total = torch.zeros(())
        count = 0
        if batches is None:
            for tokens, learnt in given:
                shares = F.log_softmax(alone(model, (tokens, learnt)), -1)
                for place in range(1, len(tokens)):
                    if learnt[place]:
                        total = total - shares[place - 1, tokens[place]]
                        count += 1
        else:
            for batch in batches:
                where, targets = predicted(batch["labels"])
                total = total + token_losses(logits_at(backbone, batch, where), targets).sum()
                count += len(targets)
        total.backward()
        sums.append(total.item())
        counts.append(count)
        gradients.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "coeff_alpha" in n]))
    assert counts == [counts[0]] * 4
    assert sums == pytest.approx([sums[-1]] * 4, rel=1e-5)
    for gradient in gradients[:3]:
        torch.testing.assert_close(gradient, gradients[3], rtol=1e-3, atol=1e-4)


def test_prompts_never_reach_the_output_layer() -> None:
    backbone = backbone_of("gemma2")
    model: Any = backbone.model  # whose logits go through a softcap after the output layer
    batch = collate(texts(9, 5), PAD)
    where, targets = predicted(batch["labels"])
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    with torch.no_grad():
        chosen = logits_at(backbone, batch, where)
        whole = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert seen[0] == (1, len(targets), VOCAB)
    torch.testing.assert_close(chosen, whole[where], rtol=1e-5, atol=1e-5)
    assert not model.lm_head._forward_pre_hooks


def test_labels_are_predicted_one_place_before() -> None:
    labels = torch.tensor([[IGNORED, 5, IGNORED, 7], [3, IGNORED, 4, IGNORED]])
    where, targets = predicted(labels)
    assert where.tolist() == [[True, False, True, False], [False, True, False, False]]
    assert targets.tolist() == [5, 7, 4]  # nothing stands before the 3 of the second row


def test_log_likelihoods_are_sums_over_the_labelled_tokens_of_a_row() -> None:
    backbone = backbone_of("llama")
    model = backbone.model
    given = texts(9, 4, 6, seed=2)
    batch = collate(given, PAD)
    where, _ = predicted(batch["labels"])
    with torch.no_grad():
        sums, counts = log_likelihoods(logits_at(backbone, batch, where), batch["labels"])
        for (tokens, learnt), total, count in zip(given, sums.tolist(), counts.tolist(), strict=True):
            shares = F.log_softmax(alone(model, (tokens, learnt)).double(), -1)
            expected = [float(shares[place - 1, tokens[place]]) for place in range(1, len(tokens)) if learnt[place]]
            assert total == pytest.approx(math.fsum(expected), rel=1e-5)
            assert count == len(expected)


def by_hand(model: nn.Module, prompt: list[int], stops: list[int], most: int) -> list[int]:
    """Greedy decoding, the whole text anew for each token."""
    written: list[int] = []
    while len(written) < most:
        token = int(model(input_ids=torch.tensor([prompt + written])).logits[0, -1].argmax())
        if token in stops:
            break
        written.append(token)
    return written


@pytest.mark.parametrize(
    ("family", "coeff"), [("llama", False), ("llama", True), ("gemma3", True), ("gpt2", True), ("gpt_oss", True)]
)
@torch.no_grad()
def test_generation_is_the_same_with_any_cache_and_by_hand(family: str, coeff: bool) -> None:
    model = model_of(family, coeff=coeff)
    prompts = [text[0].tolist() for text in texts(9, 3, 6)]
    free = [by_hand(model, prompt, [], 8) for prompt in prompts]
    stops = [free[0][3], 2]
    expected = [by_hand(model, prompt, stops, 8) for prompt in prompts]
    assert len(expected[0]) < 8
    for cache in ("dynamic", "static", "none"):
        decoding = Decoding(max_new_tokens=8, cache=cache)
        found = generate(model, prompts, stops=stops, pad=PAD, decoding=decoding, batch_size=2)
        assert [list(one.tokens) for one in found] == expected, cache
        assert [one.ended for one in found] == [len(tokens) < 8 for tokens in expected]


def test_the_models_own_generation_settings_are_left_out_and_put_back() -> None:
    model: Any = model_of("llama")
    own = model.generation_config
    own.repetition_penalty, own.do_sample, own.temperature, own.min_length = 50.0, True, 5.0, 30
    model.train()
    prompt = texts(9)[0][0].tolist()
    [found] = generate(model, [prompt], stops=[2], pad=PAD, decoding=Decoding(max_new_tokens=8))
    assert model.generation_config is own and model.training
    assert list(found.tokens) == by_hand(model.eval(), prompt, [2], 8)


def test_sampling_follows_from_the_seed() -> None:
    model = model_of("llama")
    prompts = [text[0].tolist() for text in texts(9, 3, 6)]

    def drawn(**options: Any) -> list[Any]:
        return generate(model, prompts, stops=[2], pad=PAD, decoding=Decoding(max_new_tokens=8, **options))

    greedy = drawn()
    assert drawn(temperature=1.0, seed=1) == drawn(temperature=1.0, seed=1)
    assert drawn(temperature=1.0, seed=1) != drawn(temperature=1.0, seed=2)
    assert drawn(temperature=1.0, top_p=1e-6) == greedy


def test_a_stream_tells_every_token_and_half_letters_wait() -> None:
    model = model_of("llama")
    prompt = texts(9)[0][0].tolist()
    heard: list[list[int]] = []
    decoding = Decoding(max_new_tokens=8)
    [found] = generate(model, [prompt], stops=[2], pad=PAD, decoding=decoding, watch=heard.append)
    assert [len(tokens) for tokens in heard] == list(range(1, len(heard) + 1))
    assert tuple(heard[-1][: len(found.tokens)]) == found.tokens

    pieces: list[str] = []
    letters = "né!".encode()
    tell = Teller(lambda tokens: bytes(tokens).decode(errors="replace"), pieces.append, stops=[7])
    for end in range(1, len(letters) + 1):
        tell(list(letters[:end]))
    tell([*letters, 7])
    assert pieces == ["n", "é", "!"]


def test_prompts_that_cannot_be_continued() -> None:
    model = model_of("gpt2")  # 40 positions
    with pytest.raises(UserError, match="40 tokens, and the model takes 40 in all"):
        generate(model, [[3] * 40], stops=[2], pad=PAD)
    with pytest.raises(UserError, match="the prompt is empty"):
        generate(model, [[]], stops=[2], pad=PAD)
    [found] = generate(model, [[3] * 36], stops=[], pad=PAD)
    assert len(found.tokens) == 4
    assert left_padded([[5, 6], [7]], 0)["attention_mask"].tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"cache": "big"}, "cache must be one of"),
    ],
)
def test_decoding_refuses_what_makes_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Decoding(**options)
