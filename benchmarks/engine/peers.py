"""Baselines as shipped: FlowerTune's way of a client's visit, and Opacus, whose parts are imported when asked for."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any, final

import numpy as np
import transformers
from numpy.typing import NDArray
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.engine.jobs import Arrays, Job
from benchmarks.engine.resident import Resident, adamw, eager, loss_of, named_parameters, peft_model
from benchmarks.engine.shapes import Shape, twin
from fedlora.models.quiet import quiet

NOISE = 1.0


@final
class AsShipped:
    """FlowerTune's way: tokenizer, model, adapter and optimizer are made anew at each visit of a client.

    Its trainer and its Flower messages are left out, which are its users' to choose; so it is faster here than there.

    Args:
        model: The model; it is saved to a folder once.
        job: The round.
        rank: Of LoRA.
        start: Where clients start.
    """

    def __init__(self, model: Any, job: Job, rank: int, start: Arrays) -> None:
        self.shape, self.rank = job.shape, rank
        self.folder = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, self.folder)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        with quiet():
            model.save_pretrained(self.folder)
            _tokenizer(job.vocabulary).save_pretrained(self.folder)
            adapted = peft_model(twin(model), job.shape, rank)
            named_parameters(adapted, start)
            self.adapter = get_peft_model_state_dict(adapted)

    def round(self, job: Job, clients: int) -> NDArray[np.float64]:
        """Train the first clients of a round; return each one's mean loss."""
        return np.array([self._visit(job, client) for client in range(clients)])

    def _visit(self, job: Job, client: int) -> float:
        kind = getattr(transformers, self.shape.task.auto_model)
        with quiet():
            transformers.AutoTokenizer.from_pretrained(self.folder)
            model = kind.from_pretrained(self.folder, dtype=self.dtype).to(self.device)
            adapted = peft_model(model, self.shape, self.rank)
            set_peft_model_state_dict(adapted, self.adapter)
        trained = {name: one for name, one in adapted.named_parameters() if one.requires_grad}
        _, losses = eager(adapted, trained, job).visit(job, client)
        assert get_peft_model_state_dict(adapted)
        return float(losses) / job.steps


def _tokenizer(size: int) -> Any:
    from tokenizers import Tokenizer, models

    words = {"[UNK]": 0, **{f"w{number}": number for number in range(1, size)}}
    whole = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="[UNK]", pad_token="[UNK]")


def opacus(model: Any, shape: Shape, job: Job, rank: int, start: Arrays, mode: str) -> Resident:
    """Return Opacus on a resident model, in a gradient mode.

    Args:
        model: The model, whose weights are shared.
        shape: Its shape.
        job: The round.
        rank: Of LoRA.
        start: Where clients start.
        mode: ``hooks`` or ``ghost``.
    """
    from opacus import PrivacyEngine

    if mode == "ghost" and shape.causal:
        raise ValueError("Opacus's ghost clipping takes one label a row")
    adapted = peft_model(twin(model), shape, rank)
    named_parameters(adapted, start)
    loader = DataLoader(TensorDataset(job.tensors(0)[0][0]), batch_size=job.rows)
    with quiet():
        made: Any = PrivacyEngine(accountant="rdp").make_private(
            module=adapted,
            optimizer=adamw([one for one in adapted.parameters() if one.requires_grad], job),
            criterion=nn.CrossEntropyLoss(),
            data_loader=loader,
            noise_multiplier=NOISE,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
    module, optimizer = made[:2]
    criterion = made[2] if mode == "ghost" else None

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Any
        if criterion is None:
            loss = loss_of(module, ids, labels)
        else:
            loss = criterion(module(input_ids=ids).logits.float(), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()  # type: ignore[no-any-return]

    parameters = [one for one in module.parameters() if one.requires_grad]
    return Resident(parameters, optimizer, step, parameters[0].device)
