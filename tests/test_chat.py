"""Chat data: the public shapes, which tokens are learned, and templates and rows that are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from fedlora.config import Config, ConfigError
from fedlora.data import Corpus, Table, Turn, load_corpus
from fedlora.plugins import read_config
from fedlora.reports.card import model_card
from fedlora.runs.privacy import without_privacy
from fedlora.tasks import CausalLM
from simulations.setup import resolve, settle
from tests.support.tiny import save_tiny_language_model

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] | trim }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
TALK = (
    Turn("system", "w1 w2"),
    Turn("user", "w3"),
    Turn("assistant", "w4 w5", learned=True),
    Turn("user", "w6 w7"),
    Turn("assistant", "w8", learned=True),
)
ONLY_LAST = (*TALK[:2], TALK[2]._replace(learned=False), *TALK[3:])


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(save_tiny_language_model(tmp_path))
    tokenizer.add_tokens(["<system>"])
    tokenizer.chat_template = CHATML
    return tokenizer


def table(*chats: tuple[Turn, ...]) -> Table:
    return Table(tuple(chat[0].content for chat in chats), (0,) * len(chats), ("x",) * len(chats), chats=chats)


def learned(tokenizer: Any, *chats: tuple[Turn, ...], max_length: int = 64) -> list[str]:
    """Return the learned words of each conversation, with a dot for each token that is read only."""
    task = CausalLM(tokenizer.pad_token_id)
    examples = task.encode(table(*chats), tokenizer, max_length)
    labels = task.collate(examples, range(len(chats)), torch.device("cpu"))["labels"]
    return [
        " ".join("." if label < 0 else tokenizer.convert_ids_to_tokens(int(label)) for label in row[: len(tokens)])
        for row, tokens in zip(labels, examples.tokens, strict=True)
    ]


def config(path: Path, **changes: Any) -> Config:
    flat = {"task": "causal-lm", "data.name": "file", "data.path": str(path), "data.partition": "iid"}
    return read_config({**flat, **changes})


def corpus(tmp_path: Path, rows: list[dict[str, Any]], suffix: str = ".jsonl", **changes: Any) -> Corpus:
    path = tmp_path / f"chat{suffix}"
    if suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_corpus(config(path, **{"data.test-path": str(path)}, **changes))


# -- tokens -------------------------------------------------------------------------------------------


def test_turns_are_learned_and_prompts_never(tokenizer: Any) -> None:
    prompt = ". . . . . . . ."  # <system> w1 w2 <end> <user> w3 <end> <assistant>
    assert learned(tokenizer, TALK, ONLY_LAST) == [
        f"{prompt} w4 w5 <end> . . . . . w8 <end>",
        f"{prompt} . . . . . . . . w8 <end>",
    ]


def test_labels_against_a_loop_over_tokens(tokenizer: Any) -> None:
    """The slow reference: a turn's tokens are those that follow the tokens of all that was written before it."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        turns = [Turn("system", "w0")] if generator.random() < 0.5 else []
        for _ in range(int(generator.integers(1, 4))):
            said = [" ".join(f"w{n}" for n in generator.integers(0, 40, size=generator.integers(1, 5))) for _ in "ab"]
            turns += [Turn("user", said[0]), Turn("assistant", said[1], learned=bool(generator.random() < 0.7))]
        turns[-1] = turns[-1]._replace(learned=True)
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        expected: list[str] = []
        for at, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            asked = tokenizer.apply_chat_template(messages[:at], add_generation_prompt=True, return_dict=False)
            said = tokenizer.apply_chat_template(messages[: at + 1], return_dict=False)
            expected += ["."] * (len(asked) - len(expected))
            for token in said[len(asked) :]:
                expected.append(tokenizer.convert_ids_to_tokens(token) if turn.learned else ".")
        assert learned(tokenizer, tuple(turns)) == [" ".join(expected)]


