"""A real coordinator for each test: set REKNIT to the program `reknit`."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any, Iterator

import pytest

PROGRAM = os.environ.get("REKNIT", os.path.join(os.path.dirname(__file__), "../../target/release/reknit"))


class Coordinator:
    def __init__(self, *options: str, listen: str = "127.0.0.1:0") -> None:
        command = [PROGRAM, "serve", "--listen", listen, "--announce", *(options or ("--store", "memory"))]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.endpoint = self.process.stdout.readline().strip()

    def run(self, *arguments: str) -> str:
        command = [PROGRAM, *arguments, "--coordinator", f"http://{self.endpoint}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def status(self, job: str) -> Any:
        return json.loads(self.run("status", job, "--json"))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    coordinator = Coordinator()
    yield coordinator
    coordinator.kill()
