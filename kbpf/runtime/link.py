"""What is attached, as long as it is there: a filter on a socket, a program on an interface or a control group."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from kbpf.backend import Backend
from kbpf.errors import BpfError
from kbpf.info import LinkInfo
from kbpf.isa import cbpf
from kbpf.runtime.backends import select
from kbpf.runtime.failures import doing
from kbpf.runtime.filter import Filter
from kbpf.runtime.program import Program
from kbpf.runtime.resource import Resource

if TYPE_CHECKING:
    from kbpf.specs import Layout

Self = TypeVar("Self", bound="Link")
Made = TypeVar("Made", bound="BpfLink")


class Link(ABC):
    """Something attached; leaving ``with`` takes it off."""

    #: What is attached; None once it is off.
    attached: Filter | Program | None

    @property
    @abstractmethod
    def backend(self) -> str:
        """``"kernel"`` or ``"emulator"``."""

    @staticmethod
    def open(
        *,
        path: str | os.PathLike[str] | None = None,
        id: int | None = None,
        fd: int | None = None,
        backend: str | None = None,
    ) -> BpfLink:
        """Open an existing BPF link by pin, id or inherited descriptor; exactly one of them.

        By `fd` the descriptor is duplicated: the caller keeps its own. By `id` CAP_SYS_ADMIN is needed. Gives an
        `InterfaceLink`, `CgroupLink` or `IteratorLink` where it is one. Its ``attached`` is None, and ``program()``
        opens what it is. Raises `BpfError` (ENOENT) where there is none, EINVAL where it is no link.
        """
        chosen = select(backend)
        given = [what for what in (path, id, fd) if what is not None]
        if len(given) != 1:
            raise TypeError("Link.open() takes exactly one of path, id and fd")
        with doing(chosen, f"open link {given[0]!r}", operation="obj_get" if path is not None else "link_get_fd_by_id"):
            if path is not None:
                opened = chosen.open_pinned(os.fspath(path))
            elif fd is not None:
                opened = chosen.duplicate(fd)
            else:
                opened = chosen.open_by_id("link", id or 0)
        try:
            with doing(chosen, f"read the info of link {given[0]!r}", operation="obj_get_info_by_fd"):
                info = chosen.link_info(opened)
        except BaseException:
            chosen.close(opened)
            raise
        return _KINDS.get(info.type, BpfLink)(chosen, opened, f"link {info.id} ({info.type})")

    @abstractmethod
    def detach(self) -> bool:
        """Take it off; False if it was off already."""

    @abstractmethod
    def __enter__(self: Self) -> Self: ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class SocketLink(Link):
    """What `kbpf.attach` gives: the socket, and the filter in its one slot.

    Keeps the socket object, not its number. Leaving ``with`` detaches, and never raises for a lock or a closed
    socket. A link that is merely dropped leaves the filter where it is, as setsockopt(2) does.
    """

    def __init__(self, backend: Backend, socket: Any, attached: Filter | Program) -> None:
        self._backend = backend
        #: The filtered socket: the one that was given, or in the emulator what stands in its place.
        self.socket = socket
        #: The filter or program in the slot.
        self.attached = attached
        self._layout: Layout = backend.socket_layout(socket)

    @property
    def backend(self) -> str:
        """``"kernel"`` or ``"emulator"``."""
        return self._backend.name

    def detach(self) -> bool:
        """SO_DETACH_FILTER, if the filter there is still this link's; False if it was gone or somebody else's.

        A classic filter is read back and compared first; an eBPF program cannot be seen, so where this link put
        one, whatever program is there is taken off. Raises `PermissionDeniedError` when the filter is locked,
        `BpfError` (EBADF) when the socket was closed.
        """
        if self.attached is None:
            return False
        with doing(self._backend, "detach the socket's filter", operation="SO_DETACH_FILTER", socket=self.socket):
            if not self._is_ours():
                self.attached = None
                return False
            try:
                self._backend.socket_detach(self.socket)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
                self.attached = None
                return False
        self.attached = None
        return True

    def replace(self, new: str | Filter | Program, drain: bool | None = None) -> None:
        """Put another filter in the slot, with no moment between them without one.

        Takes what `kbpf.attach` takes. If it is refused, the old filter stays.
        """
        from kbpf.runtime.attach import put

        self.attached = put(self._backend, self.socket, new, drain, self.attached)

    def lock(self) -> None:
        """SO_LOCK_FILTER (Linux 3.9): nobody can change or detach the filter any more, this process included."""
        with doing(self._backend, "lock the socket's filter", operation="SO_LOCK_FILTER", socket=self.socket):
            self._backend.socket_lock(self.socket)

    def read_back(self) -> Filter | None:
        """The classic filter that is in the slot now (SO_GET_FILTER, Linux 3.8), None if there is none.

        Raises `PermissionDeniedError` (EACCES) where an eBPF program is: it cannot be read back.
        """
        with doing(self._backend, "read the socket's filter back", operation="SO_GET_FILTER", socket=self.socket):
            raw = self._backend.socket_get_filter(self.socket)
        if isinstance(self.attached, Filter) and raw == cbpf.encode(self.attached.instructions):
            return self.attached
        return Filter(cbpf.decode(raw), layout=self._layout) if raw else None

    def _is_ours(self) -> bool:
        try:
            raw = self._backend.socket_get_filter(self.socket)
        except OSError as error:
            if error.errno == errno.EACCES:
                return isinstance(self.attached, Program)
            raise
        return isinstance(self.attached, Filter) and raw == cbpf.encode(self.attached.instructions)

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.detach()
        except BpfError as failure:
            # A locked filter stays by intent, and a closed socket took its filter with it.
            if failure.errno not in (errno.EPERM, errno.EBADF, errno.ENOTSOCK):
                raise

    def __repr__(self) -> str:
        what = "detached" if self.attached is None else repr(self.attached)
        return f"<SocketLink {what} on {self.socket!r}, {self.backend}>"


class BpfLink(Resource, Link):
    """A BPF link (Linux 5.7), which owns a descriptor.

    Closing it takes the program off, as leaving ``with`` does, unless the link is pinned or somebody else has it open.
    Where what it leads to goes away the link stays, and leads nowhere.
    """

    attached: Program | None

    def __init__(self, backend: Backend, fd: int, label: str, attached: Program | None = None) -> None:
        super().__init__(backend, fd, label)
        self.attached = attached

    @classmethod
    def of(cls: type[Made], attached: Program, where: str, fd: int) -> Made:
        """Take over the descriptor of a link that was made of a program."""
        return cls(attached._backend, fd, f"link of {attached.label} to {where}", attached)

    @property
    def info(self) -> LinkInfo:
        """The link's type and id, its program's id, and what is told of where it leads.

        The interface's index and the group's id are 0 once it is off.
        """
        with doing(self._backend, f"read the info of the {self.label}", operation="obj_get_info_by_fd"):
            return self._backend.link_info(self.fileno())

    @property
    def id(self) -> int:
        return self.info.id

    def program(self) -> Program:
        """Open the program that it is a link of, by its id: the caller closes it. Needs CAP_SYS_ADMIN."""
        return Program.open(id=self.info.program_id, backend=self.backend)

    def update(self, program: Program, *, expected: Program | None = None) -> None:
        """BPF_LINK_UPDATE: another program of the same type in its place, with no moment between them without one.

        Raises `PermissionDeniedError` (EPERM) where the program there is not the `expected` one, `BpfError` (ENOLINK)
        once it is detached, `BpfError` (EINVAL) for another type of program. The old program then stays.
        """
        if program.backend != self.backend:
            raise ValueError(f"{program.label} is the {program.backend}'s and the link is the {self.backend}'s")
        with doing(self._backend, f"update the {self.label}", operation="link_update", program_type=program.type):
            old = None if expected is None else expected.fileno()
            self._backend.link_update(self.fileno(), program.fileno(), old)
        self.attached = program

    def detach(self) -> bool:
        """BPF_LINK_DETACH (Linux 5.9), whoever else has the link, and close it; False if it was off already.

        Whether a netfilter link is off the kernel does not tell, so that is for others to know.
        """
        if self.closed:
            return False
        with doing(self._backend, f"detach the {self.label}", operation="link_detach"):
            before = self._backend.link_info(self.fileno())
            self._backend.link_detach(self.fileno())
        self.close()
        if before.type == "netfilter":
            return True
        return any((before.ifindex, before.cgroup_id, *map(before.details.get, ("netns_ino", "map_id"))))

    def pin(self, path: str | os.PathLike[str]) -> None:
        """Pin on a BPF file system: the program stays attached when the link is closed, and the process ends."""
        with doing(self._backend, f"pin the {self.label} at {path}", operation="obj_pin"):
            self._backend.pin(self.fileno(), os.fspath(path))

    def close(self) -> None:
        super().close()
        self.attached = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.label}, {'closed' if self.closed else self.backend}>"


def attaching(program: Program, where: str, attach_type: str) -> AbstractContextManager[None]:
    """`doing` for a link that is made of a program."""
    return doing(
        program._backend,
        f"attach {program.label} to {where}",
        operation="link_create",
        program_type=program.type,
        attach_type=attach_type,
    )


class InterfaceLink(BpfLink):
    """What `Program.attach` gives for an interface."""


class CgroupLink(BpfLink):
    """What `Program.attach` gives for a control group."""


class IteratorLink(BpfLink):
    """What `Program.iterator` gives: each `read` walks over all that there is then."""

    def read(self) -> bytes:
        """What the program writes in one walk (BPF_ITER_CREATE and read(2), Linux 5.8): all of it.

        Raises `BpfError` for the errno with which a program ends a walk (EAGAIN when it returns 1 without end).
        """
        with doing(self._backend, f"walk the {self.label}", operation="iter_create"):
            walk = self._backend.iterator_open(self.fileno())
            try:
                return b"".join(iter(lambda: self._backend.read(walk, _WALK_BYTES), b""))
            finally:
                self._backend.close(walk)


#: Bytes that are read of a walk at once: the kernel has a buffer of eight pages.
_WALK_BYTES = 1 << 15
#: By bpftool's name of the link type; the others are links of no special kind.
_KINDS: dict[str, type[BpfLink]] = {
    "xdp": InterfaceLink,
    "tcx": InterfaceLink,
    "netkit": InterfaceLink,
    "cgroup": CgroupLink,
    "iter": IteratorLink,
}
