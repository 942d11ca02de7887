"""Target modules and structure: patterns, models of several parts, lengths, heads."""

from __future__ import annotations

import pytest
import torch
import transformers

from fedlora.models import Structure, check_length, inspect
from tools.families import FAMILIES, task_of, tiny_model


def structure(family: str, targets: str = "auto") -> Structure:
    return inspect(tiny_model(family), targets, has_head=task_of(family).has_head)


def names(family: str, targets: str) -> list[str]:
    return [layer.name for layer in structure(family, targets).adapted]


def test_a_pattern_matches_whole_names_as_in_peft() -> None:
    every = names("BERT", "query,value")
    assert names("BERT", r".*layer[.]1[.].*(query|value)") == every[2:]
    assert names("BERT", r"bert.encoder.layer.\d.attention.self.query") == every[::2]
    with pytest.raises(ValueError, match="PEFT cannot adapt a bert model so"):
        names("BERT", "query|")
    with pytest.raises(ValueError, match=r"'\(query': is no regular expression \(.*unterminated subpattern"):
        names("BERT", "(query")
    with pytest.raises(ValueError, match="'qery'"):
        names("BERT", "query,qery")


@pytest.mark.parametrize("targets", ["auto", "all-linear", "q_proj", r".*[.](q_proj|fc1|down_proj)"])
def test_no_target_lies_in_the_vision_tower(targets: str) -> None:
    """SigLIP's q_proj is called as Gemma's, and fc1 is its own; only the language model is a text model."""
    found = names("Gemma 3 (with vision)", targets)
    assert found
    assert all(name.startswith("model.language_model.layers.") for name in found)


@pytest.mark.parametrize("targets", ["fc1", r"model[.]vision_tower.*q_proj"])
def test_targets_in_the_vision_tower_alone_are_refused(targets: str) -> None:
    with pytest.raises(ValueError, match=r"vision_tower.* belongs to the head or to another part than the text model"):
        names("Gemma 3 (with vision)", targets)


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_finds_something_in_every_family(family: str) -> None:
    found = structure(family)
    assert found.adapted
    assert not {layer.name for layer in found.adapted} & {layer.name for layer in found.head}


@pytest.mark.parametrize(
    ("family", "limit"), [("BERT", 80), ("RoBERTa", 79), ("MPNet", 78), ("GPT-2", 80), ("T5", None)]
)
def test_the_most_tokens(family: str, limit: int | None) -> None:
    """In RoBERTa's line positions start after the padding's number, here 0; MPNet's is always 1."""
    found = structure(family)
    assert found.max_length == limit
    if limit is None:
        return
    check_length(found, limit)
    with pytest.raises(ValueError, match=rf"train.max-length = {limit + 1}: the model takes {limit} tokens at most"):
        check_length(found, limit + 1)


def test_a_row_of_the_most_tokens_goes_through() -> None:
    for family in ("RoBERTa", "MPNet"):
        model, limit = tiny_model(family), structure(family).max_length
        assert limit is not None
        model(input_ids=torch.full((1, limit), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 5))


def test_a_tied_output_layer_is_refused_in_a_nested_model_too() -> None:
    model = tiny_model("Gemma 3 (with vision)")
    assert isinstance(model, transformers.PreTrainedModel)
    with pytest.raises(ValueError, match="lm_head is tied to the embedding"):
        inspect(model, "lm_head", has_head=False)


def test_modernberts_whole_head_is_found() -> None:
    head = {layer.name: layer.norm for layer in structure("ModernBERT").head}
    assert head == {"head.dense": False, "head.norm": True, "classifier": False}
