"""Columns of a run's files: what they stand for, and that an undeclared one is never called covered."""

from __future__ import annotations

from collections import Counter

import pytest

from fedlora.metrics import Metric, Population, declared, is_covered
from fedlora.tasks import TASKS


def test_a_column_is_parsed_into_what_made_it() -> None:
    for metric in declared():
        assert Metric.parse(metric.key) == metric
    assert Metric("accuracy", Population.TEST).key == "test_accuracy"
    assert Metric("accuracy", Population.ALONE_TEST).worst_tenth.key == "alone_test_accuracy_worst_tenth"
    assert Metric.parse("personal_perplexity").population is Population.PERSONAL
    assert Metric.parse("test_accuracy_rank_4") == Metric("accuracy_rank_4", Population.TEST)


def test_no_two_metrics_share_a_column() -> None:
    assert [key for key, count in Counter(metric.key for metric in declared()).items() if count > 1] == []


def test_a_new_column_is_outside_the_guarantee_until_it_is_declared() -> None:
    """Planted: names that a prefix would have called covered, and one that no prefix fits."""
    for key in (
        "test_rows_of_client_3",
        "dev_accuracy_by_class",
        "mean_gradient_norm",
        "bytes_of_rows",
        "test_",
        "",
        "loss_rank_4",
    ):
        assert not is_covered(key), key
        with pytest.raises(ValueError, match=r"is not declared in fedlora/metrics\.py"):
            Metric.parse(key)


@pytest.mark.parametrize("task", list(TASKS))
def test_what_comes_from_clients_rows_without_noise_is_outside(task: str) -> None:
    measure = TASKS[task].measure.name
    rows = ("personal_", "clients_", "alone_clients_", "alone_test_", "alone_dev_", "central_test_", "central_dev_")
    assert not any(is_covered(f"{prefix}{name}") for prefix in rows for name in TASKS[task].metric_names)
    assert not any(is_covered(key) for key in (f"clients_{measure}_worst_tenth", "majority_share", "train_loss"))
    assert all(is_covered(f"{prefix}_{measure}") for prefix in ("test", "dev", "before"))
    assert all(is_covered(key) for key in ("epsilon", "delta", "bytes_up", "effective_rank", "head", "guarantee"))
