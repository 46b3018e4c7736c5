/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * Bytes per IP protocol.
 *
 * Program `count`, for SO_ATTACH_BPF on any socket; map `bytes`: protocol number -> bytes of IP packets,
 * headers included, of IPv4 and IPv6 together. Outgoing packets are not counted. Nothing is dropped.
 */
#include "packet.bpf.h"

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, __u64);
	__uint(max_entries, 256);
} bytes SEC(".maps");

SEC("socket")
int count(struct __sk_buff *skb)
{
	struct packet packet;
	__u64 *counter;

	if (find_packet(skb, &packet) < 0)
		return KEEP_ALL;
	counter = bpf_map_lookup_elem(&bytes, &packet.protocol);
	if (counter)
		__sync_fetch_and_add(counter, packet.bytes);
	return KEEP_ALL;
}
