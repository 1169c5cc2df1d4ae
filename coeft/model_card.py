"""The README.md of an adapter."""

from pathlib import Path
from typing import Any

from coeft.adapt import ParameterCount
from coeft.assemble import Assembled, describe_preprocessing
from coeft.config import TrainConfig
from coeft.run import versions


def model_card(
    cfg: TrainConfig, built: Assembled, counts: ParameterCount, row: dict[str, Any], num_classes: int
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
    on = f"{row['n_test']} test images" if row["n_test"] else f"{row['n_val']} validation images"
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

- Base model: timm `{backbone.name}`
- Images: {describe_preprocessing(backbone.preprocessing)}
- Data: {cfg.data.kind}{f" ({data})" if data else ""}, {num_classes} classes, {row["n_train"]} training images
- Trained: {counts.trainable:,} of {counts.total:,} parameters ({counts.head:,} of them the head)
- Recipe: {cfg.recipe or "none"}, seed {cfg.seed}, fold {row["fold"]}, best epoch {row["best_epoch"]}
- Reached: {reached} on {on}

{methods or "No method beside the head."}

## Loading

```python
import coeft
import timm

{_base_model(cfg)}
model = coeft.load_adapter(model, "this folder")
```

The class names, in the order of the logits, stand in the metadata of `head.safetensors`.
{stock}
Written by coeft {versions().get("coeft", "")}.
"""


def _base_model(cfg: TrainConfig) -> str:
    """The lines that make the base model."""
    settings = cfg.backbone
    options = dict(settings.options)
    if cfg.data.image_size is not None:
        options["img_size"] = cfg.data.image_size
    hub = settings.pretrained and settings.weights is None
    arguments = [repr(settings.name), *(["pretrained=True"] if hub else [])]
    arguments += [f"{name}={value!r}" for name, value in options.items()]
    line = f"model = timm.create_model({', '.join(arguments)})"
    if settings.pretrained and settings.weights is not None:
        line += f"\n# then load its weights, {Path(settings.weights).name}, by model.load_state_dict(..., strict=False)"
    return line
