"""Packed training equals PEFT, one client at a time, in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.nn import functional

from fedlora.config import Config, MethodConfig, TrainConfig
from fedlora.engine import ClientWork, Engine, evaluate, train_pack
from fedlora.methods import build_method, initial_tensors
from fedlora.seeded import Seeded
from fedlora.tasks import Examples
from tests.support.families import (
    FAMILIES,
    LANGUAGE,
    random_examples,
    small_base,
    small_model,
    small_task,
    task_of,
    without_float32,
)
from tests.support.matrix import CONFIGS, engine_of, random_start

METHOD = MethodConfig(name="lora", rank=3, alpha=6.0)
TARGETS = {"distilbert": "q_lin,v_lin"}  # PEFT has no choice of its own for this family


def make_engine(family: str, method: MethodConfig = METHOD, targets: str = "", **sections: Any) -> Engine:
    targets = targets or TARGETS.get(family, "auto")
    base = small_base(family, targets)
    built = build_method(Config(method=method, **sections), base.structure.adapted, base.structure.head)
    return Engine.build(base, built, small_task(family))


def make_works(
    engine: Engine, clients: int, train: TrainConfig, seed: int = 0, family: str = "bert"
) -> list[ClientWork]:
    """Clients with different rows, lengths, batch sizes and numbers of steps (the third has none)."""
    generator = np.random.default_rng(seed)
    works = []
    for client in range(clients):
        examples = random_examples(12, seed=100 + client, family=family)
        steps = 0 if client == 2 else int(generator.integers(1, 5))
        batches = [generator.permutation(12)[: int(generator.integers(1, 6))] for _ in range(steps)]
        start = initial_tensors(engine.method.specs(), Seeded(7))
        works.append(ClientWork(client, examples, 12, batches, start))
    return works


def peft_model(
    family: str, start: Mapping[str, Any], method: MethodConfig, targets: str = "", frozen: frozenset[str] = frozenset()
) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """Return PEFT's model, and its trained parameters by our names, at ``start``."""
    model = without_float32(small_model(family))
    targets = targets or TARGETS.get(family, "auto")
    wanted: Any = {"auto": None}.get(targets, targets if targets == "all-linear" else targets.split(","))
    peft_config = LoraConfig(
        task_type=TaskType(task_of(family).peft_type),
        r=method.rank,
        lora_alpha=method.alpha,
        target_modules=wanted,
        use_rslora=method.rslora,
    )
    adapted = get_peft_model(model, peft_config).double().eval()
    named = {}
    for key, parameter in adapted.named_parameters():
        name = key.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        name = name.replace("lora_A.default.weight", "lora_A").replace("lora_B.default.weight", "lora_B")
        parameter.requires_grad_(name in start and ".original_module." not in key)
        if parameter.requires_grad:
            named[name] = parameter
    assert named.keys() == start.keys()
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(np.asarray(start[name])))
    for name in frozen:
        named[name].requires_grad_(False)
    return adapted, named


def peft_alone(
    family: str,
    work: ClientWork,
    method: MethodConfig,
    train: TrainConfig,
    targets: str = "",
    frozen: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """The slow reference: one client, plain PEFT, plain torch optimizer, one forward a row."""
    adapted, named = peft_model(family, work.start, method, targets, frozen)
    parameters = [parameter for name, parameter in named.items() if name not in frozen]
    rate = train.learning_rate
    optimizer: torch.optim.Optimizer
    if train.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=train.weight_decay)
    else:
        optimizer = torch.optim.SGD(parameters, lr=rate, momentum=train.momentum, weight_decay=train.weight_decay)
    for step, batch in enumerate(work.batches):
        losses = []
        for row in batch:
            ids = torch.from_numpy(work.examples.tokens[row])[None]
            logits = adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            target = work.examples.targets[row]
            if family in LANGUAGE:  # the mean over the answer, each token predicted from those before it
                start = int(np.argmax(target))
                losses.append(functional.cross_entropy(logits[0, start - 1 : -1], ids[0, start:]))
            else:
                losses.append(functional.cross_entropy(logits, torch.tensor([int(target)])))
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        if train.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, train.clip_norm)
        if train.schedule == "linear":
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / len(work.batches))
        optimizer.step()
    return {name: parameter.detach().numpy() for name, parameter in named.items()}


