"""Links to control groups: what is refused, and the order of a hook's programs, against the kernel."""

from __future__ import annotations

import time
from random import Random
from typing import Any

import pytest
from groups import Nested, emulated_groups, real_groups
from hooks import returns
from sides import Side

from kbpf.specs import ProgramSpec
from kbpf.uapi.constants import BPF_F_AFTER, BPF_F_BEFORE, BPF_F_ID, BPF_F_LINK, BPF_F_PREORDER

pytestmark = pytest.mark.requires("kernel")

HOOK = "cgroup_inet4_bind"
NOWHERE = 9999
SEEDS, STEPS = 120, 14


class Holder:
    """One side's programs and links in the inner group."""

    def __init__(self, groups: Nested) -> None:
        self.groups, self.backend = groups, groups.side.backend
        self.programs = [
            self.backend.program_load(
                ProgramSpec(type="cgroup_sock_addr", instructions=tuple(returns(1)), expected_attach_type=hook), []
            )
            for hook in (HOOK, HOOK, HOOK, "cgroup_inet6_bind")
        ]
        self.links: list[int] = []

    def do(self, name: str, *arguments: Any) -> Any:
        """What it gives, or the errno that it ends with."""
        try:
            return getattr(self, name)(*arguments)
        except OSError as error:
            return error.errno

    def create(self, program: int, flags: int, beside: str, link: int, revision: int) -> None:
        relative = 0
        if beside == "link" and not self.links and not flags & BPF_F_ID:
            # Descriptor 0 is open on the kernel's side only.
            flags &= ~BPF_F_LINK
        if beside == "link" and self.links:
            relative = self.links[link % len(self.links)]
            if flags & BPF_F_ID:
                relative = self.backend.link_info(relative).id
        elif beside == "program":
            relative = self.programs[0]
        elif beside == "nowhere":
            relative = 1 << 30 if flags & BPF_F_ID else NOWHERE
        self.links.append(
            self.backend.link_create(self.programs[program], self.groups.inner, HOOK, flags, relative, revision)
        )

    def update(self, link: int, program: int, old: int | None) -> None:
        if self.links:
            self.backend.link_update(
                self.links[link % len(self.links)], self.programs[program], None if old is None else self.programs[old]
            )

    def detach(self, link: int) -> None:
        if self.links:
            self.backend.link_detach(self.links[link % len(self.links)])

    def drop(self, link: int) -> None:
        if self.links:
            self.backend.close(self.links.pop(link % len(self.links)))

    def state(self) -> Any:
        """The hook's programs, by number, its revision, and what the links say."""
        ids = {self.backend.program_info(fd).id: number for number, fd in enumerate(self.programs)}
        query = self.backend.program_query(self.groups.inner, HOOK)
        infos = [self.backend.link_info(link) for link in self.links]
        links = [(info.type, ids[info.program_id], info.attach_type, bool(info.cgroup_id)) for info in infos]
        return query.revision, [ids[id] for id in query.program_ids], query.link_ids, links

    def close(self) -> None:
        for fd in (*self.links, *self.programs):
            self.backend.close(fd)


def test_an_order_of_ones_own(kernel: Side, emulator: Side) -> None:
    """Random sequences of what can be done with links come out alike, and are refused alike."""
    for seed in range(SEEDS):
        rng = Random(seed)
        with real_groups(kernel) as real, emulated_groups(emulator) as ours:
            truth, found = Holder(real), Holder(ours)
            for _ in range(STEPS):
                step = random_step(rng)
                expected = truth.do(*step), truth.state()
                assert (found.do(*step), found.state()) == expected, (seed, step)
            truth.close()
            found.close()


