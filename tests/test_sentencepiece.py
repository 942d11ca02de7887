"""Tokenizers of SentencePiece: trained here by the real library, loaded, trained with and exported; and without it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import transformers

from fedlora.config import ModelConfig
from fedlora.data import Table
from fedlora.models import load_tokenizer
from fedlora.tasks import CausalLM, Classification
from simulations.cli import main
from tests.support.exported import exported_run
from tests.support.families import SIZES
from tests.support.tiny import save_texts
from tests.support.trainers import ask, tiny_flat, tiny_worker

LINES = [
    "the film is good and the letter is long",
    "a bad film, a short letter",
    "who wrote the letter? w1 w2 w30",
] * 20
TEXTS = ["the film is good", "who wrote a letter, and what?", "  two  spaces "]
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("unigram", "spiece.model", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
    "llama": ("bpe", "tokenizer.model", {"pad_id": 3}),
}


def trained(folder: Path, kind: str) -> sentencepiece.SentencePieceProcessor:
    """Write a folder with a configuration and a SentencePiece file, and nothing else; return the library's own."""
    model_type, name, special = KINDS[kind]
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(folder / "made"), vocab_size=90, hard_vocab_limit=False,
        model_type=model_type, minloglevel=2, **special,
    )  # fmt: skip
    (folder / "made.model").rename(folder / name)
    (folder / "made.vocab").unlink()
    known = (
        {} if kind == "t5" else {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": {"t5": "T5Tokenizer", "llama": "LlamaTokenizer"}[kind], **known})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / name))


def without(folder: Path, texts: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Tokenize in a process in which neither package can be imported."""
    code = (
        "import sys; sys.modules['sentencepiece'] = sys.modules['tiktoken'] = None\n"
        "from fedlora.config import ModelConfig\n"
        "from fedlora.models import load_tokenizer\n"
        "try:\n"
        f"    print(load_tokenizer(ModelConfig({str(folder)!r}))({list(texts)!r})['input_ids'])\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_the_library(kind: str, tmp_path: Path) -> None:
    own = trained(tmp_path / kind, kind)
    tokenizer = load_tokenizer(ModelConfig(str(tmp_path / kind)))
    assert tokenizer.pad_token_id == own.pad_id()
    end = [own.eos_id()] if kind == "t5" else []
    expected = [own.encode(text) for text in TEXTS[:2]]
    rows = Classification(tokenizer.pad_token_id).encode(Table(tuple(TEXTS[:2]), (0, 1)), tokenizer, 64)
    assert [row.tolist() for row in rows.tokens] == [[*ids, *end] for ids in expected]
    written = CausalLM(tokenizer.pad_token_id).encode(Table((TEXTS[0],), (0,), (TEXTS[1],)), tokenizer, 99)
    assert written.tokens[0].tolist() == [*expected[0], *expected[1], own.eos_id()]
    assert int(written.targets[0].sum()) == len(expected[1]) + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_without_the_package_the_cure_is_named(kind: str, tmp_path: Path) -> None:
    """And what was saved with it is read without it: an adapter's tokenizer needs no SentencePiece."""
    trained(tmp_path / kind, kind)
    done = without(tmp_path / kind, TEXTS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "Its tokenizer needs SentencePiece: pip install 'fedlora[sentencepiece]'" in done.stdout
    tokenizer = load_tokenizer(ModelConfig(str(tmp_path / kind)))
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/config.json").write_text((tmp_path / kind / "config.json").read_text())
    done = without(tmp_path / "saved", TEXTS)
    assert done.stdout.strip() == str(tokenizer(TEXTS)["input_ids"]), done.stderr


def test_a_broken_file(tmp_path: Path) -> None:
    trained(tmp_path / "t5", "t5")
    (tmp_path / "t5/spiece.model").write_bytes(b"\x0e\x1f nothing that could be read")
    with pytest.raises(ValueError, match=r"cannot be loaded \(.*\). Its SentencePiece file is broken, or the package"):
        load_tokenizer(ModelConfig(str(tmp_path / "t5")))


def test_a_model_with_such_a_tokenizer_trains_and_its_adapter_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lm"
    own = trained(folder, "llama")
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 64, "vocab_size": own.get_piece_size()}
    transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes, pad_token_id=3)).save_pretrained(
        folder
    )
    assert not (folder / "tokenizer.json").exists()
    changes = {"model.name": str(folder), "data.path": save_texts(tmp_path / "texts.csv")}
    for update in ask(tiny_worker(tmp_path, **changes)):
        assert update.report.reason == ""
        assert all(np.isfinite(value).all() for value in update.tensors.values())
    run = exported_run(tmp_path, tiny_flat(tmp_path, **changes))
    assert (run.path / "adapter/tokenizer.json").is_file()
    with pytest.raises(SystemExit) as stopped:
        main(["try", str(run.path), "w1 w2"])
    assert stopped.value.code == 0
    assert "good" in capsys.readouterr().out
