"""Text from a causal language model: greedy or sampled, in batches, with or without a cache, as a stream."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from coeft.edits import prompting
from coeft.errors import UserError
from coeft.modes import evaluating
from coeft.seeding import reseed

CACHES = ("dynamic", "static", "none")


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How the next token is chosen, and when to stop."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 takes the likeliest token; else logits are divided by it and a token is drawn."""
    top_p: float = 1.0
    """Draw only from the likeliest tokens that together have this probability."""
    seed: int = 0
    cache: str = "dynamic"
    """dynamic, static (of fixed size) or none: keys and values of earlier tokens. The text is the same with each."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be 1 or more, not {self.max_new_tokens}")
        if not self.temperature >= 0:
            raise UserError(f"temperature must be 0 (the likeliest token) or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.cache not in CACHES:
            raise UserError(f"cache must be one of {', '.join(CACHES)}, not {self.cache!r}")


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after one prompt."""

    tokens: tuple[int, ...]
    """Without the token that ended it."""
    ended: bool
    """Whether the model ended it, not max_new_tokens."""


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    stops: Sequence[int],
    pad: int,
    decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
    batch_size: int = 8,
    watch: Callable[[list[int]], None] | None = None,
) -> list[Continuation]:
    """Continue every prompt, in batches padded on the left; the model is in evaluation mode meanwhile.

    The model's own generation settings (a repetition penalty, a temperature) are left out of it, so that the result
    follows from `decoding` alone.

    Args:
        prompts: tokens of each prompt, one at least.
        stops: tokens that end a text.
        pad: token that fills shorter prompts up; masked, so that any will do.
        watch: called with the tokens of one prompt as they are written, the whole text each time; one prompt only.
    Raises:
        UserError: a prompt is empty, or leaves no room in the model's positions.
    """
    if watch is not None and len(prompts) != 1:
        raise ValueError("watch follows one prompt")
    top = cast(Any, model)
    limit = positions(model)
    for prompt in prompts:
        if not prompt:
            raise UserError("the prompt is empty")
        if limit is not None and len(prompt) >= limit:
            raise UserError(f"the prompt has {len(prompt)} tokens, and the model takes {limit} in all; shorten it")
    options: dict[str, Any] = {"do_sample": False}
    if decoding.temperature > 0:
        options = {"do_sample": True, "temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    options |= {"use_cache": False} if decoding.cache == "none" else {"use_cache": True}
    if decoding.cache == "static":
        options["cache_implementation"] = "static"
    found: list[Continuation] = []
    device = next(model.parameters()).device
    with _evaluating(model), torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            inputs = {name: value.to(device) for name, value in left_padded(batch, pad).items()}
            width = inputs["input_ids"].shape[1]
            room = decoding.max_new_tokens if limit is None else min(decoding.max_new_tokens, limit - width)
            reseed(decoding.seed, "generate", start)
            with prompting(model, inputs["attention_mask"]):
                rows = top.generate(
                    **inputs,
                    max_new_tokens=room,
                    eos_token_id=list(stops),
                    pad_token_id=pad,
                    streamer=_Follower(watch) if watch is not None else None,
                    **options,
                )
            found += [_until(row[width:].tolist(), stops) for row in rows]
    return found


def readable(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Tokens as text, without special tokens and white space around it."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """input_ids and attention_mask, int64 (B, T): every prompt ends in the last column."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def positions(model: nn.Module) -> int | None:
    """How many tokens a model takes at most; None if its config does not say."""
    config = cast(Any, model).config.get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if isinstance(found, int) and found > 0 else None


def _until(tokens: list[int], stops: Sequence[int]) -> Continuation:
    end = next((index for index, token in enumerate(tokens) if token in stops), None)
    return Continuation(tuple(tokens[:end]), end is not None)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and generation settings that are nothing but transformers' defaults; both put back after."""
    top = cast(Any, model)
    before = top.generation_config
    top.generation_config = type(before)() if before is not None else None
    try:
        with evaluating(model):
            yield
    finally:
        top.generation_config = before


class _Follower:
    """What transformers calls with the prompt, then with each new token."""

    def __init__(self, watch: Callable[[list[int]], None]) -> None:
        self.watch = watch
        self.tokens: list[int] | None = None  # none before the prompt has come

    def put(self, value: Tensor) -> None:
        if self.tokens is None:
            self.tokens = []
            return
        self.tokens += value.flatten().tolist()
        self.watch(list(self.tokens))

    def end(self) -> None:
        """Nothing is held back."""


class Teller:
    """Writes a growing text piece by piece; a letter whose bytes are not all there yet waits for them.

    Args:
        decode: tokens -> text.
        write: gets each new piece.
        stops: tokens that are not written.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], write: Callable[[str], Any], stops: Sequence[int] = ()
    ) -> None:
        self.decode, self.write, self.stops = decode, write, set(stops)
        self.text = ""
        self.told = 0

    def __call__(self, tokens: list[int]) -> None:
        self.text = self.decode([token for token in tokens if token not in self.stops])
        if not self.text.endswith("\ufffd"):
            self.end()

    def end(self) -> None:
        """Write what is left, whole letters or not."""
        if len(self.text) > self.told:
            self.write(self.text[self.told :])
            self.told = len(self.text)
