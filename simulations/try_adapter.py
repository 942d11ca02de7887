"""``fedlora try``: what the adapter that a run exported answers, by plain PEFT on the untouched base model.

Nothing of the engine computes here: transformers loads the base, PEFT the adapter. The run's task turns the text into
tokens as it did in training, with the run's own prompt template or chat template.
"""

from __future__ import annotations

import argparse
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from rich.console import Console
from rich.table import Table as RichTable

from fedlora import plugins
from fedlora.config import Config
from fedlora.data import Table
from fedlora.messages import first_line
from fedlora.reports.adapters import adapter_of
from fedlora.reports.run import Run
from fedlora.tasks import TASKS, CausalLM, Classification, Task

NOTHING = "(nothing: the model ends its answer at once)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedlora try``."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="the text; one a column, where the prompt has several")
    parser.add_argument(
        "--client", type=int, metavar="N", help="by the adapter of this client, where they have own ones"
    )
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="the most that a language model writes")


def run_try(options: argparse.Namespace, console: Console) -> int:
    """Print what a run's adapter answers.

    Raises:
        ValueError: The run has no such adapter, its model cannot be loaded, or the text does not fit.
    """
    if options.tokens < 1:
        raise ValueError(f"--tokens {options.tokens}: must be at least 1.")
    run = Run.read(options.run.expanduser().resolve())
    plugins.load(run.config.run.plugins)
    folder = adapter_of(run, options.client)
    task = TASKS[run.config.task]
    if not issubclass(task, CausalLM | Classification):
        raise ValueError(
            f"task = {run.config.task!r}: fedlora try answers for 'classification' and 'causal-lm'; load {folder} with "
            "PEFT as its README.md shows."
        )
    text = read_text(run.config, options.texts)
    adapted = Adapted.load(run, folder)
    if task.has_head:
        console.print(_ranking(adapted.classify(text)))
    else:
        console.print(adapted.write(text, options.tokens) or NOTHING, markup=False)
    return 0


def read_text(config: Config, texts: list[str]) -> str:
    """Return what the model reads: a text as it is, or the run's prompt template with a text in each column's place.

    Raises:
        ValueError: There are more texts than columns, or fewer, or one is empty.
    """
    template = config.data.prompt_template
    names = list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name)) or ["text"]
    if len(texts) != len(names):
        source = f"data.prompt-template = {template!r}" if template else "the run"
        raise ValueError(
            f"{source} reads {len(names)} text(s) ({', '.join(names)}), and {len(texts)} were given; give each in "
            "quotes, in this order."
        )
    if not any(text.strip() for text in texts):
        raise ValueError("the text is empty; give one in quotes.")
    return template.format(**dict(zip(names, texts, strict=True))) if template else texts[0]


@final
@dataclass(frozen=True)
class Adapted:
    """An exported adapter on its base model, as any user of PEFT loads it.

    Attributes:
        run: The run.
        task: Its task, for this tokenizer.
        tokenizer: The adapter's.
        model: The PEFT model.
    """

    run: Run
    task: Task
    tokenizer: Any
    model: Any

    @classmethod
    def load(cls, run: Run, folder: Path) -> Adapted:
        """Load an adapter.

        Raises:
            ValueError: Base model or adapter cannot be loaded.
        """
        import torch
        import transformers
        from peft import PeftModel

        from fedlora.models import names
        from fedlora.models.quiet import quiet

        config, kind = run.config, TASKS[run.config.task]
        options: dict[str, Any] = {"dtype": getattr(torch, config.engine.dtype), **names.options(config.model)}
        try:
            with quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
                if kind.has_head:  # a checkpoint's head of another number of classes is replaced by the adapter's
                    classes, padding = len(run.partition["classes"]), tokenizer.pad_token_id
                    options |= {"num_labels": classes, "pad_token_id": padding, "ignore_mismatched_sizes": True}
                base = getattr(transformers, kind.auto_model).from_pretrained(names.place(config.model), **options)
                model = PeftModel.from_pretrained(base, str(folder)).eval()
        except Exception as error:  # libraries raise whatever a file makes of them
            raise ValueError(
                f"the adapter {folder} cannot be loaded on model.name = {config.model.name!r} ({first_line(error)}); "
                "the base model of the run must be there as it was."
            ) from error
        return cls(run, kind.build(tokenizer, config), tokenizer, model)

    def classify(self, text: str) -> dict[str, float]:
        """Return each class with its probability, the likeliest first."""
        import torch

        rows = self.task.encode(Table((text,), (0,)), self.tokenizer, self.run.config.train.max_length)
        batch = self.task.collate(rows, [0], torch.device("cpu"))
        with torch.no_grad():
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]
        found = dict(zip(self.run.partition["classes"], logits.double().softmax(-1).tolist(), strict=True))
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def write(self, prompt: str, tokens: int) -> str:
        """Return what the model writes after a prompt, greedily, until it ends its answer.

        Raises:
            ValueError: The prompt is longer than the model takes.
        """
        import torch

        from fedlora.engine.generation import end_tokens, greedy, split_answer

        rows: Any = self.task.encode(Table((prompt,), (0,), ("a",)), self.tokenizer, 2**31)
        ids = torch.from_numpy(split_answer(rows, 0)[0])[None]
        config: Any = self.model.get_base_model().config.get_text_config()
        limit = int(getattr(config, "max_position_embeddings", 2**31))
        if ids.shape[1] >= limit:
            raise ValueError(f"the prompt has {ids.shape[1]} tokens, and the model takes {limit} at most; shorten it.")
        ends = end_tokens(self.task, self.tokenizer, self.model.get_base_model())
        (new,) = greedy(self.model, ids, min(tokens, limit - ids.shape[1]), ends, self.tokenizer.pad_token_id)
        return str(self.tokenizer.decode(new, skip_special_tokens=True)).strip()


def _ranking(found: dict[str, float]) -> RichTable:
    """Return a table of the classes."""
    from rich.markup import escape

    table = RichTable(show_edge=False)
    table.add_column("class")
    table.add_column("probability", justify="right")
    for name, probability in found.items():
        table.add_row(escape(name), f"{probability:.4f}")
    return table
