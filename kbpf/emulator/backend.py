"""The emulator as a backend: bpf(2)'s commands on maps, programs, BTF and pins, and the other parts put together.

Pins are the process's own, under the paths of the BPF file system.
"""

from __future__ import annotations

import errno
import gc
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from struct import Struct
from typing import Any
from weakref import WeakValueDictionary

from kbpf.asm.ebpf_listing import helper_name
from kbpf.backend import Answer, BackendName, Batch, Engine, EventWaiter, FeatureKind, ObjectKind, SocketLike
from kbpf.emulator import cgroups, links, maps, network, test_runs, trace
from kbpf.emulator.attached import attach, query
from kbpf.emulator.btf import BTFS, Btf, described
from kbpf.emulator.clock import run_due
from kbpf.emulator.environment import environment
from kbpf.emulator.link_commands import LinkCommands
from kbpf.emulator.maps.base import MAPS, Map, refused
from kbpf.emulator.maps.file import MapFile, release
from kbpf.emulator.maps.perf import PerfBuffer, PerfCounter, PerfReading
from kbpf.emulator.maps.ringbuf import Ring
from kbpf.emulator.program import PROGRAMS, Program
from kbpf.emulator.socket_calls import SocketCalls
from kbpf.emulator.statistics import Switch
from kbpf.emulator.waiting import Waiter
from kbpf.info import BtfInfo, MapInfo, ProgramInfo, TaskEvent
from kbpf.refusals import refused_by_object
from kbpf.runs import RawRun, RunOptions, TraceStep
from kbpf.specs import EventSource, MapSpec, ProgramSpec
from kbpf.uapi.constants import BPF_F_RDONLY, BPF_F_WRONLY, BPF_STREAM_STDERR, BPF_STREAM_STDOUT

PIN_ROOT = "/sys/fs/bpf/"

_OBJECTS: dict[ObjectKind, WeakValueDictionary[int, Any]] = {
    "map": MAPS,
    "program": PROGRAMS,
    "link": links.LINKS,
    "btf": BTFS,
}


