/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/*
 * What a socket filter in C needs of Linux, and nothing else: no system header is
 * included, so the same compiler makes the same object on every machine.
 */
#pragma once

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;

#define SEC(name) __attribute__((section(name), used))
#define __always_inline inline __attribute__((always_inline))

/* Maps are described by the types of a struct's members, which BTF records. */
#define __uint(name, value) int (*name)[value]
#define __type(name, value) typeof(value) *name

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define ntohs(x) __builtin_bswap16(x)
#else
#define ntohs(x) (x)
#endif
#define htons(x) ntohs(x)

/* linux/bpf.h: the context, as far as it is used here. */
struct __sk_buff {
	__u32 len;
	__u32 pkt_type;
	__u32 mark;
	__u32 queue_mapping;
	__u32 protocol;
};

enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_NOEXIST = 1,
	BPF_HDR_START_NET = 1,
	PACKET_OUTGOING = 4,
};

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*bpf_map_update_elem)(void *map, const void *key, const void *value, __u64 flags) = (void *)2;
static long (*bpf_skb_load_bytes_relative)(const struct __sk_buff *skb, __u32 offset, void *to, __u32 length,
					   __u32 start) = (void *)68;

/* A filter that only counts keeps the whole packet: it may sit on somebody's live socket. */
#define KEEP_ALL (-1)

/* The compiler's name and version, into .comment, where tools look for it. */
__asm__(".section .comment,\"MS\",@progbits,1\n\t.asciz \"" __VERSION__ "\"\n\t.text\n");

char _license[] SEC("license") = "Dual MIT/GPL";
