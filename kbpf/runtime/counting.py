"""Count what expressions match on an interface: one socket filter made of them all, and one map of counters.

No C compiler is involved. The program keeps no packet: it returns 0, so nothing is queued or copied. Linux 5.1; needs
CAP_NET_RAW for the socket, and CAP_BPF to load it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

from kbpf.filter.ebpf.counting import counting_program
from kbpf.pcapfile import Record
from kbpf.runtime.attach import attach, backend_of
from kbpf.runtime.captures import link_name
from kbpf.runtime.filter import Filter, compile
from kbpf.runtime.program import load_program


class Count(NamedTuple):
    """How much an expression matched: packets, and their bytes on the wire with the link header."""

    packets: int
    bytes: int


class Counter:
    """Counts the packets of a packet socket by named expressions; a context manager that ends the counting.

    Takes the socket's one filter slot, and the socket receives nothing from then on. Packets that leave through
    loopback are not counted, as they come in there again. Raises `FilterError` for an expression, and
    what `kbpf.load_program` and `kbpf.attach` raise.
    """

    def __init__(self, socket: Any, expressions: Mapping[str, str], backend: str | None = None) -> None:
        self.names = tuple(expressions)
        carrier = backend_of(socket, backend)
        spec = counting_program(list(expressions.values()), carrier.socket_layout(socket))
        self.program = load_program(spec, backend=carrier.name)
        try:
            self._link = attach(socket, self.program, backend=carrier.name)
        except BaseException:
            self.program.close()
            raise

    @property
    def backend(self) -> str:
        """``"kernel"`` or ``"emulator"``."""
        return self.program.backend

    def counts(self) -> dict[str, Count]:
        """What each expression has matched since the start."""
        totals = self.program.maps[0][0].sum()
        return {name: Count(*total) for name, total in zip(self.names, totals, strict=True)}

    def close(self) -> None:
        """Stop counting: detach from the socket, which stays open, and close the program."""
        with self.program, self._link:
            pass

    def __enter__(self) -> Counter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class CaptureCounter:
    """Counts the records of a capture by named expressions, in user space; needs no privilege."""

    def __init__(self, expressions: Mapping[str, str]) -> None:
        self._expressions = dict(expressions)
        self._filters: dict[int, dict[str, Filter]] = {}
        self._counts = dict.fromkeys(expressions, Count(0, 0))

    def add(self, record: Record) -> None:
        """Count one packet. Raises `FilterError` for an expression or a link type that cannot be filtered."""
        # A pcapng file may hold interfaces of several link types.
        if record.dlt not in self._filters:
            link = link_name(record.dlt)
            self._filters[record.dlt] = {name: compile(text, link=link) for name, text in self._expressions.items()}
        for name, filter in self._filters[record.dlt].items():
            if filter.run(record.data, record.wirelen):
                before = self._counts[name]
                self._counts[name] = Count(before.packets + 1, before.bytes + record.wirelen)

    def counts(self) -> dict[str, Count]:
        """What each expression has matched so far."""
        return dict(self._counts)
