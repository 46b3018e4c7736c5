"""BTF put together by hand: enough for map values with special fields and for functions."""

from __future__ import annotations

import struct

INT, PTR, ARRAY, STRUCT, FUNC, FUNC_PROTO = 1, 2, 3, 4, 12, 13
STATIC, GLOBAL = 0, 1


class BtfBytes:
    """Types are numbered from 1 in the order they are added."""

    def __init__(self) -> None:
        self._types = b""
        self._strings = b"\0"
        self._count = 0
        self.int = self.add("int", INT, 0, 4, struct.pack("=I", 1 << 24 | 32))
        self.u64 = self.add("u64", INT, 0, 8, struct.pack("=I", 64))

    def add(self, name: str, kind: int, count: int, word: int, rest: bytes = b"") -> int:
        self._types += struct.pack("=III", self._string(name), kind << 24 | count, word) + rest
        self._count += 1
        return self._count

    def structure(self, name: str, size: int, *members: tuple[str, int, int]) -> int:
        """Members are name, type and offset in bytes."""
        rest = b"".join(struct.pack("=III", self._string(n), t, at * 8) for n, t, at in members)
        return self.add(name, STRUCT, len(members), size, rest)

    def function(self, name: str, linkage: int = STATIC, returns: int | None = None, parameters: int = 0) -> int:
        """A function of u64 arguments that returns an int, or what is given (0: nothing)."""
        rest = b"".join(struct.pack("=II", self._string(f"p{i}"), self.u64) for i in range(parameters))
        proto = self.add("", FUNC_PROTO, parameters, self.int if returns is None else returns, rest)
        return self.add(name, FUNC, linkage, proto)

    def bytes(self) -> bytes:
        types, strings = self._types, self._strings
        return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings

    def _string(self, text: str) -> int:
        if not text:
            return 0
        at = len(self._strings)
        self._strings += text.encode() + b"\0"
        return at
