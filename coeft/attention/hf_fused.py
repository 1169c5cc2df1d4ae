"""The fused route of transformers models: layers that hand their whole attention to the mixer, without holding maps.

For layers that would run sdpa and whose file computes plain scaled-dot-product attention: every statement of its
eager_attention_forward is one of STEPS, in that order. Softcaps, sinks, position biases and whatever a later version of
transformers writes there are none of these, so such layers keep the route over their maps, and `dry_run` shows that.
Models that were asked for eager attention keep it too: eager is how transformers is asked for maps.
Read from transformers 5.23.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn

from coeft.attention.mixer import CoeffMixer

SCORES = "attn_weights = torch.matmul(query, {}.transpose({})) * scaling"
STEPS: tuple[tuple[str, ...], ...] = (
    tuple(f"if scaling is None:\n    scaling = {size} ** (-0.5)" for size in ("query.size(-1)", "module.head_dim")),
    ("key_states = repeat_kv(key, module.num_key_value_groups)", "key_states = key"),
    ("value_states = repeat_kv(value, module.num_key_value_groups)", "value_states = value"),
    tuple(SCORES.format(key, axes) for key in ("key", "key_states") for axes in ("2, 3", "-1, -2")),
    (
        "if softcap is not None:\n    attn_weights = attn_weights / softcap\n"
        "    attn_weights = torch.tanh(attn_weights)\n    attn_weights = attn_weights * softcap",
    ),
    ("if attention_mask is not None:\n    attn_weights = attn_weights + attention_mask",),
    (
        "attn_weights = nn.functional.softmax(attn_weights, dim=-1)",
        "attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)",
    ),
    ("attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)",),
    tuple(f"attn_output = torch.matmul(attn_weights, {value})" for value in ("value", "value_states")),
    ("attn_output = attn_output.transpose(1, 2).contiguous()",),
    ("return (attn_output, attn_weights)",),
)
"""What plain attention is made of in transformers; a softcap counts as plain where the layer gives none."""


@cache
def is_plain(eager: Callable[..., Any]) -> bool:
    """Whether every statement of an eager_attention_forward is one of STEPS, in that order."""
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(eager))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # no source, or not that of one function
        return False
    steps = iter(STEPS)
    body = getattr(function, "body", [])
    return bool(body) and all(any(ast.unparse(line) in step for step in steps) for line in body)


def unchanged(options: dict[str, Any]) -> bool:
    """Whether the options of a call leave plain attention what it is, and nobody wants the maps."""
    changed = options.get("softcap") is not None or options.get("position_bias") is not None
    return not changed and not options.get("output_attentions")


def attend(
    mixer: CoeffMixer,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **ignored: Any,
) -> Tensor:
    """What transformers' sdpa gives, (B, N, H, D), with mixed maps: without a mask a layer is causal where it says so.

    Query (B, H, N, E), key (B, H_kv, M, E), value (B, H_kv, M, D), mask bool or float, (B, 1 or H, N, M).
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    output = mixer(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout if module.training else 0.0,
        is_causal=bool(mask is None and causal and query.shape[2] > 1),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous()
