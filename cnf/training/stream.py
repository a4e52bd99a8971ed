"""Where batches come from: a density, rows in memory, a dataset, an iterable of batches."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.utils.data import Dataset, IterableDataset, default_collate

from cnf.data import Points, load
from cnf.data.arrays import is_rows
from cnf.data.density import Toy
from cnf.data.tabular import is_large
from cnf.distributions import Base, FromTorch, as_base
from cnf.flow import Flow
from cnf.objectives import Batch
from cnf.random import draws_itself, preserved, reseed, stream, stream_seed
from cnf.training.batches import as_batch, drop_zero_weights, first_rows, in_memory, is_batch
from cnf.training.config import BATCH_SIZE, PICTURES, TrainConfig
from cnf.training.origin import draws_of, hash_of_rows
from cnf.training.prefetch import Prefetched
from cnf.training.shards import Shards

HEAD_BYTES = 500_000_000  # of a dataset, before training begins
CPU = torch.device("cpu")
ENTROPY_DRAWS = 100_000  # where it has no formula


class Stream(ABC):
    """Batches by step number, so that a resumed run goes on with the rows it would have seen.

    Attributes:
        validation: Held-out rows, or None.
        head: Rows that preprocessing is fitted to.
        total: How many rows there are to train on, where that is known.
    """

    validation: Batch | None
    head: Batch | None
    total: int | None = None

    @abstractmethod
    def size(self, step: int) -> int:
        """How many rows the batch of a step has, over all processes."""

    @abstractmethod
    def batches(
        self, step: int, shards: Shards, generators: Sequence[torch.Generator]
    ) -> list[Batch]:
        """The batch of each shard of a step, whose rows of other processes may be placeholders.

        Args:
            step: Its number.
            shards: Of the step's batch.
            generators: Source of the draws of each shard.
        """

    @abstractmethod
    def rows(self, n: int) -> Batch | None:
        """The first n rows to train on, or all that there are; None where there are none."""

    def move(self, device: torch.device) -> None:  # noqa: B027, most have nothing to move
        """Copy rows that are in memory to the device that trains; others stay where they are."""

    @abstractmethod
    def fingerprint(self) -> Any:
        """What tells these data from others, as plain data or a tensor; None if nothing does."""


class DistributionData:
    """A torch distribution, a base or a flow as a density to learn: the interface of a `Toy`.

    Args:
        source: The distribution; what it draws must be of shape (D,) for `dim` and the like.

    Attributes:
        name: The name of its class.
    """

    source: str | None = None  # no file
    columns: tuple[str, ...] | None = None

    def __init__(self, source: Distribution | Base | Flow) -> None:
        self.name = type(source).__name__
        self.inner = as_base(source, ()) if isinstance(source, Distribution) else source

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw n points."""
        return self.inner.sample((n,), generator=generator)

    @torch.no_grad()
    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats, of the distribution's batch."""
        return self.inner.log_prob(x)

    @property
    def dim(self) -> int:
        """The number of variables D."""
        shape = self.inner.event_shape
        if len(shape) != 1:
            raise ValueError(
                f"{self.name}: expected a distribution of vectors, shape (D,), got {shape}; one "
                "number is a vector of one: Normal(torch.zeros(1), torch.ones(1))"
            )
        return shape[0]

    @property
    def sizes(self) -> dict[str, int]:
        """The options of a model of it."""
        return {"dim": self.dim}

    @cached_property
    def support(self) -> Tensor:
        """A box with nearly all draws, low and high corner, shape (2, D)."""
        return Points(self.sample(10_000, torch.Generator().manual_seed(0))).support

    @cached_property
    def entropy(self) -> float:
        """The entropy in nats: torch's formula, else the mean of -log p over 100,000 draws."""
        if isinstance(self.inner, FromTorch):
            try:
                return float(self.inner.distribution.entropy())
            except NotImplementedError:  # torch has no formula: by draws, below
                pass
        drawn = self.sample(ENTROPY_DRAWS, torch.Generator().manual_seed(0))
        return -float(self.log_prob(drawn).double().mean())


def validation_draws(density: Any, n: int, seed: int) -> Tensor:
    """The draws from a density that training with this seed is validated on, shape (n, D).

    Args:
        density: The density.
        n: How many.
        seed: Of training.
    """
    return density.sample(n, stream(seed, "validation"))


