"""The loss of tokens under a language model's output layer, without keeping their logits.

A logit for each token and word of the vocabulary is what a language model's step takes most memory for, and most of it
for tokens of prompts, which nobody learns. Here the answers' tokens alone meet the output layer, some at a time; as the
layer is frozen, the gradient of what goes into it is all that has to be kept, and it is had at once, since a token's
loss enters the objective by a factor.
"""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.fused import fused

_NUMBERS = 2**28  # logits at a time


@final
class _Losses(torch.autograd.Function):
    """Losses of tokens, and whether each is the likeliest; the gradient is that of the first."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, answers: Tensor
    ) -> tuple[Tensor, Tensor]:
        size = max(1, _NUMBERS // len(weight))
        losses, right, grads = [], [], []
        for some, wanted in zip(torch.split(hidden, size), torch.split(answers, size), strict=True):
            loss, likeliest, slope = fused(_softmax)(functional.linear(some, weight, bias), wanted)
            losses.append(loss)
            right.append(likeliest)
            if ctx.needs_input_grad[0]:
                grads.append(slope @ weight)
        if grads:
            ctx.save_for_backward(torch.cat(grads))
        whole = torch.cat(right)
        ctx.mark_non_differentiable(whole)
        return torch.cat(losses), whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * grad[:, None]).to(slopes.dtype), None, None, None


def _softmax(logits: Tensor, answers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses of tokens [M] under logits [M, V], whether each is the likeliest, and the loss's gradient."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    total = wide.logsumexp(-1)
    loss = total - wide.gather(-1, answers[:, None])[:, 0]
    wanted = torch.arange(logits.shape[-1], device=logits.device) == answers[:, None]
    slope = (wide - total[:, None]).exp() - wanted.to(wide.dtype)
    return loss, wide.argmax(-1) == answers, slope.to(logits.dtype)


def token_losses(hidden: Tensor, head: nn.Linear, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of tokens [M], in float32 or wider, and whether each is the likeliest.

    Args:
        hidden: What goes into the output layer where each is predicted, [M, d].
        head: The output layer, frozen.
        answers: The tokens, [M].
    """
    found: tuple[Tensor, Tensor] = _Losses.apply(hidden, head.weight, head.bias, answers)  # type: ignore[no-untyped-call]
    return found
