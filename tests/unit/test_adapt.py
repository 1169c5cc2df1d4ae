"""The stack, adapted linear layers and the choice of layers."""

import re

import pytest

from coeft.adapt import select_layers
from coeft.errors import UserError

NAMES = [f"blocks.{i}.attn" for i in range(12)]


def test_select_layers_takes_indices_and_patterns_in_ascending_order_without_repeats() -> None:
    assert select_layers(NAMES, None, "x") == list(range(12))
    assert select_layers(NAMES, [-1, 3, 11, "blocks.3.", 0], "x") == [0, 3, 11]
    assert select_layers(NAMES, [r"\.1[01]?\.attn$"], "x") == [1, 10, 11]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([12], "peft.coeff.layers: there is no layer 12; indices are 0 to 11, or -12 to -1"),
        ([-13], "there is no layer -13"),
        (["blocks.99"], "peft.coeff.layers: 'blocks.99' matches no layer; did you mean blocks."),
        ([0, "nowhere"], "'nowhere' matches no layer; there are blocks.0.attn,"),
        (["blocks.("], "'blocks.(' is not a regular expression: "),
        ([True], "True is neither an index nor a regular expression"),
        ([1.5], "1.5 is neither"),
    ],
)
def test_select_layers_refuses_what_is_not_there(layers: list, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        select_layers(NAMES, layers, "peft.coeff.layers")


def test_select_layers_of_a_model_without_layers() -> None:
    assert select_layers([], None, "x") == []
    with pytest.raises(UserError, match="none to choose from"):
        select_layers([], [0], "x")
