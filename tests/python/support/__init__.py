"""What tests share: they import it as ``support``, from this folder's parent.

- stores for the core: ``stores`` writes them, ``drawing`` and ``sampling`` choose which, ``oracle`` reads them slowly,
  ``damages`` and ``damaged_metadata`` break them; ``h5files`` writes HDF5 files
- data for the ops and for loaders, with what is in them: ``small``, ``cells``, ``genes``
- scverse annbatch 0.3.1: ``upstream_calls`` and ``upstream_loader_calls`` have recorded what it did, ``upstream`` compares
- ``processes`` runs code in a Python of its own
"""
