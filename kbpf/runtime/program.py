"""eBPF programs, loaded: by the kernel, or by the emulator in its place."""

from __future__ import annotations

import errno
import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from kbpf.backend import ENGINES, Backend, Engine
from kbpf.errors import BpfError, VerifierError
from kbpf.info import ProgramInfo
from kbpf.isa.ebpf import Instruction, decode
from kbpf.runs import TraceStep
from kbpf.runtime.backends import select
from kbpf.runtime.contexts import pack_context, unpack_context
from kbpf.runtime.failures import doing
from kbpf.runtime.maps.base import BpfMap
from kbpf.runtime.packets import Packets, as_bytes, listed_packets
from kbpf.runtime.resource import Resource
from kbpf.specs import Netfilter, ProgramSpec
from kbpf.uapi import constants as uapi

if TYPE_CHECKING:
    from kbpf.runtime.event_link import EventLink
    from kbpf.runtime.link import BpfLink, IteratorLink, Link, SocketLink
    from kbpf.runtime.reuseport import ReuseportLink
    from kbpf.specs import EventSource

# The context structure that BPF_PROG_TEST_RUN takes and gives, by program type.
_CONTEXTS = {
    **dict.fromkeys(
        ["socket_filter", "sched_cls", "sched_act", "cgroup_skb", "lwt_in", "lwt_out", "lwt_xmit"], "__sk_buff"
    ),
    "xdp": "xdp_md",
    "flow_dissector": "bpf_flow_keys",
    "sk_lookup": "bpf_sk_lookup",
}


#: Bytes that are read of a stream at once.
_STREAM_BYTES = 4096


class RunResult(NamedTuple):
    """One BPF_PROG_TEST_RUN: the 32-bit return value, packet and context afterwards, the mean time of a run."""

    value: int
    data: bytes
    #: Fields by name; bytes of a context that was given as bytes.
    context: Any
    duration_ns: int


