"""The backend, with a real coordinator and PyTorch's own stores, without torchrun. With torchrun it is tested in
tests/torchelastic."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Callable, Iterator

import pytest
from conftest import Coordinator
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousGracefulExitError,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousTimeoutError,
    rendezvous_handler_registry,
)

from reknit import __version__
from reknit.options import OptionError
from reknit.backend import create_handler
from reknit.rendezvous import LeftAsPlanned, ReknitHandler

PATIENCE = 60.0


class Node:
    """What an agent does, on a thread of its own."""

    def __init__(self, coordinator: str, name: str, bounds: tuple[int, int], **config: str) -> None:
        params = RendezvousParameters("reknit", coordinator, "job", *bounds, local_addr="127.0.0.1")
        params.config = {"name": name, **config}
        handler = create_handler(params)
        assert isinstance(handler, ReknitHandler)
        self.handler = handler
        self.thread = ThreadPoolExecutor(1)

    def next(self) -> Future[RendezvousInfo]:
        return self.thread.submit(self.handler.next_rendezvous)


@pytest.fixture
def node(coordinator: Coordinator) -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def make(name: str, least: int = 1, most: int = 4, at: str = coordinator.endpoint, **config: str) -> Node:
        nodes.append(Node(at, name, (least, most), **config))
        return nodes[-1]

    yield make
    for made in nodes:
        made.handler._launcher.leave()
        made.thread.shutdown()


def eventually(look: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not look():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.01)


def together(*nodes: Node, size: int | None = None) -> list[RendezvousInfo]:
    """All of them in one world, of that size. On a busy machine some may be too late for the first one."""
    wanted = len(nodes) if size is None else size

    def reach(node: Node) -> RendezvousInfo:
        while True:
            info = node.handler.next_rendezvous()
            if info.world_size == wanted:
                return info
            eventually(lambda: waiting(node), "the others to come")

    return [coming.result(PATIENCE) for coming in [node.thread.submit(reach, node) for node in nodes]]


def waiting(node: Node) -> bool:
    return node.handler.num_nodes_waiting() > 0


def test_torchrun_finds_it() -> None:
    # Whatever was imported first: torchrun loads backends while its own package is half there.
    for first in ("reknit.rendezvous", "torch.distributed.elastic.rendezvous"):
        look = f"import {first}; from torch.distributed.elastic.rendezvous import rendezvous_handler_registry as known; "
        look += "assert 'reknit' in known._registry"
        done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
        assert done.returncode == 0 and "Exception" not in done.stderr, done.stderr
    assert rendezvous_handler_registry._registry["reknit"] is create_handler
    assert __version__


def test_a_world_has_one_store_ranks_and_a_place_for_workers_to_meet(node: Callable[..., Node]) -> None:
    a, b = node("a", 2, 2), node("b", 2, 2)
    infos = together(a, b)
    assert sorted(info.rank for info in infos) == [0, 1]
    assert {info.world_size for info in infos} == {2}
    assert infos[0].bootstrap_store_info == infos[1].bootstrap_store_info
    infos[0].store.set("key", "value")
    assert infos[1].store.get("key") == b"value"
    assert a.handler.use_agent_store
    assert (a.handler.get_backend(), a.handler.get_run_id()) == ("reknit", "job")
    assert not a.handler.is_closed() and not waiting(a) and not waiting(b)
    assert os.environ["REKNIT_GENERATION"] == "1"


def test_each_world_has_a_fresh_store_and_ranks_stay(node: Callable[..., Node]) -> None:
    nodes = [node(name, 2, 3) for name in "ab"]
    first = together(*nodes)
    first[0].store.set("left over", "from the first")
    nodes.append(node("c", 2, 3))
    newcomer = nodes[2].next()
    eventually(lambda: waiting(nodes[0]) and waiting(nodes[1]), "the running nodes to see it")
    second = together(*nodes[:2], size=3)
    assert newcomer.result(PATIENCE).rank == 2
    assert [info.rank for info in second] == [info.rank for info in first]
    assert not second[0].store.check(["left over"])
    assert second[0].bootstrap_store_info != first[0].bootstrap_store_info


def test_a_node_that_asks_again_makes_all_begin_again(node: Callable[..., Node]) -> None:
    a, b = node("a", 2, 2), node("b", 2, 2)
    together(a, b)
    again = a.next()
    eventually(lambda: waiting(b), "the other to see it")
    assert not again.done()
    assert b.next().result(PATIENCE).world_size == again.result(PATIENCE).world_size == 2


def test_a_lost_node_is_seen_and_one_too_many_waits_for_its_place(coordinator: Coordinator, node: Callable[..., Node]) -> None:
    a, b = node("a", 1, 2), node("b", 1, 2)
    together(a, b)
    spare = node("c", 1, 2, join_timeout="0.5").next()
    eventually(lambda: len(coordinator.status("job")["members"]) == 3, "the spare to be known")
    time.sleep(1.0)  # Beyond its join_timeout: who is one too many waits on.
    assert not spare.done() and not waiting(a)
    b.handler._launcher.leave()
    eventually(lambda: waiting(a), "the loss to be seen")
    assert a.next().result(PATIENCE).world_size == spare.result(PATIENCE).world_size == 2


def test_a_notice_is_a_planned_leave_with_success(coordinator: Coordinator, node: Callable[..., Node]) -> None:
    a, b, c = (node(name) for name in "abc")
    together(a, b, c)
    coordinator.run("notice", "job", "a", "--in", "120s")
    eventually(lambda: waiting(a) and waiting(b), "the notice to be seen")
    leaving, others = a.next(), [b.next(), c.next()]
    with pytest.raises(LeftAsPlanned) as left:
        leaving.result(PATIENCE)
    assert left.value.code == 0 and isinstance(left.value.__cause__, RendezvousGracefulExitError)
    assert {info.result(PATIENCE).world_size for info in others} == {2}
    b.handler.notice(60)
    eventually(lambda: waiting(c), "the second notice to be seen")
    # Who leaves is let go once the others have their world.
    leaving, other = b.next(), c.next()
    with pytest.raises(LeftAsPlanned):
        leaving.result(PATIENCE)
    assert other.result(PATIENCE).world_size == 1


def test_a_signal_is_a_notice(node: Callable[..., Node]) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    try:
        a, b = node("a", 1, 2, notice_signal="USR2"), node("b", 1, 2)
        together(a, b)
        os.kill(os.getpid(), signal.SIGUSR2)
        eventually(lambda: waiting(b), "the notice to be seen")
        gone, stays = a.next(), b.next()
        with pytest.raises(LeftAsPlanned):
            gone.result(PATIENCE)
        assert stays.result(PATIENCE).world_size == 1
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_job_is_over_when_all_are_done_and_late_ones_are_told(coordinator: Coordinator, node: Callable[..., Node]) -> None:
    a, b = node("a", 2, 2), node("b", 2, 2)
    together(a, b)
    done = [one.thread.submit(one.handler.shutdown) for one in (a, b)]
    assert [one.result(PATIENCE) for one in done] == [True, True]
    assert coordinator.status("job")["phase"] == "closed"
    with pytest.raises(LeftAsPlanned):
        node("late", 2, 2).next().result(PATIENCE)


def test_a_node_that_fails_for_good_ends_the_job(node: Callable[..., Node]) -> None:
    a, b = node("a", 2, 2), node("b", 2, 2)
    together(a, b)

    def fails() -> None:
        try:
            raise RuntimeError("no restarts left")
        finally:
            a.handler.shutdown()

    with pytest.raises(RuntimeError):
        a.thread.submit(fails).result(PATIENCE)
    eventually(lambda: waiting(b) and b.handler.is_closed(), "the end of the job")
    with pytest.raises(RendezvousClosedError, match="reknit forget"):
        b.next().result(PATIENCE)


def test_too_few_nodes_are_not_waited_for_for_ever(node: Callable[..., Node]) -> None:
    with pytest.raises(RendezvousTimeoutError, match="not enough nodes"):
        node("a", 2, 2, join_timeout="0.5").next().result(PATIENCE)


def test_a_coordinator_that_is_not_there_is_named(node: Callable[..., Node]) -> None:
    lonely = node("a", at="127.0.0.1:1", connect_timeout="0.5")
    with pytest.raises(RendezvousConnectionError, match="127.0.0.1:1"):
        lonely.next().result(PATIENCE)


def test_other_bounds_than_the_jobs_do_not_matter_but_senseless_ones_do(node: Callable[..., Node]) -> None:
    with pytest.raises(ValueError, match="name"):
        node("no name")
    with pytest.raises(OptionError):
        node("a", at="")


def test_the_lease_is_renewed_while_the_interpreter_is_busy(coordinator: Coordinator, node: Callable[..., Node]) -> None:
    a, b = node("a", 2, 2), node("b", 2, 2)
    together(a, b)
    # One call of C's, longer than a lease of 3 s: the interpreter's lock is held all the time.
    count, held = 10_000_000, 0.0
    while held < 3.5:
        before = time.monotonic()
        sum(range(count))
        held = time.monotonic() - before
        count = int(count * max(1.5, 4.0 / held))
    assert not waiting(a) and not waiting(b)
    assert coordinator.status("job")["generation"] == 1


def test_a_coordinator_that_dies_and_comes_back_costs_nothing(tmp_path: object) -> None:
    store = ("--store", str(tmp_path))
    coordinator = Coordinator(*store)
    nodes = [Node(coordinator.endpoint, name, (2, 2)) for name in "ab"]
    together(*nodes)
    coordinator.kill()
    coordinator = Coordinator(*store, listen=coordinator.endpoint)
    try:

        def back() -> bool:
            members = coordinator.status("job")["members"]
            return len(members) == 2 and all(member["state"] == "in" for member in members)

        eventually(back, "both to come back")
        assert coordinator.status("job")["generation"] == 1
        assert not any(waiting(one) for one in nodes)
        done = [one.thread.submit(one.handler.shutdown) for one in nodes]
        assert [one.result(PATIENCE) for one in done] == [True, True]
    finally:
        coordinator.kill()


def test_an_interrupt_ends_a_wait_at_once(node: Callable[..., Node]) -> None:
    # A process that a shell has put in the background ignores it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    lonely = node("a", 2, 2)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        lonely.handler.next_rendezvous()
    assert time.monotonic() - began < 30
