"""kbpf.features: names, backends, what is kept."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import kbpf
from kbpf import features
from kbpf.backend import Answer
from kbpf.cli.main import cli
from kbpf.kernel.backend import KernelBackend
from kbpf.specs import ProgramSpec
from kbpf.uapi.enums import MAP_TYPES, PROG_TYPES

RETURN_0 = [(0xB7, 0, 0, 0, 0), (0x95, 0, 0, 0, 0)]


def test_only_yes_is_true() -> None:
    assert Answer("yes")
    assert not any(map(bool, (Answer("no"), Answer("not permitted"), Answer("inconclusive"))))


@pytest.mark.parametrize("ask", [features.map_type, features.program_type, features.attach_type, features.link_type])
def test_names_are_those_of_linux(ask: object) -> None:
    for wrong in ("flowers", "unspec"):
        with pytest.raises(ValueError, match="is called"):
            ask(wrong)  # type: ignore[operator]
    with pytest.raises(ValueError, match="is called"):
        features.helper("flowers", "map_lookup_elem")
    with pytest.raises(ValueError, match="backend"):
        features.map_type("hash", backend="windows")


class TestEmulator:
    def test_has_the_program_types_that_it_loads(self) -> None:
        for name in PROG_TYPES:
            if name == "unspec":
                continue
            try:
                kbpf.load_program(ProgramSpec(type=name, instructions=RETURN_0), backend="emulator").close()
            except kbpf.VerifierError as error:
                loads = "does not run programs" not in str(error)
            else:
                loads = True
            assert bool(features.program_type(name, backend="emulator")) is loads, name

    def test_says_what_it_has_not(self) -> None:
        assert features.map_type("arena", backend="emulator") == Answer("no", "the emulator has no maps of type arena")
        for name in MAP_TYPES:
            if name not in ("unspec", "arena", "struct_ops"):
                assert features.map_type(name, backend="emulator"), name

    def test_answers_where_it_was_chosen(self) -> None:
        with kbpf.use_backend("emulator"):
            assert features.map_type("arena").answer == "no"

    def test_helpers(self) -> None:
        assert features.helper("xdp", "bpf_redirect_map", backend="emulator")
        assert not features.helper("socket_filter", "redirect_map", backend="emulator")

    def test_attach_types(self) -> None:
        for name in ("xdp", "tcx_ingress", "cgroup_inet_egress", "cgroup_inet4_connect"):
            assert features.attach_type(name, backend="emulator")
        assert not features.attach_type("netkit_peer", backend="emulator")


class TestCache:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        asked: list[str] = []
        answers = {"hash": Answer("yes"), "array": Answer("no"), "queue": Answer("not permitted")}

        def feature(self: KernelBackend, kind: str, name: str, program_type: str = "") -> Answer:
            asked.append(name)
            return answers.get(name, Answer("inconclusive"))

        monkeypatch.setattr(KernelBackend, "feature", feature)
        monkeypatch.setattr(features, "_known", {})
        return asked

    def test_keeps_what_is_certain(self, asked: list[str]) -> None:
        for _ in range(3):
            for name in ("hash", "array", "queue", "stack"):
                features.map_type(name, backend="kernel")
        assert [asked.count(name) for name in ("hash", "array", "queue", "stack")] == [1, 1, 3, 3]

    def test_asks_again_with_other_capabilities(self, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        features.map_type("hash", backend="kernel")
        monkeypatch.setattr("kbpf.kernel.probes.asker", lambda: ("others",))
        features.map_type("hash", backend="kernel")
        assert asked == ["hash", "hash"]


class TestDoctor:
    def test_prints_tables(self) -> None:
        done = CliRunner().invoke(cli, ["doctor", "--features"], env={"KBPF_BACKEND": "emulator"})
        assert done.exit_code == 0, done.output
        lines = [line.split() for line in done.output.splitlines()]
        assert ["hash", "yes"] in lines and ["map", "types"] in lines and ["program", "types"] in lines

    def test_prints_json(self) -> None:
        done = CliRunner().invoke(cli, ["doctor", "--features", "--json"], env={"KBPF_BACKEND": "emulator"})
        told = json.loads(done.output)
        assert set(told) == {"program_type", "map_type", "attach_type", "link_type"}
        assert told["map_type"]["hash"] == {"answer": "yes", "detail": "", "since": ""}

    def test_prints_helpers_of_a_type(self) -> None:
        arguments = ["doctor", "--helpers", "xdp", "--json"]
        told = json.loads(CliRunner().invoke(cli, arguments, env={"KBPF_BACKEND": "emulator"}).output)
        assert told["helper"]["redirect_map"]["answer"] == "yes"
        assert told["helper"]["skb_load_bytes"]["answer"] == "no"

    def test_a_wrong_type_is_wrong_usage(self) -> None:
        assert CliRunner().invoke(cli, ["doctor", "--helpers", "flowers"]).exit_code == 2
