"""``fedlora try``: answers of the exported adapter, by plain PEFT, are those of the engine that trained it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from fedlora.config import ModelConfig
from fedlora.data import Table
from fedlora.engine import evaluate
from fedlora.engine.generation import end_tokens
from fedlora.engine.layers import Layout
from fedlora.models import load_tokenizer
from fedlora.tasks import CausalLM
from simulations.cli import main
from simulations.try_adapter import NOTHING
from tests.support.exported import Exported, exported_run, language_flat
from tests.support.trainers import tiny_flat
from tests.test_causal_lm import CHAT


def tried(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    """Return exit code and output of ``fedlora try``."""
    with pytest.raises(SystemExit) as stopped:
        main(["try", *map(str, arguments)])
    code = stopped.value.code
    assert isinstance(code, int)
    return code, capsys.readouterr().out


def engine_logits(run: Exported, text: str) -> torch.Tensor:
    """The engine's own logits of a text under the exported tensors."""
    model = run.worker.loaded.model
    engine, task = model.engine, model.engine.task
    rows = task.encode(Table((text,), (0,), numbers=((0.0,),)), engine.base.tokenizer, run.config.train.max_length)
    batch = task.collate(rows, [0], torch.device("cpu"))
    factors = engine.method.factors({name: engine.tensor(value) for name, value in run.tensors.items()})
    with torch.no_grad(), engine.grouped.placed(factors, Layout(1, 1, None)) as grouped:
        logits: torch.Tensor = grouped(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]
    return logits


def test_classes_with_their_probabilities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = exported_run(tmp_path, tiny_flat(tmp_path))
    for text in ("w1 w2 w3", "w30 w31", " ".join(["w7"] * 200)):
        code, output = tried(capsys, run.path, text)
        assert code == 0, output
        expected = engine_logits(run, text).softmax(-1).tolist()
        shown = {
            line.split()[0]: float(line.split()[-1]) for line in output.splitlines() if "bad" in line or "good" in line
        }
        assert shown == pytest.approx(dict(zip(("bad", "good"), expected, strict=True)), abs=1e-4)
        assert list(shown.values()) == sorted(shown.values(), reverse=True)


SEQUENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "pairs": ("a,b,label\n{0} {1},{2},yes\n{1},{0},no\n{2},{2} {0},maybe\n", {"data.text-column": "a,b"}),
    "multi-label": ("text,label\n{0},joy|fear\n{1},awe\n{2} {0},\n", {"task": "multi-label"}),
    "columns": ("text,joy,awe\n{0},1,0\n{1},1,1\n{2},0,0\n", {"task": "multi-label", "data.label-column": "joy,awe"}),
    "regression": ("text,score\n{0},0.5\n{1},-2\n{2} {0},1.25\n",
                   {"task": "regression", "data.label-column": "score"}),
    "pairs with a number": ("a,b,score\n{0},{1},0.5\n{1},{2},-2\n{2},{0},1\n",
                            {"task": "regression", "data.label-column": "score", "data.text-column": "a,b"}),
    "a comma": ('"Review, in full",label\n{0} {1},yes\n{1} {2},no\n', {"data.text-column": "Review, in full"}),
}  # fmt: skip


def sequence_run(tmp_path: Path, kind: str) -> Exported:
    """A finished run of a task on texts or pairs, with an adapter that is far from its start."""
    rows, changes = SEQUENCES[kind]
    file = tmp_path / "rows.csv"
    header, _, rest = rows.partition("\n")
    file.write_text(header + "\n" + "".join(rest.format(f"w{n}", f"w{n + 9}", f"w{n + 20}") for n in range(15)))
    flat = tiny_flat(tmp_path, **{"data.partition": "iid", "data.path": str(file), **changes})
    return exported_run(tmp_path, flat, scale=3.0)


def evaluated(run: Exported, table: Table) -> dict[str, float]:
    """What the engine's own evaluation finds of a row."""
    engine, length = run.worker.loaded.model.engine, run.config.train.max_length
    facts = evaluate(engine, run.tensors, engine.task.encode(table, engine.base.tokenizer, length), [0])
    return {name: float(values[0]) for name, values in facts.items()}


