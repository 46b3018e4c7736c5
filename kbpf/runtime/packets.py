"""Packets that lie in one buffer, as filters take them by the million."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kbpf.pcapfile import Capture


class Packets(Sequence[bytes]):
    """A buffer, and where in it packets lie: a sequence of bytes objects that are made when they are asked for.

    Packet i starts at ``offsets[i]`` and has ``sizes[i]`` bytes; without `sizes` the packets follow one another, and
    `offsets` has one number more than there are packets, where the last one ends. `wirelens` are the lengths on the
    wire, where packets were cut. The buffer is not copied: any contiguous object of bytes will do, a mapped file too.
    Raises `ValueError` for lists whose lengths do not match, and for a packet that is not inside the buffer.
    """

    __slots__ = ("buffer", "offsets", "sizes", "wirelens")

    def __init__(
        self,
        buffer: Any,
        offsets: Sequence[int],
        sizes: Sequence[int] | None = None,
        wirelens: Sequence[int] | None = None,
    ) -> None:
        self.buffer = memoryview(buffer).cast("B")
        starts = unsigned(offsets)
        if sizes is None:
            if not starts:
                raise ValueError("without sizes, offsets end with where the last packet ends")
            self.offsets = starts[:-1]
            self.sizes = unsigned(end - start for start, end in pairwise(starts))
        else:
            self.offsets, self.sizes = starts, unsigned(sizes)
        self.wirelens = None if wirelens is None else unsigned(wirelens)
        for numbers in (self.sizes, self.wirelens):
            if numbers is not None and len(numbers) != len(self.offsets):
                raise ValueError(f"{len(numbers)} lengths for {len(self.offsets)} packets")
        room = len(self.buffer)
        if any(offset + size > room for offset, size in zip(self.offsets, self.sizes, strict=True)):
            raise ValueError(f"a packet is not inside the buffer of {room} bytes")

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        start = self.offsets[index]
        return bytes(self.buffer[start : start + self.sizes[index]])

    def __iter__(self) -> Iterator[bytes]:
        return map(self.__getitem__, range(len(self)))


def listed_packets(
    packets: Iterable[bytes] | Capture, wirelens: Sequence[int] | None = None
) -> tuple[list[bytes], Sequence[int] | None]:
    """A list of packets, and their lengths on the wire where they are given, or come from a capture."""
    from kbpf.pcapfile import Capture

    if isinstance(packets, list):
        return packets, wirelens
    if not isinstance(packets, Capture):
        return list(packets), wirelens
    records = list(packets)
    return [record.data for record in records], wirelens or [record.wirelen for record in records]


def as_bytes(packet: Any) -> bytes:
    """A packet in any object of bytes; raises `TypeError` for what is none, such as a number."""
    return bytes(memoryview(packet))


def unsigned(values: Iterable[int]) -> array[int]:
    """Offsets or lengths, in 64 bits each; raises `ValueError` for what does not fit."""
    try:
        # A copy: what was found to be inside the buffer stays so, whatever becomes of the caller's.
        return array("Q", values)
    except (OverflowError, TypeError):
        raise ValueError("offsets and lengths are whole numbers from 0 on") from None