def test_a_slow_tokenizer_gives_the_same(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = learned(tokenizer, TALK, ONLY_LAST)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert learned(tokenizer, TALK, ONLY_LAST) == expected


JOINING = "{% for m in messages %}{{ m['content'] }}{% if m['role'] != 'user' %} <end>{% endif %}{% endfor %}"


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "slow"])
def test_a_token_across_the_border_is_tokenised_apart(
    fast: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt and answer that would be joined to one word: each has the tokens that it has alone."""
    tokenizer.add_tokens(["w3w4"])
    tokenizer.chat_template = JOINING
    monkeypatch.setattr(type(tokenizer), "is_fast", fast)
    assert learned(tokenizer, (Turn("user", "w1 w3"), Turn("assistant", "w4", learned=True))) == [". . w4 <end>"]


def byte_tokenizer(*, prefix: bool = False, trimmed: bool = False) -> Any:
    """A byte-level tokenizer that joins line ends, and a space to the word after it."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    model.decoder = decoders.ByteLevel()
    if trimmed:
        model.post_processor = processors.ByteLevel(trim_offsets=True)
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    model.train_from_iterator(["user assistant one two", "a\n\n\nb\n\nc"] * 50, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<|im_end|>", pad_token="<|im_start|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


SPACE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize("trimmed", [False, True], ids=["", "trimmed"])
@pytest.mark.parametrize("template", ["", SPACE], ids=["lines", "space"])
def test_joined_characters_against_a_loop_over_tokens(template: str, trimmed: bool) -> None:
    """A byte-level tokenizer, letters of several bytes, and answers whose first characters join the prompt's last.

    The slow reference: the tokens that are there when the answer is generated, and then the answer's own, one by one.
    """
    tokenizer = byte_tokenizer(trimmed=trimmed)
    tokenizer.chat_template = template or tokenizer.chat_template
    joined = 0
    for answer in ("one naïve 日本 two", "\n\nb one", " two", "\n", "one\n\n"):
        turns = (Turn("user", "två"), Turn("assistant", answer, learned=True)) * 2
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        last = (*turns[:1], turns[1]._replace(learned=False), *turns[2:])
        (one, every) = (CausalLM(0).encode(table(chat), tokenizer, 400) for chat in (last, turns))
        asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        expected = [(token, False) for token in asked]
        for token in tokenizer(text[len(prompt) :], add_special_tokens=False)["input_ids"]:
            expected.append((token, True))
        assert list(zip(one.tokens[0].tolist(), one.targets[0].tolist(), strict=True)) == expected
        joined += asked != tokenizer(text)["input_ids"][: len(asked)]
        (row,), (mask,) = every.tokens, every.targets
        parts = np.split(row, np.flatnonzero(np.diff(mask)) + 1)
        assert [tokenizer.decode(part) for part in parts[1::2]] == [f"{answer}<|im_end|>\n"] * 2
        assert tokenizer.decode(row) == text
    assert joined, "control: some would have been joined"


def test_a_space_before_each_text_cannot_be_told_apart() -> None:
    tokenizer = byte_tokenizer(prefix=True)
    turns = (Turn("user", "one"), Turn("assistant", "two", learned=True))
    assert len(CausalLM(0).encode(table(turns), tokenizer, 400)) == 1
    tokenizer.chat_template = SPACE
    with pytest.raises(ValueError, match=r"joins the end of a prompt and .* as in 'user: one<.*puts a space"):
        CausalLM(0).encode(table(turns), tokenizer, 400)


def test_truncation_never_cuts_a_prompt(tokenizer: Any) -> None:
    """Later turns are left out with their prompts; a row of which nothing is left to learn is refused, and counted."""
    assert learned(tokenizer, TALK, max_length=13) == [". . . . . . . . w4 w5 <end>"]
    assert learned(tokenizer, TALK, max_length=9) == [". . . . . . . . w4"]
    with pytest.raises(ValueError, match=r"max-length = 13: 1 of 2 prompts leave no room .* 'w1 w2' with 16 tokens"):
        learned(tokenizer, TALK, ONLY_LAST, max_length=13)


def test_templates_that_do_not_fit_are_refused(tokenizer: Any) -> None:
    rewriting = "{{ messages | length }} " + CHATML
    no_system = "{% for m in messages if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endfor %}"
    silent = CHATML.replace("in messages %}", "in messages if m['role'] != 'system' %}", 1)
    forgetful = CHATML.replace("| trim }}", "if loop.last or m['role'] != 'assistant' else '' }}")
    for template, message in (
        (None, "the model's tokenizer has none"),
        (rewriting, "writes a prompt differently once it is answered .*'w1 w2'"),
        (no_system + CHATML, r"refuses the conversation of system, user, .*no system role.*first message of the user"),
        (silent, r"leaves out or changes the system message 'w1 w2'; put it into the first message of the user"),
        (forgetful, r"leaves out or changes the assistant message 'w4 w5'"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=message):
            learned(tokenizer, TALK)
    assert learned(tokenizer, ONLY_LAST)[0].endswith(". w8 <end>"), "what it forgets is not learned here"
    tokenizer.chat_template = CHATML
    with pytest.raises(ValueError, match=r"the user message 'w3 \[END\]' spells the special token '\[END\]'"):
        learned(tokenizer, (Turn("user", "w3 [END]"), TALK[2]))


# -- rows ---------------------------------------------------------------------------------------------

OPENAI = [{"role": turn.role, "content": turn.content} for turn in TALK]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(turn.role, turn.role), "value": turn.content} for turn in TALK
]
ALPACA = {"instruction": "w1", "input": "w2", "output": "w3"}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("row", "changes"),
    [
        ({"messages": OPENAI}, {}),
        ({"conversations": SHAREGPT}, {}),
        ({"conversations": OPENAI}, {}),
        ({"conversations": SHAREGPT[1:], "system": "w1 w2"}, {}),
        ({"talk": OPENAI, "text": "w9"}, {"data.text-column": "talk"}),
        ({"messages": json.dumps(OPENAI)}, {}),
        ({"messages": OPENAI, "text": "as it was shown"}, {}),
        ({"messages": [*OPENAI, {"role": "user", "content": "w9"}]}, {}),
        ({"messages": [{"role": "system", "content": ""}, *OPENAI[1:]], "system": "w1 w2"}, {}),
    ],
)
def test_conversations_are_recognised(
    row: dict[str, Any], changes: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    for learn, expected in (("last", ONLY_LAST), ("all", TALK)):
        read = corpus(tmp_path, [row] * 3, suffix, **{"data.learn": learn}, **changes)
        assert read.train.chats == (expected,) * 3
        assert (read.train.texts[0], read.train.answers[0]) == ("w3", "w8")
        assert ("each turn of the assistant" in read.shape) == (learn == "all")
        assert ("OpenAI: role, content" in read.shape) != ("ShareGPT: from, value" in read.shape)
    assert ("(not read: text)" in read.shape) == ("text" in row)


def test_alpaca(tmp_path: Path) -> None:
    """In the words of its authors, or by the tokenizer's template."""
    read = corpus(tmp_path, [ALPACA, {**ALPACA, "input": ""}])
    assert read.train.texts[0] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nw1\n\n### Input:\nw2\n\n### Response:"
    )
    assert read.train.texts[1] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nw1\n\n### Response:"
    )
    assert read.train.answers == ("w3", "w3")
    assert read.shape.startswith("instructions (Alpaca: instruction, input, output), in the words")
    chats = corpus(tmp_path, [ALPACA, {**ALPACA, "input": ""}], **{"data.chat-template": True}).train.chats
    assert [chat[0].content for chat in chats] == ["w1\n\nw2", "w1"]
    assert all(chat[1] == Turn("assistant", "w3", learned=True) for chat in chats)


