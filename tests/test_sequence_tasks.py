"""Sentence pairs, multi-label and regression: losses, packing, DP, export and metrics against plain libraries."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fedlora.config import Config, MethodConfig, ModelConfig, TrainConfig
from fedlora.data import Table
from fedlora.engine import ClientWork, Engine, evaluate, find_batching, train_pack
from fedlora.engine.layers import Layout
from fedlora.methods import build_method
from fedlora.models import load_tokenizer, prepare_base
from fedlora.runs.export import adapter_files
from fedlora.tasks import Classification, Examples, MultiLabel, Regression, SequenceTask, Task
from tests.support.families import PAD, VOCABULARY, small_model, without_float32
from tests.support.matrix import random_start
from tests.support.tiny import save_tiny_model
from tests.test_dp_step import private_step

CPU = torch.device("cpu")
TASKS: dict[str, tuple[type[SequenceTask], int]] = {
    "pairs": (Classification, 3),
    "multi-label": (MultiLabel, 4),
    "regression": (Regression, 1),
}
tasks = pytest.mark.parametrize("kind", TASKS)
families = pytest.mark.parametrize("family", ["bert", "llama"])


def examples(kind: str, rows: int, seed: int) -> Examples:
    """Return pairs of random lengths, with random targets of a task."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 12, size=rows)
    tokens = tuple(generator.integers(2, VOCABULARY, size=int(n)).astype(np.int64) for n in lengths)
    types = tuple((np.arange(n) >= n // 2).astype(np.int64) for n in lengths)
    targets: dict[str, Any] = {
        "pairs": generator.integers(0, 3, size=rows),
        "multi-label": generator.integers(0, 2, size=(rows, 4)).astype(np.float64),
        "regression": generator.standard_normal((rows, 1)),
    }
    return Examples(tokens, targets[kind], types)


def model_of(kind: str, family: str) -> Any:
    task, outputs = TASKS[kind]
    return without_float32(small_model(family, num_labels=outputs, problem_type=task.problem_type or None))


def engine_of(kind: str, family: str) -> Engine:
    base = prepare_base(model_of(kind, family), None, "auto", device=CPU)
    method = build_method(Config(method=MethodConfig("lora", rank=2)), base.structure.adapted, base.structure.head)
    return Engine.build(base, method, TASKS[kind][0](PAD))


@families
@tasks
def test_losses_are_those_of_transformers(kind: str, family: str) -> None:
    """In a batch of all lengths against the model's own loss of each row alone, by its problem type."""
    model, task, rows = model_of(kind, family), TASKS[kind][0](PAD), examples(kind, 9, seed=1)
    with torch.no_grad():
        losses = task.row_losses(model, task.collate(rows, range(9), CPU))
        for row in range(9):
            alone = task.collate(rows, [row], CPU)
            if family == "llama":
                del alone["token_type_ids"]
            assert float(losses[row]) == pytest.approx(float(model(**alone).loss), abs=1e-12)
        untyped = task.row_losses(model, task.collate(Examples(rows.tokens, rows.targets), range(9), CPU))
    changed = float((losses - untyped).abs().max())
    assert changed > 1e-5 if family == "bert" else changed == 0, "BERT reads token types, Llama has none"


@families
@tasks
@pytest.mark.parametrize("private", [False, True], ids=["", "dp"])
def test_packed_equals_alone(kind: str, family: str, private: bool) -> None:
    """Ragged clients, one of them with rows of a single text each, in one pack and one by one."""
    engine = engine_of(kind, family)
    start = random_start(engine)
    rows = [examples(kind, 6, seed=10 + k) for k in range(3)]
    rows[1] = Examples(rows[1].tokens, rows[1].targets)
    batches = [[np.array([0, 3, 1]), np.array([2])], [np.array([5])], [np.array([4]), np.array([1, 5])]]
    works = [ClientWork(k, rows[k], 6, own, start) for k, own in enumerate(batches)]
    train = TrainConfig(learning_rate=0.05)
    find_batching(engine, start)
    step = private_step(3) if private else None
    for k, result in enumerate(train_pack(engine, works, {}, train, step)):
        alone = private_step(3) if private else None
        if alone:
            alone = type(alone)(alone.mechanism, [alone.randoms[k]])
        expected = train_pack(engine, [works[k]], {}, train, alone)[0]
        assert result.error == expected.error == ""
        assert max(float(np.abs(result.tensors[n] - expected.tensors[n]).max()) for n in start) < 1e-10
        assert max(float(np.abs(result.tensors[n] - start[n]).max()) for n in start) > 1e-3


@families
@tasks
def test_peft_reproduces_the_outputs(kind: str, family: str, tmp_path: Path) -> None:
    engine = engine_of(kind, family)
    tensors = random_start(engine)
    for file, content in adapter_files(engine, tensors, Config()).items():
        (tmp_path / file).write_bytes(content)
    batch = engine.task.collate(examples(kind, 6, seed=2), range(6), CPU)
    del batch["labels"]
    if family == "llama":
        del batch["token_type_ids"]
    factors = engine.method.factors({name: engine.tensor(value) for name, value in tensors.items()})
    with torch.no_grad(), engine.grouped.placed(factors, Layout(1, 6, None)) as model:
        expected = model(**batch).logits
        loaded = PeftModel.from_pretrained(model_of(kind, family), str(tmp_path)).double().eval()
        assert float((loaded(**batch).logits - expected).abs().max()) < 1e-12 * float(expected.abs().max())


# -- metrics ------------------------------------------------------------------------------------------


def facts_of(kind: str, rows: Examples) -> tuple[Any, dict[str, Any], Any]:
    """Return the task, facts by the engine in several forward passes, and the outputs of plain PyTorch."""
    engine = engine_of(kind, "bert")
    start = random_start(engine)
    factors = engine.method.factors({name: engine.tensor(value) for name, value in start.items()})
    with torch.no_grad(), engine.grouped.placed(factors, Layout(1, len(rows), None)) as model:
        inputs = engine.task.collate(rows, range(len(rows)), CPU)
        del inputs["labels"]
        outputs = model(**inputs).logits.numpy()

    return engine.task, evaluate(replace(engine, max_cost=30), start, rows, range(len(rows))), outputs


def metrics_of(task: Task, facts: dict[str, Any]) -> dict[str, float]:
    rows = len(next(iter(facts.values())))
    return task.metrics({name: value / rows for name, value in task.sums(facts).items()})


def test_f1_is_that_of_scikit_learn() -> None:
    rows = examples("multi-label", 50, seed=3)
    assert isinstance(rows.targets, np.ndarray)
    rows.targets[:, 3] = 0  # a label that no row has
    task, facts, outputs = facts_of("multi-label", rows)
    said = outputs > 0
    measured = metrics_of(task, facts)
    assert measured["f1_micro"] == pytest.approx(f1_score(rows.targets, said, average="micro"), abs=1e-12)
    macro = f1_score(rows.targets, said, average="macro", zero_division=0)
    assert measured["f1_macro"] == pytest.approx(macro, abs=1e-12)
    assert measured["exact_match"] == pytest.approx(accuracy_score(rows.targets, said), abs=1e-12)
    assert set(measured) == set(task.metric_names)


def test_correlations_are_those_of_scipy() -> None:
    rows = examples("regression", 40, seed=4)
    assert isinstance(rows.targets, np.ndarray)
    rows.targets[:10] = rows.targets[10:20]  # ties
    task, facts, outputs = facts_of("regression", rows)
    said, there = outputs[:, 0], rows.targets[:, 0]
    measured = metrics_of(task, facts)
    assert measured["pearson"] == pytest.approx(pearsonr(said, there).statistic, abs=1e-10)
    assert measured["spearman"] == pytest.approx(spearmanr(said, there).statistic, abs=1e-12)
    assert measured["loss"] == pytest.approx(np.square(said - there).mean(), abs=1e-12)
    assert measured["mae"] == pytest.approx(np.abs(said - there).mean(), abs=1e-12)
    assert set(measured) == set(task.metric_names)


def test_correlations_of_clients_rows() -> None:
    """Pearson's of all rows from the clients' sums; Spearman's is the weighted mean of each client's own."""
    _, facts, outputs = facts_of("regression", rows := examples("regression", 40, seed=5))
    assert isinstance(rows.targets, np.ndarray)
    parts = [slice(0, 7), slice(7, 19), slice(19, 40)]
    sums = [Regression.sums({name: values[part] for name, values in facts.items()}) for part in parts]
    means = {name: sum(one[name] for one in sums) / 40 for name in sums[0]}
    said, there = outputs[:, 0], rows.targets[:, 0]
    measured = Regression.metrics(means)
    assert measured["pearson"] == pytest.approx(pearsonr(said, there).statistic, abs=1e-10)
    own = [spearmanr(said[part], there[part]).statistic for part in parts]
    assert measured["spearman"] == pytest.approx(np.average(own, weights=[7, 12, 21]), abs=1e-12)
    assert measured["spearman"] != pytest.approx(spearmanr(said, there).statistic, abs=1e-3), "control"


def test_correlations_of_rows_that_are_alike_are_zero_and_finite() -> None:
    for said, there in (([2.5] * 5, [1.0, 2, 3, 4, 5]), ([1.0, 2, 3, 4, 5], [0.1] * 5), ([1.0], [2.0])):
        one, two = np.array(said), np.array(there)
        facts = {
            "loss": np.square(one - two), "mae": np.abs(one - two), "prediction": one, "target": two,
            "prediction_squared": one**2, "target_squared": two**2, "product": one * two,
        }  # fmt: skip
        measured = metrics_of(Regression(PAD), facts)
        assert measured["pearson"] == measured["spearman"] == 0.0
        assert all(math.isfinite(value) for value in measured.values())
    assert Regression.sums({"loss": np.zeros(0)}) == {"loss": 0.0}, "of no rows there is nothing to say"


# -- sentence pairs -----------------------------------------------------------------------------------


def test_pairs_are_the_tokenizers_own(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ModelConfig(save_tiny_model(tmp_path)))
    one, two = ("w1 w2 w3 w4 w5 w6 w7", "w1"), ("w8 w9", "w2 [SEP] w3")
    rows = Classification(tokenizer.pad_token_id).encode(Table(one, (0, 1), seconds=two), tokenizer, 8)
    assert [tokenizer.convert_ids_to_tokens(row.tolist()) for row in rows.tokens] == [
        ["[CLS]", "w1", "w2", "w3", "[SEP]", "w8", "w9", "[SEP]"],
        ["[CLS]", "w1", "[SEP]", "w2", "[UNK]", "[UNK]", "[UNK]", "[SEP]"],
    ], "the longer is cut first, and a special token that is spelt is text"
    batch = Classification(0).collate(rows, [0, 1], CPU)
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1]]
    single = Classification(0).encode(Table(one, (0, 1)), tokenizer, 8)
    assert single.types == ()
    assert "token_type_ids" not in Classification(0).collate(single, [0], CPU)


