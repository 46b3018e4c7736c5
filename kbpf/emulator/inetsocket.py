"""What UDP, TCP and raw IP sockets share: addresses as Python gives them, binding, and the options of level IP."""

from __future__ import annotations

import errno
import ipaddress
import socket as _socket
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kbpf.emulator import cgroup_hooks
from kbpf.emulator.endpoint import Endpoint, Option, flag
from kbpf.emulator.inet import Path, Sending
from kbpf.emulator.interface import EmulatedInterface
from kbpf.emulator.ports import Binding
from kbpf.emulator.slot import error
from kbpf.emulator.sock import ANY4, ANY6, MAPPED, Sock
from kbpf.emulator.socket_table import ReuseportGroup, Selector
from kbpf.uapi.constants import SO_MARK, SO_PRIORITY, SO_REUSEPORT, SOL_SOCKET

if TYPE_CHECKING:
    from kbpf.emulator.network import Network

AF_INET, AF_INET6 = int(_socket.AF_INET), int(_socket.AF_INET6)
# Linux's numbers (asm-generic/socket.h, linux/in.h, linux/in6.h).
SO_REUSEADDR, SO_BROADCAST, SO_KEEPALIVE, SO_BINDTODEVICE, SO_COOKIE = 2, 6, 9, 25, 57
SOL_IP, SOL_IPV6 = 0, 41
IP_TOS, IP_TTL = 1, 2
IPV6_UNICAST_HOPS, IPV6_V6ONLY, IPV6_TCLASS = 16, 26, 67
_MOST_PORT = 0xFFFF
_NAMES = {"localhost": {AF_INET: "127.0.0.1", AF_INET6: "::1"}, "<broadcast>": {AF_INET: "255.255.255.255"}}


@dataclass
class IpOptions:
    """What a socket puts into the headers of its packets."""

    ttl: int = 64
    tos: int = 0
    hops: int = 64
    traffic_class: int = 0

    def sending(self, sock: Sock, target: bytes, hash: int = 0, gso_segs: int = 0) -> Sending:
        """How a socket's packet to `target` is sent."""
        ttl, tos = (self.ttl, self.tos) if len(target) == 4 else (self.hops, self.traffic_class)
        return Sending(sock, sock.mark, sock.priority, ttl, tos, hash, gso_segs)


def _of_ip(name: str) -> Option:
    """An option that packets' headers have, 8 bits."""
    return Option(lambda end: getattr(end._ip, name), lambda end, value: setattr(end._ip, name, value & 0xFF))


