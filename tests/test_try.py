"""``fedlora try``: answers of the exported adapter, by plain PEFT, are those of the engine that trained it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel

from fedlora.config import ModelConfig
from fedlora.data import Table
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
    rows = task.encode(Table((text,), (0,)), engine.base.tokenizer, run.config.train.max_length)
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
