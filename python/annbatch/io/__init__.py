"""Collections of AnnData datasets on disk: created, extended and read; and the sharded writer behind them."""

from ._collection import DATASET_PREFIX, V1_ENCODING, DatasetCollection
from ._sharded import write_sharded

__all__ = ["DATASET_PREFIX", "V1_ENCODING", "DatasetCollection", "write_sharded"]
