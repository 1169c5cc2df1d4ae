"""Records of text as tokens, with a mask of those that are learnt: chats, prompts with completions, plain text.

Text is divided where a completion begins before it becomes tokens, so that what a model is trained to continue has
exactly the tokens that it is given when it generates.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coeft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"
LOSS_ON = ("completion", "all")
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One record as tokens."""

    input_ids: tuple[int, ...]
    learnt: tuple[bool, ...]
    """Which tokens the loss is taken of, as predictions from the tokens before them."""
    cut: int = 0
    """Tokens that did not fit."""

    def __post_init__(self) -> None:
        assert len(self.input_ids) == len(self.learnt)

    @property
    def count(self) -> int:
        """Tokens that the loss is taken of; the first of a row has nothing before it to be predicted from."""
        return sum(self.learnt[1:])


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is asked to continue, and what is expected."""

    text: str
    """As a person reads it: the prompt, or the last message before the answer."""
    input_ids: tuple[int, ...]
    expected: str | None = None


class Renderer:
    """Turns records into tokens with one tokenizer.

    A record is a mapping with `messages` (a list of {"role", "content"}, or the same as JSON text), with `prompt` and
    `completion`, or with `text`.

    Args:
        loss_on: "completion" learns the completion, or the assistant's messages; "all" learns prompts too. Plain text
            has no prompt: it is learnt wholly.
        max_length: longest row in tokens; longer ones lose their end.

    Raises:
        UserError: the tokenizer has no end-of-text token.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        loss_on: str = "completion",
        max_length: int | None = None,
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.loss_on = loss_on
        self.max_length = max_length
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-text token (eos_token), which ends every completion")
        self.eos: int = int(tokenizer.eos_token_id)
        self._start = self._first_tokens()
        specials = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        specials |= {str(token) for token in tokenizer.all_special_tokens}
        self._specials = re.compile("|".join(re.escape(token) for token in sorted(specials, key=len, reverse=True)))

    def render(self, record: Mapping[str, Any]) -> Rendered:
        """The tokens of a record, cut at max_length.

        Raises:
            UserError: the record cannot be rendered, or nothing that is learnt is left of it.
        """
        if "messages" in record:
            whole = self._chat(read_messages(record["messages"]))
        elif "completion" in record:
            whole = self._pair(_text(record, "prompt"), _text(record, "completion"))
        else:
            text = _text(record, "text")
            whole = self._pair("", text) if text else Rendered(input_ids=(), learnt=())
        if self.loss_on == "all":
            whole = replace(whole, learnt=(True,) * len(whole.learnt))
        if whole.count == 0:
            raise UserError("nothing to learn: the text is empty")
        limit = self.max_length
        if limit is None or len(whole.input_ids) <= limit:
            return whole
        row = Rendered(input_ids=whole.input_ids[:limit], learnt=whole.learnt[:limit], cut=len(whole.input_ids) - limit)
        if row.count == 0:
            raise UserError(
                f"its {len(whole.input_ids)} tokens are cut to data.max_length={limit}, "
                f"which leaves nothing of the completion"
            )
        return row

    def prompt(self, record: Mapping[str, Any]) -> Prompt:
        """What a model is given of a record when it generates; its beginning in `render`, uncut.

        Of a chat that ends with the assistant's message, all before that; of plain text, the whole.

        Raises:
            UserError: the record cannot be rendered.
        """
        if "messages" in record:
            messages = read_messages(record["messages"])
            expected = None
            if messages[-1]["role"] == ASSISTANT and len(messages) > 1:
                expected, messages = str(messages[-1].get("content") or ""), messages[:-1]
            text = self._apply(messages, add_generation_prompt=True)
            ids = [token for segment in self._turns(messages, text)[0] for token in segment]
            said = str(messages[-1].get("content") or "")
            return Prompt(text=said, input_ids=tuple(ids), expected=expected)
        key = "prompt" if "prompt" in record else "text"
        text = _text(record, key)
        expected = str(record["completion"]) if record.get("completion") is not None else None
        return Prompt(text=text, input_ids=self._begun(self._encode(text) if text else []), expected=expected)

    def stop_tokens(self) -> list[int]:
        """The tokens that end an answer: the tokenizer's end of text, and what its chat template puts after one."""
        stops = [self.eos]
        if self.has_template():
            content = "x"
            try:
                text = self._apply([{"role": "user", "content": content}, {"role": ASSISTANT, "content": content}])
            except UserError:  # a template that wants other roles
                return stops
            found = self._specials.search(text, text.rindex(content) + len(content))
            if found:
                [*ids] = self._encode(found[0])
                stops += [token for token in ids[:1] if len(ids) == 1 and token not in stops]
        return stops

    def has_template(self) -> bool:
        """Whether chats can be rendered."""
        return bool(self.tokenizer.chat_template)

    def require_template(self) -> None:
        """Refuse a tokenizer without a chat template."""
        if not self.has_template():
            raise UserError(
                "the tokenizer has no chat template, which says how messages become text: give one by "
                "data.chat_template=FILE (Jinja), or use the columns prompt and completion"
            )

    def continued(self, record: Mapping[str, Any], text: str) -> tuple[list[int], list[int]]:
        """The tokens of a prompt and of a text that follows it, neither ended nor cut.

        Raises:
            UserError: the record cannot be rendered, or the text is empty.
        """
        if not text:
            raise UserError("the text after the prompt is empty")
        if "messages" not in record:
            first, second = self._segments([_text(record, "prompt"), text])
            return list(self._begun(first)), second
        before = self._apply(read_messages(record["messages"]), add_generation_prompt=True)
        first, second = self._segments([before, text])
        return first, second

    # Parts.

    def _pair(self, prompt: str, completion: str) -> Rendered:
        if not completion:
            raise UserError("the completion is empty")
        first, second = self._segments([prompt, completion])
        first = list(self._begun(first))
        return Rendered(
            input_ids=(*first, *second, self.eos), learnt=(False,) * len(first) + (True,) * (len(second) + 1)
        )

    def _chat(self, messages: list[dict[str, Any]]) -> Rendered:
        answers = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
        if not answers:
            raise UserError("the chat has no message of the assistant to learn from")
        text = self._apply(messages)
        segments, last = self._turns(messages, text)
        ids = [token for segment in segments for token in segment]
        learnt = [number % 2 == 1 for number, segment in enumerate(segments) for _ in segment]
        if answers[-1] == len(messages) - 1 and not self._closing(last):
            ids, learnt = [*ids, self.eos], [*learnt, True]  # a template that says nowhere that an answer is over
        return Rendered(input_ids=tuple(ids), learnt=tuple(learnt))

    def _turns(self, messages: list[dict[str, Any]], text: str) -> tuple[list[list[int]], str]:
        """The tokens of a chat's text in segments, every second one an answer, and the text of the last answer."""
        answers = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
        if self.loss_on == "all" or not answers:
            return [self._encode(text)], text
        marked = MARKERS.search(self.tokenizer.get_chat_template()) is not None
        spans = self._marked(messages, text) if marked else [self._answer(messages, index, text) for index in answers]
        cuts = [0, *(place for span in spans for place in span), len(text)]
        segments = self._segments([text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)])
        return segments, text[spans[-1][0] : spans[-1][1]]

    def _answer(self, messages: list[dict[str, Any]], index: int, text: str) -> tuple[int, int]:
        """Where an assistant's message begins and ends in the text of a chat, its end-of-turn token included.

        It begins after what the template writes to ask for it, and ends at the end-of-turn token, or where the chat up
        to it ends.
        """
        if index == 0:
            raise UserError("the chat begins with the assistant: there is nothing that it answers to")
        asked = self._apply(messages[:index], add_generation_prompt=True)
        if not text.startswith(asked):
            raise self._unstable(index)
        begin = len(asked)
        content = messages[index].get("content")
        said = content.strip() if isinstance(content, str) else ""
        until = self._apply(messages[: index + 1])
        if len(until) > begin and text.startswith(until):
            end = len(until)
        else:  # a template that writes an earlier answer otherwise than the last: up to the next end of turn
            at = text.find(said, begin) if said else -1
            found = re.compile(rf"\s*(?:{self._specials.pattern})").match(text, at + len(said)) if at >= 0 else None
            if found is None:
                raise self._unstable(index)
            end = found.end()
        if said and said not in text[begin:end]:
            raise self._unstable(index)
        closing = self._closing(text[begin:end])
        return (begin, begin + closing) if closing else (begin, end)

    def _closing(self, answer: str) -> int:
        """Where the end-of-turn token of an answer's text ends; 0 if it has none. White space may follow it."""
        ends = [found.end() for found in self._specials.finditer(answer) if not answer[found.end() :].strip()]
        return ends[0] if ends else 0

    def _unstable(self, index: int) -> UserError:
        return UserError(
            f"the chat template does not write message {index + 1} as the continuation of what it writes before it, so "
            f"that its tokens cannot be told apart: mark them by {{% generation %}} ... {{% endgeneration %}} in a "
            f"template of your own (data.chat_template=FILE), or learn everything (task.loss_on=all)"
        )

    def _marked(self, messages: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
        """The parts of a chat's text that the template marks as the assistant's, with the token that ends each."""
        encoded = self._apply_marked(messages)
        offsets, marks = encoded["offset_mapping"], encoded["assistant_masks"]
        spans: list[tuple[int, int]] = []
        for (start, end), mark in zip(offsets, marks, strict=True):
            if not mark or start == end:
                continue
            if spans and not text[spans[-1][1] : start]:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((start, end))
        if not spans:
            raise UserError("the chat template marks nothing as the assistant's ({% generation %}) in this chat")
        closed = []
        for start, end in spans:
            following = self._specials.match(text, end)
            closed.append((start, following.end() if following and not self._closing(text[start:end]) else end))
        return closed

    def _apply(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return self._templated(messages, tokenize=False, **options)

    def _apply_marked(self, messages: list[dict[str, Any]]) -> Mapping[str, Any]:
        return self._templated(
            messages,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )

    def _templated(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        from jinja2.exceptions import TemplateError

        self.require_template()
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except (TemplateError, TypeError, KeyError, IndexError) as error:
            raise UserError(f"the chat template refuses the messages ({error})") from error

    def _segments(self, parts: Sequence[str]) -> list[list[int]]:
        """The tokens of each part of a text.

        Each part by itself, as a model that generates meets them; where the tokenizer writes something of its own
        before every text, such as a space, the parts of the whole.
        """
        single = [self._encode(part) if part else [] for part in parts]
        whole = self._encode("".join(parts))
        joined = [token for part in single for token in part]
        if joined == whole or self._decode(joined) == self._decode(whole):
            return single
        cuts = [0]
        for number in range(1, len(parts)):
            before = self._encode("".join(parts[:number]))
            if whole[: len(before)] != before:
                raise UserError(
                    f"the tokenizer joins the end of {parts[number - 1][-20:]!r} and the beginning of "
                    f"{parts[number][:20]!r} into one token: end the prompt where a word ends"
                )
            cuts.append(len(before))
        cuts.append(len(whole))
        return [whole[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _first_tokens(self) -> tuple[int, ...]:
        """What the tokenizer writes before every text, such as its beginning-of-text token."""
        plain = self._encode("a")
        full = list(self.tokenizer("a")["input_ids"])
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return tuple(full[:start])
        return ()

    def _begun(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Tokens with the beginning-of-text token before them, once."""
        already = tuple(ids[: len(self._start)]) == self._start
        return tuple(ids) if already else (*self._start, *ids)


def take_template(tokenizer: "PreTrainedTokenizerBase", path: str | None) -> None:
    """Give a tokenizer the chat template of a file; null leaves its own.

    Raises:
        UserError: the file cannot be read, or is no Jinja template.
    """
    if path is None:
        return
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template={path}: cannot be read ({error})") from error
    tokenizer.chat_template = text
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(f"data.chat_template={path}, line {error.lineno}: {error.message}") from error
    except TemplateError:  # it wants other messages than this one
        return


def read_messages(value: Any) -> list[dict[str, Any]]:
    """The messages of a chat, from a list or from JSON text.

    Raises:
        UserError: not a list of mappings with role and content.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"messages is not JSON ({error})") from error
    if not isinstance(value, Sequence) or isinstance(value, str) or not len(value):
        raise UserError('messages must be a list such as [{"role": "user", "content": "..."}, ...]')
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f'message {number} must be a mapping with "role" and "content"')
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise UserError(f"message {number}: content must be text, not {type(content).__name__}")
        if content is None and "tool_calls" not in message:
            raise UserError(f"message {number} ({message['role']}) has no content")
        messages.append(dict(message))
    return messages


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None or (isinstance(value, float) and value != value):
        raise UserError(f"{key} is missing")
    return str(value)
