"""Map commands of bpf(2): Linux 3.18; lookup-and-delete 4.20, freezing 5.2, batches 5.6.

Sizes are the caller's word: the kernel copies as many bytes as the map has, so a `value_size` smaller than the map's,
or a key shorter than its key, would have it touch memory behind the buffer.
"""

from __future__ import annotations

import errno
import mmap
import struct
from collections.abc import Callable
from functools import cache
from typing import Any

from kbpf.backend import Batch, object_name
from kbpf.info import MapInfo
from kbpf.kernel import syscall
from kbpf.kernel.attrs import Attr, Info, command, fdinfo
from kbpf.kernel.btf import loaded_btf, read_btf
from kbpf.kernel.events import cpu_numbers
from kbpf.kernel.programs import TYPE_NAMES as PROGRAM_TYPE_NAMES
from kbpf.kernel.tokens import command_with_token
from kbpf.specs import MapSpec
from kbpf.uapi.constants import BPF_F_NUMA_NODE
from kbpf.uapi.enums import COMMANDS, MAP_TYPES

_TYPE_NAMES = {number: name for name, number in MAP_TYPES.items()}


@cache
def possible_cpus() -> int:
    """How many processors may ever come online: the slots of a per-CPU value. Numbers that none has take no slot."""
    return len(cpu_numbers("/sys/devices/system/cpu/possible"))


class MapCommands:
    """The maps' part of the backend."""

    def possible_cpus(self) -> int:
        return possible_cpus()

    def map_create(self, spec: MapSpec, inner: int | None = None) -> int:
        if spec.type not in MAP_TYPES:
            raise syscall.failure(errno.EINVAL)
        values: dict[str, int | bytes] = {
            "map_type": MAP_TYPES[spec.type],
            "key_size": spec.key_size,
            "value_size": spec.value_size,
            "max_entries": spec.max_entries,
            "map_flags": spec.flags | (0 if spec.numa_node is None else BPF_F_NUMA_NODE),
            "inner_map_fd": inner or 0,
            "numa_node": spec.numa_node or 0,
            "map_name": object_name(spec.name).encode(),
            "map_extra": spec.map_extra,
        }
        if not (spec.btf and spec.btf_value_type_id):
            return command_with_token("map_create", **values)
        with loaded_btf(spec.btf) as btf:
            if btf is None:
                return command_with_token("map_create", **values)
            described = {"btf_key_type_id": spec.btf_key_type_id, "btf_value_type_id": spec.btf_value_type_id}
            try:
                return command_with_token("map_create", btf_fd=btf, **described, **values)
            except OSError as refused:
                # Some map types take no BTF, others only newer kernels give it. If that was not why, say what was.
                try:
                    return command_with_token("map_create", **values)
                except OSError:
                    raise refused from None

    def map_info(self, fd: int) -> MapInfo:
        info, file = Info("bpf_map_info", fd), fdinfo(fd)
        number = info["type"]
        owner = file.get("owner_prog_type")
        return MapInfo(
            _TYPE_NAMES.get(number, str(number)),
            info["id"],
            info["key_size"],
            info["value_size"],
            info["max_entries"],
            info["map_flags"],
            info.text("name"),
            info["map_extra"],
            info["btf_id"],
            info["btf_key_type_id"],
            info["btf_value_type_id"],
            info["ifindex"],
            int(file["memlock"]) if "memlock" in file else None,
            file.get("frozen") == "1",
            "" if owner is None else PROGRAM_TYPE_NAMES.get(int(owner), owner),
            file.get("owner_jited") == "1",
        )

    def map_btf(self, fd: int) -> bytes:
        id = Info("bpf_map_info", fd)["btf_id"]
        return read_btf(id) if id else b""

    def map_lookup(self, fd: int, key: bytes | None, value_size: int, flags: int = 0) -> bytes:
        return syscall.element(COMMANDS["map_lookup_elem"], fd, key, value_size, flags)

    def map_reader(
        self,
        fd: int,
        key_size: int,
        value_size: int,
        key_packer: struct.Struct | None = None,
        value_packer: struct.Struct | None = None,
    ) -> Callable[[Any], Any]:
        return syscall.element_reader(fd, key_size, value_size, key_packer, value_packer)

    def map_update(self, fd: int, key: bytes | None, value: bytes, flags: int = 0) -> None:
        syscall.element(COMMANDS["map_update_elem"], fd, key, value, flags)

    def map_delete(self, fd: int, key: bytes) -> None:
        syscall.element(COMMANDS["map_delete_elem"], fd, key)

    def map_next_key(self, fd: int, key: bytes | None, key_size: int) -> bytes:
        return syscall.element(COMMANDS["map_get_next_key"], fd, key, key_size)

    def map_lookup_and_delete(self, fd: int, key: bytes | None, value_size: int, flags: int = 0) -> bytes:
        return syscall.element(COMMANDS["map_lookup_and_delete_elem"], fd, key, value_size, flags)

    def map_lookup_batch(
        self, fd: int, token: bytes | None, count: int, key_size: int, value_size: int, delete: bool = False
    ) -> Batch:
        # The token is a u32 bucket for hashes, a key for the others.
        token_at, after = _memory(token), syscall.Buffer(max(key_size, 4))
        keys, values = syscall.Buffer(count * key_size), syscall.Buffer(count * value_size)
        attr = Attr(
            "map_lookup_and_delete_batch" if delete else "map_lookup_batch",
            in_batch=_address(token_at),
            out_batch=after.address,
            keys=keys.address,
            values=values.address,
            count=count,
            map_fd=fd,
        )
        last = False
        try:
            attr.issue()
        except OSError as error:
            # The end of the map, with the last elements delivered.
            if error.errno != errno.ENOENT:
                raise
            last = True
        length = attr["count"]
        return Batch(
            keys.read(length * key_size), values.read(length * value_size), length, None if last else after.read()
        )

    def map_update_batch(self, fd: int, keys: bytes, values: bytes, count: int, flags: int = 0) -> int:
        keys_at, values_at = syscall.Buffer(keys), syscall.Buffer(values)
        return _change_batch(
            "map_update_batch", map_fd=fd, keys=keys_at.address, values=values_at.address, count=count, elem_flags=flags
        )

    def map_delete_batch(self, fd: int, keys: bytes, count: int, flags: int = 0) -> int:
        memory = syscall.Buffer(keys)
        return _change_batch("map_delete_batch", map_fd=fd, keys=memory.address, count=count, elem_flags=flags)

    def map_contains(self, fd: int, value: bytes) -> bool:
        try:
            syscall.element(COMMANDS["map_lookup_elem"], fd, None, value)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def map_memory(self, fd: int, size: int, offset: int = 0, writable: bool = False) -> memoryview:
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return memoryview(mmap.mmap(fd, size, mmap.MAP_SHARED, access, offset=offset))

    def map_freeze(self, fd: int) -> None:
        command("map_freeze", map_fd=fd)


def _memory(contents: bytes | None) -> syscall.Buffer | None:
    return None if contents is None else syscall.Buffer(contents)


def _address(memory: syscall.Buffer | None) -> int:
    return 0 if memory is None else memory.address


def _change_batch(name: str, **values: int) -> int:
    """Issue a batch that writes: how many elements it did, also as `done` on the error that stopped it."""
    attr = Attr(name, **values)
    try:
        attr.issue()
    except OSError as error:
        # One found before the first element leaves the count as it was given.
        error.done = attr["count"] % values["count"] if values["count"] else 0  # type: ignore[attr-defined]
        raise
    return attr["count"]
