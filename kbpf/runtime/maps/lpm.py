"""The longest prefix match: values for networks, found by address (kernel/bpf/lpm_trie.c, Linux 4.11).

A key is the length of its prefix in bits, as a u32 of the machine, then the bytes. Where those are 4 or 16 it is seen
as a network of `ipaddress`, else as ``(bits, bytes)``.
"""

from __future__ import annotations

import errno
import struct
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, NoReturn

from kbpf.runtime.codecs import Codec
from kbpf.runtime.map import Map
from kbpf.types import Struct

_LENGTH = struct.Struct("=I")
_NETWORKS: dict[int, Any] = {4: IPv4Network, 16: IPv6Network}
_MISSING: Any = object()


class LpmTrie(Map):
    """A mapping from networks: ``trie["10.0.0.0/8"] = 1``, then ``trie["10.1.2.3"]`` is 1.

    Looking up gives the longest prefix that covers the key, and so do ``in`` and ``get``: a network is found in a wider
    one. Storing and deleting are of exactly the key's prefix, and so are `pop` and `setdefault`. Keys may be networks
    and addresses of `ipaddress`, their text, or ``(bits, bytes)``; bits behind the prefix count for nothing.
    """

    def _codecs(self) -> tuple[Codec, Codec]:
        key, value = super()._codecs()
        if self.key_type is not None and not _is_prefix(self.key_type):
            return key, value
        return _prefix_codec(self.shape.key_size), value

    def pop(self, key: Any, default: Any = _MISSING) -> Any:
        """Take exactly this prefix out and give its value, `default` if it is not there.

        A lookup and a deletion, between which the value may change: the kernel has no command for both.
        """
        try:
            value = self[key]
            del self[key]
        except KeyError:
            if default is _MISSING:
                raise
            return default
        return value

    def increment(self, key: Any, by: int = 1) -> NoReturn:
        """Raises `TypeError`: a program, which does the adding, finds the longest prefix, and not the key's own."""
        raise TypeError(f"a program finds the longest prefix in {self.label}, which may be another than the key")

    def _hints(self, number: int, operation: str) -> tuple[str, ...]:
        if number == errno.EINVAL and operation in ("map_update_elem", "map_delete_elem"):
            return (f"a prefix has up to {8 * (self.shape.key_size - 4)} bits",)
        return super()._hints(number, operation)


def _is_prefix(type: Any) -> bool:
    """Whether BTF says no more than how long the prefix is and its bytes, as struct bpf_lpm_trie_key_u8 does."""
    return (
        isinstance(type, Struct)
        and len(type.members) <= 2
        and not (len(type.members) == 2 and isinstance(type.members[1].type, Struct))
    )


def _prefix_codec(size: int) -> Codec:
    width = size - 4
    network = _NETWORKS.get(width)

    def encode(key: Any) -> bytes:
        if isinstance(key, (bytes, bytearray, memoryview)):
            if len(key) != size:
                raise ValueError(f"{len(key)} bytes where {size} are wanted")
            return bytes(key)
        if isinstance(key, tuple):
            bits, data = key
        else:
            if isinstance(key, int):
                raise ValueError(f"{key} is a number, and no address: pass text or an address of ipaddress")
            found = ip_network(key, strict=False)
            if found.version != 4 + 2 * (width == 16) or network is None:
                raise ValueError(f"{key} is no prefix of up to {8 * width} bits")
            bits, data = found.prefixlen, found.network_address.packed
        if not 0 <= bits < 1 << 32 or len(data) > width:
            raise ValueError(f"{key!r} is no prefix of up to {8 * width} bits")
        return _LENGTH.pack(bits) + bytes(data).ljust(width, b"\0")

    def decode(data: bytes) -> Any:
        bits, rest = _LENGTH.unpack_from(data)[0], data[4:]
        # A prefix that no network has is only in a map of other things.
        return network((rest, bits), strict=False) if network is not None and bits <= 8 * width else (bits, rest)

    def decode_many(data: bytes) -> list[Any]:
        return [decode(data[at : at + size]) for at in range(0, len(data), size)]

    return Codec(size, encode, decode, decode_many)
