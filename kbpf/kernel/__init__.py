"""The real kernel: syscalls, sockets, probes, bcc. Import `kernel_backend` from `kbpf.kernel.backend`."""