class InetEndpoint(Endpoint):
    """A socket of AF_INET or AF_INET6."""

    OPTIONS: ClassVar[Mapping[tuple[int, int], Option]] = {
        **Endpoint.OPTIONS,
        (SOL_SOCKET, SO_REUSEADDR): Option(
            lambda end: end._binding.reuseaddr, lambda end, value: setattr(end._binding, "reuseaddr", bool(value))
        ),
        (SOL_SOCKET, SO_REUSEPORT): Option(
            lambda end: end._binding.reuseport, lambda end, value: setattr(end._binding, "reuseport", bool(value))
        ),
        (SOL_SOCKET, SO_BROADCAST): flag("_broadcast"),
        (SOL_SOCKET, SO_KEEPALIVE): flag("_keepalive"),
        (SOL_SOCKET, SO_MARK): Option(lambda end: end.sock.mark, lambda end, value: end._set("mark", value)),
        (SOL_SOCKET, SO_PRIORITY): Option(
            lambda end: end.sock.priority, lambda end, value: end._set("priority", value)
        ),
        (SOL_SOCKET, SO_COOKIE): Option(lambda end: end.sock.cookie),
        (SOL_IP, IP_TTL): _of_ip("ttl"),
        (SOL_IP, IP_TOS): _of_ip("tos"),
    }
    OPTIONS6: ClassVar[Mapping[tuple[int, int], Option]] = {
        (SOL_IPV6, IPV6_UNICAST_HOPS): _of_ip("hops"),
        (SOL_IPV6, IPV6_TCLASS): _of_ip("traffic_class"),
        (SOL_IPV6, IPV6_V6ONLY): Option(lambda end: end.sock.v6only, lambda end, value: end._set_v6only(value)),
    }

    def __init__(
        self, network: Network, family: int, type: int, proto: int, *, accepted: Binding | None = None
    ) -> None:
        self.closed = True
        self.network = network
        if accepted is None:
            self.sock = Sock(family=int(family), type=int(type), protocol=int(proto))
            cgroup_hooks.sock_create(self.sock)
            self._binding = Binding(self.sock)
        else:
            self.sock, self._binding = accepted.sock, accepted
        self._broadcast = self._keepalive = False
        self._ip = IpOptions()
        #: ``sk_txhash``: what the packets of a connected socket have as their hash.
        self._hash = 0
        super().__init__(family, type, proto)

    # Options.

    def _option(self, level: int, option: int) -> Option | None:
        if level == SOL_IPV6 and self.family == AF_INET6:
            return self.OPTIONS6.get((level, option))
        return super()._option(level, option)

    def getsockopt(self, level: int, option: int, buflen: int = 0) -> int | bytes:
        """The options that matter to programs that use filters; `OSError` ENOPROTOOPT for others."""
        if (level, option) == (SOL_SOCKET, SO_BINDTODEVICE):
            self._open()
            device = self._device()
            return (device.name.encode() + b"\0")[:buflen] if device is not None else b""
        if (level, option) == (SOL_SOCKET, SO_COOKIE):
            self._open()
            return self.sock.cookie.to_bytes(8, "little")[:buflen] if buflen else self.sock.cookie
        return super().getsockopt(level, option, buflen)

    def setsockopt(self, level: int, option: int, value: int | bytes | None, optlen: int = 0) -> None:
        if (level, option) == (SOL_SOCKET, SO_BINDTODEVICE) and isinstance(value, bytes):
            self._open()
            name = value.split(b"\0")[0].decode()
            with self._arrived:
                self._to_device(self.network.interface(name).index if name else 0)
            return
        super().setsockopt(level, option, value, optlen)

    def _set(self, attribute: str, value: int) -> None:
        setattr(self.sock, attribute, value & 0xFFFFFFFF)

    def _set_v6only(self, value: int) -> None:
        if self.sock.local_port:
            raise error(errno.EINVAL)
        self.sock.v6only = bool(value)

    def _to_device(self, index: int) -> None:
        self.sock.bound_dev_if = index

    def _device(self) -> EmulatedInterface | None:
        return self.network.by_index(self.sock.bound_dev_if)

    def _join_group(self) -> None:
        """The group of those that are bound just like this one, where they share their port (`reuseport_add_sock`)."""
        sock = self.sock
        if not self._binding.reuseport:
            return
        wanted = _place(sock)
        for other in self.network.inet.ports.of(sock.protocol, sock.local_port):
            there = other.sock
            if there is not sock and other.reuseport and there.reuseport is not None and _place(there) == wanted:
                self._leave_group()
                there.reuseport.add(sock)
                return
        if sock.reuseport is None:
            ReuseportGroup().add(sock)

    def _leave_group(self) -> None:
        if self.sock.reuseport is not None:
            self.sock.reuseport.remove(self.sock)

    # The program that chooses among sockets that share the port.

    def attach_reuseport(self, selector: Selector) -> None:
        """Give the group a program; `OSError` EINVAL where there is no group (`reuseport_attach_prog`)."""
        with self._arrived:
            if self.sock.reuseport is None:
                if not self._binding.reuseport or self.sock in self.network.sockets:
                    raise error(errno.EINVAL)
                ReuseportGroup().add(self.sock)
            assert self.sock.reuseport is not None
            self.sock.reuseport.selector = selector

    def detach_reuseport(self) -> None:
        """Take the group's program away; `OSError` EINVAL or ENOENT where there is none."""
        with self._arrived:
            group = self.sock.reuseport
            if group is None or group.selector is None:
                shares = group is not None or self._binding.reuseport
                raise error(errno.ENOENT if shares else errno.EINVAL)
            group.selector = None

    # Addresses.

    def _parse(self, address: Any, call: str) -> tuple[bytes, int]:
        """A packed address of the socket's family, and the port, of what Python takes for them."""
        name = "AF_INET" if self.family == AF_INET else "AF_INET6"
        if not isinstance(address, tuple):
            raise TypeError(f"{call}(): {name} address must be tuple, not {type(address).__name__}")
        if not (len(address) == 2 or (self.family == AF_INET6 and 2 <= len(address) <= 4)):
            raise TypeError(f"{call}(): {name} address must be a pair (host, port)")
        host, port = address[0], address[1]
        if isinstance(host, (bytes, bytearray)):
            host = host.decode()
        if not isinstance(host, str) or not isinstance(port, int):
            raise TypeError(f"{call}(): {name} address must be a name and a number")
        if not 0 <= port <= _MOST_PORT:
            raise OverflowError(f"{call}(): port must be 0-65535.")
        return self._packed(host), port

    def _packed(self, host: str) -> bytes:
        if not host:
            return ANY4 if self.family == AF_INET else ANY6
        host = _NAMES.get(host, {}).get(self.family, host)
        try:
            found = ipaddress.ip_address(host.split("%")[0])
        except ValueError:
            raise _socket.gaierror(_socket.EAI_NONAME, "Name or service not known") from None
        if self.family == AF_INET and found.version == 6:
            raise _socket.gaierror(_socket.EAI_ADDRFAMILY, "Address family for hostname not supported")
        if self.family == AF_INET6 and found.version == 4:
            return MAPPED + found.packed
        return found.packed

    def _shown(self, address: bytes, port: int) -> tuple[Any, ...]:
        """An address as Python shows it."""
        if self.family == AF_INET:
            return _socket.inet_ntop(_socket.AF_INET, address), port
        wide = MAPPED + address if len(address) == 4 else address
        return _socket.inet_ntop(_socket.AF_INET6, wide), port, 0, 0

    def getsockname(self) -> tuple[Any, ...]:
        self._open()
        return self._shown(*cgroup_hooks.getsockname(self.sock, self.sock.local, self.sock.local_port))

    def getpeername(self) -> tuple[Any, ...]:
        self._open()
        if not self._connected():
            raise error(errno.ENOTCONN)
        return self._shown(*cgroup_hooks.getpeername(self.sock, self.sock.remote, self.sock.remote_port))

    def _connected(self) -> bool:
        return bool(self.sock.remote_port)

    def _check_local(self, address: bytes) -> None:
        """EADDRNOTAVAIL for what is neither any address nor one of this host's."""
        own = bare(address)
        inet = self.network.inet
        if any(own) and not inet.is_local(own) and not (len(own) == 4 and inet.is_broadcast(own)):
            raise error(errno.EADDRNOTAVAIL)

    def _claim(self, local: bytes, port: int) -> None:
        """Take a port. Who is bound to an IPv6 address takes no IPv4 (`__inet6_bind`)."""
        sock, before = self.sock, self.sock.v6only
        sock.v6only |= len(bare(local)) == 16 and any(local) and not sock.remote_port
        try:
            port = self.network.inet.ports.claim(self._binding, local, port)
        except OSError:
            sock.v6only = before
            raise
        sock.local, sock.local_port = local, port

    # The way out.

    def _way(self, target: bytes) -> tuple[Path, bytes, bytes]:
        """The path, source and target of a packet to an address, each as the packet has it."""
        remote, own = bare(target), self.sock.local
        if not any(remote):
            # Nobody's address is this host's own (`ip_route_output_key_hash`, `ip6_datagram_connect`).
            remote = bytes(15) + b"\x01" if len(remote) == 16 else bytes((127, 0, 0, 1))
            if len(bare(own)) == 4 and any(own):
                remote = bare(own) if len(target) == 4 else bytes((127, 0, 0, 1))
        if len(remote) == 4 and self.family == AF_INET6 and self.sock.v6only:
            raise error(errno.ENETUNREACH)
        if len(remote) == 16 and own.startswith(MAPPED):
            raise error(errno.EAFNOSUPPORT)
        path = self.network.inet.path(remote, self._device())
        own = bare(own)
        # An address that an IPv6 connection gave the socket is none for IPv4.
        bound = len(own) == len(remote) and any(own)
        return path, own if bound else path.source, remote


