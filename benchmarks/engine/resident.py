"""Plain PEFT at its best: one resident model, clients one after another, adapters copied in place.

Eagerly, as one CUDA graph of forward, backward and optimizer, and compiled by torch as well. bfloat16 throughout, as a
researcher would who wants speed; fused AdamW; a client's tokens go to the device once a round, and its adapter comes
back in one copy, both by pinned memory and while the next client trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.engine.jobs import Arrays, Job
from benchmarks.engine.shapes import Shape
from benchmarks.engine.timing import synchronize

_UNMASKED = "sdpa-without-mask"
Step = Callable[[Tensor, Tensor], Tensor]
"""Takes an optimizer step on token numbers [rows, T] and their labels; returns the loss before it."""
_WARM = 3  # steps before a CUDA graph is captured
_SHAPES = 64  # more than a table has


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **options: Any) -> Any:
    """Return PyTorch's attention over all positions, or over those before, as transformers calls it."""
    return sdpa_attention_forward(module, query, key, value, None, **options)


def peft_model(model: Any, shape: Shape, rank: int) -> Any:
    """Return PEFT's LoRA on a model, whose layers it replaces; adapters in the model's dtype."""
    model.config.use_cache = False
    # Rows are of one length. Left to itself, transformers makes a mask all the same where a CUDA graph is captured or
    # torch compiles (5.17): it cannot look whether one is needed. A mask keeps attention from its fast kernel.
    ALL_ATTENTION_FUNCTIONS.register(_UNMASKED, _attention)
    model.config._attn_implementation = _UNMASKED
    config = LoraConfig(
        task_type=TaskType(shape.task.peft_type), r=rank, lora_alpha=2 * rank, target_modules=list(shape.targets)
    )
    dtype = next(model.parameters()).dtype
    adapted = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapted


def named_parameters(adapted: nn.Module, start: Arrays) -> dict[str, nn.Parameter]:
    """Return the trained parameters of PEFT's model by fedlora's names, at ``start``."""
    named = {}
    for key, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            name = key.removeprefix("_module.").removeprefix("base_model.model.")
            name = name.replace(".modules_to_save.default", "").replace(".default.weight", "")
            named[name] = parameter
    assert named.keys() == start.keys(), f"other tensors are trained: {sorted(named.keys() ^ start.keys())[:4]}"
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(np.array(start[name])))
    return named


def loss_of(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy, of logits that lie [rows, classes] or [tokens, vocabulary]."""
    logits = model(input_ids=ids).logits
    return functional.cross_entropy(logits.view(-1, logits.shape[-1]).float(), labels.view(-1))


@final
class Resident:
    """Clients one after another on a resident model.

    Args:
        parameters: The trained parameters, now at the start of a round.
        optimizer: Their optimizer.
        step: An optimizer step.
        device: Where the model is.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: Any, step: Step, device: torch.device) -> None:
        self.parameters = list(parameters)
        self.optimizer = optimizer
        self.step = step
        self.device = device
        self.start = [parameter.detach().clone() for parameter in self.parameters]

    def round(self, job: Job, clients: int) -> NDArray[np.float64]:
        """Train the first clients of a round; return each one's mean loss."""
        visits = [self.visit(job, client) for client in range(clients)]
        synchronize(self.device)  # once: no client waits until the one before it is fetched
        return np.array([float(loss) / job.steps for _, loss in visits])

    def visit(self, job: Job, client: int) -> tuple[Tensor, Tensor]:
        """Train a client for a round; return its adapter, on its way to the host, and the sum of its losses."""
        self.restart()
        ids, labels = (one.to(self.device, non_blocking=True) for one in job.tensors(client))
        losses = torch.zeros((), dtype=torch.float64, device=self.device)
        for step in range(job.steps):
            losses += self.step(ids[step], labels[step])
        with torch.no_grad():
            update = torch.cat([parameter.flatten() for parameter in self.parameters])
            fetched = torch.empty(update.shape, dtype=update.dtype, pin_memory=self.device.type == "cuda")
            return fetched.copy_(update, non_blocking=True), losses

    def restart(self) -> None:
        """Put the start back, and moments and step counts to zero."""
        with torch.no_grad():
            torch._foreach_copy_([parameter.data for parameter in self.parameters], self.start)
            states: dict[torch.dtype, list[Tensor]] = {}
            for value in (value for state in self.optimizer.state.values() for value in state.values()):
                if isinstance(value, Tensor):
                    states.setdefault(value.dtype, []).append(value)
            for alike in states.values():
                torch._foreach_zero_(alike)


def adamw(parameters: Sequence[nn.Parameter], job: Job, *, graph: bool = False) -> torch.optim.AdamW:
    """Return torch's fused AdamW."""
    return torch.optim.AdamW(parameters, lr=job.rate, weight_decay=0.0, fused=True, capturable=graph)


def eager(model: Any, named: Mapping[str, nn.Parameter], job: Job) -> Resident:
    """Return the way without any compilation."""
    parameters = list(named.values())
    optimizer = adamw(parameters, job)

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, ids, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return Resident(parameters, optimizer, step, parameters[0].device)


def graphed(model: Any, named: Mapping[str, nn.Parameter], job: Job, *, compiled: bool = False) -> Resident:
    """Return the way as one CUDA graph of forward, backward and optimizer step.

    Args:
        model: PEFT's model.
        named: Its trained parameters.
        job: The round, for its shapes.
        compiled: Whether forward and backward are what ``torch.compile`` makes of them.
    """
    parameters = list(named.values())
    device = parameters[0].device
    optimizer = adamw(parameters, job, graph=True)
    ids, labels = (one[0].to(device) for one in job.tensors(0))
    loss_fn: Any = loss_of
    if compiled:
        torch._dynamo.config.recompile_limit = _SHAPES  # beyond it torch would go on without compiling, and not say so
        loss_fn = torch.compile(loss_of, dynamic=False)
    # Left to itself, a compiled model may be given attention in float32.
    kernels = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]) if compiled else nullcontext()

    def whole() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = loss_fn(model, ids, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    resident = Resident(parameters, optimizer, lambda _ids, _labels: torch.zeros(()), device)
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with kernels:
        with torch.cuda.stream(side):
            for _ in range(_WARM):
                whole()
        torch.cuda.current_stream(device).wait_stream(side)
        optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = whole()
    kept = [parameter.grad for parameter in parameters]

    def step(new_ids: Tensor, new_labels: Tensor) -> Tensor:
        assert kept, "the graph writes into these gradients"
        ids.copy_(new_ids)
        labels.copy_(new_labels)
        graph.replay()
        return loss

    resident.step = step
    return resident
