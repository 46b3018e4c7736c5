"""Instruction sets as data: classic BPF (`cbpf`), eBPF (`ebpf`), and the way from one to the other (`translate`)."""