def random_step(rng: Random) -> tuple[Any, ...]:
    link = rng.randrange(8)
    kind = rng.choice(("create",) * 5 + ("update", "detach", "drop"))
    if kind == "update":
        return kind, link, rng.randrange(4), rng.choice((None, 0, 1))
    if kind != "create":
        return kind, link
    flags = sum(flag for flag in (BPF_F_BEFORE, BPF_F_AFTER, BPF_F_PREORDER) if rng.random() < 0.4)
    beside = rng.choice(("none", "link", "link", "program", "nowhere"))
    if beside in ("link", "program", "nowhere"):
        flags |= rng.choice((0, BPF_F_LINK, BPF_F_LINK, BPF_F_LINK | BPF_F_ID, BPF_F_ID))
        if beside == "program":
            flags &= ~BPF_F_ID
    if rng.random() < 0.1:
        flags |= rng.choice((1, 2, 4, 0x80))
    return kind, rng.randrange(4), flags, beside, link, rng.choice((0, 0, 0, 1, 2, 3, 4, 5))


def test_a_hook_has_room_for_64_programs(kernel: Side, emulator: Side) -> None:
    with real_groups(kernel) as real, emulated_groups(emulator) as ours:
        for groups in (real, ours):
            holder = Holder(groups)
            refused = [holder.do("create", 0, 0, "none", 0, 0) for _ in range(66)]
            assert refused == [None] * 64 + [7] * 2
            assert holder.do("create", 0, BPF_F_BEFORE | BPF_F_LINK, "nowhere", 0, 0) == 7
            holder.close()


PLACES = [
    ("cgroup_skb", "cgroup_inet_ingress"),
    ("cgroup_skb", "cgroup_inet_egress"),
    ("cgroup_sock", "cgroup_inet_sock_create"),
    ("cgroup_sock", "cgroup_inet4_post_bind"),
    ("cgroup_sock_addr", "cgroup_inet4_connect"),
    ("cgroup_sock_addr", "cgroup_unix_recvmsg"),
    ("sock_ops", "cgroup_sock_ops"),
    ("cgroup_device", "cgroup_device"),
    ("cgroup_sysctl", "cgroup_sysctl"),
    ("cgroup_sockopt", "cgroup_getsockopt"),
    ("socket_filter", "cgroup_inet_ingress"),
    ("sk_reuseport", "sk_reuseport_select"),
]


def test_which_programs_go_where(kernel: Side, emulator: Side) -> None:
    hooks = sorted({hook for _, hook in PLACES if hook.startswith("cgroup_")})
    with real_groups(kernel) as real, emulated_groups(emulator) as ours:
        for type, loaded_for in PLACES:
            spec = ProgramSpec(type=type, instructions=tuple(returns(1)), expected_attach_type=loaded_for)
            fds = [side.backend.program_load(spec, []) for side in (kernel, emulator)]
            for hook in hooks:
                for flags in (0, BPF_F_LINK << 1):
                    answers = [attempt(groups, fd, hook, flags) for groups, fd in zip((real, ours), fds, strict=True)]
                    assert answers[0] == answers[1], (type, hook, flags)
            for side, fd in zip((kernel, emulator), fds, strict=True):
                side.backend.close(fd)


def attempt(groups: Nested, program: int, hook: str, flags: int) -> int:
    try:
        groups.side.backend.close(groups.attach(program, hook, flags=flags))
    except OSError as error:
        return error.errno or -1
    return 0


def test_a_group_that_goes_takes_its_programs_off(kernel: Side, emulator: Side) -> None:
    found = []
    for side, making in ((kernel, real_groups), (emulator, emulated_groups)):
        spec = ProgramSpec(type="sock_ops", instructions=tuple(returns(1)), expected_attach_type="cgroup_sock_ops")
        program = side.backend.program_load(spec, [])
        with making(side) as groups:
            link = groups.attach(program, "cgroup_sock_ops")
            assert side.backend.link_info(link).cgroup_id
        info = side.backend.link_info(link)
        for _ in range(200):
            # Linux takes programs off when it comes to it.
            if not info.cgroup_id:
                break
            time.sleep(0.05)
            info = side.backend.link_info(link)
        with pytest.raises(OSError, match=r".") as refused:
            side.backend.link_update(link, program)
        side.backend.link_detach(link)
        found.append((info.type, info.attach_type, info.cgroup_id, refused.value.errno))
        side.backend.close(link)
        side.backend.close(program)
    assert found[0] == found[1]
