"""The maps that directly written programs use, by name."""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random
from typing import Any

from kbpf.specs import MapSpec
from kbpf.testing.btf_bytes import BtfBytes
from kbpf.uapi import constants as uapi

#: Where a program writes what it ended with.
RESULTS = MapSpec(type="array", key_size=4, value_size=8, max_entries=1)
#: Bytes of the values that programs look up and store.
VALUE_SIZE = 16
#: So many that an LRU map has room for all keys in use: what it would evict, Linux leaves open.
LRU_ENTRIES = 512
PAGE = 4096
#: Loopback, which every network namespace has.
_LOOPBACK = struct.pack("=I", 1)

#: Formats of bpf_snprintf, and texts for bpf_strncmp: they must be in a map that nobody can write.
FORMATS = (
    b"", b"plain", b"%d", b"%u %x", b"%lld %llu %llx", b"%5d|%05d", b"%%%c", b"%i %li %lu", b"%X %lX %llX",
    b"%d %d %d %d %d", b"%20u", b"%03x", b"%-6d|", b"%+d", b"% d",
    b"a very long text of which there is no room for all %u",
)  # fmt: skip
TEXTS = (b"", b"a", b"abc", b"abd", b"abcdefgh", b"\xff\xfe")


def _words(*texts: bytes) -> tuple[bytes, dict[bytes, int]]:
    """Texts in a row, and where each is."""
    places, data = {}, b""
    for text in texts:
        places[text] = len(data)
        data += text + b"\0"
    return data + bytes(-len(data) % 8), places


READ_ONLY, PLACES = _words(*FORMATS, *TEXTS)


def _elements(type: str, key_size: int = 4, entries: int = 4, flags: int = 0) -> Callable[[Random], MapSpec]:
    """A map of a few numbered elements, some of which are there."""

    def make(rng: Random) -> MapSpec:
        contents: list[tuple[bytes, bytes]] = []
        if "percpu" not in type:
            for number in rng.sample(range(4), rng.randrange(5)):
                key = struct.pack("=I", number)
                if type == "lpm_trie":
                    key = struct.pack("=II", rng.choice((0, 4, 8, 12, 32)), rng.choice(PREFIXES))
                contents.append((key, rng.randbytes(VALUE_SIZE)))
        return MapSpec(
            type=type,
            key_size=key_size,
            value_size=VALUE_SIZE,
            max_entries=entries,
            flags=flags
            | (uapi.BPF_F_NO_PREALLOC if type.endswith("hash") and "lru" not in type and rng.random() < 0.5 else 0),
            contents=tuple(dict(contents).items()),
        )

    return make


#: Bits that keys of the trie begin with.
PREFIXES = (0, 0x0A, 0x010A, 0x800A, 0xFFFFFFFF)


def _fixed(type: str, **given: Any) -> Callable[[Random], MapSpec]:
    spec = MapSpec(type=type, **given)
    return lambda rng: spec


def _described(special: str, size: int) -> MapSpec:
    """An array of {what the kernel knows by this name, u64}."""
    btf = BtfBytes()
    words = [(f"word{at}", btf.int, at) for at in range(0, size, 4)]
    number_at = max(size, 8)
    members = ("special", btf.structure(special, size, *words), 0), ("number", btf.u64, number_at)
    value = btf.structure("value", number_at + 8, *members)
    return MapSpec(
        type="array",
        key_size=4,
        value_size=number_at + 8,
        max_entries=2,
        btf=btf.bytes(),
        btf_key_type_id=btf.int,
        btf_value_type_id=value,
    )


def _records(rng: Random) -> MapSpec:
    """A ring with what user space has written, as one pair without a key: all data up to the producer's position."""
    data = b""
    for _ in range(rng.randrange(5)):
        size = rng.choice((4, 8, 8, 16, 17))
        length = size | rng.choice((0, 0, 0, 0, uapi.BPF_RINGBUF_DISCARD_BIT, uapi.BPF_RINGBUF_BUSY_BIT))
        if rng.random() < 0.05:
            length = rng.choice((1000, PAGE, 0x3FFFFFFF))
        data += struct.pack("=II", length, 0) + rng.randbytes(size) + bytes(-size % 8)
    return MapSpec(type="user_ringbuf", max_entries=PAGE, contents=((b"", data),))


_INNER = MapSpec(type="array", key_size=4, value_size=VALUE_SIZE, max_entries=2)
_LOCKED, _TIMERS = _described("bpf_spin_lock", 4), _described("bpf_timer", 16)

#: What makes each map. Most are named by their type.
MAPS: dict[str, Callable[[Random], MapSpec]] = {
    **{type: _elements(type) for type in ("array", "percpu_array", "hash", "percpu_hash")},
    **{type: _elements(type, entries=LRU_ENTRIES) for type in ("lru_hash", "lru_percpu_hash")},
    "lpm_trie": _elements("lpm_trie", key_size=8, flags=uapi.BPF_F_NO_PREALLOC),
    **{type: _fixed(type, value_size=8, max_entries=3) for type in ("queue", "stack")},
    "bloom_filter": _fixed("bloom_filter", value_size=8, max_entries=3, flags=uapi.BPF_F_ZERO_SEED),
    "ringbuf": _fixed("ringbuf", max_entries=PAGE),
    "user_ringbuf": _records,
    "perf_event_array": _fixed("perf_event_array", key_size=4, value_size=4, max_entries=2),
    # The program itself is at 0.
    "prog_array": _fixed("prog_array", key_size=4, value_size=4, max_entries=2),
    # Maps of their own are at 0 and 1.
    **{
        type: _fixed(type, key_size=4, value_size=4, max_entries=3, inner=_INNER)
        for type in ("array_of_maps", "hash_of_maps")
    },
    **{
        type: _fixed(type, key_size=4, value_size=4, max_entries=3, contents=((bytes(4), _LOOPBACK),))
        for type in ("devmap", "devmap_hash")
    },
    **{type: _fixed(type, key_size=4, value_size=4, max_entries=3) for type in ("cpumap", "xskmap")},
    **{type: _fixed(type, key_size=16, value_size=VALUE_SIZE) for type in ("cgroup_storage", "percpu_cgroup_storage")},
    "memory": _fixed("array", key_size=4, value_size=32, max_entries=1),
    "locked": lambda rng: _LOCKED,
    "timers": lambda rng: _TIMERS,
    "read-only": _fixed(
        "array",
        key_size=4,
        value_size=len(READ_ONLY),
        max_entries=1,
        flags=uapi.BPF_F_RDONLY_PROG,
        contents=((bytes(4), READ_ONLY),),
        frozen=True,
    ),
}  # fmt: skip
