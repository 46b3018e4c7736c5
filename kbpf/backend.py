"""The seam between what a user holds and what carries it out.

A backend speaks in bytes and descriptors and raises plain `OSError` with the kernel's
errno; about one method for each bpf(2) command and each way to attach. Typed keys and
values, names and errors are made above it, in `kbpf.runtime`. Descriptors are ints on both
backends: file descriptors of the kernel, or entries in the emulator's own table, so that a
map of maps or a program array takes them as values the same way.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from struct import Struct
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args

from kbpf.info import BtfInfo, LinkInfo, MapInfo, ProgramInfo, TaskEvent
from kbpf.runs import RawRun, TraceStep
from kbpf.specs import EventSource, Layout, MapSpec, Netfilter, ProgramSpec

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

BackendName = Literal["kernel", "emulator"]
#: What may run an emulated program: the interpreter, native code, or native code once the program has earned it.
Engine = Literal["auto", "interpreter", "jit"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
#: What has ids; all but BTF have pins too.
ObjectKind = Literal["map", "program", "link", "btf"]
#: What a kernel may have or not.
FeatureKind = Literal["map_type", "program_type", "helper", "attach_type", "link_type"]


def object_name(name: str) -> str:
    """A map's or program's name as bpf(2) takes and keeps it: letters, digits, ``_`` and ``.``, 15 of them at most."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.") else "_" for c in name)[:15]


class Attached(NamedTuple):
    """What BPF_PROG_QUERY tells of a place: a number that each change makes larger, programs and links in order."""

    revision: int
    program_ids: tuple[int, ...]
    link_ids: tuple[int, ...]


class Batch(NamedTuple):
    """One chunk of a batch lookup: `length` keys and values, back to back.

    `token` continues after it; None when this was the last chunk.
    """

    keys: bytes
    values: bytes
    length: int
    token: bytes | None


class Answer(NamedTuple):
    """Whether something is there; true only for a yes. `detail` says why not, `since` names the first Linux with it.

    ``not permitted``: this process may not have it, and so cannot ask whether the kernel does. ``inconclusive``: it
    could not be asked, for want of memory or descriptors, or because nothing cheap would tell.
    """

    answer: Literal["yes", "no", "not permitted", "inconclusive"]
    detail: str = ""
    since: str = ""

    def __bool__(self) -> bool:
        return self.answer == "yes"


class LoadRefused(OSError):
    """BPF_PROG_LOAD failed: the errno, and the verifier's log as far as there is one.

    `hints` say what the log does not: that the verifier refuses it only to processes without a capability.
    """

    def __init__(self, errno: int, log: str, hints: tuple[str, ...] = ()) -> None:
        super().__init__(errno, log)
        self.log = log
        self.hints = hints


class LacksFeature(OSError):
    """A refusal because the kernel is older than what was asked of it; `strerror` says what, and which Linux has it."""


class EventWaiter(Protocol):
    """Sleeps until a program has written to, or read from, one of several buffers.

    It may be left early, for nothing; buffers are looked at before each sleep, after `look`.
    """

    def add(self, fd: int, writing: bool = False) -> None:
        """Wait for this ring or perf buffer too; with `writing` for room in a ring buffer of user space."""
        ...

    def look(self) -> float | None:
        """To be called before memory is looked at: from here on, what a program writes ends the next sleep.

        Returns after how many seconds it must be looked again in any case; None where that is not so.
        """
        ...

    def wait(self, seconds: float) -> None:
        """Sleep so long at most. Signal handlers run meanwhile, and what they raise comes out."""
        ...

    def wake(self) -> None:
        """End the sleep of whoever waits, and each later one. Any thread and any signal handler may call it."""
        ...

    def subscribe(self, loop: AbstractEventLoop, callback: Callable[[], object]) -> Callable[[], object]:
        """Have the loop call back whenever a sleep would end, until what this returns is called."""
        ...

    def close(self) -> None: ...


class SocketLike(Protocol):
    """Anything with a descriptor: sockets, asyncio's TransportSocket, files made from sockets."""

    def fileno(self) -> int: ...