def shown_values(output: str) -> dict[str, list[str]]:
    """The lines of a table by their first word."""
    return {words[0]: words[1:] for line in output.splitlines()[2:] if (words := line.replace("│", " ").split())}


def test_a_pair_takes_two_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = sequence_run(tmp_path, "pairs")
    names = ("maybe", "no", "yes")
    answers = {}
    for first, second in (("w1 w2", "w30"), ("w30", "w1 w2"), (" ".join(["w7"] * 90), "w9 w8")):
        code, output = tried(capsys, run.path, first, second)
        assert code == 0, output
        answers[first] = {name: float(words[-1]) for name, words in shown_values(output).items()}
        losses = [evaluated(run, Table((first,), (label,), seconds=(second,)))["loss"] for label in range(3)]
        expected = {name: math.exp(-loss) for name, loss in zip(names, losses, strict=True)}
        assert answers[first] == pytest.approx(expected, abs=1e-4)
        assert list(answers[first].values()) == sorted(answers[first].values(), reverse=True)
    assert answers["w1 w2"] != answers["w30"], "control: the order of a pair matters"
    for texts in (["w1"], ["w1", "w2", "w3"]):
        code, output = tried(capsys, run.path, *texts)
        assert (code, output.count("\n")) == (2, 1), output
        assert f"data.text-column = 'a,b' reads 2 text(s) (a, b), and {len(texts)} were given" in output
    code, output = tried(capsys, run.path, "w1", " ")
    assert (code, output.count("\n")) == (2, 1), output
    assert "the text is empty" in output


def test_a_column_with_a_comma_in_its_name_is_one_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = sequence_run(tmp_path, "a comma")
    code, output = tried(capsys, run.path, "w1 w2")
    assert code == 0, output
    assert set(shown_values(output)) == {"yes", "no"}
    assert "tokenizer(TEXTS, padding" in (run.path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["multi-label", "columns"])