def test_a_pair_needs_room_for_both_texts(tmp_path: Path) -> None:
    tokenizer, pair = (
        load_tokenizer(ModelConfig(save_tiny_model(tmp_path))),
        Table(("w1 w2",), (0,), seconds=("w3 w4",)),
    )
    task = Classification(tokenizer.pad_token_id)
    assert tokenizer.decode(task.encode(pair, tokenizer, 5).tokens[0]) == "[CLS] w1 [SEP] w3 [SEP]"
    with pytest.raises(ValueError, match=r"train.max-length = 4: a pair takes 5 tokens or more"):
        task.encode(pair, tokenizer, 4)


BEGIN, END, CLOSE = ("<s>", 0), ("</s>", 1), ("[SEP]", 3)
MARKS: dict[str, tuple[Any, bool]] = {
    "gpt-2": (processors.ByteLevel(trim_offsets=False), False),
    "qwen": (None, False),
    "a begin alone": (
        processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B:1", special_tokens=[BEGIN]), False
    ),
    "llama": (processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[BEGIN]), True),
    "t5": (processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[END]), True),
    "roberta": (processors.RobertaProcessing(END, BEGIN), True),
    "bert": (processors.BertProcessing(CLOSE, BEGIN), True),
}  # fmt: skip


@pytest.mark.parametrize("family", MARKS)
def test_two_texts_with_nothing_between_are_refused(family: str) -> None:
    """By the post-processors of real families on a byte-level tokenizer, whose texts are as long as they look."""
    processor, marked = MARKS[family]
    letters = ["<s>", "</s>", "[UNK]", "[SEP]", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    model = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(letters)}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if processor is not None:
        model.post_processor = processor
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", pad_token="[UNK]")
    pair, task = Table(("ab",), (0,), seconds=("cd",)), Classification(2)
    alone = Table(("abcd",), (0,))
    if marked:
        (row,) = task.encode(pair, tokenizer, 20).tokens
        text = tokenizer.convert_ids_to_tokens(row.tolist())
        assert text[text.index("b") + 1] in ("<s>", "</s>", "[SEP]")
    else:
        assert tokenizer("ab", "cd")["input_ids"] == tokenizer("abcd")["input_ids"], "control: silently one text"
        with pytest.raises(ValueError, match=r"sentence pair: .* puts nothing between two texts .* into one column"):
            task.encode(pair, tokenizer, 20)
    assert len(task.encode(alone, tokenizer, 20)) == 1


