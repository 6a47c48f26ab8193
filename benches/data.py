"""Data to measure with (sparse counts, images, genotypes, each made dataset by dataset) and what they add up to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch


def counts(rng, n_cells: int, n_genes: int, n_draws: int):
    """CSR counts whose gene popularity falls like a power law, as in droplet data."""
    popularity = (np.arange(n_genes) + 10.0) ** -0.9
    np.random.default_rng(0).shuffle(popularity)
    cumulative = np.cumsum(popularity / popularity.sum())
    for first in range(0, n_cells, 40_000):
        indices, data, indptr = [], [], [0]
        for _ in range(min(40_000, n_cells - first)):
            draws = np.searchsorted(cumulative, rng.random(int(n_draws * rng.uniform(1.0, 2.2))))
            genes, repeats = np.unique(np.minimum(draws, n_genes - 1), return_counts=True)
            indices.append(genes.astype(np.int32))
            data.append(repeats.astype(np.float32))
            indptr.append(indptr[-1] + len(genes))
        arrays = np.concatenate(data), np.concatenate(indices), np.array(indptr)
        yield sp.csr_matrix(arrays, shape=(len(indptr) - 1, n_genes))


def images(rng, n_images: int):
    """uint8 ``[n, 5, 64, 64]``: photons counted from a bright cell on a dim background that is brighter on one side.

    An eighth are drawn and the others are those moved sideways, further than a chunk away: drawing photons is slow.
    """
    y, x = np.mgrid[:64, :64].astype(np.float32)
    n_drawn = min(1024, n_images)
    for first in range(0, n_images, 8 * n_drawn):
        at_x, at_y = rng.uniform(16, 48, (2, n_drawn, 1, 1, 1)).astype(np.float32)
        radius = rng.uniform(4, 12, (n_drawn, 5, 1, 1)).astype(np.float32)
        brightness = rng.gamma(2.0, 10.0, (n_drawn, 5, 1, 1)).astype(np.float32)
        background = rng.uniform(0.0, 0.01, (n_drawn, 5, 1, 1)).astype(np.float32) * (x + 0.5 * y)
        photons = background + brightness * np.exp(-((x - at_x) ** 2 + (y - at_y) ** 2) / (2 * radius**2))
        drawn = np.minimum(rng.poisson(photons), 255).astype(np.uint8)
        moved = np.concatenate([np.roll(drawn, 7 * times, axis=-1) for times in range(8)])
        yield moved[: n_images - first]


def genotypes(rng, n_people: int, n_variants: int):
    """uint8 ``[n, n_variants]``: 0, 1 or 2 copies of the rarer allele, most of which are rare."""
    frequency = 0.5 * rng.random(n_variants) ** 4
    one, two = (((1 - (1 - frequency) ** 2) * 2**16).astype(np.uint16), (frequency**2 * 2**16).astype(np.uint16))
    for first in range(0, n_people, 2048):
        x = np.empty((min(2048, n_people - first), n_variants), dtype=np.uint8)
        for row in x:
            draw = rng.integers(2**16, size=n_variants, dtype=np.uint16)
            np.add(draw < one, draw < two, out=row, dtype=np.uint8)
        yield x


MAKERS = {"sparse": counts, "images": images, "genotypes": genotypes}


@dataclass
class Totals:
    """What an epoch adds up to, in whatever order its batches come."""

    rows: int = 0
    entries: int = 0
    checksum: int = 0

    def add(self, index, x) -> None:
        """Add the batch `x` of the rows `index`.

        A row counts for the sum of its values times their columns (of all axes but the first, flattened), the checksum
        for the sum of rows times their numbers: a row or a value in another's place changes it. All sums are whole
        numbers below 2^53, so exact.
        """
        self.rows += x.shape[0]
        if x.layout == torch.sparse_csr:
            self.entries += x.values().numel()
            of_entries = x.values().double() * (x.col_indices().double() + 1)
            sums = torch.cat([of_entries.new_zeros(1), of_entries.cumsum(0)])
            of_rows = sums[x.crow_indices().long()].diff().cpu()
        else:
            self.entries += x.numel()
            places = torch.arange(1, x[0].numel() + 1).double()
            of_rows = torch.cat([rows.flatten(1).double() @ places for rows in x.split(64)])
        numbers = torch.from_numpy(np.asarray(index, dtype=np.int64)) + 1
        self.checksum = (self.checksum + int((of_rows.long() * numbers).sum())) % 2**64

    def answer(self) -> list[int]:
        return [self.rows, self.entries, self.checksum]


def as_tensor(x):
    if hasattr(x, "indptr"):
        return torch.sparse_csr_tensor(x.indptr, x.indices, x.data, x.shape, check_invariants=False)
    return torch.from_numpy(x)
