"""What the emulator has and random programs do not reach, with why, and the test that compares it with the kernel.

Everything else that the emulator has must be reached by a full run of the fuzzer; a test holds both.
"""

from __future__ import annotations

from typing import NamedTuple


class Elsewhere(NamedTuple):
    """Why it cannot be compared by random programs, and the test that compares it: a file of tests/ and a function."""

    why: str
    test: str


_NO_LOCKS = Elsewhere(
    "Linux lets socket filters use no map with a lock",
    "emulator/test_emulator_maps_locks.py::test_commands_with_a_lock",
)
_SOCKETS = "it is about sockets, which a test must have made"
_TYPES_OF_THE_KERNEL = "it takes what this one kernel's BTF describes"
_SECRET = "cookies are sealed with a secret that two machines do not share"
_NO_TEST_RUN = Elsewhere(
    "Linux has no test run of it", "emulator/test_emulator_events_access.py::test_what_may_be_loaded_and_stored"
)

#: Helpers, by name, or by program type and name.
HELPERS: dict[str, Elsewhere] = {
    "socket_filter spin_lock": _NO_LOCKS,
    "socket_filter spin_unlock": _NO_LOCKS,
    **{
        f"raw_tracepoint {helper}": _NO_LOCKS
        for helper in ("spin_lock", "spin_unlock", "timer_init", "timer_set_callback", "timer_start", "timer_cancel")
    },
    "sk_lookup_udp": Elsewhere(
        _SOCKETS, "emulator/test_emulator_socket_lookup.py::test_udp_sockets_are_found_as_the_kernel_scores_them"
    ),
    **dict.fromkeys(
        ("sk_lookup_tcp", "skc_lookup_tcp", "sk_release"),
        Elsewhere(_SOCKETS, "emulator/test_emulator_socket_lookup.py::test_tcp_sockets_are_found_and_shown"),
    ),
    **dict.fromkeys(
        (
            "sk_fullsock", "tcp_sock", "get_listener_sock", "skc_to_tcp_sock", "skc_to_tcp6_sock",
            "skc_to_tcp_timewait_sock", "skc_to_tcp_request_sock", "skc_to_udp6_sock", "skc_to_unix_sock",
            "skc_to_mptcp_sock",
        ),
        Elsewhere(_SOCKETS, "emulator/test_emulator_socket_lookup.py::test_views_are_there_or_not"),
    ),
    "sk_assign": Elsewhere(
        _SOCKETS, "emulator/test_emulator_socket_of_packet.py::test_a_test_run_assigns_no_socket"
    ),
    **dict.fromkeys(
        ("sk_cgroup_id", "sk_ancestor_cgroup_id"),
        Elsewhere(
            _SOCKETS,
            "emulator/test_emulator_socket_of_packet.py::test_it_is_in_the_control_group_of_the_process",
        ),
    ),
    **dict.fromkeys(
        ("sk_storage_get", "sk_storage_delete"),
        Elsewhere(
            _SOCKETS,
            "emulator/test_emulator_socket_storage.py::test_programs_and_descriptors_reach_the_same_values",
        ),
    ),
    **{
        f"tcp_raw_{what}_syncookie_ipv{version}": Elsewhere(
            _SECRET, "emulator/test_emulator_syncookies.py::test_a_cookie_says_the_segment_size"
        )
        for what in ("gen", "check")
        for version in (4, 6)
    },
    **dict.fromkeys(
        ("tcp_gen_syncookie", "tcp_check_syncookie"),
        Elsewhere(_SOCKETS, "emulator/test_emulator_syncookies.py::test_listeners_make_and_check_cookies"),
    ),
    "snprintf_btf": Elsewhere(
        _TYPES_OF_THE_KERNEL, "emulator/test_emulator_show.py::test_random_values_of_the_kernels_types"
    ),
    **dict.fromkeys(
        ("per_cpu_ptr", "this_cpu_ptr"),
        Elsewhere(
            _TYPES_OF_THE_KERNEL,
            "emulator/test_emulator_kernel_variables.py::test_each_processor_has_its_own",
        ),
    ),
    **dict.fromkeys(
        ("task_storage_get", "task_storage_delete", "cgrp_storage_get", "cgrp_storage_delete"),
        Elsewhere(
            "it is about what a program finds by following the kernel's pointers",
            "emulator/test_emulator_task_storage.py::test_values_of_what_a_program_holds",
        ),
    ),
}  # fmt: skip

#: Types of programs.
TYPES: dict[str, Elsewhere] = {
    **dict.fromkeys(("cgroup_sock", "cgroup_sock_addr", "sock_ops", "sk_reuseport"), _NO_TEST_RUN),
    **dict.fromkeys(
        ("kprobe", "tracepoint", "perf_event", "raw_tracepoint_writable"),
        Elsewhere(
            _NO_TEST_RUN.why,
            "emulator/test_emulator_tracing.py::test_each_helper_is_callable_as_in_the_kernel",
        ),
    ),
    "syscall": Elsewhere(
        "it may sleep, and so may not use what the others use",
        "emulator/test_emulator_tracing.py::test_syscall_programs_read_and_write_their_context",
    ),
}

#: Types of maps that no helper of the types that are generated reaches.
MAPS: dict[str, Elsewhere] = {
    type: Elsewhere(
        "only commands reach it",
        "emulator/test_emulator_maps_stateful.py::test_random_sequences_have_the_kernels_results",
    )
    for type in ("stack_trace", "sk_storage", "inode_storage", "task_storage", "cgrp_storage")
}


def where(helper: str, program_type: str) -> Elsewhere | None:
    """What is known of a helper as programs of that type call it; None if random programs do."""
    return HELPERS.get(helper) or HELPERS.get(f"{program_type} {helper}")
