"""The rendezvous backend ``reknit`` of torchrun.

``torchrun --rdzv-backend=reknit --rdzv-endpoint=HOST:PORT[,HOST:PORT...] ...`` names the coordinators. What torchrun calls a
node is a member of the job here, and its run id is the job's name; ``reknit status RUN_ID`` shows both.

What torchrun's agent asks its backend for, and what it gets here:

* ``next_rendezvous`` waits for a place in the next world of the job. The node of rank 0 opens a new store of PyTorch's for
  each world, through which agents and workers find each other; the others are told where it is.
* ``num_nodes_waiting`` says 1 as soon as the world is over, or is to end, for whatever reason. The agent then stops its
  workers and asks for the next one, and takes nothing off ``--max-restarts`` for it.
* ``shutdown`` says that this node's part is done, and waits for the others.
"""

from __future__ import annotations

import atexit
import inspect
import json
import logging
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from importlib import import_module
from types import FrameType
from typing import NoReturn

from torch import __version__ as _torch
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStateError,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from . import _native
from .options import Options

__all__ = ["LeftAsPlanned", "ReknitHandler"]

log = logging.getLogger(__name__)

_RELEASE = tuple(int(part) for part in _torch.split("+")[0].split(".")[:2])


def _counts_attempts() -> bool:
    # In 2.5 workers that share their agent's store look for each other under the number of restarts that their own agent has
    # spent. Agents do not spend alike, and would never find each other: there workers get a store of their own.
    module = import_module("torch.distributed.rendezvous")
    try:
        return "/worker/attempt_" in inspect.getsource(module._create_c10d_store)
    except (AttributeError, OSError):
        return False


_COUNTS_ATTEMPTS = _counts_attempts()

# How long one attempt to reach a world's store may take, in seconds: if its host is gone, so is the world.
_STORE_ATTEMPT = 2.0
# How long is waited between looks at whether a world is over, in seconds.
_LOOK_EVERY = 1.0


class _RoundStore(PrefixStore):
    """What agents tell each other in one world. It notices that this one has come to the end."""

    is_at_the_end = False

    def add(self, key: str, amount: int) -> int:
        # With this an agent whose workers have all ended well enters torchrun's last barrier.
        if key.startswith("torchelastic/agent/terminal_state"):
            self.is_at_the_end = True
        return int(super().add(key, amount))


