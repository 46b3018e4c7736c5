"""The links' part of the emulator: bpf(2)'s commands on them, and what is asked of the places that they lead to."""

from __future__ import annotations

import errno

from kbpf.backend import Attached
from kbpf.emulator import cgroup_links, cgroups, links, network, sockmap_links
from kbpf.emulator.descriptor_table import DescriptorTable
from kbpf.emulator.maps.base import refused
from kbpf.info import LinkInfo
from kbpf.specs import Netfilter

#: The type of programs that each place for links takes.
LINKED = {"xdp": "xdp", "tcx_ingress": "sched_cls", "tcx_egress": "sched_cls"}


class LinkCommands(DescriptorTable):
    """The links' part of the backend."""

    def link_create(
        self, program: int, target: int, attach_type: str, flags: int = 0, relative: int = 0, revision: int = 0
    ) -> int:
        found = self.program(program)
        if attach_type.startswith("cgroup_"):
            cgroup_links.check(found, attach_type, flags)
            with network.current().lock:
                group = self._group(target)
                there = cgroup_links.attach(found, group, attach_type, flags, relative, revision, self)
                return self._open(there)
        if attach_type in sockmap_links.PLACES:
            sockmap_links.check(found, attach_type, flags)
            with network.current().lock:
                return self._open(sockmap_links.attach_link(found, self.map(target), attach_type))
        if attach_type not in LINKED:
            raise OSError(errno.EOPNOTSUPP, f"the emulator does not attach programs to {attach_type} yet")
        if found.type != LINKED[attach_type]:
            raise refused(errno.EINVAL)
        with network.current().lock:
            device = network.current().by_index(target)
            if attach_type == "xdp":
                if device is None:
                    raise refused(errno.EINVAL)
                made: links.Link = links.attach_xdp(found, device, flags)
            else:
                if device is None:
                    raise refused(errno.ENODEV)
                made = links.attach_tcx(found, device, attach_type, flags, relative, revision, self)
            return self._open(made)

    def netfilter_link(self, program: int, hook: Netfilter) -> int:
        found = self.program(program)
        with network.current().lock:
            return self._open(network.current().inet.netfilter.attach(found, hook))

    def link_update(self, link: int, program: int, old: int | None = None) -> None:
        found = self.link(link)
        with network.current().lock:
            found.update(self.program(program), None if old is None else self.program(old))

    def link_detach(self, link: int) -> None:
        found = self.link(link)
        with network.current().lock:
            found.detach()

    def program_attach(
        self, program: int, target: int, attach_type: str, flags: int = 0, replaced: int | None = None
    ) -> None:
        found = self.program(program)
        if attach_type not in sockmap_links.PLACES:
            raise _by_links_only(attach_type)
        sockmap_links.check(found, attach_type, flags if replaced is None else -1)
        with network.current().lock:
            sockmap_links.attach(found, self.map(target), attach_type)

    def program_detach(self, program: int | None, target: int, attach_type: str) -> None:
        if attach_type not in sockmap_links.PLACES:
            raise _by_links_only(attach_type)
        if program is None:
            raise refused(errno.EINVAL)
        with network.current().lock:
            there, found = self.map(target), self.program(program)
            sockmap_links.check(found, attach_type)
            sockmap_links.detach(found, there, attach_type)

    def link_info(self, link: int) -> LinkInfo:
        return self.link(link).info

    def program_query(self, target: int, attach_type: str) -> Attached:
        if attach_type.startswith("cgroup_"):
            return cgroup_links.query(self._group(target), attach_type)
        if attach_type in sockmap_links.PLACES or attach_type in sockmap_links.LACKING:
            return sockmap_links.query(self.map(target), attach_type)
        device = network.current().by_index(target)
        if device is None:
            raise refused(errno.ENODEV)
        chain = device.tcx.get(attach_type, links.Chain())
        programs = tuple(link.program.id for link in chain.links)
        return Attached(chain.revision, programs, tuple(link.id for link in chain.links))

    def cgroup_open(self, path: str) -> int:
        return self._open(cgroups.find(path))

    def namespace_open(self, path: str) -> int:
        raise OSError(errno.EOPNOTSUPP, "the emulator attaches no programs to network namespaces yet")

    def _group(self, fd: int) -> cgroups.Group:
        """The control group behind a descriptor; EBADF."""
        found = self._handle(fd)
        if not isinstance(found, cgroups.Group):
            raise refused(errno.EBADF)
        return found

    def interface_index(self, name: str) -> int:
        network.current().bindable(name)
        return network.current().interface(name).index


def _by_links_only(attach_type: str) -> OSError:
    return OSError(errno.EOPNOTSUPP, f"the emulator attaches programs by links only, not to {attach_type}")