class Program(Resource):
    """A loaded eBPF program.

    `maps` are the maps that it uses, in the order of its spec. Closing the program also closes those
    that were made for it, and not those it was given.
    """

    def __init__(
        self,
        backend: Backend,
        fd: int,
        *,
        type: str,
        name: str = "",
        maps: Sequence[BpfMap] = (),
        owned: Sequence[BpfMap] = (),
        attach_type: str | None = None,
    ) -> None:
        super().__init__(backend, fd, f'program "{name}" ({type})' if name else f"program ({type})")
        self.name = name
        #: bpftool's name of the program type.
        self.type = type
        #: Where it was loaded to be attached, as far as that is known.
        self.attach_type = attach_type
        self.maps: tuple[Any, ...] = tuple(maps)
        self._owned = tuple(owned)

    @classmethod
    def open(
        cls,
        *,
        path: str | os.PathLike[str] | None = None,
        id: int | None = None,
        fd: int | None = None,
        backend: str | None = None,
    ) -> Program:
        """Open an existing program by pin, id or inherited descriptor; exactly one of them.

        By `fd` the descriptor is duplicated: the caller keeps its own. By `id` CAP_SYS_ADMIN is needed. Raises
        `BpfError` (ENOENT) where there is none.
        """
        chosen = select(backend)
        given = [what for what in (path, id, fd) if what is not None]
        if len(given) != 1:
            raise TypeError("Program.open() takes exactly one of path, id and fd")
        with doing(
            chosen, f"open program {given[0]!r}", operation="obj_get" if path is not None else "prog_get_fd_by_id"
        ):
            if path is not None:
                opened = chosen.open_pinned(os.fspath(path))
            elif fd is not None:
                opened = chosen.duplicate(fd)
            else:
                opened = chosen.open_by_id("program", id or 0)
        return cls.from_fd(chosen, opened)

    @classmethod
    def from_fd(cls, backend: Backend, fd: int, *, maps: Sequence[BpfMap] = ()) -> Program:
        """Take over a descriptor, asking the backend what program it is."""
        try:
            with doing(backend, "read a program's info", operation="obj_get_info_by_fd"):
                info = backend.program_info(fd)
        except BaseException:
            backend.close(fd)
            raise
        return cls(backend, fd, type=info.type, name=info.name, maps=maps)

    @property
    def verified(self) -> bool:
        """Whether a verifier has accepted it: always on the kernel, not yet in the emulator."""
        return self._backend.verifies

    @property
    def id(self) -> int:
        with doing(self._backend, f"read the info of {self.label}", operation="obj_get_info_by_fd"):
            return self._backend.program_info(self.fileno()).id

    @property
    def tag(self) -> str:
        """The digest of the instructions, sixteen hexadecimal digits, as bpftool shows it."""
        with doing(self._backend, f"read the info of {self.label}", operation="obj_get_info_by_fd"):
            return self._backend.program_info(self.fileno()).tag.hex()

    @property
    def info(self) -> ProgramInfo:
        """What there is to tell of it now, run counts and all, as ``bpftool prog show`` does."""
        with doing(self._backend, f"read the info of {self.label}", operation="obj_get_info_by_fd"):
            return self._backend.program_info(self.fileno())

    def xlated(self) -> tuple[Instruction, ...]:
        """The instructions as they run, after the verifier has rewritten them; maps are named by their ids.

        Empty for those who may not read them. The emulator rewrites nothing.
        """
        with doing(self._backend, f"read the instructions of {self.label}", operation="obj_get_info_by_fd"):
            return decode(self._backend.program_code(self.fileno()))

    def jited(self) -> bytes:
        """The native code that runs, of all functions; empty where there is none or it may not be read.

        The emulator's native code is not shown.
        """
        with doing(self._backend, f"read the native code of {self.label}", operation="obj_get_info_by_fd"):
            return self._backend.program_code(self.fileno(), jited=True)

    def dump(self) -> str:
        """`xlated` as ``bpftool prog dump xlated`` lists it, a line an instruction."""
        return "\n".join(f"{index:4}: {text}" for index, text in self.listing())

    def listing(self) -> Iterator[tuple[int, str]]:
        """The lines of `dump` by the index of the instruction."""
        from kbpf.asm.ebpf_listing import lines

        return lines(self.xlated(), self._backend.call_name)

    def bind_map(self, map: BpfMap) -> None:
        """BPF_PROG_BIND_MAP (Linux 5.10): keep a map that its instructions do not name, as long as the program lives.

        Such a map is a place for data about the program; see ``info.map_ids``.
        """
        with doing(self._backend, f"bind {map.label} to {self.label}", operation="prog_bind_map"):
            self._backend.program_bind_map(self.fileno(), map.fileno())

    def read_stream(self, name: Literal["stdout", "stderr"] = "stderr") -> str:
        """Take what the program and the kernel have written about it (bpf_stream_vprintk, Linux 6.17).

        On ``stderr`` the kernel says what it stopped a program for.
        """
        stream = {"stdout": uapi.BPF_STREAM_STDOUT, "stderr": uapi.BPF_STREAM_STDERR}[name]
        with doing(self._backend, f"read the {name} of {self.label}", operation="prog_stream_read_by_fd"):
            read = self._backend.program_stream
            parts = iter(lambda: read(self.fileno(), stream, _STREAM_BYTES), b"")
            return b"".join(parts).decode(errors="replace")

    def iterator(
        self, *, map: BpfMap | None = None, cgroup: str | os.PathLike[str] | None = None, pid: int = 0, tid: int = 0
    ) -> IteratorLink:
        """Make an iterator of a program of type ``tracing`` for ``trace_iter`` (Linux 5.8), such as SEC("iter/task").

        It goes over all there are, or the elements of `map`, the groups below the directory `cgroup` (6.1), or what
        belongs to the process `pid` or the thread `tid` (6.1), as the kind of iterator has it. The kernel's alone.
        Raises `BpfError` (EINVAL) for a program that is no iterator, or is one over something else.
        """
        from kbpf.runtime.link import IteratorLink

        backend = self._backend
        with doing(backend, f"make an iterator of {self.label}", operation="link_create", program_type=self.type):
            group = None if cgroup is None else backend.cgroup_open(os.fspath(cgroup))
            try:
                over = None if map is None else map.fileno()
                fd = backend.iterator_link(self.fileno(), map=over, cgroup=group, pid=pid, tid=tid)
            finally:
                if group is not None:
                    backend.close(group)
        return IteratorLink.of(self, "what it goes over", fd)

    def run(
        self,
        data: bytes = b"",
        context: Mapping[str, Any] | Sequence[int] | bytes | None = None,
        repeat: int = 1,
        wirelen: int | None = None,
        *,
        flags: int = 0,
        cpu: int = 0,
        batch_size: int = 0,
    ) -> RunResult:
        """Run it over `data`, as BPF_PROG_TEST_RUN does (Linux 4.12), with the same result on both backends.

        `data` is a whole frame with its Ethernet header: 14 to 3,712 bytes for programs over socket buffers, whose
        offset 0 is the byte after the header except for traffic control; up to 73,152 for XDP, with metadata before the
        frame where the context's ``data`` says so; up to 4,096 for flow dissectors, which give their keys as data; none
        for socket lookups, which need a context, for raw tracepoints and `syscall` programs.

        `context` sets fields of the program type's context by their uapi names (``{"mark": 7}``); which may be set is
        the kernel's choice. `wirelen` sets ``wire_len``. For a raw tracepoint (5.10) it is up to twelve arguments, for
        a `syscall` program (5.14) bytes, which it may change.

        `flags` are BPF_F_TEST_*: over socket buffers BPF_F_TEST_SKB_CHECKSUM_COMPLETE (6.11) has the packet summed up
        as by a network card, and EBADMSG says that the program has changed it without telling;
        BPF_F_TEST_XDP_LIVE_FRAMES (5.18) carries out what XDP programs decide, on up to `batch_size` frames at once,
        and gives neither data nor context. `cpu` is for types that take BPF_F_TEST_RUN_ON_CPU. Raises
        `BpfError` (EINVAL for sizes and fields that may not be, ENODEV for an interface that is not there),
        `NotSupportedError` for program types that cannot be run that way, and in the emulator `EmulationFault` for
        what a verifier would have refused.
        """
        for option, given in (("flags", flags), ("cpu", cpu), ("batch_size", batch_size)):
            if not 0 <= given < 1 << 32:
                raise ValueError(f"{option} has 32 bits, {given} does not fit")
        name = _CONTEXTS.get(self.type)
        if wirelen is not None:
            if not isinstance(context or {}, Mapping):
                raise TypeError("wirelen is for a context that is given by its fields")
            context = {**(context or {}), "wire_len": wirelen}  # type: ignore[dict-item]  # a mapping, as just checked
        raw = self._packed_context(context)
        # Nobody else's program, where another thread closes this one.
        with (
            doing(self._backend, f"run {self.label}", operation="prog_test_run", program_type=self.type),
            self._descriptor as fd,
        ):
            done = self._backend.program_run(fd, bytes(memoryview(data)), raw, repeat, flags, cpu, batch_size)
        if isinstance(context, bytes):
            return RunResult(done.value, done.data, done.context, done.duration_ns)
        after = unpack_context(name, done.context) if name and done.context else {}
        return RunResult(done.value, done.data, after, done.duration_ns)

    def run_all(self, packets: Iterable[bytes] | Packets) -> array[int]:
        """Run it over many packets, as `run` does over each: the values that it returned, 32 bits unsigned.

        `packets` are objects of bytes, a `kbpf.Packets`, or an open capture. In the emulator that is one call of native
        code for programs whose context is only read and whose helpers have nothing to do with the packet, once there
        is work enough (or with ``engine="jit"``). Raises what `run` raises; the packets before have run then.
        """
        listed, _ = listed_packets(packets)
        if set(map(type, listed)) - {bytes}:
            listed = [as_bytes(packet) for packet in listed]
        raw = self._packed_context(None)
        with doing(self._backend, f"run {self.label}", operation="prog_test_run", program_type=self.type):
            return self._backend.program_values(self.fileno(), listed, raw)

    def run_until_refused(self, packets: list[bytes]) -> tuple[array[int], bool]:
        """`run_all` up to the first packet that is no packet for it (EINVAL); whether there was one."""
        try:
            return self.run_all(packets), False
        except BpfError as error:
            done = getattr(error.__context__, "done", None)
            if error.errno != errno.EINVAL or done is None:
                raise
            return done, True

    def trace(self, data: bytes = b"", context: Mapping[str, Any] | None = None) -> Iterator[TraceStep]:
        """The steps of one run over `data`, as `run` takes it: instructions, registers changed, memory touched.

        The emulator's alone: raises `NotSupportedError` for a program in the kernel. A run that faults gives the steps
        until then and raises `EmulationFault`. What helpers touch is not shown.
        """
        raw = self._packed_context(context)
        with doing(self._backend, f"trace {self.label}", operation="prog_test_run", program_type=self.type):
            return self._backend.program_trace(self.fileno(), bytes(memoryview(data)), raw)

    def _packed_context(self, given: Mapping[str, Any] | Sequence[int] | bytes | None) -> bytes:
        """The context for a test run; socket buffers always get one, so that what is written there comes out."""
        if isinstance(given, bytes):
            return given
        if given is not None and not isinstance(given, Mapping):
            if self.type != "raw_tracepoint":
                raise TypeError(f"a {self.type} program has no arguments: its context is fields by name")
            return struct.pack(f"={len(given)}Q", *(argument & (1 << 64) - 1 for argument in given))
        name, fields = _CONTEXTS.get(self.type), given or {}
        if name is None and fields:
            raise ValueError(f"the context of a {self.type} program has no fields by name")
        return b"" if name is None or (name != "__sk_buff" and not fields) else pack_context(name, fields)

    @overload
    def attach(
        self,
        target: str | int | os.PathLike[str],
        attach_type: str | None = None,
        *,
        mode: Literal["generic", "native"] | None = None,
        before: BpfLink | Program | Literal["all"] | None = None,
        after: BpfLink | Program | Literal["all"] | None = None,
    ) -> BpfLink: ...

    @overload
    def attach(self, target: BpfMap, attach_type: str | None = None) -> BpfLink: ...

    @overload
    def attach(self, target: Netfilter) -> BpfLink: ...

    @overload
    def attach(self, target: EventSource, *, cookie: int = 0) -> EventLink: ...

    @overload
    def attach(self, target: Any, *, drain: bool | None = None) -> SocketLink | ReuseportLink: ...

    def attach(
        self,
        target: Any,
        attach_type: str | None = None,
        *,
        drain: bool | None = None,
        cookie: int = 0,
        mode: Literal["generic", "native"] | None = None,
        before: BpfLink | Program | Literal["all"] | None = None,
        after: BpfLink | Program | Literal["all"] | None = None,
    ) -> Link | EventLink:
        """Attach to what programs of this type are attached to; leaving ``with`` on the `Link` takes it off.

        ``socket_filter``: to a socket, with SO_ATTACH_BPF (Linux 3.19); see `kbpf.attach` for `drain`. Gives a
        `SocketLink`.

        ``xdp``: to an interface by name or index, with a link (Linux 5.9); `mode` says ``"native"`` (in the driver) or
        ``"generic"``, by default what the driver can. ``sched_cls``: to an interface with a link (tcx, Linux 6.6);
        `attach_type` is ``"tcx_ingress"`` or ``"tcx_egress"``, by default what the program was loaded for. It runs
        behind those that are there, or `before` or `after` one of them or ``"all"``. Gives an `InterfaceLink`. Raises
        `BpfError`: ENODEV for an unknown interface, EBUSY and EEXIST where an XDP program or this program is already,
        ENOENT where what it is to go before or after is not there.

        ``cgroup_*`` and ``sock_ops``: to a control group of version 2 by its directory, with a link (Linux 5.7);
        `attach_type` is the hook, by default what the program was loaded for. It runs behind those of the group that
        are there, or (Linux 6.17) `before` or `after` one of their links or ``"all"``, and before those of the groups
        around it. Gives a `CgroupLink`. Groups are real ones, and in the emulator those of `kbpf.emulator.add_cgroup`.
        Raises `BpfError`: ENOENT for a directory that is not there, EBADF for one that is no group's, EINVAL for a hook
        that is none for the program, E2BIG for more than 64.

        ``sk_skb`` and ``sk_msg``: to a `Map` of sockets, with a link (Linux 6.10); `attach_type` is the place, such as
        ``"sk_skb_stream_verdict"``, by default what the program was loaded for. ``flow_dissector`` (5.7) and
        ``sk_lookup`` (5.9): to a network namespace by its file, such as ``"/proc/self/ns/net"``. Both give a `BpfLink`,
        and are the kernel's alone.

        ``netfilter``: to a `Netfilter` hook (6.4) of the network namespace that the calling thread is in, or of the
        emulated network. Gives a `BpfLink`, which has no `BpfLink.update` (EOPNOTSUPP). Raises `BpfError`: EBUSY where
        another hook has that priority, ERANGE for the first and the last of all, and with `defragment` for those up to
        -400, E2BIG for more than 1,024 there.

        ``sk_reuseport``: to the sockets that share a port with this one; see `kbpf.attach_reuseport`. Gives a
        `ReuseportLink`.

        Tracing types: to an event, one of `Tracepoint`, `RawTracepoint`, `Uprobe` and `PerfEvent`; `cookie` is what the
        program gets from bpf_get_attach_cookie. In the emulator they happen when `kbpf.emulator.fire` says so.

        Emulated programs go onto emulated sockets and interfaces, and the kernel's onto the kernel's.
        """
        if self.type in ("xdp", "sched_cls"):
            from kbpf.runtime.interface import attach_to_interface

            if drain is not None:
                raise TypeError("an interface has no queue to drain")
            return attach_to_interface(self, target, attach_type, mode=mode, before=before, after=after)
        from kbpf.runtime.attach import attach
        from kbpf.runtime.cgroup import TYPES, attach_to_cgroup
        from kbpf.runtime.event_link import attach_event, is_source
        from kbpf.runtime.places import (
            TO_MAPS,
            TO_NAMESPACES,
            attach_to_map,
            attach_to_namespace,
            attach_to_netfilter,
        )
        from kbpf.runtime.reuseport import attach_reuseport

        if self.type in TYPES:
            if drain is not None or mode is not None:
                raise TypeError("a control group has no queue to drain, and one mode")
            return attach_to_cgroup(self, target, attach_type, before=before, after=after)
        if self.type in TO_MAPS and isinstance(target, BpfMap):
            return attach_to_map(self, target, attach_type)
        if self.type in TO_NAMESPACES:
            return attach_to_namespace(self, target)
        if (attach_type, mode, before, after) != (None, None, None, None):
            raise TypeError("attach_type, mode, before and after are of interfaces and control groups")
        if isinstance(target, Netfilter):
            return attach_to_netfilter(self, target)
        if is_source(target):
            return attach_event(self, target, cookie)
        if self.type == "sk_reuseport":
            if drain is not None:
                raise TypeError("what a group of sockets has received stays")
            return attach_reuseport(target, self)
        return attach(target, self, drain=drain)

    def pin(self, path: str | os.PathLike[str]) -> None:
        """Pin on a BPF file system (Linux 4.4). Raises `BpfError` (EEXIST; EINVAL where it is no bpffs)."""
        with doing(self._backend, f"pin {self.label} at {path}", operation="obj_pin"):
            self._backend.pin(self.fileno(), os.fspath(path))

    def close(self) -> None:
        super().close()
        for map in self._owned:
            map.close()

    def __repr__(self) -> str:
        return f"<Program {self.name!r} {self.type}, {'closed' if self.closed else self.backend}>"


