"""Any data set of the Hugging Face hub, or a local folder in its format, through flwr-datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, List, disable_progress_bars
from flwr_datasets import FederatedDataset
from flwr_datasets.partitioner import IidPartitioner

from fedlora.config import Config
from fedlora.data.columns import Source, build_corpus
from fedlora.data.table import Corpus
from fedlora.messages import first_line


def load_hub_corpus(config: Config) -> Corpus:
    """Load the splits ``data.train-split`` and ``data.test-split`` of the data set ``data.path``.

    Raises:
        ValueError: The data set cannot be loaded, has no such split, or its columns and rows do not fit.
    """
    data = config.data
    disable_progress_bars()
    path = Path(data.path).expanduser()
    federated = FederatedDataset(
        dataset=str(path.resolve()) if path.is_dir() else data.path,
        subset=data.subset or None,
        shuffle=False,
        # It insists on one; rows are partitioned by fedlora.data.partition, whatever their source.
        partitioners={data.train_split: IidPartitioner(num_partitions=1)},
    )
    train = _source(federated, "data.train-split", data.train_split, config)
    wanted = data.test_split if config.eval.test else ""
    test = _source(federated, "data.test-split", wanted, config) if wanted else None
    return build_corpus(train, test, config, split=not data.test_split)


def _source(federated: Any, key: str, split: str, config: Config) -> Source:
    data = config.data
    try:
        rows: Dataset = federated.load_split(split)
    except Exception as error:  # of the hub, the file system, and every reader behind them
        raise ValueError(
            f"data.path = {data.path!r} with {key} = {split!r}: cannot be loaded ({first_line(error)}). Name a local "
            "folder in hub format, or connect to the network once so that the data set is cached; data.subset chooses "
            "among its configurations."
        ) from error
    label: Any = rows.features.get(data.label_column)
    label = label.feature if isinstance(label, List) else label  # several labels a row
    names = list(label.names) if isinstance(label, ClassLabel) else []
    return Source(key, split, rows.to_pandas(), class_names=names)