def test_a_model_with_one_token_type_is_given_none() -> None:
    """RoBERTa's embedding has one; a second would be read beyond its end."""
    model, task, rows = small_model("roberta", type_vocab_size=1), Classification(PAD), examples("pairs", 4, seed=7)
    with torch.no_grad():
        losses = [task.row_losses(model, task.collate(one, range(4), CPU)) for one in (rows, replace(rows, types=()))]
    assert torch.equal(*losses)


def test_padding_has_the_type_zero() -> None:
    rows = examples("pairs", 6, seed=6)
    batch = Classification(PAD).collate(rows, range(6), CPU)
    assert not (batch["token_type_ids"] * (1 - batch["attention_mask"])).any()
    assert [int(row.sum()) for row in batch["token_type_ids"]] == [int(row.sum()) for row in rows.types]


def test_a_model_that_diverged_has_no_correlation() -> None:
    facts = dict.fromkeys(
        ("loss", "mae", "prediction", "prediction_squared", "product"), np.array([math.nan, 1.0, 2.0])
    )
    facts |= {"target": np.array([1.0, 2.0, 4.0]), "target_squared": np.array([1.0, 4.0, 16.0])}
    measured = metrics_of(Regression(PAD), facts)
    assert math.isnan(measured["pearson"])
    assert math.isnan(measured["spearman"])
