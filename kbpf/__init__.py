"""Linux BPF for Python: filters on live sockets, programs and their maps, an emulator with the kernel's verdicts.

Names are loaded when they are first used: a program that only compiles a filter does not pay for maps and ELF.
"""

from kbpf.errors import (
    BpfError,
    EmulationFault,
    EmulationWarning,
    FilterError,
    FilterSyntaxError,
    KbpfError,
    MapFullError,
    MissingDependencyError,
    NotSupportedError,
    ObjectError,
    PermissionDeniedError,
    VerifierError,
)

TYPE_CHECKING = False  # What type checkers take for true; importing it from typing costs more than all the rest.
if TYPE_CHECKING:
    from kbpf import bcc, emulator, features
    from kbpf.info import BtfInfo, LinkInfo, MapInfo, ProgramInfo
    from kbpf.runtime.attach import attach, packet_socket
    from kbpf.runtime.backends import use_backend
    from kbpf.runtime.captures import run_capture
    from kbpf.runtime.collection import Collection, load
    from kbpf.runtime.event_writer import EventWriter
    from kbpf.runtime.events import Events
    from kbpf.runtime.filter import Filter, compile, compile_ebpf
    from kbpf.runtime.interface import attached_programs, interface_index
    from kbpf.runtime.inventory import btfs, links, maps, programs, statistics
    from kbpf.runtime.link import BpfLink, CgroupLink, InterfaceLink, IteratorLink, Link, SocketLink
    from kbpf.runtime.map import Map
    from kbpf.runtime.maps.arrays import ArrayMap
    from kbpf.runtime.maps.base import BpfMap
    from kbpf.runtime.maps.keyless import BloomFilter, Queue, Stack
    from kbpf.runtime.packets import Packets
    from kbpf.runtime.program import Program, RunResult, load_program
    from kbpf.runtime.reuseport import ReuseportLink, attach_reuseport
    from kbpf.specs import (
        CollectionSpec,
        FilterSpec,
        MapSpec,
        Netfilter,
        PerfEvent,
        ProgramSpec,
        RawTracepoint,
        Tracepoint,
        Uprobe,
    )

# Where each name is defined; a submodule is at home here.
_HOMES = {
    "BpfLink": "runtime.link",
    "BtfInfo": "info",
    "CgroupLink": "runtime.link",
    "ArrayMap": "runtime.maps.arrays",
    "BloomFilter": "runtime.maps.keyless",
    "BpfMap": "runtime.maps.base",
    "Collection": "runtime.collection",
    "CollectionSpec": "specs",
    "EventWriter": "runtime.event_writer",
    "Events": "runtime.events",
    "Filter": "runtime.filter",
    "FilterSpec": "specs",
    "InterfaceLink": "runtime.link",
    "IteratorLink": "runtime.link",
    "Link": "runtime.link",
    "LinkInfo": "info",
    "Map": "runtime.map",
    "MapInfo": "info",
    "MapSpec": "specs",
    "Netfilter": "specs",
    "Packets": "runtime.packets",
    "PerfEvent": "specs",
    "Program": "runtime.program",
    "ProgramInfo": "info",
    "ProgramSpec": "specs",
    "Queue": "runtime.maps.keyless",
    "RawTracepoint": "specs",
    "ReuseportLink": "runtime.reuseport",
    "RunResult": "runtime.program",
    "SocketLink": "runtime.link",
    "Stack": "runtime.maps.keyless",
    "Tracepoint": "specs",
    "Uprobe": "specs",
    "attach": "runtime.attach",
    "attach_reuseport": "runtime.reuseport",
    "attached_programs": "runtime.interface",
    "bcc": "",
    "compile": "runtime.filter",
    "compile_ebpf": "runtime.filter",
    "emulator": "",
    "features": "",
    "interface_index": "runtime.interface",
    "btfs": "runtime.inventory",
    "links": "runtime.inventory",
    "load": "runtime.collection",
    "load_program": "runtime.program",
    "maps": "runtime.inventory",
    "packet_socket": "runtime.attach",
    "programs": "runtime.inventory",
    "run_capture": "runtime.captures",
    "statistics": "runtime.inventory",
    "use_backend": "runtime.backends",
}

__all__ = [
    "ArrayMap",
    "BloomFilter",
    "BpfError",
    "BpfLink",
    "BpfMap",
    "BtfInfo",
    "CgroupLink",
    "Collection",
    "CollectionSpec",
    "EmulationFault",
    "EmulationWarning",
    "EventWriter",
    "Events",
    "Filter",
    "FilterError",
    "FilterSpec",
    "FilterSyntaxError",
    "InterfaceLink",
    "IteratorLink",
    "KbpfError",
    "Link",
    "LinkInfo",
    "Map",
    "MapFullError",
    "MapInfo",
    "MapSpec",
    "MissingDependencyError",
    "Netfilter",
    "NotSupportedError",
    "ObjectError",
    "Packets",
    "PerfEvent",
    "PermissionDeniedError",
    "Program",
    "ProgramInfo",
    "ProgramSpec",
    "Queue",
    "RawTracepoint",
    "ReuseportLink",
    "RunResult",
    "SocketLink",
    "Stack",
    "Tracepoint",
    "Uprobe",
    "VerifierError",
    "attach",
    "attach_reuseport",
    "attached_programs",
    "bcc",
    "btfs",
    "compile",
    "compile_ebpf",
    "emulator",
    "features",
    "interface_index",
    "links",
    "load",
    "load_program",
    "maps",
    "packet_socket",
    "programs",
    "run_capture",
    "statistics",
    "use_backend",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'kbpf' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"kbpf.{home}"), name) if home else import_module(f"kbpf.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
