"""Control groups that programs name: stand-ins for ``struct cgroup``, as a test makes them.

Programs find a group by following pointers from a task: a test puts addresses where its program looks.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from kbpf.emulator.memory import Region

#: Bytes of a group that programs can read.
_SIZE = 1 << 12


@dataclass(kw_only=True, eq=False)
class Cgroup:
    """A group, known by its id, which is the inode number of its directory. Programs may read `memory`."""

    id: int
    memory: bytearray = field(default_factory=lambda: bytearray(_SIZE))
    region: Region = field(init=False)

    def __post_init__(self) -> None:
        self.region = Region(self.memory, writable=False, owner=weakref.ref(self))

    @property
    def address(self) -> int:
        return self.region.address
