/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * Finding the IP packet, the same on every socket.
 *
 * What lies at offset 0 depends on the socket: the Ethernet header, the IP header, the UDP header.
 * The network header is where Linux says it is on all of them, and under BPF_PROG_TEST_RUN.
 */
#pragma once

#include "kbpf.bpf.h"

#define ETH_P_IP 0x0800
#define ETH_P_8021Q 0x8100
#define ETH_P_IPV6 0x86dd
#define ETH_P_8021AD 0x88a8

#define IPV6_HEADER 40
#define MAX_EXTENSIONS 6

enum { HOP_BY_HOP = 0, ROUTING = 43, FRAGMENT = 44, AUTHENTICATION = 51, DESTINATION = 60 };

struct packet {
	__u32 version;     /* 4 or 6 */
	__u32 bytes;       /* length of the IP packet, its header included */
	__u32 protocol;    /* of the transport, behind IPv6's extension headers */
	__u32 addresses;   /* offset of the source address from the network header; the destination follows it */
	__u32 transport;   /* offset of the transport header; 0 in all fragments but the first */
};

static __always_inline int load(struct __sk_buff *skb, __u32 offset, void *to, __u32 length)
{
	return bpf_skb_load_bytes_relative(skb, offset, to, length, BPF_HDR_START_NET);
}

static __always_inline int find_ipv4(struct __sk_buff *skb, __u32 start, struct packet *packet)
{
	struct {
		__u8 version_length;
		__u8 tos;
		__u16 length;
		__u16 id;
		__u16 fragment;
		__u8 ttl;
		__u8 protocol;
	} ip;
	__u32 header;

	if (load(skb, start, &ip, 10) < 0)
		return -1;
	header = (ip.version_length & 15) * 4;
	if (ip.version_length >> 4 != 4 || header < 20)
		return -1;
	packet->version = 4;
	packet->bytes = ntohs(ip.length);
	packet->protocol = ip.protocol;
	packet->addresses = start + 12;
	packet->transport = ip.fragment & htons(0x1fff) ? 0 : start + header;
	return 0;
}

static __always_inline int find_ipv6(struct __sk_buff *skb, __u32 start, struct packet *packet)
{
	struct {
		__u8 version;
		__u8 flow[3];
		__u16 length;
		__u8 next;
		__u8 hops;
	} ip;
	__u32 next, offset = start + IPV6_HEADER;

	if (load(skb, start, &ip, sizeof(ip)) < 0 || ip.version >> 4 != 6)
		return -1;
	packet->version = 6;
	packet->bytes = ip.length ? ntohs(ip.length) + IPV6_HEADER : 0;
	packet->addresses = start + 8;
	next = ip.next;
#pragma unroll
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		struct {
			__u8 next;
			__u8 length;
			__u16 fragment;
		} extension;

		if (next != HOP_BY_HOP && next != ROUTING && next != FRAGMENT && next != AUTHENTICATION &&
		    next != DESTINATION)
			break;
		if (load(skb, offset, &extension, sizeof(extension)) < 0)
			break;
		if (next == FRAGMENT) {
			offset += 8;
			/* Only the first fragment goes on with headers. */
			if (extension.fragment & htons(0xfff8)) {
				next = extension.next;
				offset = 0;
				break;
			}
		} else if (next == AUTHENTICATION) {
			offset += (extension.length + 2) * 4;
		} else {
			offset += (extension.length + 1) * 8;
		}
		next = extension.next;
	}
	packet->protocol = next;
	packet->transport = offset;
	return 0;
}

/* Fill in `packet`; negative if this is not an IP packet, or the outgoing copy of one. */
static __always_inline int find_packet(struct __sk_buff *skb, struct packet *packet)
{
	__u16 protocol = skb->protocol;
	__u32 start = 0;
	int failed = -1;

	/* On loopback a packet socket sees each packet twice. */
	if (skb->pkt_type == PACKET_OUTGOING)
		return -1;
	/* The outer VLAN tag is in the metadata, a second one is still in front of the IP header. */
	if (protocol == htons(ETH_P_8021Q) || protocol == htons(ETH_P_8021AD)) {
		start = 4;
		if (load(skb, 2, &protocol, sizeof(protocol)) < 0)
			return -1;
	}
	/* UNIX and netlink sockets have no protocol, and their payload must not pass for a header. */
	if (protocol == htons(ETH_P_IP))
		failed = find_ipv4(skb, start, packet);
	else if (protocol == htons(ETH_P_IPV6))
		failed = find_ipv6(skb, start, packet);
	/* Above 64 KiB (BIG TCP) the header says 0: take what the socket sees of the packet. */
	if (!failed && !packet->bytes)
		packet->bytes = skb->len;
	return failed;
}
