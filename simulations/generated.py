"""Generation metrics of a finished run (``eval.generate``), on the server's rows or on those that clients hold out."""

from __future__ import annotations

from fedlora.generated import drawn_rows, scores
from simulations.run import Run

FILE = "generated.jsonl"


def generated(run: Run) -> dict[str, float]:
    """Return ROUGE-L and exact match of what the run's model writes, by column; empty without ``eval.generate``.

    Answers to the server's own rows are kept in ``generated.jsonl``; what clients' rows say is not.
    """
    plan, config, evaluator = run.plan, run.plan.config, run.evaluator
    if not config.eval.generate:
        return {}
    if plan.strategy.has_personal:
        number = run.lines[-1]["round"] + 1
        counts = shared_out({client: len(plan.data.holdout[client]) for client in _trained(run)}, config.eval.generate)
        answers = evaluator.answers_personal(run.tensors, plan.strategy.all_roles(number), number, counts)
        return scores(answers, "personal") if answers else {}
    split = "test" if config.eval.test else "dev"
    rows = drawn_rows(config, len(plan.data.corpus.splits[split]))
    answers = evaluator.answers(run.tensors, split, rows)
    lines = [{"row": row, **one._asdict()} for row, one in zip(rows, answers, strict=True)]
    run.parts.folder.write_lines(FILE, lines)
    return scores(answers, split)


def shared_out(held: dict[int, int], rows: int) -> dict[int, int]:
    """Return how many rows each client is measured on: as evenly as what they hold allows, ``rows`` in all."""
    counts = dict.fromkeys(held, 0)
    for _ in range(max(held.values(), default=0)):
        for client in held:
            if sum(counts.values()) == rows:
                break
            counts[client] += counts[client] < held[client]
    return {client: count for client, count in counts.items() if count}


def _trained(run: Run) -> list[int]:
    return sorted(run.flower.state.clients.trained)
