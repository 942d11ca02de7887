"""The check before a run: data, model, method and rows tried together, before Flower, Ray or a trainer start.

What it lets pass, the run itself must not refuse.
"""

from __future__ import annotations

from typing import Any

from clients.resident import model_remarks
from fedlora.config import Config
from fedlora.data import Corpus
from fedlora.engine.rehearsal import rehearse
from fedlora.methods import build_method
from fedlora.models import (
    Structure,
    check_length,
    inspect_by_name,
    load_tokenizer,
    own_config,
    trained_labels,
)
from fedlora.tasks import TASKS
from simulations.plan import Plan
from simulations.setup import federation_of, settle
from strategies.build import build_strategy


def preflight(config: Config, nodes: int, *, rows: int | None = None) -> tuple[Plan, Structure]:
    """Return the plan of a run and the structure of its model, having tried what can be tried without its weights.

    Args:
        config: The resolved configuration.
        nodes: SuperNodes that the run will have.
        rows: Rows of each split that are tokenized; None: all.

    Raises:
        ValueError: Data, model, method or strategy cannot work, or not together.
    """
    labels = trained_labels(own_config(config.model), TASKS[config.task])  # first: it is the quickest to be wrong
    config, data = settle(config, nodes)
    task_class = TASKS[config.task]
    outputs = len(data.corpus.classes) if task_class.has_head else 0
    structure = inspect_by_name(config.model, task_class, outputs, config.method.target_modules)
    check_length(structure, config.train.max_length)
    specs = build_method(config, structure.adapted, structure.head).specs()
    plan = Plan(
        config=config,
        data=data,
        strategy=build_strategy(config, specs),
        federation=federation_of(config),
        family=structure.family,
        num_parameters=structure.num_parameters,
        num_layers=len(structure.adapted),
        nodes=nodes,
        trainers=config.engine.trainers or 1,
        remarks=_tried(config, structure, data.corpus, labels, outputs, rows),
    )
    return plan, structure


def _tried(
    config: Config, structure: Structure, corpus: Corpus, labels: tuple[str, ...], outputs: int, rows: int | None
) -> tuple[str, ...]:
    """Tokenize the rows and rehearse the model; return what may surprise."""
    tokenizer = load_tokenizer(config.model)
    task: Any = TASKS[config.task].build(tokenizer, config)
    for table in corpus.splits.values():
        task.encode(table.first(rows), tokenizer, config.train.max_length)
    engine = rehearse(config, structure, task, tokenizer, outputs)
    remarks = model_remarks(structure, labels, engine.batching if engine else None, config, corpus.classes)
    untried = "note: whether rows can be kept apart in this model is found out when it is loaded"
    return remarks if engine else (*remarks, untried)
