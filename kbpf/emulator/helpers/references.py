"""Sockets in a program's hands: what it has looked up is its own until bpf_sk_release."""

from __future__ import annotations

from kbpf.emulator.interpreter import Run
from kbpf.emulator.sock import STRUCTURE, TCP, Sock
from kbpf.errors import EmulationFault


class Reference:
    """A socket that a program has looked up and must release."""

    __slots__ = ("sock",)

    def __init__(self, sock: Sock) -> None:
        self.sock = sock

    def drop(self) -> None:
        """Nothing counts references but the run."""


def hold(run: Run, sock: Sock | None) -> int:
    """Give a program a socket that it must release; 0 for None."""
    if sock is None:
        return 0
    run.held = (*run.held, Reference(sock))
    return sock.address


def sock_at(run: Run, address: int) -> Sock:
    """The socket that a program names by an address that it has been given."""
    owner = run.owner(address & ~(TCP | STRUCTURE))
    if not isinstance(owner, Sock):
        raise EmulationFault("this is no socket", address=address)
    return owner


def sk_release(run: Run, sock: int, *_: int) -> int:
    released = sock_at(run, sock)
    for held in run.held:
        if isinstance(held, Reference) and held.sock is released:
            run.held = tuple(other for other in run.held if other is not held)
            return 0
    raise EmulationFault("this socket is not held", address=sock)
