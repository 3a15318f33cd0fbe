"""The processes of one torchrun in, their number, common counters and exchanged objects out; one plain process is a group of one."""

import os
from datetime import timedelta
from typing import Any


class Ranks:
    """This process's place in the group. Use as a context manager; without torchrun nothing is opened."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.local_world = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        self._store: Any = None
        self._counts: dict[str, int] = {}

    @property
    def first(self) -> bool:
        """Whether this rank prints and plans."""
        return self.rank == 0

    def __enter__(self) -> "Ranks":
        if self.world > 1:
            import torch.distributed as dist

            patience = timedelta(hours=24)  # a rank may wait for another's largest episodes
            self._store, rank, world = next(dist.rendezvous("env://", timeout=patience))
            dist.init_process_group("gloo", store=self._store, rank=rank, world_size=world, timeout=patience)
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if self.world > 1 and kind is None:  # after an error the others may hang in a collective; torchrun ends them
            import torch.distributed as dist

            dist.barrier()
            dist.destroy_process_group()

    def add(self, name: str, amount: int) -> int:
        """Add to a counter common to all ranks (0: only read it); returns its new value."""
        if self._store is not None:
            return int(self._store.add(f"vla/{name}", amount))
        self._counts[name] = self._counts.get(name, 0) + amount
        return self._counts[name]

    def share(self, value: Any) -> Any:
        """The first rank's `value`, on every rank."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in order of rank, on every rank."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        boxes: list[Any] = [None] * self.world
        dist.all_gather_object(boxes, value)
        return boxes
