"""What the settings of every task say."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from coeft.data._part import Encoder
    from coeft.tasks._task import Task


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Settings of what is learnt."""

    head: ClassVar[str] = "classifier"
    """What the backbone ends in: classifier, a fresh layer; or lm, a language model's own output layer."""

    @property
    def target(self) -> str:
        """What the data must give: class, classes (several of them), number, text or choice."""
        raise NotImplementedError

    def outputs(self, class_names: Sequence[str]) -> int:
        """Width of the head; 0 where the backbone has its own.

        Raises:
            UserError: there are too few classes.
        """
        return 0

    def encoder(self, data: Any, backbone: Any) -> "Encoder":
        """What turns the data's text into tokens: its columns as they are.

        Raises:
            UserError: the tokenizer cannot do it, or the data names no column.
        """
        from coeft.data._text import column_encoder

        return column_encoder(data, backbone, self.target)

    def build(self, num_outputs: int) -> "Task":
        """Loss and metrics."""
        raise NotImplementedError
