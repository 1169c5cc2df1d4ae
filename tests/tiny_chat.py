"""A small random Llama in a folder, and chats, pairs, texts and questions for it."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_lm import CHATML, tiny_tokenizer

ANSWER = "ANSWER: yes"
TOPICS = ["sky", "water", "fire", "model", "question", "time"]


def tiny_llama(folder: Path, max_position_embeddings: int = 128) -> Path:
    """A Llama of two layers with its tokenizer and a chat template, as from_pretrained reads it."""
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=len(tokenizer),
        max_position_embeddings=max_position_embeddings,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chats(path: Path, count: int = 48) -> Path:
    """Chats whose answer is always the same."""
    rng = random.Random(0)
    return write(
        path,
        [
            {
                "messages": [
                    {"role": "user", "content": f"What is {rng.choice(TOPICS)} {number}?"},
                    {"role": "assistant", "content": ANSWER},
                ]
            }
            for number in range(count)
        ],
    )


def questions(path: Path, count: int = 48) -> Path:
    """Questions whose right choice is the topic they name."""
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        choices = rng.sample(TOPICS, 3)
        right = rng.randrange(3)
        rows.append({"question": f"Which is {choices[right]}?", "choices": choices, "answer": "ABC"[right]})
    return write(path, rows)


def command(model: Path, task: str = "causal_lm") -> list[str]:
    """What all runs of it have in common."""
    return [
        "backbone=hf",
        f"backbone.name={model}",
        f"task={task}",
        "data=table",
        "data.batch_size=8",
        "trainer.progress=false",
        "trainer.threads=1",
    ]
