"""Models: what is found, what is adapted, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from fedlora.config import ModelConfig
from fedlora.models import inspect_by_name, load_base, load_config, load_tokenizer
from fedlora.tasks import Classification
from tests.support.families import CONFIGS, small_model, small_structure
from tests.support.tiny import save_tiny_model

CPU = torch.device("cpu")
HEADS = {
    "bert": ["classifier"],
    "roberta": ["classifier.dense", "classifier.out_proj"],
    "distilbert": ["pre_classifier", "classifier"],
    "llama": ["score"],
    "gpt2": ["score"],
}


@pytest.mark.parametrize("family", CONFIGS)
def test_heads_are_found(family: str) -> None:
    """Every layer that the task adds, DistilBERT's first one (which PEFT's default leaves out) among them."""
    structure = small_structure(family, "all-linear")
    assert [layer.name for layer in structure.head] == HEADS[family]
    assert not {layer.name for layer in structure.adapted} & set(HEADS[family])


def test_targets_are_peft_names() -> None:
    def names(targets: str, family: str = "bert") -> list[str]:
        return [layer.name.split("layer.")[-1] for layer in small_structure(family, targets).adapted]

    assert names("auto") == [f"{n}.attention.self.{p}" for n in (0, 1) for p in ("query", "value")]
    assert names("value, query") == names("auto")
    assert names("1.attention.self.key") == ["1.attention.self.key"]
    conv = small_structure("gpt2", "c_attn").adapted[0]
    assert (conv.d_in, conv.d_out, conv.fan_in_fan_out) == (16, 48, True)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            "qery",
            r"method.target-modules = 'qery': PEFT cannot adapt a bert model so: .* called: dense, key, query, value",
        ),
        ("query,qery", r"method.target-modules: 'qery' names no layer of this bert model"),
        ("classifier", r"method.target-modules = 'classifier': "),
        ("word_embeddings", r"bert.embeddings.word_embeddings is not a linear layer"),
    ],
)
def test_targets_that_cannot_be_adapted(targets: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_structure("bert", targets)


def test_a_model_that_is_not_there_names_both_cures() -> None:
    absent = ModelConfig("no-such/model")
    for load in (lambda: load_config(absent, 2), lambda: load_tokenizer(absent)):
        with pytest.raises(
            ValueError, match=r"model.name = 'no-such/model': cannot be loaded .*local folder.*connect to the network"
        ):
            load()


def test_bundled_model_loads_without_a_network() -> None:
    base = load_base(ModelConfig("minilm"), Classification, 8, "auto", dtype=torch.float32, device=CPU)
    assert base.structure.num_parameters == 22_716_296
    assert len(base.structure.adapted) == 12
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not any(module.p for module in base.model.modules() if isinstance(module, torch.nn.Dropout))
    again = load_base(ModelConfig("minilm"), Classification, 3, "auto", dtype=torch.float32, device=CPU)
    assert base.digest == again.digest, "the head, random at each load, is not part of the base"
    assert inspect_by_name(ModelConfig("minilm"), Classification, 8, "auto") == base.structure


def test_local_folder_and_digest(tmp_path: Path) -> None:
    folders = save_tiny_model(tmp_path / "one"), save_tiny_model(tmp_path / "two", seed=1)
    one, two = (
        load_base(ModelConfig(folder), Classification, 2, "auto", dtype=torch.float64, device=CPU) for folder in folders
    )
    assert one.digest != two.digest
    assert one.tokenizer.padding_side == "right"


def test_a_checkpoint_without_base_weights_is_refused(tmp_path: Path) -> None:
    """They would start at random, differently on each machine."""
    from safetensors.torch import load_file, save_file

    folder = save_tiny_model(tmp_path / "model")
    weights = load_file(f"{folder}/model.safetensors")
    cut = {name: value for name, value in weights.items() if "pooler" not in name}
    assert len(cut) < len(weights)
    save_file(cut, f"{folder}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for bert.pooler.dense.bias \(2 tensors are missing\)"):
        load_base(ModelConfig(folder), Classification, 2, "auto", dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("family", CONFIGS)
def test_every_dropout_is_switched_off(family: str, tmp_path: Path) -> None:
    """Whatever a family calls it."""
    config = CONFIGS[family]()
    defaults = type(config)(
        **{key: value for key, value in config.to_dict().items() if "drop" not in key and key != "dtype"}
    )
    defaults.save_pretrained(tmp_path)
    loaded = load_config(ModelConfig(str(tmp_path)), 3)
    model = transformers.AutoModelForSequenceClassification.from_config(loaded)
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    assert loaded.num_labels == 3


def test_small_models_are_random() -> None:
    """The oracle's models have no zero biases that would hide a fault."""
    assert not any((parameter == 0).all() for parameter in small_model("bert").parameters())
