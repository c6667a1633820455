"""The hosts file: each bad line is named, and there are as many as machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from fulltune.errors import SetupError
from fulltune.launch.hosts import Host, read_hosts


def problems(path: Path, text: str, machines: int = 2) -> list[str]:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SetupError) as caught:
        read_hosts(path, machines)
    return [problem.removeprefix(str(path)) for problem in caught.value.problems]


def test_lines_are_hosts_with_user_and_port(tmp_path: Path) -> None:
    file = tmp_path / "hosts.txt"
    file.write_text("# ours\n\nnode-1  # first\nme@node_2.lab:2222\r\n[fe80::1%eth0]:22\nroot@[::1]\n10.0.0.1\n")
    assert read_hosts(file, 5) == [
        Host("node-1"),
        Host("node_2.lab", "me", 2222),
        Host("fe80::1%eth0", None, 22),
        Host("::1", "root"),
        Host("10.0.0.1"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        *("a b", "-oProxyCommand=x", "a;b", "$(x)", "me@", "@a", "a:", "a:0", "a:65536", "a:x", "a:1:2"),
        *("::1", "[a]", "[1.2.3.4]", "[::1", "ssh://a", "me@you@a", "-x@a", "a/b"),
    ],
)
def test_bad_line_is_named_with_its_number(tmp_path: Path, line: str) -> None:
    [said] = problems(tmp_path / "hosts.txt", f"good\n\n{line}\n")
    assert said.startswith(f":3  '{line}': expected [user@]host[:port]")


def test_all_bad_lines_and_duplicates_are_named_at_once(tmp_path: Path) -> None:
    said = problems(tmp_path / "hosts.txt", "a\na b\nme@A\na:22\nb:70000\n")
    assert [one.partition(": ")[0] for one in said] == [":2  'a b'", ":3  'me@A'", ":5  'b:70000'"]
    assert "stands in line 1 already" in said[1]


@pytest.mark.parametrize(("text", "number"), [("", 0), ("a\n", 1), ("a\nb\nc\n", 3)])
def test_number_of_hosts_must_be_that_of_machines(tmp_path: Path, text: str, number: int) -> None:
    [said] = problems(tmp_path / "hosts.txt", text)
    assert f"has {number} host" in said
    assert "train.num_machines is 2" in said


def test_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, reason in (("absent", "no such file"), ("binary", "not a text in UTF-8"), (".", "is a directory")):
        with pytest.raises(SetupError, match=rf"--ssh: .* cannot be read \({reason}"):
            read_hosts(tmp_path / name, 2)
