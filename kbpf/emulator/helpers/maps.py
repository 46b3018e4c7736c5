"""Helpers over maps. A failure is minus the errno that bpf(2) would set."""

from __future__ import annotations

import errno
from collections.abc import Callable

from kbpf.emulator.environment import environment
from kbpf.emulator.helpers.references import hold, sock_at
from kbpf.emulator.interpreter import Code, HelperFunction, Run
from kbpf.emulator.maps.base import Map
from kbpf.emulator.maps.bloom import BloomFilter
from kbpf.emulator.maps.descriptors import ProgArray
from kbpf.emulator.maps.sockets import SocketMap
from kbpf.errors import EmulationFault


def map_at(run: Run, address: int) -> Map:
    """The map that a program names by the address of its handle."""
    owner = run.owner(address)
    if not isinstance(owner, Map):
        raise EmulationFault("this is no map", address=address)
    return owner


def _find(run: Run, found: Map, key: int) -> int:
    """The address of the value of a key in memory; 0 if there is none."""
    try:
        return found.find(run.read(key, found.key_size))
    except OSError:
        raise EmulationFault(f"programs do not look into a {found.type} map") from None


def map_lookup_elem(run: Run, map: int, key: int, *_: int) -> int:
    found = map_at(run, map)
    if isinstance(found, SocketMap):
        return hold(run, found.sock_at(run.read(key, found.key_size)))
    return _find(run, found, key)


def map_update_elem(run: Run, map: int, key: int, value: int, flags: int, _: int) -> int:
    found = map_at(run, map)
    found.check_program_writes()
    try:
        if isinstance(found, SocketMap):
            found.put(run.read(key, found.key_size), sock_at(run, value), flags)
        else:
            found.store(run.read(key, found.key_size), run.read(value, found.value_size), flags)
    except OSError as error:
        return -(error.errno or 0)
    return 0


def map_delete_elem(run: Run, map: int, key: int, *_: int) -> int:
    found = map_at(run, map)
    found.check_program_writes()
    try:
        found.remove(run.read(key, found.key_size))
    except OSError as error:
        return -(error.errno or 0)
    return 0


def map_lookup_percpu_elem(run: Run, map: int, key: int, cpu: int, *_: int) -> int:
    found = map_at(run, map)
    if not found.per_cpu:
        raise EmulationFault(f"a {found.type} map has no per-CPU values")
    if cpu & 0xFFFFFFFF >= found.cpus:
        return 0
    address = _find(run, found, key)
    return address and address + ((cpu & 0xFFFFFFFF) - environment.cpu) * found.slot_size


def map_push_elem(run: Run, map: int, value: int, flags: int, *_: int) -> int:
    found = map_at(run, map)
    found.check_program_writes()
    try:
        found.push(run.read(value, found.value_size), flags)
    except OSError as error:
        return -(error.errno or 0)
    return 0


def map_pop_elem(run: Run, map: int, value: int, *_: int) -> int:
    found = map_at(run, map)
    found.check_program_writes()
    return _out(run, found, value, found.pop)


def map_peek_elem(run: Run, map: int, value: int, *_: int) -> int:
    found = map_at(run, map)
    if isinstance(found, BloomFilter):
        return 0 if found.contains(run.read(value, found.value_size)) else -errno.ENOENT
    return _out(run, found, value, found.peek)


def _out(run: Run, found: Map, value: int, take: Callable[[], bytes]) -> int:
    """Hand out a value, or zeroes where there is none."""
    run.check_writable(value, found.value_size)
    try:
        run.write(value, take())
    except OSError as error:
        run.write(value, bytes(found.value_size))
        return -(error.errno or 0)
    return 0


def tail_target(run: Run, map: int, index: int) -> Code | None:
    """What bpf_tail_call goes on with."""
    found = map_at(run, map)
    if not isinstance(found, ProgArray):
        raise EmulationFault(f"a tail call into a {found.type} map")
    return found.code_at(index)


HELPERS: dict[str, HelperFunction] = {
    "map_lookup_elem": map_lookup_elem,
    "map_update_elem": map_update_elem,
    "map_delete_elem": map_delete_elem,
    "map_push_elem": map_push_elem,
    "map_pop_elem": map_pop_elem,
    "map_peek_elem": map_peek_elem,
    "map_lookup_percpu_elem": map_lookup_percpu_elem,
}
