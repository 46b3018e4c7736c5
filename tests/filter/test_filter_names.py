"""Names of services, protocols, networks and hosts come from the system's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from kbpf.errors import FilterSyntaxError
from kbpf.filter import compile_filter
from kbpf.filter.names import Names, Port


@pytest.fixture
def names(tmp_path: Path) -> Names:
    files = {
        "services": "# comment\nweb 80/tcp http www\ndns 53/tcp\ndns 53/udp\nboot-ps 67/udp\nold 5/tcp\nold 6/udp\n",
        "protocols": "tcp 6 TCP\nospf 89 OSPFIGP # routing\n",
        "networks": "office 10.1\nloop 127\nquad 10.1.0.0\n",
        "ethers": "0:1:2:3:4:5 printer\n",
        "hosts": "10.1.2.3 printer printer.example\nfe80::7 printer\n",
    }
    paths = {}
    for name, text in files.items():
        path = tmp_path / name
        path.write_text(text)
        paths[name] = str(path)
    return Names(**paths)


def test_services_and_ranges(names: Names) -> None:
    assert names.port("http") == Port(80, 6)
    assert names.port("dns") == Port(53, None)
    assert names.port("old") == Port(5, 6)
    assert names.port("nosuch") is None
    assert names.port_range("53-http") == (53, 80, None)
    assert names.port_range("http-http") == (80, 80, 6)
    # A range is split at its first hyphen, and a name alone is none.
    assert names.port_range("boot-ps-http") is None
    assert names.port_range("http") is None


@pytest.mark.parametrize(
    ("named", "numeric"),
    [
        ("port web", "tcp port 80"),
        ("port dns", "port 53"),
        ("udp portrange dns-67", "udp portrange 53-67"),
        ("ip proto ospf", "ip proto 89"),
        ("net office", "net 10.1.0.0/16"),
        ("net loop", "net 127.0.0.0/8"),
        # All four numbers, as in "net 10.1.0.0": one address.
        ("net quad", "net 10.1.0.0/32"),
        ("host printer", "host 10.1.2.3 or ip6 host fe80::7"),
        ("ip6 host printer", "ip6 host fe80::7"),
        ("ether src printer", "ether src 0:1:2:3:4:5"),
        ("gateway printer", "ether host 0:1:2:3:4:5 and not host 10.1.2.3"),
    ],
)
def test_names_mean_their_numbers(names: Names, named: str, numeric: str) -> None:
    assert compile_filter(named, names=names).instructions == compile_filter(numeric, names="numeric").instructions


@pytest.mark.parametrize("expression", ["udp port web", "port nosuch", "host nosuch", "net nosuch", "proto nosuch"])
def test_unknown_names_are_refused(names: Names, expression: str) -> None:
    with pytest.raises(FilterSyntaxError):
        compile_filter(expression, names=names)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "services"
    names = Names(services=str(path))
    assert names.port("web") is None
    path.write_text("web 80/tcp\n")
    assert names.port("web") == Port(80, 6)


def test_numeric_looks_nothing_up() -> None:
    with pytest.raises(FilterSyntaxError):
        compile_filter("port domain", names="numeric")