class ReknitHandler(RendezvousHandler):
    """One node's membership in a job, as torchrun's agent sees it."""

    def __init__(self, run_id: str, min_nodes: int, max_nodes: int, options: Options) -> None:
        self._run_id = run_id
        self._options = options
        self._store: _RoundStore | None = None
        self._had_world = False
        host = options.address
        self._launcher = _native.Launcher(
            options.coordinators,
            run_id,
            min=min_nodes,
            max=max_nodes,
            listen=options.listen,
            advertise=host,
            name=options.name,
            ca=options.ca,
            cert=options.cert,
            key=options.key,
            token_file=options.token_file,
            join_patience=options.connect_timeout,
            patience=options.heartbeat_timeout,
        )
        # An agent that ends by a signal does not call shutdown: the others should not wait for a lease to run out.
        atexit.register(self._launcher.leave)
        if options.notice_signal is not None and threading.current_thread() is threading.main_thread():
            signal.signal(options.notice_signal, self._on_notice_signal)

    def _on_notice_signal(self, number: int, _frame: FrameType | None) -> None:
        log.warning("got %s: this node leaves as planned", signal.Signals(number).name)
        self.notice(self._options.notice_seconds)

    def notice(self, seconds: float) -> None:
        """This machine will be taken in so many seconds: the others go on without this node before that."""
        self._launcher.notice(seconds)

    def get_backend(self) -> str:
        return "reknit"

    def get_run_id(self) -> str:
        return self._run_id

    @property
    def use_agent_store(self) -> bool:
        # The same switch as stock torchrun's: workers then make a store of their own.
        return os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "0") != "1" and not _COUNTS_ATTEMPTS

    def next_rendezvous(self) -> RendezvousInfo:
        # The last world's workers are stopped by now: whoever still waits in its store waits for nothing.
        self._store = None
        while True:
            world = self._next_world()
            try:
                info = self._begin(world)
            except _native.WorldOver:
                continue
            if info is not None:
                self._had_world = True
                # Workers inherit it: a number that rises with each change, for names and logs.
                os.environ["REKNIT_GENERATION"] = str(world.generation)
                log.info("rank %d of %d in generation %d", world.rank, world.size, world.generation)
                return info

    def _next_world(self) -> _native.World:
        until = time.monotonic() + self._options.join_timeout
        while True:
            try:
                world = self._launcher.next_world(max(until - time.monotonic(), 0.0))
            except _native.Unreachable as why:
                raise RendezvousConnectionError(str(why)) from None
            except _native.Refused as why:
                raise RendezvousStateError(str(why)) from None
            except _native.JobClosed as why:
                raise RendezvousClosedError(f"{why}; `reknit forget {self._run_id}` makes its id free again") from None
            except _native.JobCompleted as why:
                self._is_over(str(why))
            except _native.Released as why:
                raise _goes(str(why))
            if world is not None:
                return world
            if not self._launcher.job_has_a_world():
                raise RendezvousTimeoutError(
                    f"not enough nodes for job {self._run_id!r} within {self._options.join_timeout:.0f} s; "
                    f"`reknit status {self._run_id}` says who is there"
                )
            # One node too many for the world that runs: it is needed when another one goes.
            until = time.monotonic() + self._options.join_timeout

    def _is_over(self, why: str) -> NoReturn:
        if self._had_world:
            raise RendezvousClosedError(why)
        # It waited for a place, and was not needed.
        raise _goes(f"{why}; `reknit forget {self._run_id}` makes its id free again")

    def _begin(self, world: _native.World) -> RendezvousInfo | None:
        """Opens the world's store, or finds it. None if the world is over before."""
        options = self._options
        timeout = timedelta(seconds=options.read_timeout)
        store: TCPStore | None = None
        own = b""
        if world.rank == 0:
            store = TCPStore(options.address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            own = json.dumps([options.address, store.port]).encode()
        place = None
        while place is None:
            place = self._launcher.share(own, _LOOK_EVERY)
        host, port = json.loads(place)
        if store is None:
            store = self._reach(host, port, timeout)
        if store is None:
            return None
        round_store = _RoundStore(f"reknit/{self._run_id}/{world.generation}", store)
        self._store = round_store
        if self.use_agent_store:
            bootstrap = RendezvousStoreInfo(host, port)
        else:
            bootstrap = RendezvousStoreInfo.build(world.rank, round_store, options.address)
        return RendezvousInfo(round_store, world.rank, world.size, bootstrap)

    def _reach(self, host: str, port: int, timeout: timedelta) -> TCPStore | None:
        until = time.monotonic() + timeout.total_seconds()
        while not self._launcher.is_over():
            try:
                attempt = timedelta(seconds=min(_STORE_ATTEMPT, timeout.total_seconds()))
                store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=attempt)
            except Exception as why:
                if time.monotonic() > until and not self._launcher.is_over():
                    raise RendezvousConnectionError(
                        f"the store of this world, at {host}:{port} on the node of rank 0, cannot be reached: {why}"
                    ) from None
                continue
            store.set_timeout(timeout)
            return store
        return None

    def num_nodes_waiting(self) -> int:
        return 1 if self._launcher.is_over() else 0

    def is_closed(self) -> bool:
        return self._launcher.has_ended()

    def set_closed(self) -> None:
        self._launcher.close_job()

    def shutdown(self) -> bool:
        # The agent calls this while an exception is on its way up if its workers have failed for good.
        cause = sys.exc_info()[1]
        # The agent of 2.5 calls it before that: then whether it has come to its last barrier tells.
        failed = cause is not None or (_RELEASE <= (2, 5) and not (self._store and self._store.is_at_the_end))
        done = True
        if self._had_world and not self._launcher.has_ended():
            if isinstance(cause, (SignalException, KeyboardInterrupt, SystemExit)):
                log.info("this node was told to stop; the others go on without it")
            elif failed:
                # As with stock torchrun: a node that has no restarts left ends the job.
                done = self._launcher.close_job()
            else:
                done = self._launcher.finish(self._options.close_timeout)
        atexit.unregister(self._launcher.leave)
        self._launcher.leave()
        self._store = None
        return done


class LeftAsPlanned(SystemExit):
    """This node has left the job as planned, or was never needed: a success, with exit code 0.

    PyTorch's own :class:`RendezvousGracefulExitError` is meant for that, but torchrun then fails over a result that is not
    there, with exit code 1 (``launch_agent``, in every release from 2.3 to 2.15). It is this exception's cause.
    """


def _goes(why: str) -> LeftAsPlanned:
    log.warning("%s", why)
    left = LeftAsPlanned(0)
    left.__cause__ = RendezvousGracefulExitError(why)
    return left