def test_labels_with_their_probabilities(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is said where the engine's own evaluation takes it for there."""
    run = sequence_run(tmp_path, kind)
    names = ("awe", "fear", "joy") if kind == "multi-label" else ("joy", "awe")
    said = set()
    for text in ("w1 w2 w3", "w30 w31", "w9", "w12 w5"):
        code, output = tried(capsys, run.path, text)
        assert code == 0, output
        shown = shown_values(output)
        facts = evaluated(run, Table((text,), numbers=((1.0,) * len(names),)))
        hits = {name: facts[f"true_positive.{at}"] == 1 for at, name in enumerate(names)}
        assert {name: words[0] == "yes" for name, words in shown.items()} == hits
        expected = dict(zip(names, engine_logits(run, text).sigmoid().tolist(), strict=True))
        assert {name: float(words[-1]) for name, words in shown.items()} == pytest.approx(expected, abs=1e-4)
        assert all((float(words[-1]) > 0.5) == hits[name] for name, words in shown.items())
        said |= set(hits.values())
    assert said == {True, False}, "control: some are said and some are not"


@pytest.mark.parametrize("kind", ["regression", "pairs with a number"])
def test_a_regression_answers_with_its_number(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = sequence_run(tmp_path, kind)
    numbers = set()
    for text in ("w1 w2 w3", "w30 w31", "w9"):
        more = ("w4 w11",) if kind != "regression" else ()
        code, output = tried(capsys, run.path, text, *more)
        assert code == 0, output
        expected = evaluated(run, Table((text,), seconds=more, numbers=((0.0,),)))["prediction"]
        assert float(output) == pytest.approx(expected, rel=1e-5)
        numbers.add(output)
    assert len(numbers) == 3, "control: the text matters"


def plain(run: Exported, prompt: str, tokens: int) -> str:
    """What the adapter writes by the lines of its own card."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(run.config.model.name, dtype=torch.float64)
    model = PeftModel.from_pretrained(base, str(run.path / "adapter")).eval()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    length = inputs["input_ids"].shape[1]
    whole = model.generate(
        **inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )
    return str(tokenizer.decode(whole[0][length:], skip_special_tokens=True)).strip()


@pytest.mark.parametrize(
    ("template", "texts", "prompt"),
    [
        ("", ["{}"], "{}"),
        ("w5 {question} w6", ["{}"], "w5 {} w6"),
        ("{hint} w6 {question} {hint}", ["w1", "{}"], "w1 w6 {} w1"),
    ],
)
def test_text_is_written_after_the_runs_own_prompt(
    template: str, texts: list[str], prompt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = exported_run(tmp_path, language_flat(tmp_path, **{"data.prompt-template": template}))
    written = set()
    for text in ("w1", "w2 w9 w30", "w7 w7", "w11 w12"):
        code, output = tried(capsys, run.path, *(one.format(text) for one in texts), "--tokens", "9")
        assert code == 0, output
        expected = plain(run, prompt.format(text), 9)
        assert output.strip() == (expected or NOTHING)
        written.add(expected)
    assert len(written) > 1, "control: the prompt matters"


def test_a_chat_run_answers_a_chat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat = language_flat(tmp_path, **{"data.chat-template": True})
    tokenizer = transformers.AutoTokenizer.from_pretrained(flat["model.name"])
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(flat["model.name"])
    run = exported_run(tmp_path, flat)
    code, output = tried(capsys, run.path, "w1 w2", "--tokens", "9")
    assert code == 0, output
    written = plain(run, "<user> w1 w2 <end> <assistant>", 9)
    assert output.strip() == (written.partition("<end>")[0].strip() or NOTHING)


def test_a_turn_ends_where_its_template_ends_it(tmp_path: Path) -> None:
    """Also by a token that is not the tokenizer's own end, as Llama's <|eot_id|>."""
    tokenizer = load_tokenizer(ModelConfig(language_flat(tmp_path)["model.name"]))
    model = torch.nn.Linear(1, 1)
    assert end_tokens(CausalLM(0), tokenizer, model) == (tokenizer.eos_token_id,)
    tokenizer.chat_template = CHAT
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert end_tokens(CausalLM(0, chat_template=True), tokenizer, model) == tuple(sorted({tokenizer.eos_token_id, end}))


def test_clients_have_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = exported_run(tmp_path, tiny_flat(tmp_path, **{"strategy.name": "local"}), clients=2)
    answers = [tried(capsys, run.path, "w1 w2", "--client", client) for client in ("0", "1")]
    assert [code for code, _ in answers] == [0, 0]
    assert answers[0][1] != answers[1][1]
    for arguments, message in (
        ([], "the server has no adapter of its own; choose one with --client, of 0, 1."),
        (["--client", "7"], "--client 7: no such adapter"),
    ):
        code, output = tried(capsys, run.path, "w1", *arguments)
        assert code == 2
        assert message in output


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = exported_run(tmp_path, language_flat(tmp_path, **{"data.prompt-template": "{question} {hint}"}))
    long = " ".join(["w1"] * 70)
    base = Path(run.config.model.name)
    cases: list[tuple[list[str | Path], str]] = [
        ([tmp_path, "w1"], "is not a run folder"),
        ([run.path, "w1"], "reads 2 text(s) (question, hint), and 1 were given"),
        ([run.path, " ", " "], "the text is empty"),
        ([run.path, "w1", "w2", "--tokens", "0"], "--tokens 0: must be at least 1"),
        ([run.path, long, "w2"], "the prompt has 71 tokens, and the model takes 64 at most"),
        ([run.path, "w1", "w2", "--client", "0"], "none of clients; leave --client out"),
    ]
    for arguments, message in cases:
        code, output = tried(capsys, *arguments)
        assert (code, output.count("\n")) == (2, 1), output
        assert message in output
    base.rename(base.with_name("gone"))
    code, output = tried(capsys, run.path, "w1", "w2")
    assert (code, output.count("\n")) == (2, 1), output
    assert "the base model of the run must be there as it was" in output
    (run.path / "result.json").unlink()
    code, output = tried(capsys, run.path, "w1", "w2")
    assert (code, output.count("\n")) == (2, 1), output
    assert "the run did not finish" in output