def test_keys_that_are_set_win(tmp_path: Path) -> None:
    row = {"text": "w1", "answer": "w2", "messages": OPENAI, **ALPACA}
    assert corpus(tmp_path, [row] * 2).train.texts == ("w1", "w1")
    keys = {"data.prompt-template": "{instruction}?", "data.answer-column": "output"}
    assert corpus(tmp_path, [row] * 2, **keys).train.texts == ("w1?", "w1?")
    with pytest.raises(ValueError, match=r"data.text-column = 'massages': no such column"):
        corpus(tmp_path, [row] * 2, **{"data.text-column": "massages"})


def test_a_weight_of_zero_is_not_learned(tmp_path: Path) -> None:
    messages = [{**message, "weight": int(at != 2)} for at, message in enumerate(OPENAI)]
    assert corpus(tmp_path, [{"messages": messages}] * 2, **{"data.learn": "all"}).train.chats[0] == ONLY_LAST


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (OPENAI[:2], r"2 of 3 conversations have no turn of the assistant to learn, the first is row 1"),
        ([*OPENAI[:2], {"role": "tool", "content": "7"}], r"row 1 .*message 2 is of role = 'tool'; known are user"),
        ([*OPENAI[:2], {"role": "assistant", "content": " "}], r"row 1 .*message 2 \(assistant\) is empty"),
        (
            [*OPENAI[:2], {"role": "assistant", "content": None, "tool_calls": ["f"]}],
            r"message 2 .* holds no text alone",
        ),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], r"message 0 .* holds no text alone"),
        ([{"role": "user", "content": 7}], r"message 0 \(user\) holds no text alone"),
        ("hello", r"row 1 .*holds no list of messages but 'hello'"),
        ([], r"row 1 .*holds no list of messages"),
        (None, r"row 1 .*holds no list of messages"),
    ],
)
def test_rows_that_are_refused(messages: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        corpus(tmp_path, [{"messages": OPENAI}, {"messages": messages}, {"messages": messages}])


def test_an_answer_to_nothing_is_not_learned(tmp_path: Path) -> None:
    """It may be what a later turn goes on from."""
    rows = [{"messages": OPENAI}, {"messages": OPENAI[2:]}]
    assert corpus(tmp_path, rows).train.chats[1] == ONLY_LAST[2:]
    with pytest.raises(ValueError, match=r"1 of 2 conversations let the assistant speak first, .* the first is row 1"):
        corpus(tmp_path, rows, **{"data.learn": "all"})


def test_parts_of_text_are_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "w3"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "w4"}]
    assert corpus(tmp_path, [{"messages": messages}] * 2).train.texts[0] == "w3"