class PortEndpoint(InetEndpoint):
    """One of UDP or TCP, which has a port, and whose control group's programs have a say in that."""

    def __init__(
        self, network: Network, family: int, type: int, proto: int, *, accepted: Binding | None = None
    ) -> None:
        super().__init__(network, family, type, proto, accepted=accepted)
        this = weakref.ref(self)

        def bind(local: bytes, port: int) -> None:
            end = this()
            if end is not None:
                end._bind_early(local, port)

        self.sock.bind = bind

    def bind(self, address: tuple[Any, ...]) -> None:
        """Bind to (host, port); port 0 is any that is free."""
        local, port = self._parse(address, "bind")
        with self._arrived:
            self._open()
            local, port = cgroup_hooks.bind(self.sock, local, port)
            self._refuse_bound()
            self._check_local(local)
            self._bind(local, port)
            try:
                cgroup_hooks.post_bind(self.sock)
            except OSError:
                self._unbind()
                raise

    def _bind_early(self, local: bytes, port: int) -> None:
        """What a program does before the socket is connected: without a port, that one is found later."""
        self._refuse_bound()
        self._check_local(local)
        if port:
            self._bind(local, port)
        else:
            self.sock.local = local

    def _refuse_bound(self) -> None:
        """EINVAL where it has its port already."""
        if self.sock.local_port:
            raise error(errno.EINVAL)

    def _bind(self, local: bytes, port: int) -> None:
        """Take the address and the port."""
        raise NotImplementedError

    def _unbind(self) -> None:
        """Give the address and the port back."""
        self.network.inet.ports.release(self._binding)
        self.sock.local, self.sock.local_port = ANY4 if self.family == AF_INET else ANY6, 0


def _place(sock: Sock) -> tuple[object, ...]:
    """What sockets of a group have in common beside their port."""
    return sock.family, sock.local, sock.bound_dev_if, sock.v6only


def bare(address: bytes) -> bytes:
    """An address as packets have it: IPv4's four bytes where it stands for one."""
    return address[12:] if address.startswith(MAPPED) else address
