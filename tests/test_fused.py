"""Compiled elementwise steps."""

from __future__ import annotations

import pytest
import torch

from fedlora import fused


def double(value: torch.Tensor) -> None:
    value.mul_(2.0)


def test_a_machine_that_cannot_compile_computes_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """Without a C compiler, torch.compile fails at the first call; here it is a backend that does."""

    def no_compiler(*_: object) -> object:
        raise RuntimeError("Failed to find C compiler")

    compiled = fused.WithFallback(torch.compile(double, backend=no_compiler), double)
    value = torch.ones(3)
    compiled(value)
    compiled(value)
    assert value.tolist() == [4.0] * 3
    assert caplog.text.count("double: plain torch computes") == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("2 GiB"), AssertionError("a stride")])
def test_what_is_not_the_compilers_is_raised(error: Exception) -> None:
    """Memory that is short is the pack's to halve; a broken promise is a fault, not a machine without a compiler."""

    def fails(_: torch.Tensor) -> None:
        raise error

    with pytest.raises(type(error)):
        fused.WithFallback(fails, double)(torch.ones(2))


def test_a_cpu_runs_the_function_itself() -> None:
    value = torch.ones(2)
    fused.fused(double)(value)
    assert value.tolist() == [2.0] * 2
