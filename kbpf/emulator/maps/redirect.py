"""Where bpf_redirect_map sends packets: devices, processors, AF_XDP sockets (kernel/bpf/devmap.c, cpumap.c, net/xdp).

Devices are those of the emulated network. A device or processor may have an XDP program that runs there first: user
space writes its descriptor and reads its id.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from kbpf.emulator import network
from kbpf.emulator.maps.base import Map, refused
from kbpf.emulator.maps.descriptors import number
from kbpf.emulator.memory import Region
from kbpf.uapi import constants as uapi

if TYPE_CHECKING:
    from kbpf.emulator.interface import EmulatedInterface
    from kbpf.emulator.program import Program

#: A device or queue size; a program's descriptor or id: struct bpf_devmap_val, struct bpf_cpumap_val.
_VALUE = struct.Struct("=II")
_LONGEST_QUEUE = 16384


class RedirectMap(Map):
    """Targets by index."""

    creation_flags = uapi.BPF_F_NUMA_NODE | uapi.BPF_F_RDONLY | uapi.BPF_F_WRONLY
    #: Where the programs run that targets may have: their expected attach type.
    attach_type: ClassVar[str]
    #: The errno for one that may not run there.
    bad_program: ClassVar[int] = errno.EINVAL
    #: Flags of bpf_redirect_map beside the action to fall back on.
    redirect_flags: ClassVar[int] = 0

    def check_creation(self) -> None:
        if not self.max_entries or self.key_size != 4 or self.value_size not in (4, _VALUE.size):
            raise refused(errno.EINVAL)
        super().check_creation()

    def allocate(self) -> None:
        #: Values as they are read, in memory that programs may read.
        self._targets: dict[int, Region] = {}
        self._programs: dict[int, Program] = {}

    def target(self, index: int) -> bytes | None:
        """The value at an index; None if there is none."""
        found = self._known(index)
        return None if found is None else bytes(found.buffer)

    def _known(self, index: int) -> Region | None:
        return self._targets.get(index)

    def devices(
        self, index: int, flags: int, ingress: EmulatedInterface
    ) -> list[tuple[EmulatedInterface, Program | None]]:
        """The devices that a packet is to leave by, and the program that looks at it first."""
        return []

    def processors(self, index: int) -> list[Program | None]:
        """For each processor that is to take a packet, the program that looks at it first."""
        return []

    def find(self, key: bytes) -> int:
        found = self._known(number(key))
        return 0 if found is None else found.address

    def read(self, key: bytes) -> bytes:
        found = self.target(number(key))
        if found is None:
            raise refused(errno.ENOENT)
        return found

    def store(self, key: bytes, value: bytes, flags: int) -> None:
        if flags > uapi.BPF_EXIST:
            raise refused(errno.EINVAL)
        index = number(key)
        if index >= self.max_entries:
            raise refused(errno.E2BIG)
        if flags == uapi.BPF_NOEXIST:
            raise refused(errno.EEXIST)
        self.put(index, *_VALUE.unpack(value.ljust(_VALUE.size, b"\0")))

    def put(self, index: int, target: int, program: int) -> None:
        """Set a target; 0 deletes."""
        raise NotImplementedError

    def keep(self, index: int, target: int, program: int) -> None:
        """Set a target that is known to be there, with a program if its descriptor is not 0."""
        id = 0
        self._programs.pop(index, None)
        if 0 < program < 1 << 31:
            try:
                found = self.descriptors.program(program)
            except OSError:
                raise refused(self.bad_program) from None
            if found.type != "xdp" or found.spec.expected_attach_type != self.attach_type:
                raise refused(self.bad_program)
            id = found.id
            self._programs[index] = found
        self._targets[index] = Region(_VALUE.pack(target, id)[: self.value_size], writable=False)

    def remove(self, key: bytes) -> None:
        if number(key) >= self.max_entries:
            raise refused(errno.EINVAL)
        self._targets.pop(number(key), None)

    def following(self, key: bytes | None) -> bytes:
        index = -1 if key is None else number(key)
        if index >= self.max_entries:
            index = -1
        if index == self.max_entries - 1:
            raise refused(errno.ENOENT)
        return struct.pack("=I", index + 1)


class DevMap(RedirectMap):
    """Devices by index."""

    type = "devmap"
    attach_type = "xdp_devmap"
    redirect_flags = uapi.BPF_F_BROADCAST | uapi.BPF_F_EXCLUDE_INGRESS

    def allocate(self) -> None:
        super().allocate()
        self.flags |= uapi.BPF_F_RDONLY_PROG
        self._devices: dict[int, EmulatedInterface] = {}

    def put(self, index: int, target: int, program: int) -> None:
        if target:
            self.put_device(index, target, program)
        elif 0 < program < 1 << 31:
            raise refused(errno.EINVAL)
        else:
            self._targets.pop(index, None)

    def put_device(self, index: int, target: int, program: int) -> None:
        device = network.current().by_index(target)
        if device is None:
            raise refused(errno.EINVAL)
        self.keep(index, target, program)
        self._devices[index] = device

    def _known(self, index: int) -> Region | None:
        device = self._devices.get(index)
        if device is not None and device.network is None:
            # A device that goes away takes its places with it.
            self._targets.pop(index, None)
        return super()._known(index)

    def devices(
        self, index: int, flags: int, ingress: EmulatedInterface
    ) -> list[tuple[EmulatedInterface, Program | None]]:
        everywhere = flags & uapi.BPF_F_BROADCAST
        found = []
        for at in list(self._targets) if everywhere else [index]:
            device = self._devices.get(at) if self._known(at) is not None else None
            if device is not None and not (everywhere and flags & uapi.BPF_F_EXCLUDE_INGRESS and device is ingress):
                found.append((device, self._programs.get(at)))
        return found


class DevMapHash(DevMap):
    """Devices by any number."""

    type = "devmap_hash"

    def check_creation(self) -> None:
        super().check_creation()
        if self.max_entries > 1 << 31:
            raise refused(errno.EINVAL)

    def store(self, key: bytes, value: bytes, flags: int) -> None:
        target, program = _VALUE.unpack(value.ljust(_VALUE.size, b"\0"))
        if flags > uapi.BPF_EXIST or not target:
            raise refused(errno.EINVAL)
        index = number(key)
        if index in self._targets and flags & uapi.BPF_NOEXIST:
            raise refused(errno.EEXIST)
        full = index not in self._targets and len(self._targets) >= self.max_entries
        self.put_device(index, target, program)
        if full:
            del self._targets[index]
            raise refused(errno.E2BIG)

    def remove(self, key: bytes) -> None:
        if self._targets.pop(number(key), None) is None:
            raise refused(errno.ENOENT)

    def following(self, key: bytes | None) -> bytes:
        keys = [index for index in list(self._targets) if self._known(index) is not None]
        index = None if key is None else number(key)
        at = keys.index(index) + 1 if index in self._targets else 0
        if at == len(keys):
            raise refused(errno.ENOENT)
        return struct.pack("=I", keys[at])


class CpuMap(RedirectMap):
    """Processors by number; the value is the length of the queue to them."""

    type = "cpumap"
    creation_flags = uapi.BPF_F_NUMA_NODE
    attach_type = "xdp_cpumap"
    bad_program = errno.ENOMEM

    def check_creation(self) -> None:
        super().check_creation()
        if self.max_entries > _most_cpus():
            raise refused(errno.E2BIG)

    def put(self, index: int, target: int, program: int) -> None:
        if target > _LONGEST_QUEUE:
            raise refused(errno.EOVERFLOW)
        if index >= self.cpus:
            raise refused(errno.ENODEV)
        if target:
            self.keep(index, target, program)
        else:
            self._targets.pop(index, None)

    def processors(self, index: int) -> list[Program | None]:
        return [self._programs.get(index)] if self._known(index) is not None else []


class XskMap(RedirectMap):
    """AF_XDP sockets by queue. The emulator has none, so the map stays empty."""

    type = "xskmap"

    def check_creation(self) -> None:
        super().check_creation()
        if self.value_size != 4:
            raise refused(errno.EINVAL)

    def read(self, key: bytes) -> bytes:
        raise refused(errno.EOPNOTSUPP)

    def store(self, key: bytes, value: bytes, flags: int) -> None:
        if flags > uapi.BPF_EXIST:
            raise refused(errno.EINVAL)
        if number(key) >= self.max_entries:
            raise refused(errno.E2BIG)
        descriptor = number(value)
        if self.descriptors.is_open(descriptor) or not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            raise refused(errno.ENOTSOCK)
        raise OSError(errno.EOPNOTSUPP, "the emulator has no AF_XDP sockets")


def _most_cpus() -> int:
    """NR_CPUS of this machine's kernel; x86-64's most where that cannot be read."""
    try:
        return int(Path("/sys/devices/system/cpu/kernel_max").read_text()) + 1
    except (OSError, ValueError):
        return 8192
