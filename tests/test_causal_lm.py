"""Language modelling: what is masked, what is measured, what is refused, and a real run that writes text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from fedlora.config import ConfigError, ModelConfig, from_toml
from fedlora.data import Table, load_federated
from fedlora.models import load_base, load_tokenizer, model_path
from fedlora.plugins import read_config
from fedlora.reports.run import Run
from fedlora.tasks import CausalLM, Examples
from simulations.setup import resolve
from tests.support.families import PAD, VOCABULARY, random_examples, small_model, small_structure
from tests.support.runs import Finished, fedlora_run
from tests.support.tiny import save_tiny_language_model

CPU = torch.device("cpu")
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(ModelConfig(save_tiny_language_model(tmp_path_factory.mktemp("lm"))))


def test_prompts_are_masked_and_answers_end(tokenizer: Any) -> None:
    """Loss is taken on the answer and its end, never on the prompt, whatever the batch's padding."""
    task = CausalLM(tokenizer.pad_token_id)
    table = Table(("w1 w2 w3", "w4"), (0, 0), ("w5", "w6 w7 w8 w9"))
    examples = task.encode(table, tokenizer, 16)
    batch = task.collate(examples, [0, 1], CPU)
    words = [[tokenizer.convert_ids_to_tokens(int(t)) for t in row if t >= 0] for row in batch["labels"]]
    assert words == [["w5", "[END]"], ["w6", "w7", "w8", "w9", "[END]"]]
    assert (batch["labels"][0] == -100).sum() == 3 + 1, "three words of prompt, one of padding"
    cut = task.encode(table, tokenizer, 4)
    assert [len(row) for row in cut.tokens] == [4, 4], "answers are cut, prompts are not"
    with pytest.raises(ValueError, match=r"train.max-length = 3: 1 of 2 prompts leave no room .* 'w1 w2 w3' with 3"):
        task.encode(table, tokenizer, 3)


def test_pad_may_be_the_end_token() -> None:
    """pad = eos: the true end is learned, padding is not, and losses are those of another padding."""
    model = small_model("llama-lm")
    rows = random_examples(8, seed=1, family="llama-lm")
    tokens = tuple(np.array([*row[:-1], 1]) for row in rows.tokens)  # every answer ends with token 1
    examples = Examples(tokens, rows.targets)
    with torch.no_grad():
        one, two = (
            task.row_losses(model, task.collate(examples, range(8), CPU)) for task in (CausalLM(1), CausalLM(PAD))
        )
    assert torch.equal(one, two)
    labels = CausalLM(1).collate(examples, range(8), CPU)["labels"]
    assert ((labels == 1).sum(1) == 1).all()


def test_measures_are_what_they_are_called() -> None:
    """Against the plainest computation, row by row: mean of means, perplexity of tokens, greedy exactness."""
    model, task = small_model("llama-lm"), CausalLM(PAD)
    examples = random_examples(20, seed=3, family="llama-lm")
    nll, exact, means = [], [], []
    with torch.no_grad():
        for row, learned in zip(examples.tokens, examples.targets, strict=True):
            start = int(np.argmax(learned))
            ids = torch.from_numpy(row)[None]
            logp = model(ids).logits[0].log_softmax(-1)
            answer_nll = [-float(logp[at - 1, row[at]]) for at in range(start, len(row))]
            nll += answer_nll
            means.append(np.mean(answer_nll))
            exact.append(all(int(logp[at - 1].argmax()) == row[at] for at in range(start, len(row))))
        facts = task.row_metrics(model, task.collate(examples, range(20), CPU))
    metrics = task.metrics({name: float(values.mean()) for name, values in facts.items()})
    assert metrics["loss"] == pytest.approx(np.mean(means), abs=1e-10)
    assert metrics["perplexity"] == pytest.approx(math.exp(np.mean(nll)), rel=1e-10)
    assert metrics["exact_match"] == np.mean(exact)
    assert metrics["perplexity"] != pytest.approx(math.exp(np.mean(means)), rel=1e-3), "control: the two differ"
    assert metrics["perplexity"] < 2 * VOCABULARY


def test_exact_match_is_greedy_generation() -> None:
    """A row counts where generate writes its answer: planted answers are generated ones, and wrong ones."""
    model, task = small_model("llama-lm"), CausalLM(PAD)
    rows = random_examples(10, seed=4, family="llama-lm")
    tokens = []
    learned = []
    for place, (row, target) in enumerate(zip(rows.tokens, rows.targets, strict=True)):
        prompt = torch.from_numpy(row[: int(np.argmax(target))])[None]
        written = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=3, min_new_tokens=3,
            pad_token_id=PAD,
        )[0].numpy()  # fmt: skip
        if place % 2:
            written[-1] = (written[-1] + 1) % VOCABULARY
        tokens.append(written)
        learned.append(np.arange(len(written)) >= prompt.shape[1])
    examples = Examples(tuple(tokens), tuple(learned))
    with torch.no_grad():
        exact = task.row_metrics(model, task.collate(examples, range(10), CPU))["exact_match"]
    assert exact.tolist() == [1.0, 0.0] * 5