class DensityStream(Stream):
    """Fresh draws from a density each step, and one fixed draw to validate on."""

    def __init__(self, density: Any, config: TrainConfig, validation: Batch | None) -> None:
        self.density, self.seed = density, config.seed
        self.batch_size = config.batch_size or BATCH_SIZE
        if validation is None:
            validation = Batch(validation_draws(density, config.validation_rows, config.seed))
        self.validation = validation
        self.head = Batch(density.sample(10_000, stream(config.seed, "head")))

    def size(self, step: int) -> int:
        return self.batch_size

    def batches(
        self, step: int, shards: Shards, generators: Sequence[torch.Generator]
    ) -> list[Batch]:
        if not isinstance(self.density, Toy | DistributionData):  # others may draw on a CPU only
            generators = [stream(self.seed, "density", step, *place) for place in shards.ranges]
        pairs = zip(shards.ranges.values(), generators, strict=True)
        return [Batch(self.density.sample(len(rows), generator)) for rows, generator in pairs]

    def rows(self, n: int) -> Batch:
        return Batch(self.density.sample(n, stream(self.seed, "rows of a coupling")))

    def fingerprint(self) -> Any:
        return draws_of(self.density)


class RowStream(Stream):
    """Rows of tensors or of a dataset, each once per epoch in an order seeded by (seed, epoch).

    Args:
        rows: Something of length N that, indexed with a tensor of row numbers, gives a Batch.
        config: Its batch size, seed and validation rows are used.
        validation: Rows to validate on; a tenth of the data is held out if None.
    """

    def __init__(self, rows: "IndexedRows", config: TrainConfig, validation: Batch | None) -> None:
        self.data, self.seed = rows, config.seed
        order = torch.randperm(len(rows), generator=stream(config.seed, "split"))
        held_out = 0
        if validation is None and config.validations:
            held_out = min(len(rows) // 10, config.validation_rows)
            validation = rows[order[:held_out]] if held_out else None
        self.train = order[held_out:]
        self.total = len(self.train)
        self.head = rows.head(self.train) if len(self.train) else None
        pictures = self.head is not None and self.head.x.dim() == 4
        most = PICTURES if pictures else BATCH_SIZE
        whole = min(most, len(self.train)) // config.devices * config.devices
        self.batch_size = config.batch_size or max(config.devices, whole)
        if len(self.train) < self.batch_size:
            each = tuple(rows[order[:1]].x.shape[1:]) if len(rows) else (0,)
            shape = "" if 0 in each else f", each of shape {each}"
            raise ValueError(
                f"fit: expected at least batch_size={self.batch_size} rows to train on, got "
                f"{len(self.train)} ({len(rows)} less {held_out} held out{shape}); lower "
                "batch_size"
            )
        self.validation = validation
        self._epoch, self._order = -1, self.train
        self._rows = Prefetched(self._read) if rows.large else self._read

    def size(self, step: int) -> int:
        return self.batch_size

    def batches(
        self, step: int, shards: Shards, generators: Sequence[torch.Generator]
    ) -> list[Batch]:
        return shards.spread(self._rows(step, shards.own))

    def _read(self, step: int, rows: range) -> Batch:
        per_epoch = len(self.train) // self.batch_size
        epoch, place = divmod(step, per_epoch)
        if epoch != self._epoch:
            order = torch.randperm(len(self.train), generator=stream(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, self.train[order].to(self.data.device)
        first = place * self.batch_size
        return self.data[self._order[first + rows.start : first + rows.stop]]

    def rows(self, n: int) -> Batch:
        return self.data[self.train[:n]]

    def move(self, device: torch.device) -> None:
        """Copy rows to a GPU, unless they are large: no step then waits for a copy."""
        if draws_itself(device):
            self.data.move(device)

    def fingerprint(self) -> str:
        """A hash of rows in memory, else of those that preprocessing is fitted to."""
        rows = self.data.data
        assert self.head is not None
        return hash_of_rows(rows if isinstance(rows, Batch) else self.head)


class IterableStream(Stream):
    """Batches of an iterable or a generator function, begun again when it ends.

    A resumed run skips what it has seen. Each pass is begun under a seed of its own, so that a
    shuffling DataLoader repeats.
    """

    def __init__(
        self, batches: Any, config: TrainConfig, validation: Batch | None, missing: bool = False
    ) -> None:
        self.source, self.validation, self.seed = batches, validation, config.seed
        self.missing = missing
        self.head = self._checked(next(self._begin(0)), 0)
        if len(self.head.x) < 2:
            raise ValueError(
                "fit: expected a first batch of two rows or more, to which preprocessing is "
                "fitted, got one row; make larger batches: DataLoader(…, batch_size=256)"
            )
        self._iterator, self._pass, self._next, self._place = self._begin(0), 0, 0, 0
        self._batch: tuple[int, Batch] | None = None  # the last one, by its step

    def _begin(self, number: int) -> Iterator[Any]:
        with preserved(CPU):
            reseed(stream_seed(self.seed, "pass", number), CPU)
            generated = inspect.isgeneratorfunction(self.source)
            iterator = self.source() if generated else iter(self.source)
            first = next(iterator, None)  # samplers seed themselves at the first item
        if first is None:
            raise ValueError(f"fit: the iterable of batches is empty in pass {number + 1}")
        return chain([first], iterator)

    def size(self, step: int) -> int:
        if self._batch is None or self._batch[0] != step:
            self._batch = step, self._read(step)
        return len(self._batch[1].x)

    def batches(
        self, step: int, shards: Shards, generators: Sequence[torch.Generator]
    ) -> list[Batch]:
        assert self._batch is not None and self._batch[0] == step  # `size` has read it
        first, last = shards.own.start, shards.own.stop
        return shards.spread(self._batch[1].map(lambda value: value[first:last]))

    def _read(self, step: int) -> Batch:
        while True:
            item = next(self._iterator, None)
            if item is None:
                self._pass, self._place = self._pass + 1, 0
                self._iterator = self._begin(self._pass)
                item = next(self._iterator)
            self._next, self._place = self._next + 1, self._place + 1
            if self._next > step:
                return self._checked(item, self._place - 1, self._pass)

    def _checked(self, item: Any, place: int, number: int = 0) -> Batch:
        """A Batch, whose errors name the item by its place, from 0, in the pass."""
        who = f"fit: batch {place}" + (f" of pass {number + 1}" if number else "")
        return as_batch(item, missing=self.missing, who=who)

    def fingerprint(self) -> str:
        assert self.head is not None
        return hash_of_rows(self.head)

    def rows(self, n: int) -> Batch:
        return first_rows((self._checked(item, k) for k, item in enumerate(self._begin(0))), n)


class NoData(Stream):
    """For objectives that need none: an empty batch of the size asked for."""

    def __init__(self, config: TrainConfig) -> None:
        self.batch_size = config.batch_size or BATCH_SIZE
        self.validation = self.head = None

    def size(self, step: int) -> int:
        return self.batch_size

    def batches(
        self, step: int, shards: Shards, generators: Sequence[torch.Generator]
    ) -> list[Batch]:
        return shards.spread(Batch(torch.empty(len(shards.own), 0)))

    def rows(self, n: int) -> None:
        return None

    def fingerprint(self) -> None:
        return None


class IndexedRows:
    """A `Batch` or a map-style dataset, indexed by a tensor of row numbers.

    Rows of a large Batch, which nobody has read, are checked as they are drawn.
    """

    def __init__(self, data: Any, missing: bool = False) -> None:
        self.data, self.missing = data, missing
        self.large = isinstance(data, Batch) and is_large(data.x)
        self.device = CPU

    def move(self, device: torch.device) -> None:
        """Copy a Batch that is not large to the device."""
        if isinstance(self.data, Batch) and not self.large:
            self.data, self.device = self.data.map(lambda value: value.to(device)), device

    def __len__(self) -> int:
        return len(self.data.x if isinstance(self.data, Batch) else self.data)

    def __getitem__(self, rows: Tensor) -> Batch:
        if isinstance(self.data, Batch):
            found = self.data.map(lambda value: value[rows])
            return as_batch(found, missing=self.missing, numbers=rows) if self.large else found
        return self._stacked(self._items(rows), rows)

    def head(self, rows: Tensor) -> Batch:
        """The first of some rows.

        Of a dataset, whose items may be large and slow, as many as `HEAD_BYTES` hold, 10,000 at
        most.
        """
        if isinstance(self.data, Batch):
            return self[rows[: 10_000 if self.large else 100_000]]
        first = self.data[int(rows[0])]  # once: a dataset may draw random numbers
        parts = vars(self._stacked([first], rows[:1])).values()
        size = sum(part.nbytes for part in parts if isinstance(part, Tensor))
        few = rows[: min(10_000, max(2, HEAD_BYTES // max(1, size)))]
        return self._stacked([first, *self._items(few[1:])], few)

    def _items(self, rows: Tensor) -> list[Any]:
        """Items of a dataset; at once where it has what torch's DataLoader asks for, too."""
        data: Any = self.data
        if hasattr(data, "__getitems__"):
            return data.__getitems__(rows.tolist())
        return [data[row] for row in rows.tolist()]

    def _stacked(self, items: list[Any], rows: Tensor) -> Batch:
        parts = items[0] if isinstance(items[0], Mapping) else {}
        listed = [name for name, value in parts.items() if isinstance(value, list)]
        if listed:  # which would be collated by its elements
            raise ValueError(
                f"fit: expected a dataset's items to hold tensors or arrays, got a list as "
                f"{listed[0]}; of a Hugging Face dataset give dataset.with_format('torch')"
            )
        return as_batch(default_collate(items), missing=self.missing, numbers=rows)


def as_stream(
    data: Any,
    config: TrainConfig,
    context: Any = None,
    weight: Any = None,
    validation: Any = None,
    missing: bool = False,
) -> Stream:
    """The stream that suits the data: see `fit`.

    Args: as of `fit`, and
        missing: Whether a context may be missing, NaN.
    """
    held_out = None
    if isinstance(data, Points) and validation is None and config.validations:
        validation = data.validation and data.validation.first(config.validation_rows)
    if validation is not None:
        held_out = _held_out(validation, config.validation_rows, missing)
    if isinstance(data, tuple) and not is_rows(data):  # of batches make a list
        data = _pair(data)
    if data is None and context is not None:  # rows that have nothing else
        data, context = {"x": torch.empty(len(context), 0), "context": context}, None
    if isinstance(data, Mapping | Points) or is_rows(data):
        data = in_memory(data, context, weight, missing)
        context = weight = None
    for name, value in (("context", context), ("weight", weight)):
        if value is not None:
            raise ValueError(
                f"fit: {name}=… goes with an array or a table, got it beside a "
                f"{type(data).__name__}; batches carry their own: cnf.Batch(x, {name}=…)"
            )
    if data is None:
        return NoData(config)
    if isinstance(data, Batch):
        data = IndexedRows(drop_zero_weights(as_batch(data, missing=missing)), missing)
        return RowStream(data, config, held_out)
    if isinstance(data, Distribution | Base | Flow):
        data = DistributionData(data)
    if hasattr(data, "sample") and hasattr(data, "log_prob"):
        return DensityStream(data, config, held_out)
    if _is_indexed(data):
        return RowStream(IndexedRows(data, missing), config, held_out)
    if isinstance(data, Iterator):
        raise ValueError(
            "fit: expected an iterable that can be begun again, got an iterator; give a list of "
            "batches, or the generator function itself, without calling it"
        )
    if isinstance(data, Iterable) or inspect.isgeneratorfunction(data):
        return IterableStream(data, config, held_out, missing)
    raise TypeError(
        "fit: expected data to be a density or its name, a file, an array or a table, a Batch, a "
        f"dataset, or batches, got {type(data).__name__}"
    )


def _is_indexed(data: Any) -> bool:
    """Whether it is a map-style dataset: torch's, or one with `__getitems__`."""
    if isinstance(data, Dataset):
        return not isinstance(data, IterableDataset)
    return hasattr(data, "__getitems__") and hasattr(data, "__len__")


def _pair(data: tuple[Any, ...]) -> dict[str, Any]:
    """(x, context) in memory by name."""
    if not 1 <= len(data) <= 2 or not all(map(is_rows, data)):
        raise ValueError(
            f"fit: expected a tuple to be (x, context), got {len(data)} parts; name them, "
            '{"x": …, "context": …, "weight": …}, or make a list of batches'
        )
    return dict(zip(("x", "context"), data, strict=False))


def _held_out(validation: Any, limit: int, missing: bool) -> Batch:
    """Rows to score: all of those in memory; of a dataset and of batches the first `limit`."""
    if isinstance(validation, str | PathLike):
        validation = load(validation)
    if isinstance(validation, Points):
        validation = in_memory(validation, missing=missing)
    if isinstance(validation, Distribution | Base | Flow):
        validation = DistributionData(validation)
    if hasattr(validation, "sample") and hasattr(validation, "log_prob"):
        validation = validation.sample(10_000, stream(0, "validation of one's own"))
    elif _is_indexed(validation):
        rows = min(limit, len(validation))  # pyright: ignore
        validation = IndexedRows(validation, missing)[torch.arange(rows)]
    elif inspect.isgeneratorfunction(validation):
        validation = validation()
    if isinstance(validation, Iterable) and not is_batch(validation):
        batches = (
            as_batch(item, missing=missing, who=f"fit: batch {place} of validation")
            for place, item in enumerate(validation)
        )
        validation = first_rows(batches, limit)
    return drop_zero_weights(as_batch(validation, "validation", missing))
