"""The kernel as a backend: bpf(2) and sockets, carried out by the running Linux.

Needs CAP_BPF (CAP_SYS_ADMIN before Linux 5.8) for most of bpf(2), and nothing for classic filters beyond what
`kbpf.kernel.sockets` says. Every descriptor that it gives is close-on-exec.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

from kbpf.backend import Answer, Backend, FeatureKind, SocketLike
from kbpf.kernel.btf import BtfCommands
from kbpf.kernel.events import EventCommands
from kbpf.kernel.iterators import IteratorCommands
from kbpf.kernel.links import LinkCommands
from kbpf.kernel.maps import MapCommands
from kbpf.kernel.objects import ObjectCommands
from kbpf.kernel.programs import ProgramCommands
from kbpf.kernel.sockets import SocketCalls
from kbpf.kernel.tracing import TracingCommands


class KernelBackend(
    MapCommands,
    EventCommands,
    ProgramCommands,
    LinkCommands,
    IteratorCommands,
    BtfCommands,
    ObjectCommands,
    SocketCalls,
    TracingCommands,
):
    """`kbpf.backend.Backend` on the running kernel."""

    name: Literal["kernel"] = "kernel"
    #: The kernel verifies every program that it loads.
    verifies = True

    def feature(self, kind: FeatureKind, name: str, program_type: str = "") -> Answer:
        from kbpf.kernel.features import ask

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
        from kbpf.kernel.denied import explain_denied

        return explain_denied(operation, errno, program_type=program_type, map_type=map_type, socket=socket, path=path)


@cache
def kernel_backend() -> Backend:
    """The one instance."""
    return KernelBackend()
