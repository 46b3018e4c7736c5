"""SYN cookies: sequence numbers that say, sealed with a secret, what a listener would have kept.

The counterpart of net/ipv4/syncookies.c.

A cookie is the sum of a hash of the connection, the sender's sequence number, the minute in the upper eight bits, and
below it a second hash with an index into a table of segment sizes. The hash is the emulator's own.
"""

from __future__ import annotations

import hashlib
import os

from kbpf.emulator.memory import M32

#: Segment sizes that a cookie tells apart, for IPv4 and IPv6.
SIZES4, SIZES6 = (536, 1300, 1440, 1460), (1220, 1420, 1440, 8940)
#: MAX_SYNCOOKIE_AGE, in minutes.
MOST_AGE = 2
_BITS = 24
_MASK = (1 << _BITS) - 1


class SynCookies:
    """Makes and checks cookies. `connection` are addresses and ports as they lie in a packet to the listener."""

    def __init__(self, secret: bytes | None = None) -> None:
        self._secret = os.urandom(32) if secret is None else secret

    def _hash(self, connection: bytes, count: int, which: int) -> int:
        given = connection + count.to_bytes(8, "big") + bytes((which,))
        return int.from_bytes(hashlib.blake2s(given, digest_size=4, key=self._secret).digest(), "big")

    def make(self, connection: bytes, sequence: int, index: int, minute: int) -> int:
        """`secure_tcp_syn_cookie`; `sequence` is the SYN's."""
        second = self._hash(connection, minute, 1) + index & _MASK
        return self._hash(connection, 0, 0) + sequence + (minute << _BITS) + second & M32

    def check(self, cookie: int, connection: bytes, sequence: int, minute: int) -> int | None:
        """The index (`check_tcp_syn_cookie`), which is no good where the cookie is not; None where it is too old."""
        cookie = cookie - self._hash(connection, 0, 0) - sequence & M32
        age = minute - (cookie >> _BITS) & 0xFF
        if age >= MOST_AGE:
            return None
        return cookie - self._hash(connection, minute - age, 1) & _MASK


def segment_size(options: bytes) -> int:
    """The MSS option in the options of a TCP header (`tcp_parse_mss_option`); 0 without one."""
    size, at = 0, 0
    while at < len(options) and options[at]:
        if options[at] == 1:
            at += 1
            continue
        length = options[at + 1] if at + 1 < len(options) else 0
        if not 2 <= length <= len(options) - at:
            break
        if options[at] == 2 and length == 4:
            size = int.from_bytes(options[at + 2 : at + 4], "big") or size
        at += length
    return size
