/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * An event for each packet.
 *
 * Program `watch`, for SO_ATTACH_BPF on any socket: writes a `struct event` to the ring buffer `events` for each
 * packet, and counts in `dropped` those for which there was no room. No packet is dropped.
 */
#include "kbpf.bpf.h"

/* linux/bpf.h, as far as it is used here alone. */
enum {
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
	BPF_MAP_TYPE_RINGBUF = 27,
};

static __u64 (*bpf_ktime_get_ns)(void) = (void *)5;
static void *(*bpf_ringbuf_reserve)(void *ringbuf, __u64 size, __u64 flags) = (void *)131;
static void (*bpf_ringbuf_submit)(void *data, __u64 flags) = (void *)132;

struct event {
	__u64 time;	/* of the monotonic clock, nanoseconds */
	__u32 length;	/* on the wire */
	__u16 protocol;	/* ETH_P_* */
	__u16 direction;	/* PACKET_HOST, PACKET_OUTGOING, ... */
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 256 * 1024);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 1);
} dropped SEC(".maps");

SEC("socket")
int watch(struct __sk_buff *skb)
{
	struct event *event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	__u32 zero = 0;
	__u64 *count;

	if (!event) {
		count = bpf_map_lookup_elem(&dropped, &zero);
		if (count)
			*count += 1;
		return KEEP_ALL;
	}
	event->time = bpf_ktime_get_ns();
	event->length = skb->len;
	event->protocol = ntohs(skb->protocol);
	event->direction = skb->pkt_type;
	bpf_ringbuf_submit(event, 0);
	return KEEP_ALL;
}