def test_chat_templates(tokenizer: Any) -> None:
    """The prompt is what the template writes before the assistant speaks; the answer is all that follows."""
    chat = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    task, table = CausalLM(chat.pad_token_id, chat_template=True), Table(("w1 w2",), (0,), ("w3",))
    with pytest.raises(ValueError, match=r"data.chat-template = true: the model's tokenizer has none"):
        task.encode(table, chat, 32)
    chat.chat_template = CHAT
    examples = task.encode(table, chat, 64)
    start = int(np.argmax(examples.targets[0]))
    assert chat.decode(examples.tokens[0][:start]) == chat.decode(chat("<user> w1 w2 <end> <assistant>")["input_ids"])
    assert "w3" in chat.decode(examples.tokens[0][start:])
    assert "w3" not in chat.decode(examples.tokens[0][:start])
    chat.chat_template = "{{ messages | length }}" + CHAT
    with pytest.raises(ValueError, match="writes a prompt differently once it is answered"):
        task.encode(table, chat, 64)


def test_tied_output_layers_are_refused() -> None:
    """Merging an adapter into a tied layer would change the embedding, too."""
    with pytest.raises(ValueError, match=r"lm_head is tied to the embedding of this gpt2 model; merging"):
        small_structure("gpt2-lm", "c_attn,lm_head")
    assert [layer.name for layer in small_structure("llama-lm", "lm_head").adapted] == ["lm_head"]
    assert small_structure("llama-lm", "auto").head == ()


def test_settings_that_a_language_model_cannot_have() -> None:
    for flat, message in (
        ({"task": "causal-lm", "method.head": "personal"}, "a language model has no head"),
        ({"data.prompt-template": "{x}"}, "data.prompt-template = '{x}': is read with task = 'causal-lm'"),
        ({"data.chat-template": True}, "data.chat-template = True: is read with task = 'causal-lm'"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve(flat)


def test_tokenizers_without_an_end_are_refused(tokenizer: Any) -> None:
    endless = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path, eos_token=None)
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        CausalLM(0).encode(Table(("w1",), (0,), ("w2",)), endless, 16)


def test_the_base_of_a_language_model(tmp_path: Path) -> None:
    folder = save_tiny_language_model(tmp_path)
    base = load_base(ModelConfig(folder), CausalLM, 0, "auto", dtype=torch.float64, device=CPU)
    assert base.structure.head == ()
    assert base.tokenizer.padding_side == "right"


# -- a real run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The built-in pairs of name and docstring on the small Llama that this machine trained."""
    changes = {
        "task": "causal-lm",
        "model.name": "small-llama",
        "data.name": "docstrings",
        "data.path": "",
        "strategy.name": "fedavg",
        "method.target-modules": "all-linear",
        "method.rank": 8,
        "train.learning-rate": 0.01,
        "train.max-length": 48,
        "train.batch-size": 8,
        "train.local-steps": 12,
        "engine.dtype": "float32",
        "rounds": 2,
    }
    return fedlora_run(tmp_path_factory.mktemp("language"), **changes)


@pytest.mark.e2e
@pytest.mark.slow
def test_perplexity_falls(run: Finished) -> None:
    assert run.code == 0, run.output
    result = Run.read(run.folder).result
    assert result is not None
    assert result["test_perplexity"] < 0.93 * result["before_perplexity"]
    assert run.metrics[-1]["test_perplexity"] == result["test_perplexity"]
    assert "before training: test perplexity" in run.output


@pytest.mark.e2e
@pytest.mark.slow
def test_plain_transformers_reproduces_the_run(run: Finished) -> None:
    """The exported adapter in plain PEFT: the run's perplexity, and text by generate that the engine would write."""
    config = read_config(from_toml((run.folder / "config.toml").read_text()))
    corpus = load_federated(config, config.federation.num_clients).corpus
    base = transformers.AutoModelForCausalLM.from_pretrained(model_path("small-llama")).double()
    model = PeftModel.from_pretrained(base, str(run.folder / "adapter")).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.folder / "adapter")
    nll, tokens, different = 0.0, 0, 0
    with torch.no_grad():
        for place, (prompt, answer) in enumerate(zip(corpus.test.texts, corpus.test.answers, strict=True)):
            start = tokenizer(prompt)["input_ids"]
            ids = torch.tensor([[*start, *tokenizer(answer)["input_ids"], tokenizer.eos_token_id]])[:, :48]
            logp = model(ids).logits[0].double().log_softmax(-1)
            answer_ids = ids[0, len(start) :]
            nll -= float(logp[len(start) - 1 : -1].gather(1, answer_ids[:, None]).sum())
            tokens += len(answer_ids)
            if place % 100 == 0:
                asked = tokenizer(prompt, return_tensors="pt")
                written = model.generate(
                    **asked, do_sample=False, max_new_tokens=12, pad_token_id=tokenizer.pad_token_id
                )
                with model.disable_adapter():
                    plain = model.generate(
                        **asked, do_sample=False, max_new_tokens=12, pad_token_id=tokenizer.pad_token_id
                    )
                different += written.tolist() != plain.tolist()
                greedy = model(written).logits[0].argmax(-1)[len(start) - 1 : -1]
                assert greedy.tolist() == written[0, len(start) :].tolist()
    assert math.exp(nll / tokens) == pytest.approx(run.metrics[-1]["test_perplexity"], rel=1e-5)
    assert different >= 6, "control: the adapter changes what is written"
