"""Generation metrics of language models: ROUGE-L and exact match of what a model really writes after prompts.

``exact_match`` of a round asks whether each token of the answer is the likeliest after the true ones before it; here
the model goes on from its own. ROUGE-L (Lin, 2004; the F measure of ``rouge-score``) is the longest common subsequence
of words.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol, final

import numpy as np

from fedlora.config import Config, ConfigError, require
from fedlora.exchange import Tensors
from fedlora.metrics import GENERATED
from fedlora.seeded import Seeded
from fedlora.tasks import TASKS

_PACKAGE = "rouge_score"
_SCRIPTS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # kana and Han, which have no spaces between words
_WORD = re.compile(rf"[{_SCRIPTS}]|[^\W_{_SCRIPTS}]+")


class Answer(NamedTuple):
    """What a model wrote for a row, and what it should have written."""

    written: str
    wanted: str


class Writer(Protocol):
    """Has models write answers."""

    def answers(self, tensors: Tensors, split: str, rows: Sequence[int]) -> list[Answer]:
        """Return what the server's model writes for each of these rows of a split."""


@final
class Words:
    """The words of a text, for ``rouge-score``: as its own, but for letters beyond a to z, which that drops."""

    def tokenize(self, text: str) -> list[str]:
        """Return the words in small letters; each character is one where a script has no spaces."""
        return _WORD.findall(text.lower())


def check_generation(config: Config) -> None:
    """Refuse ``eval.generate`` where nothing can be written or scored.

    Raises:
        ConfigError: The task writes no text, the server has no rows, or ``rouge-score`` is not installed.
    """
    wanted = config.eval.generate
    if not wanted:
        return
    writes = TASKS[config.task].auto_model == "AutoModelForCausalLM"
    rule = f"is read with task = 'causal-lm', whose model writes text, not {config.task!r}."
    require(writes, "eval.generate", wanted, rule)
    rule = "needs rows at the server, and those are at the deployed sites: set data.test-path."
    require(not config.federation.sites or config.data.test_path != "", "eval.generate", wanted, rule)
    if importlib.util.find_spec(_PACKAGE) is None:
        raise ConfigError(
            f"eval.generate = {wanted}: ROUGE-L needs a package that is not installed; install it with: "
            "pip install 'fedlora[rouge]'  # or: pip install rouge-score"
        )


def drawn_rows(config: Config, rows: int) -> list[int]:
    """Return the rows of a split that answers are written for: ``eval.generate`` of them, drawn from the seed."""
    drawn = Seeded(config.seed).permutation("generate", size=rows)[: config.eval.generate]
    return sorted(int(row) for row in drawn)


def scores(answers: Sequence[Answer], population: str) -> dict[str, float]:
    """Return the metrics of answers, by column.

    Args:
        answers: The answers.
        population: What the columns begin with, such as ``test``.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    rouge = [scorer.score(one.wanted, one.written)["rougeL"].fmeasure for one in answers]
    exact = [one.written.split() == one.wanted.split() for one in answers]
    values = (float(np.mean(exact)), float(np.mean(rouge)), len(answers))
    return {f"{population}_{name}": value for name, value in zip(GENERATED, values, strict=True)}
