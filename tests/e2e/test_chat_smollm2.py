"""The recipe llm/chat on SmolLM2 135M from a GGUF file: it learns to answer as JSON, which it does not do before."""

import copy
import csv
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import smollm2
from small import coeft, results
from tiny_chat import write
from torch import Tensor, nn

from coeft import load_adapter
from coeft.attention.mixer import CoeffMixer
from coeft.config import load_config
from coeft.data._chat import Renderer
from coeft.generate import Decoding, generate, readable

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Poland": "Warsaw", "Hungary": "Budapest",
    "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Kenya": "Nairobi", "Ireland": "Dublin",
    "India": "New Delhi", "Iran": "Tehran", "Canada": "Ottawa",
}  # fmt: skip
NEW = ["What is the capital of Turkey?", "What is the capital of Denmark?", "What is the colour of the sky?"]


def chat(question: str, answer: str | None = None) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    return {"messages": messages + ([{"role": "assistant", "content": answer}] if answer else [])}


def is_answer(text: str) -> bool:
    """Whether a text is JSON {"answer": text} and nothing else."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and list(found) == ["answer"] and isinstance(found["answer"], str)


@pytest.mark.slow
def test_smollm2_learns_a_format_from_chats(tmp_path: Path) -> None:
    rows = [
        chat(f"What is the capital of {country}?", json.dumps({"answer": city})) for country, city in CAPITALS.items()
    ]
    line = ["recipe=llm/chat", f"backbone.weights={smollm2()}", f"data.path={write(tmp_path / 'chats.jsonl', rows)}"]
    line += ["data.batch_size=4", "trainer.max_epochs=2", "trainer.threads=1", "trainer.progress=false"]
    line += ["task.samples_per_epoch=1", "task.max_new_tokens=16", "cv.val_fraction=0.15"]
    assert coeft("train", *line, f"run_dir={tmp_path / 'run'}") == 0
    assert coeft("export", "adapter", tmp_path / "run", "--out", tmp_path / "adapter") == 0
    with (tmp_path / "run" / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    assert losses[0] > 2 and max(losses[-4:]) < 1

    built = load_config(tmp_path / "run" / "config.yaml").backbone.build(0, 0, head="lm")
    base, tokenizer = built.model, built.tokenizer
    renderer = Renderer(tokenizer)
    prompts = [renderer.prompt(chat(question)).input_ids for question in NEW]

    def answers(model: nn.Module, cache: str) -> list[tuple[int, ...]]:
        decoding = Decoding(max_new_tokens=16, cache=cache)
        found = generate(model, prompts, stops=renderer.stop_tokens(), pad=tokenizer.pad_token_id, decoding=decoding)
        return [one.tokens for one in found]

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([prompts[0]])).logits

    stock = copy.deepcopy(base)
    assert not any(is_answer(readable(tokenizer, tokens)) for tokens in answers(base, "dynamic"))
    model = load_adapter(base, tmp_path / "adapter")
    written = answers(model, "dynamic")
    assert all(is_answer(readable(tokenizer, tokens)) for tokens in written)
    assert answers(model, "static") == written and answers(model, "none") == written

    whole = logits(model)
    mixers = [module for module in model.modules() if isinstance(module, CoeffMixer)]
    assert len(mixers) == 30 and all(mixer.num_heads == 9 for mixer in mixers)
    for mixer in mixers:
        mixer.set_alpha(torch.zeros(9, 9))
    assert (whole - logits(model)).abs().max() > 1e-2
    with pytest.warns(match="other_parts_need_coeft"):
        loaded = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert results(tmp_path / "run")["trainable_params"] == 30 * 9 * 9 + 30 * 16 * (2 * 576 + 2 * 576 + 2 * 768)
