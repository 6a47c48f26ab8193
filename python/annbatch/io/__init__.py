"""Collections of AnnData datasets on disk: created, extended and read; and the sharded writer behind them."""

from annbatch._data.collections import DATASET_PREFIX, V1_ENCODING

from ._collection import DatasetCollection
from ._sharded import write_sharded

__all__ = ["DATASET_PREFIX", "V1_ENCODING", "DatasetCollection", "write_sharded"]
