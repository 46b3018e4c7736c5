"""`kbpf.testing.btf_bytes`, by the name that these tests have for it."""

from __future__ import annotations

from kbpf.testing.btf_bytes import ARRAY as ARRAY
from kbpf.testing.btf_bytes import FUNC as FUNC
from kbpf.testing.btf_bytes import FUNC_PROTO as FUNC_PROTO
from kbpf.testing.btf_bytes import GLOBAL as GLOBAL
from kbpf.testing.btf_bytes import INT as INT
from kbpf.testing.btf_bytes import PTR as PTR
from kbpf.testing.btf_bytes import STATIC as STATIC
from kbpf.testing.btf_bytes import STRUCT as STRUCT
from kbpf.testing.btf_bytes import BtfBytes as BtfBytes
