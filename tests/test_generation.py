"""Generation metrics: packed generation is that of the exported adapter in plain PEFT, and scores are the library's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from rouge_score.rouge_scorer import RougeScorer

from clients.answers import write_answers
from fedlora.config import Config, ConfigError
from fedlora.engine.generation import split_answer
from fedlora.generated import Answer, check_generation, drawn_rows, scores
from fedlora.metrics import Metric, is_covered
from fedlora.models import prepare_model
from fedlora.tasks import Examples
from simulations.generated import shared_out
from simulations.setup import resolve
from tests.support.exported import Exported, exported_run, language_flat


def plain_answers(run: Exported, rows: list[int]) -> list[str]:
    """What the exported adapter writes, row by row, in plain PEFT."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        prepare_model(run.config.model.name), dtype=getattr(torch, run.config.engine.dtype)
    )
    model = PeftModel.from_pretrained(base, str(run.path / "adapter")).eval()
    examples: Any = run.worker.loaded.model.examples["test"]
    written = []
    for row in rows:
        prompt = torch.from_numpy(split_answer(examples, row)[0])[None]
        room = run.config.train.max_length - prompt.shape[1]
        whole = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=room,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        written.append(str(tokenizer.decode(whole[0][prompt.shape[1] :], skip_special_tokens=True)).strip())
    return written


def test_packed_generation_is_that_of_plain_peft(tmp_path: Path) -> None:
    """Rows of every length, several to a batch; the answers that were wanted are the file's."""
    run = exported_run(tmp_path, language_flat(tmp_path))
    rows = list(range(len(run.worker.loaded.job.data.corpus.test)))
    answers = run.worker.answers(run.tensors, "test", rows)
    assert [one.written for one in answers] == plain_answers(run, rows)
    assert [one.wanted for one in answers] == list(run.worker.loaded.job.data.corpus.test.answers)
    assert len({one.written for one in answers}) > 3, "control: prompts matter"


def test_small_llama_writes_what_its_adapter_does(tmp_path: Path) -> None:
    flat = {"task": "causal-lm", "model.name": "small-llama", "strategy.name": "fedavg", "train.max-length": 64}
    data = {"data.prompt-template": "", "federation.num-clients": 2, "engine.dtype": "float64"}
    run = exported_run(tmp_path, {**flat, **data}, scale=0.02)
    answers = run.worker.answers(run.tensors, "test", list(range(8)))
    assert [one.written for one in answers] == plain_answers(run, list(range(8)))
    assert sum(len(one.written) > 10 for one in answers) > 4


def test_clients_write_with_their_own_tensors(tmp_path: Path) -> None:
    """A pack of three clients writes what each writes alone."""
    run = exported_run(tmp_path, language_flat(tmp_path))
    model, generator = run.worker.loaded.model, np.random.default_rng(5)
    own = [
        {name: value + generator.standard_normal(value.shape) for name, value in model.initial.items()}
        for _ in range(3)
    ]
    rows, group = list(range(12)), np.arange(12) % 3
    together = write_answers(model, {}, "test", rows, own=own, group=group)
    for client, tensors in enumerate(own):
        alone = write_answers(model, tensors, "test", [row for row in rows if row % 3 == client])
        assert [together[row] for row in rows if row % 3 == client] == alone
    swapped = write_answers(model, {}, "test", rows, own=own, group=(group + 1) % 3)
    assert swapped != together, "control: whose tensors they are matters"


def test_scores_are_the_librarys() -> None:
    answers = [
        Answer("the cat sat on the mat", "a cat sat on a mat."),
        Answer("  same \n words", "same words"),
        Answer("", "something"),
        Answer("Return snake_case names", "return the snake case Names"),
    ]
    found = scores(answers, "test")
    library = RougeScorer(["rougeL"])
    expected = np.mean([library.score(one.wanted, one.written)["rougeL"].fmeasure for one in answers])
    assert found["test_generated_rouge_l"] == pytest.approx(expected)
    assert (found["test_generated_exact_match"], found["test_generated_rows"]) == (0.25, 4)


@pytest.mark.parametrize(
    ("written", "wanted", "expected"),
    [
        ("Привет, мир", "привет мир", 1.0),
        ("今日は雨", "今日は晴", 0.75),
        ("über", "ober", 0.0),
        ("été long", "été court", 0.5),
    ],
)
def test_other_scripts_are_scored(written: str, wanted: str, expected: float) -> None:
    """The library's own words are of a to z: it finds none in these."""
    assert scores([Answer(written, wanted)], "test")["test_generated_rouge_l"] == pytest.approx(expected)


def test_the_last_answer_of_a_row() -> None:
    """Of several turns the last, by which tokens are learned."""
    rows = Examples((np.arange(6),), (np.array([False, True, True, False, True, True]),))
    prompt, answer = split_answer(rows, 0)
    assert (prompt.tolist(), answer.tolist()) == ([0, 1, 2, 3], [4, 5])


def test_rows_are_bounded_and_drawn_from_the_seed() -> None:
    config = resolve({"task": "causal-lm", "model.name": "small-llama", "eval.generate": 5, "seed": 3})
    rows = drawn_rows(config, 1000)
    assert (len(set(rows)), rows) == (5, sorted(rows))
    assert rows == drawn_rows(config, 1000)
    assert rows != list(range(5))
    assert drawn_rows(config, 3) == [0, 1, 2]
    assert shared_out({0: 1, 4: 9, 7: 3}, 8) == {0: 1, 4: 4, 7: 3}
    assert shared_out({0: 1, 1: 0}, 8) == {0: 1}
    assert shared_out({0: 5, 1: 5, 2: 5}, 2) == {0: 1, 1: 1}


def test_what_cannot_be_written_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"eval.generate = 5: is read with task = 'causal-lm'"):
        resolve({"eval.generate": 5})
    with pytest.raises(ConfigError, match=r"eval.generate = -1: must be at least 0"):
        resolve({"eval.generate": -1})
    config = resolve({"task": "causal-lm", "model.name": "small-llama", "eval.generate": 5})
    monkeypatch.setattr("fedlora.generated._PACKAGE", "a_package_that_nobody_has")
    with pytest.raises(ConfigError, match=r"pip install 'fedlora\[rouge\]'"):
        check_generation(config)
    check_generation(Config())


def test_the_guarantee_covers_what_the_servers_model_writes() -> None:
    assert Metric.parse("test_generated_rouge_l").name == "generated_rouge_l"
    assert is_covered("test_generated_exact_match")
    assert is_covered("dev_generated_rows")
    assert not is_covered("personal_generated_rouge_l")
