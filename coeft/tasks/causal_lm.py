"""Supervised fine-tuning of a causal language model: next tokens of completions, of answers in chats, or of texts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from coeft.errors import UserError, near
from coeft.tasks._settings import TaskSettings

if TYPE_CHECKING:
    from coeft.data._part import Encoder
    from coeft.tasks._causal_lm import CausalLMTask

METRICS = ("exact_match", "loss", "perplexity", "token_accuracy")
LOSS_ON = ("completion", "all")


@dataclass(frozen=True, kw_only=True)
class CausalLM(TaskSettings):
    """Settings of a run that trains a language model."""

    kind: str = "causal_lm"
    metric: str = "loss"
    """What picks the epoch and is reported: loss (nats a token), perplexity, token_accuracy, or exact_match, the share
    of rows whose completion greedy decoding gives token by token."""
    loss_on: str = "completion"
    """completion: the loss is taken of the completion, or of the assistant's messages. all: of prompts too."""
    packing: bool = False
    """Put several texts into one row of data.max_length tokens; they do not see each other. data.batch_size counts
    rows then."""
    max_new_tokens: int = 64
    """Longest text that is generated for a sample."""
    samples_per_epoch: int = 3
    """Prompts of the validation part that are answered after each epoch, into samples.jsonl; 0 is none."""

    head: ClassVar[str] = "lm"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UserError(f"task.metric: no metric {self.metric!r}; {near(self.metric, METRICS)}")
        if self.loss_on not in LOSS_ON:
            raise UserError(f"task.loss_on must be completion or all, not {self.loss_on!r}")
        if self.max_new_tokens < 1:
            raise UserError(f"task.max_new_tokens must be 1 or more, not {self.max_new_tokens}")
        if self.samples_per_epoch < 0:
            raise UserError(f"task.samples_per_epoch must be 0 or more, not {self.samples_per_epoch}")

    @property
    def target(self) -> str:
        """What is learnt: the text itself."""
        return "text"

    def encoder(self, data: Any, backbone: Any) -> "Encoder":
        from coeft.tasks._causal_lm import encoder

        return encoder(self, data, backbone)

    def build(self, num_outputs: int) -> "CausalLMTask":
        """Loss and metrics."""
        from coeft.tasks._causal_lm import CausalLMTask

        return CausalLMTask(self)
