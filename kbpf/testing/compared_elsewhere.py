"""What the emulator has and random programs do not reach, with why, and the test that compares it with the kernel.

Everything else that the emulator has must be reached by a full run of the fuzzer; a test holds both. A line has why,
then a file of tests/emulator and a function in it, then what it is about, by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Elsewhere(NamedTuple):
    """Why it cannot be compared by random programs, and the test that compares it: a file of tests/ and a function."""

    why: str
    test: str


def _table(lines: Iterable[tuple[str, str, str]]) -> dict[str, Elsewhere]:
    return {
        name: Elsewhere(why, "emulator/test_emulator_" + test.replace(" ", ".py::test_"))
        for why, test, names in lines
        for name in names.split(", ")
    }


_LOCKS = "Linux lets it use no map with a lock or a timer"
_SOCKETS = "it is about sockets, which a test must have made"
_SECRET = "cookies are sealed with a secret that two machines do not share"
_GROUPS = "it is about control groups, which a test must have made"
_COUNTERS = "it is about counters, which go on counting"
_THREADS = "it is about the thread that runs the program, its memory and its stacks"
_EVENTS = "it is about an event that a test must have made"
_KERNEL = "it takes what this one kernel's BTF describes"
_NO_TEST_RUN = "Linux has no test run of it"
_SLEEPS = "it may sleep, and so may not use what the others use"
_COMMANDS = "only commands reach it"

#: Helpers, by name, or by program type and name.
HELPERS: dict[str, Elsewhere] = _table((
    (_LOCKS, "maps_locks commands_with_a_lock", "socket_filter spin_lock, socket_filter spin_unlock"),
    (_LOCKS, "maps_locks commands_with_a_lock", "raw_tracepoint spin_lock, raw_tracepoint spin_unlock"),
    (_LOCKS, "timers timers", "raw_tracepoint timer_init, raw_tracepoint timer_set_callback"),
    (_LOCKS, "timers timers", "raw_tracepoint timer_start, raw_tracepoint timer_cancel"),
    (_SOCKETS, "socket_lookup udp_sockets_are_found_as_the_kernel_scores_them", "sk_lookup_udp"),
    (_SOCKETS, "socket_lookup tcp_sockets_are_found_and_shown", "sk_lookup_tcp, skc_lookup_tcp, sk_release"),
    (_SOCKETS, "socket_lookup views_are_there_or_not", "sk_fullsock, tcp_sock, get_listener_sock"),
    (_SOCKETS, "socket_lookup views_are_there_or_not", "skc_to_tcp_sock, skc_to_tcp6_sock, skc_to_tcp_timewait_sock"),
    (_SOCKETS, "socket_lookup views_are_there_or_not", "skc_to_tcp_request_sock, skc_to_udp6_sock, skc_to_unix_sock"),
    (_SOCKETS, "socket_lookup views_are_there_or_not", "skc_to_mptcp_sock"),
    (_SOCKETS, "socket_of_packet a_test_run_assigns_no_socket", "sk_assign"),
    (_SOCKETS, "socket_of_packet it_is_in_the_control_group_of_the_process", "sk_cgroup_id, sk_ancestor_cgroup_id"),
    (_SOCKETS, "socket_storage programs_and_descriptors_reach_the_same_values", "sk_storage_get, sk_storage_delete"),
    (_SOCKETS, "socket_options values", "getsockopt, setsockopt"),
    (_SOCKETS, "cgroup_sockets a_program_binds_before_a_socket_connects", "bind"),
    (_SOCKETS, "maps_sockets a_socket_of_the_group_is_selected", "sk_select_reuseport"),
    (_SOCKETS, "maps_sockets_hooks a_connection_is_put_into_a_map", "sock_map_update, sock_hash_update"),
    (_SOCKETS, "sk_skb bytes_are_redirected_in_order", "sk_redirect_map, sk_redirect_hash"),
    (_SOCKETS, "sk_msg messages_are_redirected", "msg_redirect_map, msg_redirect_hash"),
    (_SOCKETS, "sk_msg messages_are_cut_and_held_back", "msg_apply_bytes, msg_cork_bytes, msg_pull_data, msg_pop_data"),
    (_SOCKETS, "sk_msg bytes_are_put_in", "msg_push_data"),
    (_SOCKETS, "syncookies listeners_make_and_check_cookies", "tcp_gen_syncookie, tcp_check_syncookie"),
    (_SECRET, "syncookies a_cookie_says_the_segment_size", "tcp_raw_gen_syncookie_ipv4, tcp_raw_check_syncookie_ipv4"),
    (_SECRET, "syncookies a_cookie_says_the_segment_size", "tcp_raw_gen_syncookie_ipv6, tcp_raw_check_syncookie_ipv6"),
    (_GROUPS, "maps_cgroup who_is_in_a_group", "current_task_under_cgroup, skb_under_cgroup"),
    (_COUNTERS, "perf_counters what_may_be_read_from_here", "perf_event_read, perf_event_read_value"),
    (_THREADS, "tracing_helpers programs_of_all_types_get_the_thread", "get_current_task, get_current_task_btf"),
    (_THREADS, "tracing_helpers the_threads_registers_are_read_by_probes", "task_pt_regs"),
    (_THREADS, "tracing_helpers areas_of_memory_are_found", "find_vma"),
    (_THREADS, "tracing_helpers stacks_are_cut_and_skipped_as_in_the_kernel", "get_stack, get_task_stack"),
    (_THREADS, "tracing_helpers stacks_have_the_kernels_ids", "get_stackid"),
    (_THREADS, "task_storage values_of_what_a_program_holds", "task_storage_get, task_storage_delete"),
    (_THREADS, "task_storage values_of_what_a_program_holds", "cgrp_storage_get, cgrp_storage_delete"),
    (_EVENTS, "tracing_helpers it_gives_what_the_kernel_gives", "get_branch_snapshot, get_attach_cookie"),
    (_EVENTS, "events a_uprobe_on_a_function_of_a_child", "get_func_ip"),
    (_EVENTS, "events a_perf_event_of_page_faults", "perf_prog_read_value, read_branch_records"),
    (_NO_TEST_RUN, "cgroup_contexts what_the_system_call_returns", "get_retval, set_retval"),
    (_NO_TEST_RUN, "sock_ops options_are_reserved_and_written", "load_hdr_opt, reserve_hdr_opt, store_hdr_opt"),
    (_NO_TEST_RUN, "cgroup_machine sysctls", "sysctl_get_current_value, sysctl_get_name"),
    (_NO_TEST_RUN, "cgroup_machine sysctls", "sysctl_get_new_value, sysctl_set_new_value"),
    (_NO_TEST_RUN, "sock_ops states_are_told_where_they_were_asked_for", "sock_ops_cb_flags_set"),
    (_KERNEL, "show random_values_of_the_kernels_types", "snprintf_btf"),
    (_KERNEL, "kernel_variables each_processor_has_its_own", "per_cpu_ptr, this_cpu_ptr"),
))  # fmt: skip

#: Types of programs. Their helpers that no other type has are in the table above.
TYPES: dict[str, Elsewhere] = _table((
    (_NO_TEST_RUN, "events_access what_may_be_loaded_and_stored", "cgroup_sock, cgroup_sock_addr"),
    (_NO_TEST_RUN, "events_access what_may_be_loaded_and_stored", "sock_ops, sk_reuseport"),
    (_NO_TEST_RUN, "sk_skb what_programs_see", "sk_skb"),
    (_NO_TEST_RUN, "sk_msg what_programs_see", "sk_msg"),
    (_KERNEL, "netfilter hooks_and_families", "netfilter"),
    (_NO_TEST_RUN, "lwt programs_of_segments_have_no_test_run", "lwt_seg6local"),
    (_NO_TEST_RUN, "cgroup_machine devices", "cgroup_device"),
    (_NO_TEST_RUN, "cgroup_machine sysctls", "cgroup_sysctl"),
    (_NO_TEST_RUN, "cgroup_machine an_option_is_set", "cgroup_sockopt"),
    (_NO_TEST_RUN, "tracing each_helper_is_callable_as_in_the_kernel", "kprobe, tracepoint, perf_event"),
    (_NO_TEST_RUN, "tracing each_helper_is_callable_as_in_the_kernel", "raw_tracepoint_writable"),
    (_SLEEPS, "tracing syscall_programs_read_and_write_their_context", "syscall"),
))  # fmt: skip

#: Types of maps that no helper of the types that are generated reaches.
MAPS: dict[str, Elsewhere] = _table((
    (_COMMANDS, "maps_stateful random_sequences_have_the_kernels_results", "stack_trace, inode_storage, cgroup_array"),
    (_COMMANDS, "maps_stateful random_sequences_have_the_kernels_results", "sk_storage, task_storage, cgrp_storage"),
    (_SOCKETS, "maps_sockets programs_find_sockets", "sockmap, sockhash, reuseport_sockarray"),
))  # fmt: skip


def where(helper: str, program_type: str) -> Elsewhere | None:
    """What is known of a helper as programs of that type call it; None if random programs do."""
    return HELPERS.get(helper) or HELPERS.get(f"{program_type} {helper}")
