"""``fedlora try``: what the adapter that a run exported answers, by plain PEFT on the untouched base model.

Nothing of the engine computes here: transformers loads the base, PEFT the adapter. The run's task turns the text into
tokens as it did in training, with the run's own prompt template or chat template.
"""

from __future__ import annotations

import argparse
import itertools
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table as RichTable

from fedlora import plugins
from fedlora.data import Table
from fedlora.messages import first_line
from fedlora.reports.adapters import adapter_of
from fedlora.reports.run import Run
from fedlora.tasks import TASKS, CausalLM, MultiLabel, SequenceTask, Task

_TOGETHER = 8  # rows that go through the model at once: a language model's logits take much memory
NOTHING = "(nothing: the model ends its answer at once)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``fedlora try``."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument(
        "texts",
        nargs="+",
        metavar="TEXT",
        help="the text; both of a sentence pair, or one a column of a prompt",
    )
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
    if not issubclass(TASKS[run.config.task], SequenceTask | CausalLM):
        raise ValueError(
            f"task = {run.config.task!r}: fedlora try answers for tasks on texts; load {folder} with PEFT as its "
            "README.md shows."
        )
    row = read_row(run, options.texts)
    adapted = Adapted.load(run, folder)
    if not isinstance(adapted.task, SequenceTask):
        console.print(adapted.write(row, options.tokens) or NOTHING, markup=False)
    elif adapted.task.has_classes:
        console.print(_ranking(adapted.predict(row), one_class=adapted.task.one_class))
    else:
        console.print(", ".join(f"{one.value:.6g}" for one in adapted.predict(row)), markup=False)
    return 0


def read_row(run: Run, texts: list[str]) -> Table:
    """Return the row that the model reads: a text, a pair of them, or the run's prompt template filled with them.

    Raises:
        ValueError: There are more texts than columns, or fewer, or one is empty.
    """
    data, template = run.config.data, run.config.data.prompt_template
    if TASKS[run.config.task].has_head:
        source, names = f"data.text-column = {data.text_column!r}", run.texts
    elif template:
        source = f"data.prompt-template = {template!r}"
        names = tuple(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name))
    else:
        source, names = "the run", ("text",)
    if len(texts) != len(names):
        raise ValueError(
            f"{source} reads {len(names)} text(s) ({', '.join(names)}), and {len(texts)} were given; give each in "
            "quotes, in this order."
        )
    if not any(text.strip() for text in texts) or (not template and not all(text.strip() for text in texts)):
        raise ValueError("the text is empty; give one in quotes.")
    if template:
        return Table((template.format(**dict(zip(names, texts, strict=True))),), (0,), ("a",))
    return Table((texts[0],), (0,), ("a",), seconds=tuple(texts[1:]), numbers=((0.0,),))


