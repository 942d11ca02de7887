"""Reductions: how clients' updates become one thing, at nodes and at the server alike."""

from fedlora.reduce.base import ClientUpdate, Expected, Reduced, Reduction
from fedlora.reduce.check import check_tensors
from fedlora.reduce.fold import REDUCTIONS, fold
from fedlora.reduce.mean import WeightedMean
from fedlora.reduce.one_by_one import OneByOne, factors, mean_product, shares, weighted_mean

__all__ = [
    "REDUCTIONS",
    "ClientUpdate",
    "Expected",
    "OneByOne",
    "Reduced",
    "Reduction",
    "WeightedMean",
    "check_tensors",
    "factors",
    "fold",
    "mean_product",
    "shares",
    "weighted_mean",
]
