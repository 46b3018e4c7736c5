"""The kernel in user space: memory, interpreter, helpers, maps, contexts, network, sockets."""
