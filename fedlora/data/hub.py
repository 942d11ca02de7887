"""Any data set of the Hugging Face hub, or a local folder of one, through datasets and flwr-datasets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from datasets import ClassLabel, Dataset, List, disable_progress_bars, load_from_disk
from datasets.load import CachedDatasetModuleFactory
from flwr_datasets import FederatedDataset
from flwr_datasets.partitioner import IidPartitioner
from huggingface_hub import constants

from fedlora.config import Config, DataConfig
from fedlora.data.columns import Source
from fedlora.data.corpus import build_corpus
from fedlora.data.table import Corpus
from fedlora.hub import hub_answers
from fedlora.messages import closest, first_line

_SAVED = ("dataset_dict.json", "state.json")  # what save_to_disk writes beside the rows, for splits and for one


@final
class _UnloadableError(Exception):
    """Why a split cannot be loaded, and the cure."""

    def __init__(self, reason: str, cure: str) -> None:
        super().__init__(reason)
        self.cure = cure


def load_hub_corpus(config: Config) -> Corpus:
    """Load the splits ``data.train-split`` and ``data.test-split`` of the data set ``data.path``.

    That is a data set's name, or a folder: in the hub's format, or as ``save_to_disk`` has written it.

    Raises:
        ValueError: The data set cannot be loaded, has no such split, or its columns and rows do not fit.
    """
    data = config.data
    disable_progress_bars()
    path = Path(data.path).expanduser()
    if path.is_file():
        raise ValueError(f"data.path = {data.path!r}: is a file; leave data.name out, or set data.name = 'file'.")
    load = _saved(path, data) if any((path / name).is_file() for name in _SAVED) else _of_the_hub(path, data)
    train = _source(load, "data.train-split", data.train_split, config)
    wanted = data.test_split if config.eval.test else ""
    test = _source(load, "data.test-split", wanted, config) if wanted else None
    return build_corpus(train, test, config, split=not data.test_split)


def _of_the_hub(path: Path, data: DataConfig) -> Callable[[str], Dataset]:
    """Return what loads a split of a data set of the hub, or of a folder in its format."""
    federated = FederatedDataset(
        dataset=str(path.resolve()) if path.is_dir() else data.path,
        subset=data.subset or None,
        shuffle=False,
        # It insists on one; rows are partitioned by fedlora.data.partition, whatever their source.
        partitioners={data.train_split: IidPartitioner(num_partitions=1)},
    )
    cure = (
        "Name a file, a folder in the hub's format or one that save_to_disk has written; data.subset chooses among "
        "the configurations of a data set."
        if path.is_dir()
        else "There is no local folder of that name: name one, or connect to the network once so that the data set is "
        "cached; data.subset chooses among its configurations."
    )

    def load(split: str) -> Dataset:
        if not path.is_dir() and not _within_reach(data.path):
            raise _UnloadableError("it is not cached, and the Hugging Face hub cannot be reached", cure)
        try:
            return federated.load_split(split)
        except Exception as error:  # of the hub, the file system, and every reader behind them
            raise _UnloadableError(first_line(error), cure) from error

    return load


def _within_reach(name: str) -> bool:
    """Return whether a data set may be loaded: from the hub, from its cache, or offline as the loader says."""
    if constants.HF_HUB_OFFLINE or hub_answers():
        return True
    try:
        CachedDatasetModuleFactory(name).get_module()
    except Exception:  # whatever it misses
        return False
    return True


def _saved(path: Path, data: DataConfig) -> Callable[[str], Dataset]:
    """Return what loads a split of a data set that was saved by ``save_to_disk``.

    One that was saved without splits is its own training split.
    """

    def load(split: str) -> Dataset:
        if data.subset:
            raise _UnloadableError("it was saved without configurations", f"Leave data.subset = {data.subset!r} out.")
        try:
            saved = load_from_disk(str(path.resolve()))
        except Exception as error:  # of every reader behind it
            raise _UnloadableError(first_line(error), "Save it again with save_to_disk.") from error
        if isinstance(saved, Dataset):
            saved = {data.train_split: saved}
        if split not in saved:
            known = ", ".join(map(str, saved))
            raise _UnloadableError("there is no such split", f"Its splits: {known}.{closest(split, map(str, saved))}")
        return saved[split]

    return load


def _source(load: Callable[[str], Dataset], key: str, split: str, config: Config) -> Source:
    data = config.data
    try:
        rows = load(split)
    except _UnloadableError as error:
        raise ValueError(
            f"data.path = {data.path!r} with {key} = {split!r}: cannot be loaded ({str(error).rstrip('.')}). "
            f"{error.cure}"
        ) from error
    label: Any = rows.features.get(data.label_column)
    label = label.feature if isinstance(label, List) else label  # several labels a row
    names = list(label.names) if isinstance(label, ClassLabel) else []
    return Source(key, split, rows.to_pandas(), class_names=names)
