"""All elements of a map, by batch or key by key (BPF_MAP_LOOKUP_BATCH, Linux 5.6; BPF_MAP_GET_NEXT_KEY)."""

from __future__ import annotations

import errno
from collections.abc import Generator
from typing import TYPE_CHECKING

from kbpf.errors import ENOTSUPP

if TYPE_CHECKING:
    from kbpf.runtime.map import Map

#: Bytes of keys and values in a batch: a whole map of 100,000 counters, without holding a huge one twice.
BATCH_BYTES = 4 << 20
#: What the kernel says where it has no such command for a type, or none at all.
NO_COMMAND = (errno.EINVAL, errno.EOPNOTSUPP, ENOTSUPP)
#: Keys that a walk sees at most where the map says no number.
_UNBOUNDED = 1 << 20


class NoSuchBatch(Exception):
    """The type, or the kernel, takes nothing out by batch."""


def chunks(map: Map, keys_only: bool = False, delete: bool = False) -> Generator[tuple[bytes, bytes], None, bool]:
    """Keys and values back to back, chunk by chunk: by batch, or key by key where the type has none.

    Gives in the end whether all that was there the whole time has been seen. With `delete` they are taken out, by
    batch alone: `NoSuchBatch` where there is none.
    """
    key_size, value_size = map.shape.key_size, map.value_codec.size
    entries = max(map.shape.max_entries, 1)
    size = min(max(BATCH_BYTES // (key_size + value_size), 1), entries)
    token: bytes | None = None
    started = False
    while True:
        try:
            with map._descriptor as fd:
                batch = map._backend.map_lookup_batch(fd, token, size, key_size, value_size, delete)
        except OSError as error:
            # A bucket that does not fit is left whole.
            if error.errno == errno.ENOSPC and size <= entries:
                size *= 2
                continue
            if not started and error.errno in NO_COMMAND:
                if delete:
                    raise NoSuchBatch from None
                return (yield from _one_by_one(map, keys_only))
            attempt = ("take from", "map_lookup_and_delete_batch") if delete else ("read", "map_lookup_batch")
            raise map._failure(error, *attempt) from None
        started = True
        if batch.length:
            yield batch.keys, batch.values
        if batch.token is None:
            return True
        token = batch.token


def _one_by_one(map: Map, keys_only: bool) -> Generator[tuple[bytes, bytes], None, bool]:
    key: bytes | None = None
    # A deleted key sends the walk back to the start; without a bound, churn could keep it going forever.
    for _ in range(2 * (map.shape.max_entries or _UNBOUNDED) + 1):
        try:
            with map._descriptor as fd:
                key = map._backend.map_next_key(fd, key, map.shape.key_size)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return True
            raise map._failure(error, "read", "map_get_next_key") from None
        value = b""
        if not keys_only or map.has_gaps:
            try:
                with map._descriptor as fd:
                    value = map._backend.map_lookup(fd, key, map.value_codec.size)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    continue
                raise map._failure(error, "read", "map_lookup_elem") from None
        yield key, value
    return False
