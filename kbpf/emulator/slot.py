"""The one place a socket has for a filter, with the kernel's rules about it (net/core/filter.c, net/core/sock.c)."""

from __future__ import annotations

import errno
import os
from typing import Protocol

from kbpf.emulator.packet import Packet


class Runnable(Protocol):
    """A classic or an eBPF program, made ready to run."""

    def run_packet(self, packet: Packet) -> int:
        """The return value, 32 bits unsigned: the bytes to keep, 0 to drop."""
        ...


def error(number: int) -> OSError:
    """The exception that the system call would end with."""
    return OSError(number, os.strerror(number))


class Slot:
    """Holds one program; replaced freely until it is locked."""

    def __init__(self) -> None:
        self.program: Runnable | None = None
        #: The classic instructions as they were given; None beside an eBPF program.
        self.classic: bytes | None = None
        self.locked = False

    def copy(self) -> Slot:
        """One with the same filter and lock, as an accepted connection has its listener's (`sk_clone_lock`)."""
        made = Slot()
        made.program, made.classic, made.locked = self.program, self.classic, self.locked
        return made

    def refuse_if_locked(self) -> None:
        """EPERM when locked: the kernel says so before it looks at the new program."""
        if self.locked:
            raise error(errno.EPERM)

    def attach(self, program: Runnable, classic: bytes | None) -> None:
        """SO_ATTACH_FILTER, SO_ATTACH_BPF (where `classic` is None)."""
        self.refuse_if_locked()
        self.program, self.classic = program, classic

    def detach(self) -> None:
        """SO_DETACH_FILTER: EPERM when locked, ENOENT when there is none."""
        self.refuse_if_locked()
        if self.program is None:
            raise error(errno.ENOENT)
        self.program = self.classic = None

    def get_filter(self) -> bytes:
        """SO_GET_FILTER: empty without a filter, EACCES when an eBPF program is there."""
        if self.program is None:
            return b""
        if self.classic is None:
            raise error(errno.EACCES)
        return self.classic

    def lock(self) -> None:
        """SO_LOCK_FILTER; for good."""
        self.locked = True

    def run(self, packet: Packet) -> int:
        """What the program returns, the packet's length without a program: the bytes to keep, 0 to drop it."""
        return packet.length if self.program is None else self.program.run_packet(packet)
