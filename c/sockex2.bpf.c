/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * Packets and bytes per flow.
 *
 * Program `count`, for SO_ATTACH_BPF on any socket; map `flows`: struct flow -> struct counters. A flow has
 * one direction. Bytes are of IP packets, headers included. Outgoing packets are not counted. Nothing is
 * dropped. When the map is full, packets of new flows are not counted.
 */
#include "packet.bpf.h"

#define AF_INET 2
#define AF_INET6 10

enum { TCP = 6, UDP = 17, DCCP = 33, SCTP = 132, UDPLITE = 136 };

struct flow {
	__u16 family;           /* AF_INET or AF_INET6 */
	__u16 protocol;
	__u16 source_port;      /* host order; 0 where there are none, as in all fragments but the first */
	__u16 destination_port;
	__u8 source[16];        /* network order; IPv4 has the first four bytes, the others are 0 */
	__u8 destination[16];
};

struct counters {
	__u64 packets;
	__u64 bytes;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__type(key, struct flow);
	__type(value, struct counters);
	__uint(max_entries, 16384);
} flows SEC(".maps");

static __always_inline int has_ports(__u32 protocol)
{
	return protocol == TCP || protocol == UDP || protocol == DCCP || protocol == SCTP || protocol == UDPLITE;
}

SEC("socket")
int count(struct __sk_buff *skb)
{
	struct flow flow = {};
	struct counters *counters, zero = {};
	struct packet packet;
	__u16 ports[2];

	if (find_packet(skb, &packet) < 0)
		return KEEP_ALL;
	flow.protocol = packet.protocol;
	if (packet.version == 4) {
		flow.family = AF_INET;
		if (load(skb, packet.addresses, flow.source, 4) < 0 ||
		    load(skb, packet.addresses + 4, flow.destination, 4) < 0)
			return KEEP_ALL;
	} else {
		flow.family = AF_INET6;
		if (load(skb, packet.addresses, flow.source, 16) < 0 ||
		    load(skb, packet.addresses + 16, flow.destination, 16) < 0)
			return KEEP_ALL;
	}
	if (packet.transport && has_ports(packet.protocol) && load(skb, packet.transport, ports, sizeof(ports)) == 0) {
		flow.source_port = ntohs(ports[0]);
		flow.destination_port = ntohs(ports[1]);
	}
	counters = bpf_map_lookup_elem(&flows, &flow);
	if (!counters) {
		/* Another processor may have been first. */
		bpf_map_update_elem(&flows, &flow, &zero, BPF_NOEXIST);
		counters = bpf_map_lookup_elem(&flows, &flow);
	}
	if (counters) {
		__sync_fetch_and_add(&counters->packets, 1);
		__sync_fetch_and_add(&counters->bytes, packet.bytes);
	}
	return KEEP_ALL;
}