class EmulatorBackend(LinkCommands, SocketCalls):
    """`kbpf.backend.Backend` in user space."""

    name: BackendName = "emulator"
    #: Programs are checked, but not verified.
    verifies = False

    def __init__(self, engine: Engine = "auto") -> None:
        """`engine` is what runs programs that are loaded without naming one."""
        super().__init__()
        self._engine = engine
        self._pins: dict[str, Map | Program | links.Link] = {}

    def possible_cpus(self) -> int:
        return environment.cpus

    def online_cpus(self) -> list[int]:
        return list(range(environment.cpus))

    # Maps.

    def map_create(self, spec: MapSpec, inner: int | None = None) -> int:
        made = maps.create(spec, self, inner)
        made.btf = described(spec.btf) if spec.btf_value_type_id else None
        return self._open(MapFile(made, spec.flags))

    def map_info(self, fd: int) -> MapInfo:
        found = self.map(fd)
        return MapInfo(
            type=found.type,
            id=found.id,
            key_size=found.key_size,
            value_size=found.value_size,
            max_entries=found.max_entries,
            flags=found.flags,
            name=found.name,
            map_extra=found.map_extra,
            btf_id=0 if found.btf is None else found.btf.id,
            btf_key_type_id=found.spec.btf_key_type_id,
            btf_value_type_id=found.spec.btf_value_type_id,
            frozen=found.frozen,
            owner_type=found.owner_type,
        )

    def map_btf(self, fd: int) -> bytes:
        return self.map(fd).spec.btf

    def map_lookup(self, fd: int, key: bytes | None, value_size: int, flags: int = 0) -> bytes:
        network.settle()
        return self.map_file(fd).lookup(key, flags)

    def map_reader(
        self,
        fd: int,
        key_size: int,
        value_size: int,
        key_packer: Struct | None = None,
        value_packer: Struct | None = None,
    ) -> Callable[[Any], Any]:
        read = self.map_file(fd).lookup
        single = value_packer is not None and len(value_packer.unpack(bytes(value_size))) == 1

        def reader(key: Any) -> Any:
            network.settle()
            try:
                found = read(key if key_packer is None else key_packer.pack(key))
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return None
                raise
            if value_packer is None:
                return found
            fields = value_packer.unpack(found)
            return fields[0] if single else fields

        return reader

    def map_update(self, fd: int, key: bytes | None, value: bytes, flags: int = 0) -> None:
        run_due()
        self.map_file(fd).update(key, value, flags)

    def map_delete(self, fd: int, key: bytes) -> None:
        run_due()
        self.map_file(fd).delete(key)

    def map_next_key(self, fd: int, key: bytes | None, key_size: int) -> bytes:
        network.settle()
        return self.map_file(fd).next_key(key)

    def map_lookup_and_delete(self, fd: int, key: bytes | None, value_size: int, flags: int = 0) -> bytes:
        network.settle()
        return self.map_file(fd).take(key, flags)

    def map_lookup_batch(
        self, fd: int, token: bytes | None, count: int, key_size: int, value_size: int, delete: bool = False
    ) -> Batch:
        network.settle()
        return self.map_file(fd).lookup_batch(token, count, delete)

    def map_update_batch(self, fd: int, keys: bytes, values: bytes, count: int, flags: int = 0) -> int:
        run_due()
        return self.map_file(fd).update_batch(keys, values, count, flags)

    def map_delete_batch(self, fd: int, keys: bytes, count: int, flags: int = 0) -> int:
        run_due()
        return self.map_file(fd).delete_batch(keys, count, flags)

    def map_contains(self, fd: int, value: bytes) -> bool:
        network.settle()
        return self.map_file(fd).contains(value)

    def map_memory(self, fd: int, size: int, offset: int = 0, writable: bool = False) -> memoryview:
        network.settle()
        found = self._handle(fd)
        if isinstance(found, (Program, links.Link, cgroups.Group, Btf, Switch)):
            raise refused(errno.ENODEV)
        return found.memory(offset, size, writable)

    def memory_barrier(self) -> None:
        """The interpreter's lock is one."""

    def perf_buffer(self, cpu: int, pages: int = 8, wakeup: int = 1) -> int:
        return self._open(PerfBuffer(cpu, pages, wakeup))

    def event_waiter(self) -> EventWaiter:
        return Waiter(self._buffer)

    def _buffer(self, fd: int) -> Ring | PerfBuffer:
        """The ring or perf buffer behind a descriptor; EPERM for what epoll(7) would not take."""
        found = self._handle(fd)
        buffer = found.map if isinstance(found, MapFile) else found
        if not isinstance(buffer, Ring | PerfBuffer):
            raise refused(errno.EPERM)
        return buffer

    def perf_counter(self, read: Callable[[], PerfReading], cpu: int | None = None) -> int:
        """A counter for bpf_perf_event_read, of one processor or of the process, whose value is what `read` gives."""
        return self._open(PerfCounter(read, cpu))

    def map_freeze(self, fd: int) -> None:
        self.map_file(fd).freeze()

    # Programs.

    def program_load(
        self, spec: ProgramSpec, maps: Sequence[int], log_level: int = 0, engine: Engine | None = None
    ) -> int:
        used = [self.map(fd) for fd in maps]
        return self._open(Program(spec, used, self.map, engine=engine or self._engine))

    def program_info(self, fd: int) -> ProgramInfo:
        return self.program(fd).info

    def program_code(self, fd: int, jited: bool = False) -> bytes:
        found = self.program(fd)
        return b"" if jited else found.xlated

    def call_name(self, imm: int) -> str:
        return helper_name(imm)

    def program_bind_map(self, program: int, map: int) -> None:
        self.program(program).bind(self.map(map))

    def program_stream(self, fd: int, stream: int, size: int) -> bytes:
        self.program(fd)
        if stream not in (BPF_STREAM_STDOUT, BPF_STREAM_STDERR):
            raise refused(errno.ENOENT)
        # The kernel functions that write there are refused at load.
        return b""

    def statistics_enable(self) -> int:
        return self._open(Switch())

    def program_run(
        self, fd: int, data: bytes, context: bytes, repeat: int = 1, flags: int = 0, cpu: int = 0, batch_size: int = 0
    ) -> RawRun:
        run_due()
        return test_runs.run(self.program(fd), data, context, RunOptions(repeat, flags, cpu, batch_size))

    def program_values(self, fd: int, packets: list[bytes], context: bytes) -> array[int]:
        run_due()
        return test_runs.values(self.program(fd), packets, context)

    def program_trace(self, fd: int, data: bytes, context: bytes) -> Iterator[TraceStep]:
        return trace.trace(self.program(fd), data, context)

    # Events.

    def event_attach(self, program: int, source: EventSource, cookie: int = 0) -> int:
        return self._open(attach(self.program(program), source, cookie))

    def event_query(self, pid: int, fd: int) -> TaskEvent:
        if pid != environment.pid_tgid() >> 32:
            raise refused(errno.ENOENT)
        return query(self._handle(fd))

    # Iterators: their programs are of a type that is refused at load.

    def iterator_link(
        self, program: int, *, map: int | None = None, cgroup: int | None = None, pid: int = 0, tid: int = 0
    ) -> int:
        self.program(program)
        raise refused(errno.EINVAL)

    def iterator_open(self, link: int) -> int:
        self.link(link)
        raise refused(errno.EINVAL)

    def read(self, fd: int, size: int) -> bytes:
        self._handle(fd)
        raise refused(errno.EINVAL)

    # BTF.

    def btf_load(self, blob: bytes) -> int:
        return self._open(Btf(blob))

    def btf_info(self, fd: int) -> BtfInfo:
        return self._btf(fd).info

    def btf_data(self, fd: int) -> bytes:
        return self._btf(fd).blob

    def _btf(self, fd: int) -> Btf:
        found = self._handle(fd)
        if not isinstance(found, Btf):
            raise refused(errno.EINVAL)
        return found

    # Pins and ids.

    def pin(self, fd: int, path: str) -> None:
        found = self._handle(fd)
        self._check_pin(path)
        if isinstance(found, MapFile):
            found.map.users += 1
            self._pins[path] = found.map
        elif isinstance(found, links.Link):
            found.opened()
            self._pins[path] = found
        elif isinstance(found, Program):
            self._pins[path] = found
        else:
            raise refused(errno.EINVAL)

    def _check_pin(self, path: str) -> None:
        """What bpffs refuses of a new name. In the emulator's every folder is taken to be there."""
        if "\0" in path:
            raise ValueError("a path has no NUL byte")
        name = path.rpartition("/")[2]
        if not path:
            raise refused(errno.ENOENT)
        if path in (PIN_ROOT, PIN_ROOT.rstrip("/")) or path in self._pins:
            raise refused(errno.EEXIST)
        if not path.startswith(PIN_ROOT):
            raise refused(errno.EPERM)
        if len(name.encode()) > 255:
            raise refused(errno.ENAMETOOLONG)
        if "." in name:
            raise refused(errno.EPERM)

    def unpin(self, path: str) -> None:
        """What unlink(2) does on the BPF file system."""
        run_due()
        found = self._pins.pop(path, None)
        if found is None:
            raise refused(errno.ENOENT)
        if isinstance(found, Map):
            release(found)
        elif isinstance(found, links.Link):
            found.closed()

    def open_pinned(self, path: str, flags: int = 0) -> int:
        found = self._pins.get(path)
        if found is None:
            raise refused(errno.ENOENT)
        return self._reopen(found, flags)

    def pins(self, kind: ObjectKind) -> list[tuple[int, str]]:
        of_kind = _OBJECTS[kind]
        return [(found.id, path) for path, found in self._pins.items() if of_kind.get(found.id) is found]

    def _reopen(self, found: Map | Program | links.Link, flags: int = 0) -> int:
        if flags & ~(BPF_F_RDONLY | BPF_F_WRONLY) or (flags and not isinstance(found, Map)):
            raise refused(errno.EINVAL)
        return self._open(MapFile(found, flags) if isinstance(found, Map) else found)

    def open_by_id(self, kind: ObjectKind, id: int, flags: int = 0) -> int:
        found = _OBJECTS[kind].get(id)
        if isinstance(found, Map) and not found.users:
            found = None
            _let_go()
            found = MAPS.get(id)
        if found is None:
            raise refused(errno.ENOENT)
        return self._reopen(found, flags)

    def ids(self, kind: ObjectKind) -> list[int]:
        if kind in ("map", "btf") and any(not found.users for found in list(MAPS.values())):
            _let_go()
        return sorted(_OBJECTS[kind])

    def feature(self, kind: FeatureKind, name: str, program_type: str = "") -> Answer:
        from kbpf.emulator.features import ask

        return ask(kind, name, program_type)

    def explain_denied(
        self,
        operation: str,
        errno: int,
        *,
        program_type: str = "",
        map_type: str = "",
        socket: SocketLike | None = None,
        path: str = "",
    ) -> tuple[str, ...]:
        return refused_by_object(operation, errno)


def _let_go() -> None:
    """Have maps gone that nobody holds: they and their elements refer to each other, which only a collection ends."""
    gc.collect()


@cache
def emulator_backend() -> EmulatorBackend:
    """The one emulator of this process."""
    return EmulatorBackend()
