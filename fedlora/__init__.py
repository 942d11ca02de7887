"""fedlora: federated fine-tuning of low-rank adapters."""

__version__ = "0.1.0"
