"""Write docs/families.md from the tables in coeft/attention/timm.py: python docs/write_families.py"""

from pathlib import Path

from coeft.attention.timm import PASSED_OVER, REFUSED, ROUTE, SUPPORTED

PAGE = """# Which timm models Coeff-Tuning fits

Written from the tables in `coeft/attention/timm.py` by `python docs/write_families.py`; do not edit by hand.

Coeff-Tuning mixes post-softmax attention maps across heads. coeft reaches them by the attention module's class. A model
is taken when all its attention layers between tokens are in the first table, refused when one is in the second or in
none, and what is in the third is passed over. `dry_run=true` shows the layers it found. Methods that act on weights
(lora, bitfit, full) fit refused models as well.

## Supported

Route: {route}. The class computes softmax maps (batch, heads, queries, keys) and passes them through `attn_drop`.

| class | models |
|---|---|
{supported}

## Refused

| class | models | reason |
|---|---|---|
{refused}

Models without attention between tokens (ResNet, ConvNeXt, MLP-Mixer ...) are refused as such.

## Passed over

| class | what it is |
|---|---|
{passed}
"""


def page() -> str:
    """The text of docs/families.md."""
    return PAGE.format(
        route=ROUTE,
        supported="\n".join(f"| `{name}` | {models} |" for name, models in SUPPORTED.items()),
        refused="\n".join(f"| `{name}` | {models} | {why} |" for name, (models, why) in REFUSED.items()),
        passed="\n".join(f"| `{name}` | {what} |" for name, what in PASSED_OVER.items()),
    )


if __name__ == "__main__":
    (Path(__file__).parent / "families.md").write_text(page(), encoding="utf-8")