class Backend(Protocol):
    """What both backends do. `OSError.errno` is always the kernel's."""

    @property
    def name(self) -> BackendName: ...

    # Programs are verified before they run: always by the kernel, by the emulator once it has a verifier.
    @property
    def verifies(self) -> bool: ...

    def possible_cpus(self) -> int:
        """Processors that per-CPU values have a slot for."""
        ...

    def online_cpus(self) -> list[int]:
        """The numbers of the processors that programs run on now."""
        ...

    def close(self, fd: int) -> None: ...

    def duplicate(self, fd: int) -> int: ...

    # Maps. `value_size` is what user space passes: for per-CPU maps possible_cpus() slots, each rounded up to 8 bytes.

    def map_create(self, spec: MapSpec, inner: int | None = None) -> int:
        """BPF_MAP_CREATE; `inner` is the template for maps of maps. Contents and freezing are the caller's."""
        ...

    def map_info(self, fd: int) -> MapInfo: ...

    def map_btf(self, fd: int) -> bytes:
        """The raw BTF that describes the map's key and value; empty if there is none or it may not be read."""
        ...

    def map_lookup(self, fd: int, key: bytes | None, value_size: int, flags: int = 0) -> bytes: ...

    def map_reader(
        self,
        fd: int,
        key_size: int,
        value_size: int,
        key_packer: Struct | None = None,
        value_packer: Struct | None = None,
    ) -> Callable[[Any], Any]:
        """A bound lookup for one map, as fast as the backend can; None for a missing key. Not after close().

        It takes the key's bytes, or with `key_packer` the one value that it packs, where `struct.error`, `TypeError` or
        `ValueError` comes out; and gives the value's bytes, or with `value_packer` what it unpacks: a tuple, and of one
        field that field.
        """
        ...

    def map_update(self, fd: int, key: bytes | None, value: bytes, flags: int = 0) -> None: ...

    def map_delete(self, fd: int, key: bytes) -> None: ...

    def map_next_key(self, fd: int, key: bytes | None, key_size: int) -> bytes:
        """The key after `key`, or the first; ENOENT at the end."""
        ...

    def map_lookup_and_delete(self, fd: int, key: bytes | None, value_size: int, flags: int = 0) -> bytes: ...

    def map_lookup_batch(
        self, fd: int, token: bytes | None, count: int, key_size: int, value_size: int, delete: bool = False
    ) -> Batch:
        """BPF_MAP_LOOKUP_BATCH or _LOOKUP_AND_DELETE_BATCH; ENOSPC when a bucket holds more than `count`."""
        ...

    def map_update_batch(self, fd: int, keys: bytes, values: bytes, count: int, flags: int = 0) -> int:
        """Returns how many were stored; raises with ``done`` set on the OSError when it stops early."""
        ...

    def map_delete_batch(self, fd: int, keys: bytes, count: int, flags: int = 0) -> int: ...

    def map_contains(self, fd: int, value: bytes) -> bool:
        """Whether a bloom filter has (perhaps) seen the value."""
        ...

    def map_memory(self, fd: int, size: int, offset: int = 0, writable: bool = False) -> memoryview:
        """mmap(2) of a map: a ring buffer's positions and data (once), an array's values with BPF_F_MMAPABLE.

        A ring buffer has a page with the consumer's position, a page with the producer's, then `max_entries` bytes of
        data, which the kernel maps twice, one after the other, and the emulator once. The consumer's page alone may be
        writable; in a ring buffer of user space the others.
        """
        ...

    def memory_barrier(self) -> Callable[[], object] | None:
        """What keeps accesses to such memory in order between itself and before; None where they are anyway.

        Raises EOPNOTSUPP on machines where there is none.
        """
        ...

    def perf_buffer(self, cpu: int, pages: int = 8, wakeup: int = 1) -> int:
        """A buffer for bpf_perf_event_output on `cpu`, with a power of two of `pages` of data; see `map_memory`.

        Whoever waits for it is woken at each `wakeup`th sample.
        """
        ...

    def event_waiter(self) -> EventWaiter: ...

    def map_freeze(self, fd: int) -> None: ...

    # Programs.

    def program_load(
        self, spec: ProgramSpec, maps: Sequence[int], log_level: int = 0, engine: Engine | None = None
    ) -> int:
        """BPF_PROG_LOAD; raises `LoadRefused` with the verifier's log (asked for when the first try fails).

        `engine` is what runs the program in the emulator; in the kernel its own JIT does.
        """
        ...

    def program_info(self, fd: int) -> ProgramInfo: ...

    def program_code(self, fd: int, jited: bool = False) -> bytes:
        """The instructions as they run, maps named by their ids, or the native code; empty where they may not be read.

        The kernel fills in zeroes for its addresses where ``kernel.kptr_restrict`` hides them.
        """
        ...

    def call_name(self, imm: int) -> str:
        """The name of the function that a call in such instructions means, by its `imm`."""
        ...

    def program_bind_map(self, program: int, map: int) -> None:
        """BPF_PROG_BIND_MAP (Linux 5.10): the program keeps a map that its instructions do not name."""
        ...

    def program_stream(self, fd: int, stream: int, size: int) -> bytes:
        """BPF_PROG_STREAM_READ_BY_FD (Linux 6.17): up to `size` bytes of what it wrote; empty: none left.

        `stream` is BPF_STREAM_STDOUT or BPF_STREAM_STDERR.
        """
        ...

    def statistics_enable(self) -> int:
        """BPF_ENABLE_STATS (Linux 5.8): runs and their time are counted as long as the descriptor is open."""
        ...

    def program_run(
        self, fd: int, data: bytes, context: bytes, repeat: int = 1, flags: int = 0, cpu: int = 0, batch_size: int = 0
    ) -> RawRun:
        """BPF_PROG_TEST_RUN; `context` may be empty. `flags` are BPF_F_TEST_*; see `RunOptions`."""
        ...

    def program_values(self, fd: int, packets: list[bytes], context: bytes) -> array[int]:
        """BPF_PROG_TEST_RUN over one packet after the other: what the program returns for each, 32 bits unsigned.

        Raises with ``done`` set on the OSError to the values until then, when a packet is refused.
        """
        ...

    def program_trace(self, fd: int, data: bytes, context: bytes) -> Iterator[TraceStep]:
        """The steps of such a run; EOPNOTSUPP on the kernel, which does not show them."""
        ...

    # Events.

    def event_attach(self, program: int, source: EventSource, cookie: int = 0) -> int:
        """Have a program run for an event, as long as the descriptor that this gives is open.

        A raw tracepoint (BPF_RAW_TRACEPOINT_OPEN), or BPF_LINK_CREATE for what perf_event_open(2) gives. A uprobe's
        offset is a number.
        """
        ...

    def event_query(self, pid: int, fd: int) -> TaskEvent:
        """BPF_TASK_FD_QUERY (Linux 4.18) about a descriptor of a process; ENOTSUPP where that is of no event."""
        ...

    # Iterators.

    def iterator_link(
        self, program: int, *, map: int | None = None, cgroup: int | None = None, pid: int = 0, tid: int = 0
    ) -> int:
        """BPF_LINK_CREATE for an iterator program (Linux 5.8): over all there are, or those of one owner.

        That is the elements of a map (5.9) or the groups below a control group (6.1), by descriptor, or the files,
        mappings and threads of a process or the thread itself (6.1).
        """
        ...

    def iterator_open(self, link: int) -> int:
        """BPF_ITER_CREATE: a descriptor of which one walk's text is read."""
        ...

    def read(self, fd: int, size: int) -> bytes:
        """read(2) of such a descriptor; empty at the end."""
        ...

    # BTF.

    def btf_load(self, blob: bytes) -> int:
        """BPF_BTF_LOAD (Linux 4.18)."""
        ...

    def btf_info(self, fd: int) -> BtfInfo: ...

    def btf_data(self, fd: int) -> bytes: ...

    # Programs at a place without a link, which stay there when the process ends.

    def program_attach(
        self, program: int, target: int, attach_type: str, flags: int = 0, replaced: int | None = None
    ) -> None:
        """BPF_PROG_ATTACH (Linux 4.10) to a control group's, socket map's or network namespace's descriptor.

        `flags` are BPF_F_ALLOW_*; `replaced` is the program of a group to take the place of (with BPF_F_ALLOW_MULTI).
        """
        ...

    def program_detach(self, program: int | None, target: int, attach_type: str) -> None:
        """BPF_PROG_DETACH; None for whatever program is there, where there is one at most. ENOENT for none."""
        ...

    # Links. What `target` is, the attach type says: an interface's index for ``xdp`` and ``tcx_*``, a descriptor of a
    # control group for ``cgroup_*``, of a socket map for ``sk_skb_*`` and ``sk_msg_verdict``, of a network namespace
    # for ``flow_dissector`` and ``sk_lookup``.

    def link_create(
        self, program: int, target: int, attach_type: str, flags: int = 0, relative: int = 0, revision: int = 0
    ) -> int:
        """BPF_LINK_CREATE (Linux 5.7; XDP 5.9, tcx 6.6).

        `flags` are XDP_FLAGS_*_MODE for XDP, and for tcx BPF_F_BEFORE or BPF_F_AFTER what `relative` means: a program's
        descriptor, or with BPF_F_LINK a link's, with BPF_F_ID its id; 0 is all that is there. ESTALE where `revision`
        is given and not the place's. Control groups have the same since Linux 6.17, but only links to go before or
        after, and BPF_F_PREORDER (6.16).
        """
        ...

    def netfilter_link(self, program: int, hook: Netfilter) -> int:
        """BPF_LINK_CREATE for a hook of netfilter (Linux 6.4), in the network namespace of the caller."""
        ...

    def link_update(self, link: int, program: int, old: int | None = None) -> None:
        """BPF_LINK_UPDATE; EPERM where `old` is given and not the program that is there, ENOLINK once detached."""
        ...

    def link_detach(self, link: int) -> None:
        """BPF_LINK_DETACH (Linux 5.9)."""
        ...

    def link_info(self, link: int) -> LinkInfo: ...

    def program_query(self, target: int, attach_type: str) -> Attached:
        """BPF_PROG_QUERY of a place with an order: tcx, and control groups, which tell of no links."""
        ...

    def cgroup_open(self, path: str) -> int:
        """A descriptor of a control group, by its directory; ENOENT, ENOTDIR."""
        ...

    def namespace_open(self, path: str) -> int:
        """A descriptor of a network namespace, by its file such as /proc/self/ns/net; ENOENT."""
        ...

    def interface_index(self, name: str) -> int:
        """The index of a network interface; ENODEV for an unknown name."""
        ...

    # Pins and ids; `kind` says what is wanted, the kernel checks.

    def pin(self, fd: int, path: str) -> None: ...

    def open_pinned(self, path: str, flags: int = 0) -> int: ...

    def unpin(self, path: str) -> None:
        """Remove a pin; ENOENT if there is none."""
        ...

    def pins(self, kind: ObjectKind) -> list[tuple[int, str]]:
        """The id of what is pinned, and the path, of each pin of the kind that this process may open."""
        ...

    def open_by_id(self, kind: ObjectKind, id: int, flags: int = 0) -> int:
        """`flags`: BPF_F_RDONLY or BPF_F_WRONLY, of maps."""
        ...

    def ids(self, kind: ObjectKind) -> list[int]: ...

    # Sockets. The emulator takes its own sockets, and those that it was asked by name to filter in user space.

    def socket_layout(self, socket: SocketLike) -> Layout:
        """What lies at offset 0 of what a filter on this socket sees."""
        ...

    def socket_attach_filter(self, socket: SocketLike, program: bytes) -> None:
        """SO_ATTACH_FILTER with an array of ``struct sock_filter``."""
        ...

    def socket_attach_bpf(self, socket: SocketLike, program: int) -> None:
        """SO_ATTACH_BPF."""
        ...

    def socket_detach(self, socket: SocketLike) -> None:
        """SO_DETACH_FILTER; ENOENT when there is none."""
        ...

    def socket_get_filter(self, socket: SocketLike) -> bytes:
        """SO_GET_FILTER: the classic instructions, empty without a filter; EACCES when an eBPF program is there."""
        ...

    def socket_lock(self, socket: SocketLike) -> None:
        """SO_LOCK_FILTER."""
        ...

    def socket_drain(self, socket: SocketLike) -> int:
        """Throw away what is queued, without waiting or touching the blocking mode; returns how many packets."""
        ...

    def socket_drainable(self, socket: SocketLike) -> bool:
        """Whether draining is safe: packet, raw and UDP sockets; never streams, listeners, UNIX sockets."""
        ...

    def socket_attach_reuseport_filter(self, socket: SocketLike, program: bytes) -> None:
        """SO_ATTACH_REUSEPORT_CBPF: which of the sockets that share the port a packet is for.

        EINVAL for sockets that never share one, or have not set SO_REUSEPORT.
        """
        ...

    def socket_attach_reuseport_bpf(self, socket: SocketLike, program: int) -> None:
        """SO_ATTACH_REUSEPORT_EBPF, with a program of type socket_filter or sk_reuseport."""
        ...

    def socket_detach_reuseport(self, socket: SocketLike) -> None:
        """SO_DETACH_REUSEPORT_BPF (Linux 5.3); ENOENT where there is none. A lock does not hinder it."""
        ...

    def packet_socket(self, interface: str | None, *, type: Literal["raw", "dgram"] = "raw", protocol: int = 3) -> Any:
        """An AF_PACKET socket bound to `interface` (None: all); `protocol` is ETH_P_* in host order."""
        ...

    def feature(self, kind: FeatureKind, name: str, program_type: str = "") -> Answer:
        """Whether it is there, asked anew; `name` is one of `kbpf.uapi.enums`, a helper is asked for a program type."""
        ...

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
        """Why EPERM or EACCES came: a line each for reason and remedy, from what this process really lacks."""
        ...