class Prediction(NamedTuple):
    """What a model with a head says of a text.

    Attributes:
        name: Of the class or label.
        value: Its probability, or a regression's number.
        said: Whether it is what the model predicts.
    """

    name: str
    value: float
    said: bool


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
        from peft import PeftConfig, PeftModel

        from fedlora.models import names
        from fedlora.models.quiet import quiet

        config, kind = run.config, TASKS[run.config.task]
        options: dict[str, Any] = {"dtype": getattr(torch, config.engine.dtype), **names.options(config.model)}
        try:
            with quiet():
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
                if kind.has_head:  # a checkpoint's head of another number of classes is replaced by the adapter's
                    outputs, padding = len(run.outputs), tokenizer.pad_token_id
                    options |= {"num_labels": outputs, "pad_token_id": padding, "ignore_mismatched_sizes": True}
                quantised = config.model.quantization != "none"
                if quantised:
                    from fedlora.models.quantised import leave_rows_alone, settings

                    heads = PeftConfig.from_pretrained(folder).modules_to_save
                    options["quantization_config"] = settings(config.model.quantization, options["dtype"], heads)
                    options["device_map"] = "cpu"  # where the text goes, also beside a GPU
                base = getattr(transformers, kind.auto_model).from_pretrained(names.place(config.model), **options)
                if quantised:
                    leave_rows_alone(base)  # as in training: bitsandbytes' 8 bits would round activations as well
                model = PeftModel.from_pretrained(base, str(folder)).eval()
        except Exception as error:  # libraries raise whatever a file makes of them
            raise ValueError(
                f"the adapter {folder} cannot be loaded on model.name = {config.model.name!r} ({first_line(error)}); "
                "the base model of the run must be there as it was."
            ) from error
        return cls(run, kind.build(tokenizer, config), tokenizer, model)

    def predict(self, row: Table) -> list[Prediction]:
        """Return what the model says of each class or label of a row, the likeliest first, or its number."""
        import torch

        from fedlora.tasks.text import model_inputs

        task = self.task
        assert isinstance(task, SequenceTask), "a task with a head of its own"
        batch = task.collate(
            task.encode(row, self.tokenizer, self.run.config.train.max_length), [0], torch.device("cpu")
        )
        with torch.no_grad():
            logits = self.model(**model_inputs(self.model.get_base_model(), batch)).logits.double()
        values = task.predictions(logits)
        said = task.said(logits) if isinstance(task, MultiLabel) else values == values.amax(-1, keepdim=True)
        found = zip(self.run.outputs, values[0].tolist(), said[0].tolist(), strict=True)
        return sorted(itertools.starmap(Prediction, found), key=lambda one: -one.value)

    def metrics(self, table: Table) -> dict[str, float]:
        """Return the metrics of some rows, those of equal length together: no model makes anything of padding then."""
        import torch

        rows = self.task.encode(table, self.tokenizer, self.run.config.train.max_length)
        found: dict[str, list[NDArray[np.float64]]] = {}
        for cost in np.unique(rows.cost):
            same = np.flatnonzero(rows.cost == cost)
            for part in np.array_split(same, -(-len(same) // _TOGETHER)):
                batch = self.task.collate(rows, part.tolist(), self.model.device)
                with torch.no_grad():
                    facts = self.task.row_metrics(self.model, batch)
                for name, values in facts.items():
                    found.setdefault(name, []).append(values.double().cpu().numpy())
        sums = self.task.sums({name: np.concatenate(values) for name, values in found.items()})
        return self.task.metrics({name: value / len(rows) for name, value in sums.items()})

    def write(self, row: Table, tokens: int) -> str:
        """Return what the model writes after a row's prompt, greedily, until it ends its answer.

        Raises:
            ValueError: The prompt is longer than the model takes.
        """
        import torch

        from fedlora.engine.generation import end_tokens, greedy, split_answer

        rows: Any = self.task.encode(row, self.tokenizer, 2**31)
        ids = torch.from_numpy(split_answer(rows, 0)[0])[None]
        config: Any = self.model.get_base_model().config.get_text_config()
        limit = int(getattr(config, "max_position_embeddings", 2**31))
        if ids.shape[1] >= limit:
            raise ValueError(f"the prompt has {ids.shape[1]} tokens, and the model takes {limit} at most; shorten it.")
        ends = end_tokens(self.task, self.tokenizer, self.model.get_base_model())
        (new,) = greedy(self.model, ids, min(tokens, limit - ids.shape[1]), ends, self.tokenizer.pad_token_id)
        return str(self.tokenizer.decode(new, skip_special_tokens=True)).strip()


def _ranking(found: list[Prediction], *, one_class: bool) -> RichTable:
    """Return a table of the classes, or of the labels with those marked that the model predicts."""
    from rich.markup import escape

    table = RichTable(show_edge=False)
    for name in ("class",) if one_class else ("label", "predicted"):
        table.add_column(name)
    table.add_column("probability", justify="right")
    for one in found:
        mark = () if one_class else ("yes" if one.said else "no",)
        table.add_row(escape(one.name), *mark, f"{one.value:.4f}")
    return table
