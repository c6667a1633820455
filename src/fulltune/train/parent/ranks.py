"""`python -m fulltune.train.parent.ranks listen|join HOST:PORT ...` runs torchrun with a store that listens on one
address only and unpickles nothing (docs/guides/scale.md)."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

ONE_MACHINE = ("listen", "127.0.0.1:0")


def main(arguments: Sequence[str]) -> None:
    """Run torchrun with its static rendezvous: role, endpoint, then torchrun's own arguments and machine rank."""
    from torch.distributed import TCPStore, run  # type: ignore[attr-defined]  # not in its stubs

    for name in [name for name in os.environ if name.startswith("PET_")]:  # meant for another torchrun
        del os.environ[name]
    role, endpoint, *others = arguments
    if role == "listen":
        name, _, port_text = endpoint.rpartition(":")
        host = name.strip("[]")
        listening = socket.create_server(
            (host, int(port_text)), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
        port = listening.getsockname()[1]
        endpoint = f"{name}:{port}"
        # torchrun's own store on this port joins the server of this one instead of starting one on all interfaces.
        options: Any = {"wait_for_workers": False, "multi_tenant": True, "master_listen_fd": listening.detach()}
        _store = TCPStore(host, port, is_master=True, **options)
    run.main(["--rdzv-backend=static", f"--rdzv-endpoint={endpoint}", *others])


if __name__ == "__main__":
    main(sys.argv[1:])
