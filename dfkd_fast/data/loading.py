"""Batches of a dataset: the same ones for a seed, whatever the number of worker processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, SequentialSampler

__all__ = ["loader"]


class _Batch(list[int]):
    """Indices of a batch, with the seed of its random transforms."""

    seed: int


class _SeededBatches(Sampler[list[int]]):
    """Batches of indices, each with a seed of its own from the loader's generator."""

    def __init__(self, batches: BatchSampler, generator: torch.Generator) -> None:
        self.batches = batches
        self.generator = generator

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        seeds = torch.randint(2**62, (len(self),), generator=self.generator).tolist()
        for indices, seed in zip(self.batches, seeds, strict=True):
            batch = _Batch(indices)
            batch.seed = seed
            yield batch


class _Seeded(Dataset[Any]):
    """Fetches a batch under its own seed and leaves the global generator as it found it."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getitems__(self, batch: _Batch) -> list[Any]:
        # Only the CPU's generator: torch.manual_seed would touch CUDA's too.
        state = torch.random.get_rng_state()
        torch.default_generator.manual_seed(batch.seed)
        try:
            fetch = getattr(self.dataset, "__getitems__", None)
            return fetch(list(batch)) if fetch else [self.dataset[index] for index in batch]
        finally:
            torch.random.set_rng_state(state)


def loader(
    dataset: Dataset[Any], *, batch_size: int, shuffle: bool, seed: int, workers: int, drop_last: bool = False
) -> DataLoader[Any]:
    """Batches ``(images, labels)``: float32 (N, 3, H, W) and int64 (N,).

    Order and random transforms follow from ``seed`` and from how many passes over this loader came before; neither the
    number of workers nor PyTorch's global generator has a part in them, and that generator is left as it was.

    Args:
        dataset: a map-style dataset, as :class:`~dfkd_fast.data.ImageData` holds.
        batch_size: images a batch.
        shuffle: a new order each pass.
        seed: of the order and of the random transforms.
        workers: processes, which stay alive between passes; 0 fetches in the caller's.
        drop_last: leave out a last batch that is not full.

    Returns:
        The loader; its memory is pinned where CUDA is available.

    Raises:
        ValueError: a batch size under 1, a negative number of workers, or no image to load.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    count = len(dataset)  # type: ignore[arg-type]
    if count == 0:
        raise ValueError("dataset must hold at least one image, got none")
    generator = torch.Generator().manual_seed(seed)
    order: Sampler[int] = (
        RandomSampler(dataset, generator=generator)  # type: ignore[arg-type]
        if shuffle
        else SequentialSampler(dataset)  # type: ignore[arg-type]
    )
    return DataLoader(
        _Seeded(dataset),
        batch_sampler=_SeededBatches(BatchSampler(order, batch_size, drop_last), generator),
        num_workers=workers,
        # For what DataLoader itself draws: a base seed a pass, which would otherwise move the global generator.
        generator=torch.Generator().manual_seed(seed),
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
