"""The README.md of an adapter."""

from typing import Any

from coeft.adapt import ParameterCount
from coeft.assemble import Assembled, describe_inputs
from coeft.config import TrainConfig
from coeft.data._data import NOUNS
from coeft.run import versions

LIBRARIES = {"timm": "timm", "hf": "transformers"}


def model_card(
    cfg: TrainConfig, built: Assembled, counts: ParameterCount, row: dict[str, Any], class_names: list[str]
) -> str:
    """What the adapter is, what it was trained on, what it reached and how to load it."""
    backbone, stack = built.backbone, ", ".join(cfg.peft) or "none (the head alone)"
    methods = "\n".join(
        f"- `{attachment.method}`: {len(attachment.places)} places, "
        f"{sum(place.num_parameters for place in attachment.places):,} parameters"
        for attachment in built.stack.attachments
    )
    data = getattr(cfg.data, "name", None)
    reached = "no data to measure on" if row["value"] is None else f"{cfg.task.metric} {row['value']:.4f}"
    noun, inputs = NOUNS[backbone.modality], describe_inputs(backbone)
    on = f"{row['n_test']} test {noun}" if row["n_test"] else f"{row['n_val']} validation {noun}"
    classes = f", {len(class_names)} classes" if class_names else ""
    order = (
        "\nThe class names, in the order of the logits, stand in the metadata of `head.safetensors`."
        if class_names
        else ""
    )
    stock = (
        "\nThe LoRA part alone loads in stock peft, without the other methods and the head:\n\n"
        '```python\nimport peft\n\nmodel = peft.PeftModel.from_pretrained(model, "this folder")\n```\n'
        if "lora" in cfg.peft
        else ""
    )
    return f"""---
library_name: coeft
base_model: {backbone.name}
tags: [{", ".join(["coeft", "peft", *cfg.peft])}]
---

# {backbone.name}, adapted by {stack}

- Base model: {LIBRARIES[backbone.kind]} `{backbone.name}`
- {inputs[0].upper()}{inputs[1:]}
- Data: {cfg.data.kind}{f" ({data})" if data else ""}{classes}, {row["n_train"]} training {noun}
- Trained: {counts.trainable:,} of {counts.total:,} parameters ({counts.head:,} of them the head)
- Recipe: {cfg.recipe or "none"}, seed {cfg.seed}, fold {row["fold"]}, best epoch {row["best_epoch"]}
- Reached: {reached} on {on}

{methods or "No method beside the head."}

## Loading

```python
import coeft
{cfg.backbone.code(cfg.data.image_size)}
model = coeft.load_adapter(model, "this folder")
```
{order}
{stock}
Written by coeft {versions().get("coeft", "")}.
"""