def largest_difference(results: list[Any], works: list[ClientWork], references: list[dict[str, Any]]) -> float:
    return max(
        float(np.abs(result.tensors[name] - reference[name]).max())
        for result, reference in zip(results, references, strict=True)
        for name in works[0].start
    )


ADAMW = TrainConfig(learning_rate=0.02, weight_decay=0.1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("clients", [1, 2, 5, 16])
def test_packed_equals_sequential_peft(family: str, clients: int) -> None:
    """Ragged clients with different step counts, AdamW: packing changes nothing."""
    engine = make_engine(family)
    works = make_works(engine, clients, ADAMW, family=family)
    results = train_pack(engine, works, {}, ADAMW)
    references = [peft_alone(family, work, METHOD, ADAMW) for work in works]
    # Rows of one key have no gradient but rounding, at most 1e-16, of which AdamW makes a step of 1e-16 / 1e-8 x rate.
    rounding = 1e-16 / 1e-8 * ADAMW.learning_rate * 4 if family in LANGUAGE else 0.0
    assert largest_difference(results, works, references) < 1e-10 + rounding
    assert [result.error for result in results] == [""] * clients


@pytest.mark.parametrize(
    "train",
    [
        TrainConfig(optimizer="sgd", learning_rate=0.1),
        TrainConfig(optimizer="sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.01, clip_norm=0.05),
        TrainConfig(learning_rate=0.02, clip_norm=0.05, schedule="linear"),
    ],
    ids=["sgd", "sgd-momentum-decay-clip", "adamw-clip-linear"],
)
def test_optimizers_clipping_and_schedule_are_per_client(train: TrainConfig) -> None:
    engine = make_engine("bert")
    works = make_works(engine, 4, train)
    results = train_pack(engine, works, {}, train)
    references = [peft_alone("bert", work, METHOD, train) for work in works]
    assert largest_difference(results, works, references) < 1e-10


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("bert", "all-linear"),
        ("gpt2", "c_attn,c_proj,c_fc"),
        ("llama", "all-linear"),
        ("qwen2-lm", "all-linear"),
        ("gpt2-lm", "c_attn,c_proj,c_fc"),
        ("llama-lm", "q_proj,lm_head"),
    ],
)
def test_other_targets_and_rslora(family: str, targets: str) -> None:
    """Every linear layer, non-square ones and Conv1D among them, with rsLoRA's scale."""
    method = MethodConfig(name="lora", rank=4, alpha=6.0, rslora=True)
    engine = make_engine(family, method, targets)
    works = make_works(engine, 3, ADAMW, family=family)
    results = train_pack(engine, works, {}, ADAMW)
    references = [peft_alone(family, work, method, ADAMW, targets) for work in works]
    assert largest_difference(results, works, references) < 1e-10


def test_the_comparison_can_fail() -> None:
    """Control: one label changed at one client changes that client by far more, and no other client at all."""
    engine = make_engine("bert")
    works = make_works(engine, 4, ADAMW)
    row = int(works[1].batches[0][0])
    targets = works[1].examples.targets.copy()
    targets[row] = (targets[row] + 1) % 3
    changed = list(works)
    changed[1] = replace(works[1], examples=Examples(works[1].examples.tokens, targets))
    before, after = train_pack(engine, works, {}, ADAMW), train_pack(engine, changed, {}, ADAMW)
    moved = [
        max(float(np.abs(a.tensors[name] - b.tensors[name]).max()) for name in a.tensors)
        for a, b in zip(before, after, strict=True)
    ]
    assert moved[1] > 1e-4
    assert max(moved[0], moved[2], moved[3]) == 0.0