def test_a_pair_of_columns_is_no_prompt(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one prompt, not a sentence pair; .* data.prompt-template = '{a} {b}'"):
        corpus(tmp_path, [{"a": "w1", "b": "w2", "answer": "w3"}] * 2, **{"data.text-column": "a,b"})


def test_settings() -> None:
    with pytest.raises(ConfigError, match=r"data.learn = 'al': must be one of last, all. Did you mean 'all'"):
        resolve({"data.learn": "al"})
    with pytest.raises(ConfigError, match=r"data.learn = 'all': is read with task = 'causal-lm'"):
        resolve({"data.learn": "all"})


def test_what_goes_on_from_a_settled_run(tmp_path: Path, tokenizer: Any) -> None:
    """The configuration says that the template is used, and the card's snippet writes the prompt that was learned."""
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": OPENAI[1:3]}) + "\n" for _ in range(12)), encoding="utf-8")
    flat = {"task": "causal-lm", "data.name": "file", "data.path": str(path), "data.partition": "iid"}
    settled, data = settle(resolve({**flat, "federation.num-clients": 2}), 2)
    assert settled.data.chat_template
    card = model_card(settled, (), {}, {}, without_privacy({}), 1)
    snippet = re.search(r"^inputs = .*?(?=^tokens)", card, re.MULTILINE | re.DOTALL)
    assert snippet is not None
    scope: dict[str, Any] = {"tokenizer": tokenizer, "PROMPT": data.corpus.train.texts[0]}
    exec(snippet.group(), scope)
    examples = CausalLM(tokenizer.pad_token_id).encode(data.corpus.train, tokenizer, 64)
    start = int(np.argmax(examples.targets[0]))
    assert scope["inputs"]["input_ids"][0].tolist() == examples.tokens[0][:start].tolist()
