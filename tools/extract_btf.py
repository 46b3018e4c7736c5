"""Write tools/uapi/vmlinux.btf: the few types of the running kernel's BTF that kbpf/uapi is made from.

    python tools/extract_btf.py [/sys/kernel/btf/vmlinux [OUTPUT]]

Needs a kernel with CONFIG_DEBUG_INFO_BTF. What is kept is listed below; pointers lose what they point to, so that
the extract stays small. The same kernel gives the same bytes. Run generate_uapi.py afterwards.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from generate_uapi import EXTRACT, RELEASE, btf  # (loads kbpf.elf.btf)

ENUMS = [
    "bpf_cmd",
    "bpf_map_type",
    "bpf_prog_type",
    "bpf_attach_type",
    "bpf_link_type",
    "bpf_func_id",
    "bpf_stats_type",
    "bpf_ret_code",
    "bpf_adj_room_mode",
    "bpf_hdr_start_off",
    "bpf_lwt_encap_mode",
    "bpf_check_mtu_flags",
    "bpf_check_mtu_ret",
    "bpf_task_fd_type",
    "bpf_cgroup_iter_order",
    "xdp_action",
    "sk_action",
    "tcx_action_base",
]

# The anonymous enums of linux/bpf.h, each by its first name.
ANONYMOUS = [
    "BPF_ANY",
    "BPF_F_NO_PREALLOC",
    "BPF_F_UPROBE_MULTI_RETURN",
    "BPF_F_KPROBE_MULTI_RETURN",
    "BPF_F_INDEX_MASK",
    "BPF_F_GET_BRANCH_RECORDS_SIZE",
    "BPF_F_TIMER_ABS",
    "BTF_F_COMPACT",
    "BPF_RB_NO_WAKEUP",
    "BPF_RB_AVAIL_DATA",
    "BPF_RINGBUF_BUSY_BIT",
    "BPF_LOCAL_STORAGE_GET_F_CREATE",
    "BPF_F_INGRESS",
    "BPF_F_SKIP_FIELD_MASK",
    "BPF_F_SYSCTL_BASE_NAME",
    "BPF_F_BPRM_SECUREEXEC",
    "BPF_SOCK_OPS_VOID",
    "BPF_FLOW_DISSECTOR_F_PARSE_1ST_FRAG",
    "BPF_F_RECOMPUTE_CSUM",
    "BPF_F_HDR_FIELD_MASK",
    "BPF_F_PSEUDO_HDR",
    "BPF_F_TUNINFO_IPV6",
    "BPF_F_ZERO_CSUM_TX",
    "BPF_F_TUNINFO_FLAGS",
    "BPF_CSUM_LEVEL_QUERY",
    "BPF_F_ADJ_ROOM_FIXED_GSO",
    "BPF_ADJ_ROOM_ENCAP_L2_MASK",
    "BPF_SK_LOOKUP_F_REPLACE",
    "BPF_SKB_TSTAMP_UNSPEC",
    "BPF_SOCK_OPS_RTO_CB_FLAG",
    "SK_BPF_CB_TX_TIMESTAMPING",
    "TCP_BPF_IW",
    "BPF_LOAD_HDR_OPT_TCP_SYN",
    "BPF_WRITE_HDR_TCP_CURRENT_MSS",
    "BPF_TCP_ESTABLISHED",
    "BPF_FIB_LOOKUP_DIRECT",
    "BPF_FIB_LKUP_RET_SUCCESS",
    "BPF_F_CURRENT_NETNS",
    "BPF_DEVCG_ACC_MKNOD",
    "BPF_F_USER_STACK",
    "BPF_STREAM_STDOUT",
]

STRUCTS = [
    "__sk_buff",
    "xdp_md",
    "bpf_sock",
    "bpf_sock_tuple",
    "bpf_sock_addr",
    "bpf_sock_ops",
    "bpf_sk_lookup",
    "sk_reuseport_md",
    "sk_msg_md",
    "bpf_flow_keys",
    "bpf_tcp_sock",
    "bpf_tunnel_key",
    "bpf_xfrm_state",
    "bpf_fib_lookup",
    "bpf_redir_neigh",
    "bpf_perf_event_data",
    "bpf_perf_event_value",
    "bpf_cgroup_dev_ctx",
    "bpf_sysctl",
    "bpf_sockopt",
    "bpf_pidns_info",
    "btf_ptr",
    "bpf_spin_lock",
    "bpf_timer",
    "bpf_devmap_val",
    "bpf_cpumap_val",
    "bpf_func_info",
    "bpf_line_info",
    "bpf_prog_info",
    "bpf_map_info",
    "bpf_btf_info",
    "bpf_link_info",
]


def extract(source: btf.Btf) -> bytes:
    """The wanted types and all that they are made of, as BTF."""
    wanted = {(btf.ENUM, name) for name in ENUMS} | {(btf.STRUCT, name) for name in STRUCTS} | {(btf.UNION, "bpf_attr")}
    roots = []
    for record in source.records:
        if record.kind in (btf.ENUM, btf.ENUM64) and not record.name:
            keep = bool(record.items) and record.items[0].name in ANONYMOUS
        else:
            keep = (record.kind, record.name) in wanted
            wanted.discard((record.kind, record.name))
        if keep:
            roots.append(record.id)
    kept: dict[int, int] = {0: 0}
    pending = roots[::-1]
    while pending:
        id = pending.pop()
        if id not in kept:
            kept[id] = len(kept)
            pending.extend(reversed(_refers_to(source[id])))
    strings = _Strings()
    body = b"".join(_encode(source[id], kept, strings) for id in kept if id)
    text = strings.data
    return struct.pack("=HBBIIIII", btf.MAGIC, 1, 0, 24, 0, len(body), len(body), len(text)) + body + bytes(text)


def _refers_to(record: btf.Record) -> list[int]:
    if record.kind in btf.MODIFIERS:
        return [record.word]
    if record.kind == btf.ARRAY:
        return [*record.data[:2]]
    if record.kind in (btf.STRUCT, btf.UNION):
        return [member.type for member in record.items]
    return []


class _Strings:
    def __init__(self) -> None:
        self.data = bytearray(b"\0")
        self._known = {"": 0}

    def add(self, text: str) -> int:
        if text not in self._known:
            self._known[text] = len(self.data)
            self.data += text.encode() + b"\0"
        return self._known[text]


def _encode(record: btf.Record, ids: dict[int, int], strings: _Strings) -> bytes:
    kind, word, items = record.kind, record.word, record.items
    if kind == btf.PTR:
        word = 0
    elif kind in btf.MODIFIERS:
        word = ids[word]
    head = struct.pack("=III", strings.add(record.name), record.flag << 31 | kind << 24 | len(items), word)
    if kind in (btf.STRUCT, btf.UNION):
        return head + b"".join(
            struct.pack("=III", strings.add(m.name), ids[m.type], m.bit_size << 24 | m.bit_offset) for m in items
        )
    if kind == btf.ENUM:
        return head + b"".join(struct.pack("=II", strings.add(e.name), e.value & 0xFFFFFFFF) for e in items)
    if kind == btf.ENUM64:
        return head + b"".join(
            struct.pack("=III", strings.add(e.name), e.value & 0xFFFFFFFF, e.value >> 32 & 0xFFFFFFFF) for e in items
        )
    if kind == btf.ARRAY:
        element, index, count = record.data
        return head + struct.pack("=III", ids[element], ids[index], count)
    return head + struct.pack(f"={len(record.data)}I", *record.data)


def main() -> None:
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "/sys/kernel/btf/vmlinux")
    output = Path(sys.argv[2]) if len(sys.argv) > 2 else EXTRACT
    data = extract(btf.Btf(source.read_bytes(), str(source)))
    output.write_bytes(data)
    if output == EXTRACT:
        RELEASE.write_text(os.uname().release + "\n")
    print(f"{output}: {len(data)} bytes")


if __name__ == "__main__":
    main()
