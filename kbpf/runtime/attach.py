"""Attach a filter to a socket: SO_ATTACH_FILTER for classic ones, SO_ATTACH_BPF for programs.

Linux 2.2 (classic) and 3.19 (eBPF). No capability, but for classic filters on TCP (CAP_NET_ADMIN; older kernels, such
as Debian's 6.1, take none there either). A socket has one slot: attaching replaces what is there, and so does anybody
else who holds the socket.
"""

from __future__ import annotations

import errno
import sys
from typing import Any, Literal

from kbpf.backend import Backend
from kbpf.errors import BpfError, KbpfError
from kbpf.isa import cbpf
from kbpf.runtime.backends import chosen, get_backend, select_for_socket
from kbpf.runtime.failures import doing, translate
from kbpf.runtime.filter import Filter
from kbpf.runtime.link import SocketLink
from kbpf.runtime.program import Program

_DROP_ALL = cbpf.encode([cbpf.stmt(cbpf.RET | cbpf.K, 0)])


def attach(
    socket: Any, what: str | Filter | Program, drain: bool | None = None, backend: str | None = None
) -> SocketLink:
    """Attach an expression, a filter or a program to a live socket.

    `socket` is anything with a ``fileno()``: `socket.socket`, asyncio's transport sockets, or an emulated socket.
    An expression is compiled for where that socket's data starts: the link header on AF_PACKET SOCK_RAW, the UDP
    header on UDP sockets, the payload on UNIX ones. A `Filter` is attached as it is.

    Packets that were queued before were never filtered. By default they are thrown away on packet, raw and UDP sockets,
    and never on streams, listeners and UNIX sockets, whose data would be lost; `drain` says otherwise, and raises
    `ValueError` where draining would eat data.

    A filter on a socket of the operating system is real, or this raises, unless the emulator was asked for by name
    (``backend="emulator"``, ``KBPF_BACKEND=emulator``): then ``link.socket`` is the filtered one.

    Raises `FilterSyntaxError` and `FilterError` for the filter, `PermissionDeniedError` (a locked filter; a TCP
    socket without CAP_NET_ADMIN), `NotSupportedError` for sockets that never run a filter, `BpfError` otherwise
    (EBADF, ENOTSOCK, ENOMEM when it is larger than ``net.core.optmem_max`` allows). What was attached before stays
    when it fails.
    """
    carrier = backend_for(socket, what, backend)
    if carrier.name == "emulator":
        from kbpf.emulator.sockets import wrap

        with doing(carrier, "filter this socket in the emulator", operation="SO_ATTACH_FILTER"):
            socket = wrap(socket)
    return SocketLink(carrier, socket, put(carrier, socket, what, drain))


def put(
    backend: Backend,
    socket: Any,
    what: str | Filter | Program,
    drain: bool | None,
    known: Filter | Program | None = None,
) -> Filter | Program:
    """Compile if need be, and put it into the slot, draining where that is right.

    `known` is what the caller has put there before: if it fails after the slot was changed, that is put back.
    """
    with doing(backend, "ask the socket for its type", operation="getsockopt"):
        layout = backend.socket_layout(socket)
        drainable = backend.socket_drainable(socket)
    if drain and not drainable:
        raise ValueError("draining this socket would throw away data that its owner is to receive")
    if isinstance(what, str):
        from kbpf.filter import compile_filter

        what = Filter.from_spec(compile_filter(what, layout))
    if isinstance(what, Filter):
        what.check()
    elif not isinstance(what, Program):
        raise TypeError(f"an expression, a Filter or a Program can be attached, not a {type(what).__name__}")
    elif what.backend != backend.name:
        raise _mixed(what, backend)
    try:
        if drain is False or not drainable:
            _put_one(backend, socket, what)
        else:
            _put_drained(backend, socket, what, known)
    except KbpfError:
        raise
    except OSError as error:
        raise _failed(error, backend, socket, what) from None
    return what


def _put_one(backend: Backend, socket: Any, what: Filter | Program) -> None:
    if isinstance(what, Filter):
        backend.socket_attach_filter(socket, cbpf.encode(what.instructions))
    else:
        backend.socket_attach_bpf(socket, what.fileno())


