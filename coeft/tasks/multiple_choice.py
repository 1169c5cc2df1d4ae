"""Multiple choice with a causal language model: the choice of the highest length-normalised log-likelihood."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from coeft.errors import UserError, near
from coeft.tasks._settings import TaskSettings

if TYPE_CHECKING:
    from coeft.data._part import Encoder
    from coeft.tasks._multiple_choice import MultipleChoiceTask

METRICS = ("accuracy", "accuracy_unnormalised", "loss")
NORMALISE = ("byte", "token")


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(TaskSettings):
    """Settings of a run on questions with choices. The right choice's text is learnt; all choices are scored."""

    kind: str = "multiple_choice"
    metric: str = "accuracy"
    """What picks the epoch and is reported: accuracy, accuracy_unnormalised (by the sum of log-likelihoods), or loss
    (nats a token of the right choices)."""
    normalise: str = "byte"
    """What a choice's log-likelihood is divided by: its bytes as UTF-8, which does not depend on the tokenizer, or its
    tokens."""
    chat: bool = False
    """Ask by the tokenizer's chat template; false puts the choice after the question and a space."""

    head: ClassVar[str] = "lm"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UserError(f"task.metric: no metric {self.metric!r}; {near(self.metric, METRICS)}")
        if self.normalise not in NORMALISE:
            raise UserError(f"task.normalise must be byte or token, not {self.normalise!r}")

    @property
    def target(self) -> str:
        """What is learnt: which choice is right."""
        return "choice"

    def encoder(self, data: Any, backbone: Any) -> "Encoder":
        from coeft.tasks._multiple_choice import encoder

        return encoder(self, data, backbone)

    def build(self, num_outputs: int) -> "MultipleChoiceTask":
        """Loss and metrics."""
        from coeft.tasks._multiple_choice import MultipleChoiceTask

        return MultipleChoiceTask(self)
