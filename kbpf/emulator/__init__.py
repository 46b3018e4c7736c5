"""The kernel in user space: memory, interpreter, helpers, maps, contexts, network, sockets.

The emulated network is for tests and for programs without privileges: `inject` puts frames on an interface,
`add_interface` and `add_pair` make more of them, and ``KBPF_EMULATED_CAPTURE=FILE`` plays a capture. `environment` is
the machine around the programs, as a test sets it; a `ManualClock` makes its time repeatable.
"""

from kbpf.emulator.clock import ManualClock
from kbpf.emulator.environment import environment
from kbpf.emulator.interface import EmulatedInterface
from kbpf.emulator.network import Network, add_interface, add_pair, current, inject, reset

__all__ = [
    "EmulatedInterface",
    "ManualClock",
    "Network",
    "add_interface",
    "add_pair",
    "current",
    "environment",
    "inject",
    "reset",
]
