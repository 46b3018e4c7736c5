"""A case's maps on one backend: made with what is in them before the runs, and read as plain data afterwards."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from contextlib import ExitStack
from mmap import PAGESIZE

from kbpf.backend import Backend
from kbpf.emulator.environment import environment
from kbpf.specs import MapSpec

#: Elements that one batch is asked for; more than generated maps hold.
_ELEMENTS = 64
#: Maps of a map of maps.
_INNER = 2
_PERF_PAGES = 8
# struct perf_event_mmap_page.
_HEAD = 1024
_LOST = 2

#: What a map holds, by key; keys of what has none are made up.
Contents = dict[bytes, bytes]


class CaseMap:
    """One map. `fd` is its descriptor, closed with the stack that it was made with."""

    def __init__(self, backend: Backend, spec: MapSpec, stack: ExitStack) -> None:
        self.backend, self.spec = backend, spec
        self.fd: int
        self.inner: list[CaseMap] = []
        if spec.inner is not None:
            self.inner = [CaseMap(backend, spec.inner, stack) for _ in range(_INNER)]
        self.fd = backend.map_create(spec, self.inner[0].fd if self.inner else None)
        stack.callback(backend.close, self.fd)
        for number, inner in enumerate(self.inner):
            self._put(number, inner.fd)
        if spec.type == "perf_event_array":
            event = backend.perf_buffer(environment.cpu, _PERF_PAGES)
            stack.callback(backend.close, event)
            self.memory = backend.map_memory(event, (1 + _PERF_PAGES) * PAGESIZE, 0, True)
            stack.callback(self.memory.release)
            self._put(environment.cpu, event)
        elif spec.type == "user_ringbuf":
            self._produce(spec.contents[0][1])
        else:
            for key, value in spec.contents:
                backend.map_update(self.fd, key, value)
        if spec.frozen:
            backend.map_freeze(self.fd)

    def _put(self, key: int, descriptor: int) -> None:
        self.backend.map_update(self.fd, struct.pack("=I", key), struct.pack("=I", descriptor))

    def loaded(self, program: int) -> None:
        """The program is there: it finds itself at 0 of a program array."""
        if self.spec.type == "prog_array":
            self._put(0, program)

    def _produce(self, data: bytes) -> None:
        memory = self.backend.map_memory(self.fd, self.spec.max_entries, 2 * PAGESIZE, True)
        memory[: len(data)] = data
        memory.release()
        memory = self.backend.map_memory(self.fd, PAGESIZE, PAGESIZE, True)
        memory[:8] = len(data).to_bytes(8, sys.byteorder)
        memory.release()

    def contents(self) -> Contents:
        """What is in it; of maps that programs do not change, nothing."""
        read = _READERS.get(self.spec.type)
        return read(self) if read else {}


def _elements(shown: CaseMap) -> Contents:
    key_size, size = shown.spec.key_size, shown.spec.value_size
    if "percpu" in shown.spec.type:
        size = (size + 7) // 8 * 8 * shown.backend.possible_cpus()
    batch = shown.backend.map_lookup_batch(shown.fd, None, _ELEMENTS, key_size, size)
    assert batch.token is None
    keys, values = batch.keys, batch.values
    return {keys[n * key_size : (n + 1) * key_size]: values[n * size : (n + 1) * size] for n in range(batch.length)}


def _popped(shown: CaseMap) -> Contents:
    found: Contents = {}
    while True:
        try:
            value = shown.backend.map_lookup_and_delete(shown.fd, None, shown.spec.value_size)
        except FileNotFoundError:
            return found
        found[bytes([len(found)])] = value


def _ring(shown: CaseMap) -> Contents:
    memory = shown.backend.map_memory(shown.fd, PAGESIZE + shown.spec.max_entries, PAGESIZE)
    found = {b"produced": bytes(memory[:8]), b"data": bytes(memory[PAGESIZE:])}
    memory.release()
    return found


def _user_ring(shown: CaseMap) -> Contents:
    memory = shown.backend.map_memory(shown.fd, PAGESIZE)
    found = {b"consumed": bytes(memory[:8])}
    memory.release()
    return found


def _perf(shown: CaseMap) -> Contents:
    """The records; of lost ones without the id, which is the kernel's choice."""
    found: Contents = {}
    data = bytes(shown.memory[PAGESIZE:])
    head, at = int.from_bytes(shown.memory[_HEAD : _HEAD + 8], sys.byteorder), 0
    while at < head:
        kind, _, size = struct.unpack_from("=IHH", data, at)
        record = data[at : at + size]
        found[at.to_bytes(4, "big")] = record[:8] + record[16:] if kind == _LOST else record
        at += size
    return found


def _inner(shown: CaseMap) -> Contents:
    return {
        bytes([number]) + key: value
        for number, inner in enumerate(shown.inner)
        for key, value in inner.contents().items()
    }


_READERS: dict[str, Callable[[CaseMap], Contents]] = {
    **dict.fromkeys(
        ("array", "percpu_array", "hash", "percpu_hash", "lru_hash", "lru_percpu_hash", "lpm_trie"), _elements
    ),
    **dict.fromkeys(("queue", "stack"), _popped),
    **dict.fromkeys(("array_of_maps", "hash_of_maps"), _inner),
    "ringbuf": _ring,
    "user_ringbuf": _user_ring,
    "perf_event_array": _perf,
}
