"""Write docs/families.md from the tables in coeft/attention/: python docs/write_families.py"""

from pathlib import Path

from coeft.attention import hf
from coeft.attention.timm import BOTH_ROUTES, PASSED_OVER, REFUSED, ROUTE, SUPPORTED
from coeft.attention.timm_fused import FUSED

PAGE = """# Which models Coeff-Tuning fits

Written from the tables in `coeft/attention/` by `python docs/write_families.py`; do not edit by hand.

Coeff-Tuning mixes post-softmax attention maps across heads, so coeft has to reach these maps. A model is taken when all
its attention layers between tokens can be reached, and refused with the reason when one cannot. `dry_run=true` shows
the layers it found. Methods that act on weights (lora, bitfit, full) fit refused models as well.

## timm

The attention module's class decides. A model is taken when all its attention layers between tokens are in the first
table, refused when one is in the second or in none, and what is in the third is passed over.

### Supported

Route: {route}. The class computes softmax maps (batch, heads, queries, keys) and passes them through `attn_drop`.

Where the second column says so, the whole attention can also be handed over, without its maps ("{both}" in
`dry_run`): `coeff_attention` by blocks of query rows, for layers whose maps would not fit in the cache. Both give the
same to round-off. These classes use coeft's own forward only as long as timm's has the source it was written from.

| class | without maps | models |
|---|---|---|
{supported}

### Refused

| class | models | reason |
|---|---|---|
{refused}

Models without attention between tokens (ResNet, ConvNeXt, MLP-Mixer ...) are refused as such.

### Passed over

| class | what it is |
|---|---|
{passed}

## transformers

Route: {hf_route}. A forward decides, not a list: coeft runs one on small inputs and notes which layers
ask transformers' attention interface. A model is taken when every attention layer asks, is reached, and multiplies the
maps that it returns with the values. Softcap, sinks, position biases, scaling, masks and dropout stay the model's own;
caches, generation, gradient checkpointing and `torch.compile` work as before.

Layers with coefficients compute their maps as eager attention does. Of a model that runs sdpa, layers whose file
computes plain scaled-dot-product attention hand large inputs to `coeff_attention` as a whole: memory then grows with
the length, not with its square, and no maps are returned, as by sdpa (`dry_run`: "{both}"). A model with
eager attention keeps its maps. Layers without coefficients keep eager or sdpa attention as they were. Flash and flex
attention, which give no maps, are replaced by sdpa. Attaching sets the model's attention implementation to
`coeft_eager` or `coeft_sdpa`; whoever switches it away gets an error in the next forward.

### Tested

These have a small model in the tests (`tests/tiny_hf.py`), where every claim above is checked. Where a model has
several kinds of attention, `peft.coeff.layers` chooses among them by regular expressions on their names, as given here.

| `model_type` | models | attention layers |
|---|---|---|
{hf_tested}

Other models are taken if their forward passes the same checks.

### Refused

| class | models | reason |
|---|---|---|
{hf_refused}

So are models with `reorder_and_upcast_attn` (an option of GPT-2), which takes a way around the interface.

### Passed over

| class | what it is |
|---|---|
{hf_passed}
"""


def page() -> str:
    """The text of docs/families.md."""
    return PAGE.format(
        route=ROUTE,
        both=BOTH_ROUTES,
        supported="\n".join(
            f"| `{name}` | {'too' if name in FUSED else ''} | {models} |" for name, models in SUPPORTED.items()
        ),
        refused="\n".join(f"| `{name}` | {models} | {why} |" for name, (models, why) in REFUSED.items()),
        passed="\n".join(f"| `{name}` | {what} |" for name, what in PASSED_OVER.items()),
        hf_route=hf.ROUTE,
        hf_tested="\n".join(f"| `{name}` | {models} | {layers} |" for name, (models, layers) in hf.TESTED.items()),
        hf_refused="\n".join(f"| `{name}` | {models} | {why} |" for name, (models, why) in hf.REFUSED.items()),
        hf_passed="\n".join(f"| `{name}` | {what} |" for name, what in hf.PASSED_OVER.items()),
    )


if __name__ == "__main__":
    (Path(__file__).parent / "families.md").write_text(page(), encoding="utf-8")
