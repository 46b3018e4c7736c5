"""The kernel in user space: memory, interpreter, helpers, maps, contexts, network, sockets.

The emulated network is for tests and for programs without privileges: `socket` and `socketpair` make sockets there,
`inject` puts frames on an interface, `add_interface` and `add_pair` make more of them, and
``KBPF_EMULATED_CAPTURE=FILE`` plays a capture. `environment` is the machine around the programs, as a test sets it; a
`ManualClock` makes its time repeatable. `run_program` runs a program that Linux runs on events of its own, over a
context and a `Sock` that a test makes. `current_task` is the thread that programs run in, `fire` makes an event happen
that programs are attached to.
"""

from kbpf.emulator.attached import fire
from kbpf.emulator.cgroup import Cgroup
from kbpf.emulator.cgroups import Group, add_cgroup, remove_cgroup
from kbpf.emulator.clock import ManualClock
from kbpf.emulator.environment import environment
from kbpf.emulator.events import EventRun, run_program
from kbpf.emulator.families import socket, socketpair
from kbpf.emulator.interface import EmulatedInterface
from kbpf.emulator.network import Network, add_address, add_interface, add_pair, capture, current, inject, play, reset
from kbpf.emulator.sock import Sock
from kbpf.emulator.task import Area, Task, current_task
from kbpf.emulator.tracing import Event

__all__ = [
    "Area",
    "Cgroup",
    "EmulatedInterface",
    "Event",
    "EventRun",
    "Group",
    "ManualClock",
    "Network",
    "Sock",
    "Task",
    "add_address",
    "add_cgroup",
    "add_interface",
    "add_pair",
    "capture",
    "current",
    "current_task",
    "environment",
    "fire",
    "inject",
    "play",
    "remove_cgroup",
    "reset",
    "run_program",
    "socket",
    "socketpair",
]
