/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * A gate between two interfaces.
 *
 * Program `gate`, for XDP: counts IPv4 packets by protocol in the per-CPU map `passed` or `dropped`, and drops
 * those of the protocols that are set in the map `closed`. Program `forward`, for tcx/ingress: sends what has passed
 * out of the interface whose index is in the map `target`; 0: on to the stack.
 */
#include "kbpf.bpf.h"

#define PROTOCOLS 256

/* linux/bpf.h, as far as it is used here alone. */
struct xdp_md {
	__u32 data;
	__u32 data_end;
};

enum {
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	XDP_DROP = 1,
	XDP_PASS = 2,
	TCX_PASS = 0,
};

static long (*bpf_redirect)(__u32 index, __u64 flags) = (void *)23;

struct counters {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, PROTOCOLS);
};

struct counters passed SEC(".maps");
struct counters dropped SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, PROTOCOLS);
} closed SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, 1);
} target SEC(".maps");

SEC("xdp")
int gate(struct xdp_md *xdp)
{
	const __u8 *frame = (const __u8 *)(long)xdp->data;
	__u32 protocol, *shut;
	__u64 *counter;

	if (frame + 34 > (const __u8 *)(long)xdp->data_end || frame[12] != 0x08 || frame[13] != 0x00)
		return XDP_PASS;
	protocol = frame[23];
	shut = bpf_map_lookup_elem(&closed, &protocol);
	counter = shut && *shut ? bpf_map_lookup_elem(&dropped, &protocol) : bpf_map_lookup_elem(&passed, &protocol);
	if (counter)
		++*counter;
	return shut && *shut ? XDP_DROP : XDP_PASS;
}

SEC("tcx/ingress")
int forward(struct __sk_buff *skb __attribute__((unused)))
{
	__u32 first = 0, *index = bpf_map_lookup_elem(&target, &first);

	return index && *index ? bpf_redirect(*index, 0) : TCX_PASS;
}