def test_one_clients_nan_stays_its_own() -> None:
    """A client that diverges is named, and its neighbours in the pack do not notice."""
    engine = make_engine("bert")
    works = make_works(engine, 4, ADAMW)
    name = next(iter(works[1].start))
    poisoned = list(works)
    poisoned[1] = replace(works[1], start={**works[1].start, name: np.full_like(works[1].start[name], np.nan)})
    clean, results = train_pack(engine, works, {}, ADAMW), train_pack(engine, poisoned, {}, ADAMW)
    assert "not finite" in results[1].error
    for g in (0, 2, 3):
        assert results[g].error == ""
        for key in clean[g].tensors:
            assert np.array_equal(clean[g].tensors[key], results[g].tensors[key])


@pytest.mark.parametrize("method", CONFIGS)
def test_training_after_an_evaluation(method: str) -> None:
    """What a method keeps from an evaluation must not stand in the way of gradients."""
    engine = engine_of(method, "bert")
    start = random_start(engine)
    examples = random_examples(4, 0)
    evaluate(engine, start, examples, range(4))
    work = ClientWork(0, examples, 4, [np.arange(4)], start)
    assert train_pack(engine, [work], {}, ADAMW)[0].error == ""


def test_other_packs_and_micro_batches_agree() -> None:
    """Other packs, and other cuts of a step into forward passes, agree within rounding."""
    engine = make_engine("llama")
    works = make_works(engine, 6, ADAMW)
    together = train_pack(engine, works, {}, ADAMW)
    apart = [train_pack(engine, [work], {}, ADAMW)[0] for work in works]
    tiny = train_pack(replace(engine, max_cost=13), works, {}, ADAMW)
    for other in (apart, tiny):
        difference = max(
            float(np.abs(a.tensors[n] - b.tensors[n]).max())
            for a, b in zip(together, other, strict=True)
            for n in a.tensors
        )
        assert difference < 1e-10
    again = train_pack(engine, works, {}, ADAMW)
    assert all(
        np.array_equal(a.tensors[n], b.tensors[n]) for a, b in zip(together, again, strict=True) for n in a.tensors
    )


def test_a_layer_computes_its_update_before_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order in which autograd adds up the gradients of an input, and so the bits of a run, depends on it."""
    order = []
    engine = make_engine("bert")
    layer = engine.grouped.model.get_submodule(engine.base.structure.adapted[0].name)
    own = type(layer)._own  # type: ignore[attr-defined]
    monkeypatch.setattr(type(layer), "_own", lambda self, x: (order.append("update"), own(self, x))[1])
    layer.base.register_forward_hook(lambda *_: order.append("base"))  # type: ignore[union-attr]
    evaluate(engine, initial_tensors(engine.method.specs(), Seeded(3)), random_examples(2, seed=5), range(2))
    assert order[:2] == ["update", "base"]


def test_frozen_tensors_are_used_and_not_trained() -> None:
    """With A common and fixed, B trains as in PEFT with A frozen."""
    engine = make_engine("bert")
    full = make_works(engine, 3, ADAMW)
    frozen = frozenset(name for name, spec in engine.method.specs().items() if spec.kind == "A")
    works = [replace(w, start={n: v for n, v in w.start.items() if n not in frozen}) for w in full]
    common = {name: full[0].start[name] for name in frozen}
    results = train_pack(engine, works, common, ADAMW)
    for work, whole, result in zip(works, full, results, strict=True):
        reference = peft_alone("bert", whole, METHOD, ADAMW, frozen=frozen)
        assert set(result.tensors) == set(work.start)
        assert max(float(np.abs(result.tensors[n] - reference[n]).max()) for n in result.tensors) < 1e-10


def test_base_is_frozen_and_shared() -> None:
    """Training leaves every weight of the base model as it was."""
    engine = make_engine("bert")
    base = small_base("bert")
    before = copy.deepcopy(base.model.state_dict())
    engine = replace(engine, base=base, grouped=Engine.build(base, engine.method, small_task()).grouped)
    train_pack(engine, make_works(engine, 3, ADAMW), {}, ADAMW)
    after = {name.replace(".base.", "."): value for name, value in base.model.state_dict().items()}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
