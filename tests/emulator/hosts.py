"""A host with sockets, on the kernel and in the emulator: the same scenario is run on both and sees the same."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from kbpf import emulator
from kbpf.backend import Backend
from kbpf.emulator.backend import EmulatorBackend
from kbpf.isa import cbpf
from kbpf.isa.ebpf import Instruction
from kbpf.specs import ProgramSpec
from kbpf.testing.network import NetworkNamespace
from kbpf.uapi.constants import SO_MEMINFO

T = TypeVar("T")

KEEP = 0xFFFFFFFF
AD, NET, LL = cbpf.AD_OFF, cbpf.NET_OFF, cbpf.LL_OFF


def returns(value: int) -> list[cbpf.Instruction]:
    return [cbpf.stmt(cbpf.RET | cbpf.K, value)]


def passes_if(size: int, offset: int, value: int) -> list[cbpf.Instruction]:
    """Keep all of a packet that has this value there, drop others."""
    load = cbpf.stmt(cbpf.LD | size | cbpf.ABS, offset)
    return [load, cbpf.jump(cbpf.JMP | cbpf.JEQ | cbpf.K, value, 0, 1), *returns(KEEP), *returns(0)]


class Host:
    """One host. What it opens is closed with it."""

    def __init__(self, backend: Backend, stack: contextlib.ExitStack) -> None:
        self.backend = backend
        self._stack = stack

    @property
    def emulated(self) -> bool:
        return self.backend.name == "emulator"

    def open(self, family: int = socket.AF_INET, type: int = socket.SOCK_DGRAM, proto: int = 0) -> Any:
        made = emulator.socket(family, type, proto) if self.emulated else socket.socket(family, type, proto)
        return self.keep(made)

    def pair(self, type: int = socket.SOCK_DGRAM) -> tuple[Any, Any]:
        make = emulator.socketpair if self.emulated else socket.socketpair
        one, other = make(socket.AF_UNIX, type)
        return self.keep(one), self.keep(other)

    def keep(self, made: Any) -> Any:
        made.settimeout(5)
        return self._stack.enter_context(made)

    def udp(self, address: str = "127.0.0.1", port: int = 0) -> Any:
        """A UDP socket that is bound."""
        made = self.open(socket.AF_INET6 if ":" in address else socket.AF_INET)
        made.bind((address, port))
        return made

    def attach(self, target: Any, program: Sequence[cbpf.Instruction]) -> None:
        self.backend.socket_attach_filter(target, cbpf.encode(program))

    def packets(self) -> Any:
        """A packet socket on ``lo``."""
        return self.keep(self.backend.packet_socket("lo"))

    def load(self, instructions: Sequence[Instruction], type: str = "socket_filter") -> int:
        fd = self.backend.program_load(ProgramSpec(instructions=tuple(instructions), type=type), [])
        self._stack.callback(self.backend.close, fd)
        return fd


@contextlib.contextmanager
def kernel_host() -> Iterator[Host]:
    """This thread's network namespace."""
    from kbpf.kernel.backend import KernelBackend

    with contextlib.ExitStack() as stack:
        yield Host(KernelBackend(), stack)


@contextlib.contextmanager
def emulated_host() -> Iterator[Host]:
    emulator.reset()
    try:
        with contextlib.ExitStack() as stack:
            yield Host(EmulatorBackend(), stack)
    finally:
        emulator.reset()


def same_on_both(netns: NetworkNamespace, scenario: Callable[..., T], *arguments: Any) -> T:
    """Run a scenario on both; what it returns must be equal."""

    def on_kernel() -> T:
        with kernel_host() as host:
            return scenario(host, *arguments)

    expected = netns.call(on_kernel)
    with emulated_host() as host:
        found = scenario(host, *arguments)
    assert found == expected
    return found


def outcome(action: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns, or the name of the errno or exception that it raises."""
    try:
        return action(*arguments)
    except OSError as failure:
        return errno.errorcode.get(failure.errno, str(failure.errno)) if failure.errno else type(failure).__name__
    except (ValueError, TypeError, OverflowError) as failure:
        return type(failure).__name__


def received(target: Any) -> list[bytes]:
    """All that is queued."""
    before = target.gettimeout()
    target.setblocking(False)
    found = []
    with contextlib.suppress(BlockingIOError):
        while True:
            found.append(target.recv(65536))
    target.settimeout(before)
    return found


def drops(target: Any) -> int:
    """SK_MEMINFO_DROPS."""
    return int(struct.unpack("=9I", target.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))[8])