def _put_drained(backend: Backend, socket: Any, what: Filter | Program, known: Filter | Program | None) -> None:
    """The filter itself first, so that a refusal changes nothing.

    Then drop all, empty the queue, and the filter again. `known` is what the caller put there before.
    """
    before: Filter | Program | None
    try:
        before = _slot(backend, socket)
    except OSError as error:
        if error.errno != errno.EACCES:
            raise
        # A program cannot be read, and so be put back only where it is known.
        before = known if isinstance(known, Program) and not known.closed else None
    _put_one(backend, socket, what)
    try:
        backend.socket_attach_filter(socket, _DROP_ALL)
        backend.socket_drain(socket)
        _put_one(backend, socket, what)
    except BaseException:
        if before is None:
            backend.socket_detach(socket)
        else:
            _put_one(backend, socket, before)
        raise


def _slot(backend: Backend, socket: Any) -> Filter | None:
    """The classic filter in the socket's slot; `OSError` EACCES where a program is."""
    raw = backend.socket_get_filter(socket)
    return Filter(cbpf.decode(raw)) if raw else None


def _failed(error: OSError, backend: Backend, socket: Any, what: Filter | Program) -> BpfError:
    """The exception for a refused attachment."""
    operation = "SO_ATTACH_BPF" if isinstance(what, Program) else "SO_ATTACH_FILTER"
    named = what.label if isinstance(what, Program) else f"a filter of {len(what)} instructions"
    return translate(error, backend, f"attach {named} to the socket", operation=operation, socket=socket)


def backend_of(socket: Any, backend: str | None) -> Backend:
    """The backend that carries a filter on this socket: an emulated socket's is the emulator."""
    if is_emulated(socket):
        if (backend or chosen()) == "kernel":
            raise ValueError("an emulated socket cannot take the kernel's filters")
        return get_backend("emulator")
    return select_for_socket(backend)


def is_emulated(socket: Any) -> bool:
    """Whether a socket is one of the emulator's; asking does not load the emulator."""
    module = sys.modules.get("kbpf.emulator.sockets")
    return module is not None and module.is_emulated(socket)


def backend_for(socket: Any, what: str | Filter | Program, backend: str | None) -> Backend:
    """`backend_of`; `ValueError` for a program of the other one."""
    carrier = backend_of(socket, backend)
    if isinstance(what, Program) and what.backend != carrier.name:
        raise _mixed(what, carrier)
    return carrier


def _mixed(program: Program, carrier: Backend) -> ValueError:
    if program.backend == "emulator":
        return ValueError(
            f"{program.label} runs in the emulator and this socket is the operating system's: nothing would be "
            'filtered. Ask for it by name (KBPF_BACKEND=emulator, backend="emulator") and read from link.socket, '
            "or use an emulated socket"
        )
    return ValueError(f"{program.label} is the {program.backend}'s and the socket is the {carrier.name}'s")


def packet_socket(
    interface: str | None = None,
    *,
    type: Literal["raw", "dgram"] = "raw",
    protocol: int = 0x0003,
    backend: str | None = None,
) -> Any:
    """A packet socket bound to an interface: AF_PACKET on the kernel, an emulated one in the emulator.

    ``"raw"`` frames start with the link header, ``"dgram"`` ones with the network header; `protocol` is an ETH_P_*
    in host order, by default ETH_P_ALL. Nothing is queued before it is bound. In ``auto`` it is the kernel's: an
    emulated interface sees only what a test injects. Needs CAP_NET_RAW; raises `PermissionDeniedError` without,
    `BpfError` (ENODEV) for an unknown interface, `ValueError` for another `type` or a `protocol` out of range.
    """
    if type not in ("raw", "dgram"):
        raise ValueError(f"type: {type!r} is none of raw, dgram")
    if not 0 <= protocol <= 0xFFFF:
        raise ValueError(f"protocol: {protocol} is no ETH_P_*, which have 16 bits")
    carrier = select_for_socket(backend)
    where = "on all interfaces" if interface is None else f"on {interface}"
    with doing(carrier, f"open a packet socket {where}", operation="socket(AF_PACKET)"):
        return carrier.packet_socket(interface, type=type, protocol=protocol)
