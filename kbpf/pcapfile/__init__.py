"""Capture files: pcap and pcapng, read as a stream of records and written as pcap.

`open_capture` takes a path, a binary file object or bytes. A file that is cut off or corrupt yields
every record before the damage, then raises `CaptureError` with the byte offset.
"""

from kbpf.pcapfile.linktypes import dlt_of_linktype, linktype_of_dlt
from kbpf.pcapfile.reader import Capture, open_capture
from kbpf.pcapfile.records import CaptureError, Interface, Record
from kbpf.pcapfile.writer import PcapWriter

__all__ = [
    "Capture",
    "CaptureError",
    "Interface",
    "PcapWriter",
    "Record",
    "dlt_of_linktype",
    "linktype_of_dlt",
    "open_capture",
]