def load_program(
    spec: ProgramSpec,
    maps: Sequence[BpfMap] | Mapping[str, BpfMap] | None = None,
    backend: str | None = None,
    engine: Engine = "auto",
) -> Program:
    """Load a program (BPF_PROG_LOAD), making the maps of its spec, or with existing `maps` in their place.

    `maps` are given in the order of ``spec.maps``, or by name. `engine` chooses what runs an emulated program:
    ``"interpreter"``, ``"jit"`` (native code, with the `jit` extra), or ``"auto"``, which moves to native code when the
    program has run enough to earn it; results are the same. Raises `VerifierError` with the log when it is refused,
    `PermissionDeniedError` (CAP_BPF, and CAP_NET_ADMIN or CAP_PERFMON for types beyond socket filters), `ValueError`
    for maps that do not fit. Nothing stays open after an error.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: {engine!r} is none of {', '.join(ENGINES)}")
    chosen = select(backend, program_type=spec.type)
    made: list[BpfMap] = []
    try:
        used = _maps_for(spec, maps, chosen, made)
        for map in used:
            if map.backend != chosen.name:
                raise ValueError(f"{map.label} is the {map.backend}'s, the program would be the {chosen.name}'s")
        named = f'program "{spec.name}" ({spec.type})' if spec.name else f"program ({spec.type})"
        with doing(chosen, f"load {named}", operation="prog_load", program_type=spec.type):
            fd = chosen.program_load(spec, [map.fileno() for map in used], engine=engine)
    except BaseException as error:
        for map in made:
            map.close()
        if isinstance(error, VerifierError):
            from kbpf.runtime.refused import locate

            locate(error, spec)
        raise
    attach_type = spec.expected_attach_type if isinstance(spec.expected_attach_type, str) else None
    return Program(chosen, fd, type=spec.type, name=spec.name, maps=used, owned=made, attach_type=attach_type)


def _maps_for(
    spec: ProgramSpec, given: Sequence[BpfMap] | Mapping[str, BpfMap] | None, chosen: Backend, made: list[BpfMap]
) -> list[BpfMap]:
    """The map for each of ``spec.maps``; those made here are also put into `made`."""
    if isinstance(given, Mapping):
        unknown = set(given) - {map.name for map in spec.maps}
        if unknown:
            raise ValueError(f"the program has no map {', '.join(sorted(unknown))}")
    elif given is not None and len(given) != len(spec.maps):
        raise ValueError(f"{len(given)} maps where the program has {len(spec.maps)}")
    used = []
    for index, wanted in enumerate(spec.maps):
        existing = given.get(wanted.name) if isinstance(given, Mapping) else given[index] if given is not None else None
        if existing is None:
            existing = BpfMap._create(wanted, chosen)
            made.append(existing)
        used.append(existing)
    return used
