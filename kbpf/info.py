"""What is told of objects that are there: maps, programs, links, BTF, and the events that programs are on.

The answers of BPF_OBJ_GET_INFO_BY_FD and its kin, on either backend. What a kernel is too old to tell is 0 or empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class MapInfo:
    """``struct bpf_map_info``, with what only the descriptor's file in /proc tells (`memlock`, `frozen`)."""

    #: bpftool's name; a number for a type that kbpf does not know.
    type: str
    id: int
    key_size: int
    value_size: int
    max_entries: int
    #: BPF_F_*.
    flags: int
    name: str
    map_extra: int = 0
    #: The ids of the BTF, and in it of the key's and the value's type; 0 where there is none.
    btf_id: int = 0
    btf_key_type_id: int = 0
    btf_value_type_id: int = 0
    #: The interface whose network card holds the map; 0 for memory.
    ifindex: int = 0
    #: Bytes of memory (Linux 4.10); None where that is not told: without /proc, and by the emulator.
    memlock: int | None = None
    #: User space may not write any more (Linux 5.2).
    frozen: bool = False
    #: For program arrays: the type of the programs in it, and whether they are native code; empty as long as none was.
    owner_type: str = ""
    owner_jited: bool = False


@dataclass(frozen=True)
class ProgramInfo:
    """``struct bpf_prog_info``, with what only the descriptor's file in /proc tells (`memlock`)."""

    #: bpftool's name; a number for a type that kbpf does not know.
    type: str
    id: int
    name: str
    #: Eight bytes of digest of the instructions.
    tag: bytes
    #: In no order that means anything.
    map_ids: tuple[int, ...]
    gpl_compatible: bool
    #: Nanoseconds from boot to load (CLOCK_BOOTTIME); and the user who loaded it.
    load_time_ns: int = 0
    uid: int = 0
    #: Bytes of instructions as they run, after the verifier has rewritten them, and of native code; 0 for those who
    #: may not read them.
    xlated_size: int = 0
    jited_size: int = 0
    #: What is counted while `kbpf.statistics` are on (Linux 5.1): all runs, and the time that they took.
    run_time_ns: int = 0
    run_count: int = 0
    #: Runs that did not happen because the program was running on the processor already (Linux 5.12).
    recursion_misses: int = 0
    #: Instructions that the verifier went through (Linux 5.16); the emulator has none.
    verified_instructions: int = 0
    #: The ids of the program's own BTF, and of the type that it is attached to, with the BTF that this is in.
    btf_id: int = 0
    attach_btf_id: int = 0
    attach_btf_object_id: int = 0
    #: The interface whose network card runs the program; 0 for the host.
    ifindex: int = 0
    #: Bytes of memory (Linux 4.10); None where that is not told: without /proc, and by the emulator.
    memlock: int | None = None


@dataclass(frozen=True)
class LinkInfo:
    """``struct bpf_link_info``."""

    #: bpftool's name; a number for a type that kbpf does not know.
    type: str
    id: int
    program_id: int
    #: Where the link says so: of interfaces, control groups, network namespaces, tracing.
    attach_type: str = ""
    #: The interface's index, or the control group's id; 0 once the link is detached or what it leads to is gone.
    ifindex: int = 0
    cgroup_id: int = 0
    #: What else there is about links of this type, by the names of the structure's members: ``tp_name``, ``netns_ino``,
    #: ``target_name``, ``pf``, ``hooknum``, ``priority``, ``cookie`` and such; file names and symbols are text, and
    #: what there is for each of several places are tuples: ``offsets``, ``addrs``, ``cookies``.
    details: Mapping[str, int | str | tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class BtfInfo:
    """``struct bpf_btf_info`` (Linux 4.18)."""

    id: int
    #: Bytes of the BTF.
    size: int
    #: ``vmlinux`` or the module's name for the kernel's own; usually empty otherwise (Linux 5.11).
    name: str = ""
    kernel: bool = False


@dataclass(frozen=True)
class TaskEvent:
    """What BPF_TASK_FD_QUERY tells of a process's descriptor for an event: the program on it, and which event."""

    program_id: int
    #: ``raw_tracepoint``, ``tracepoint``, ``kprobe``, ``kretprobe``, ``uprobe`` or ``uretprobe``.
    type: str
    #: The tracepoint, function or file; empty for a kprobe by address.
    name: str
    offset: int = 0
    address: int = 0
