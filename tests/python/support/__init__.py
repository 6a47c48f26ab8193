"""What tests share: they import it as ``support``, from this folder's parent.

- stores for the core: ``stores`` writes them, ``drawing`` and ``sampling`` choose which, ``oracle`` reads them slowly,
  ``damages`` and ``damaged_metadata`` break them; ``h5files`` writes their HDF5 twins
- data for loaders: ``cells`` writes them and holds them in memory
- scverse annbatch 0.3.1: ``upstream_calls`` and ``upstream_loader_calls`` have recorded what it did, ``upstream`` compares
"""
