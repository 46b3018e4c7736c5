"""Netfilter hooks of an emulated network, and links of programs to them (net/netfilter/nf_bpf_link.c, Linux 6.4).

The context (``struct bpf_nf_ctx``) is two pointers to structures of the kernel's own, as BTF describes them. Of
``struct nf_hook_state`` the emulator has the hook and the family, of ``struct sk_buff`` nothing.
"""

from __future__ import annotations

import bisect
import errno
from typing import TYPE_CHECKING

from kbpf.emulator.links import Link
from kbpf.emulator.memory import Region
from kbpf.emulator.packet import Packet
from kbpf.emulator.slot import error
from kbpf.info import LinkInfo
from kbpf.specs import NETFILTER_FAMILIES, NETFILTER_HOOKS, Netfilter
from kbpf.uapi.constants import BPF_F_NETFILTER_IP_DEFRAG

if TYPE_CHECKING:
    from kbpf.emulator.interpreter import Run
    from kbpf.emulator.program import Program

#: What a program says of a packet that may go on; all else drops it.
NF_ACCEPT = 1
#: MAX_HOOK_COUNT.
_MOST_PROGRAMS = 1024
#: NF_IP_PRI_FIRST and _LAST, which are the kernel's own, and _CONNTRACK_DEFRAG, where fragments are put together.
_FIRST, _LAST, _DEFRAG = -(1 << 31), (1 << 31) - 1, -400


class NetfilterContext:
    """A `kbpf.emulator.interpreter.Context`: of a hook (NF_INET_*), and a family (NFPROTO_*)."""

    __slots__ = ("_structures",)

    def __init__(self, hook: int, family: int) -> None:
        state = Region(bytes((hook, family)), writable=False)
        self._structures = state, Region(readable=False, writable=False)

    def show(self, run: Run) -> None:
        """The packet is the kernel's structure."""

    def load(self, offset: int, size: int) -> int | None:
        return self._structures[offset // 8].address if size == 8 and offset in (0, 8) else None

    def store(self, offset: int, size: int, value: int) -> bool:
        return False


class NetfilterLink(Link):
    """A program in a hook, which stays the one that it is."""

    type = "netfilter"

    def __init__(self, program: Program, hook: Netfilter, hooks: Hooks) -> None:
        super().__init__(program, "")
        self.hook = hook
        self.context = NetfilterContext(NETFILTER_HOOKS[hook.hook], NETFILTER_FAMILIES[hook.family])
        #: None once it is detached, which its info does not tell.
        self._hooks: Hooks | None = hooks

    @property
    def attached(self) -> bool:
        return self._hooks is not None

    @property
    def info(self) -> LinkInfo:
        hook = self.hook
        details = {
            "pf": NETFILTER_FAMILIES[hook.family],
            "hooknum": NETFILTER_HOOKS[hook.hook],
            "priority": hook.priority,
            "flags": BPF_F_NETFILTER_IP_DEFRAG if hook.defragment else 0,
        }
        return LinkInfo(self.type, self.id, self.program.id, details=details)

    def update(self, program: Program, old: Program | None) -> None:
        raise error(errno.EOPNOTSUPP)

    def detach(self) -> None:
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            hooks.at(self.hook.family, self.hook.hook).remove(self)


class Hooks:
    """The programs of one network."""

    def __init__(self) -> None:
        self._links: dict[tuple[str, str], list[NetfilterLink]] = {}

    def at(self, family: str, hook: str) -> list[NetfilterLink]:
        """Those of one hook, by rising priority."""
        return self._links.setdefault((family, hook), [])

    @property
    def used(self) -> bool:
        """Whether there are any."""
        return any(self._links.values())

    def attach(self, program: Program, hook: Netfilter) -> NetfilterLink:
        """BPF_LINK_CREATE; raises `OSError` with the kernel's errno."""
        if program.type != "netfilter":
            raise error(errno.EINVAL)
        if hook.priority in (_FIRST, _LAST) or (hook.defragment and hook.priority <= _DEFRAG):
            raise error(errno.ERANGE)
        there = self.at(hook.family, hook.hook)
        if any(link.hook.priority == hook.priority for link in there):
            raise error(errno.EBUSY)
        if len(there) == _MOST_PROGRAMS:
            raise error(errno.E2BIG)
        made = NetfilterLink(program, hook, self)
        bisect.insort(there, made, key=lambda link: link.hook.priority)
        return made

    def accept(self, hook: str, version: int) -> bool:
        """Whether the programs let an IP packet go on from a hook: the first one that does not ends its way."""
        there = self._links.get((f"ipv{version}", hook))
        if not there:
            return True
        nothing = Packet(buffer=b"")
        return all(link.program.execute(nothing, b"", link.context) == NF_ACCEPT for link in tuple(there))
