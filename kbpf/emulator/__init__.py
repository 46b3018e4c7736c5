"""The kernel in user space: memory, interpreter, helpers, maps, contexts, network, sockets.

The emulated network is for tests and for programs without privileges: `inject` puts frames on an interface,
`add_interface` and `add_pair` make more of them, and ``KBPF_EMULATED_CAPTURE=FILE`` plays a capture.
"""

from kbpf.emulator.network import EmulatedInterface, Network, add_interface, add_pair, current, inject, reset

__all__ = ["EmulatedInterface", "Network", "add_interface", "add_pair", "current", "inject", "reset"]
