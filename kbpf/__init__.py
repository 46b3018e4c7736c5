"""Linux BPF for Python: filters on live sockets, programs and their maps, an emulator with the kernel's verdicts."""

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
from kbpf.runtime.attach import attach, packet_socket
from kbpf.runtime.backends import use_backend
from kbpf.runtime.collection import Collection, load
from kbpf.runtime.filter import Filter, compile
from kbpf.runtime.link import Link
from kbpf.runtime.map import Map
from kbpf.runtime.program import Program, RunResult, load_program
from kbpf.specs import CollectionSpec, FilterSpec, MapSpec, ProgramSpec

__all__ = [
    "BpfError",
    "Collection",
    "CollectionSpec",
    "EmulationFault",
    "EmulationWarning",
    "Filter",
    "FilterError",
    "FilterSpec",
    "FilterSyntaxError",
    "KbpfError",
    "Link",
    "Map",
    "MapFullError",
    "MapSpec",
    "MissingDependencyError",
    "NotSupportedError",
    "ObjectError",
    "PermissionDeniedError",
    "Program",
    "ProgramSpec",
    "RunResult",
    "VerifierError",
    "attach",
    "compile",
    "load",
    "load_program",
    "packet_socket",
    "use_backend",
]
