"""The README.md of an adapter."""

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from coeft.adapt import ParameterCount
from coeft.assemble import Assembled, describe_inputs
from coeft.backbones._backbone import Backbone
from coeft.config import TrainConfig, shorten_home
from coeft.data._data import NOUNS
from coeft.run import versions

if TYPE_CHECKING:
    from coeft.standalone import Summary

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
    data, base = plain(getattr(cfg.data, "name", None) or ""), plain(backbone.name)
    reached = "no data to measure on" if row["value"] is None else f"{cfg.task.metric} {row['value']:.4f}"
    noun, inputs = NOUNS[backbone.data_modality], describe_inputs(backbone)
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
base_model: {_scalar(base)}
tags: [{", ".join(["coeft", "peft", *cfg.peft])}]
---

# {base}, adapted by {stack}

- Base model: {LIBRARIES[backbone.kind]} `{base}`
- {inputs[0].upper()}{inputs[1:]}
- Data: {cfg.data.kind}{f" ({data})" if data else ""}{classes}, {row["n_train"]} training {noun}
- Trained: {counts.trainable:,} of {counts.total:,} parameters ({counts.head:,} of them the head)
- Recipe: {plain(cfg.recipe or "none")}, seed {cfg.seed}, fold {row["fold"]}, best epoch {row["best_epoch"]}
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


def standalone_card(backbone: Backbone, summary: "Summary", facts: Mapping[str, str]) -> str:
    """What a stand-alone model is, what was done to it, what that costs and how to load it.

    Args:
        facts: name -> text, on where the model comes from.
    """
    base, library = plain(backbone.name), LIBRARIES[backbone.kind]
    needs = f"{library} and coeft, which runs {', '.join(summary.kept)}" if summary.kept else f"{library} alone"
    listed = "\n".join(f"- {name}: {text}" for name, text in facts.items())
    done = "\n".join(f"- {line[0].upper()}{line[1:]}" for line in summary.lines())
    return f"""---
library_name: {library}
base_model: {_scalar(base)}
tags: [coeft]
---

# {base}, fine-tuned

{listed}

## What was done

{done}

## Loading

In this folder (elsewhere write its path for the dot), with {needs}:

```python
{summary.code}
```

Written by coeft {versions().get("coeft", "")}.
"""


def _scalar(text: str) -> str:
    """One line of text as YAML."""
    return text if re.fullmatch(r"[\w./@~-]+", text) else json.dumps(text, ensure_ascii=False)


def plain(text: str) -> str:
    """Text of a config as a card shows it: one line that is neither markup nor a path of the home folder."""
    text = " ".join(shorten_home(text).split()).replace("`", "'")
    return text.replace("<", "&lt;").replace(">", "&gt;").replace("](", "] (")


def run_facts(cfg: TrainConfig, results: Mapping[str, Any], fold: int | None) -> dict[str, str]:
    """Where the model of a run, or of one fold of it, comes from and what it reached."""
    rows = {row["fold"]: row for row in results["folds"]}
    if fold is None and len(rows) > 1:
        value, on = results["mean"], f"held-out data, the mean of {len(rows)} folds whose models are not this one"
    else:
        row = rows[fold or 0]
        value, on = row["value"], f"{row['n_test'] or row['n_val']} {'test' if row['n_test'] else 'validation'} samples"
    return {
        "Base model": f"{LIBRARIES[cfg.backbone.kind]} `{plain(cfg.backbone.name)}`",
        "Data": " ".join(filter(None, [cfg.data.kind, plain(getattr(cfg.data, "name", None) or "")])),
        "Methods": ", ".join(cfg.peft) or "none (the head alone)",
        "Recipe": f"{plain(cfg.recipe or 'none')}, seed {cfg.seed}",
        "Reached": "no data to measure on" if value is None else f"{results['metric']} {value:.4f} on {on}",
    }
