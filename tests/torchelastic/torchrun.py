"""Stock torchrun against reknit: real agents, real workers, real SIGKILL.

    python torchrun.py --reknit PATH_OF_BINARY [--repeat N] [NAME …]
"""

import argparse
import os
import signal
import sys
import time
import traceback

import torch

from fleet import Coordinator, Fleet

RELEASE = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
# In between, an agent that has not been the first one from the beginning ends itself when it becomes that.
SURVIVES_RANK_0 = not (2, 5) <= RELEASE < (2, 13)
# An agent of 2.5 that is told to stop closes the run for everybody (`LocalElasticAgent._shutdown`).
STOPS_ALONE = RELEASE != (2, 5)

TESTS = []
FLEETS = []


def test(function):
    TESTS.append(function)
    return function


def stock(coordinator, nodes, run="job", restarts=0, **more):
    options = [f"--nnodes={nodes}", "--nproc-per-node=1", f"--rdzv-id={run}", f"--max-restarts={restarts}"]
    options += ["--rdzv-backend=c10d", f"--rdzv-endpoint={coordinator.endpoint}", "--rdzv-conf=is_host=0"]
    FLEETS.append(Fleet(options, **more))
    return FLEETS[-1]


def agent_of(fleet, rank):
    """The agent whose worker has that rank."""
    of_rank = {line["rank"]: line["agent"] for line in fleet.events("first")}
    (agent,) = [agent for agent in fleet.alive() if agent.pid == of_rank[rank]]
    return agent


def loses_little(fleet):
    """The loss falls, whoever came and went."""
    losses = [line["loss"] for line in fleet.events("step") if line["rank"] == 0]
    assert losses[-1] < 0.1 * losses[0], losses


@test
def a_job_trains_and_ends_with_success(coordinator):
    fleet = stock(coordinator, "2")
    fleet.add(2)
    fleet.world(2)
    fleet.eventually(lambda: len(fleet.events("step")) > 8, "some steps")
    status = coordinator.look("status", "job")
    assert status["phase"] == "running" and status["ranks"] == 2, status
    assert sorted(member["rank"] for member in status["members"]) == [0, 1], status
    codes = fleet.end()
    assert set(codes.values()) == {0}, codes
    loses_little(fleet)
    # Its id can be used again.
    again = stock(coordinator, "2")
    again.add(2)
    again.world(2)
    assert set(again.end().values()) == {0}


@test
def a_node_that_vanishes_is_gone_at_once_and_one_that_comes_is_taken_in(coordinator):
    fleet = stock(coordinator, "2:4", restarts=3)
    fleet.add(4)
    fleet.world(4)
    for round in range(2):
        victim = agent_of(fleet, 0 if round == 1 and SURVIVES_RANK_0 else 3)
        at = victim.kill()
        took = fleet.world(3, since=at) - at
        print(f"    {3} of 4 go on after {took:.1f} s", flush=True)
        at = time.time()
        fleet.add(1)
        took = fleet.world(4, since=at) - at
        print(f"    {4} again after {took:.1f} s", flush=True)
    history = coordinator.look("history", "job")
    assert [(change["before"], change["after"]) for change in history] == [(0, 4), (4, 3), (3, 4), (4, 3), (3, 4)], history
    assert all(agent.process.poll() is None for agent in fleet.alive())
    codes = fleet.end()
    assert set(codes.values()) == {0}, codes


@test
def rank_0_may_vanish_too(coordinator):
    fleet = stock(coordinator, "1:3", restarts=3)
    fleet.add(3)
    fleet.world(3)
    at = agent_of(fleet, 0).kill()
    if not SURVIVES_RANK_0:
        # Seen, so that it is known when it changes: the one that is to be the first now ends itself.
        fleet.eventually(lambda: any("AssertionError" in agent.shown() for agent in fleet.agents.values()), "it")
        return
    fleet.world(2, since=at)
    assert set(fleet.end().values()) == {0}


@test
def an_agent_that_is_told_to_stop_is_not_waited_for(coordinator):
    fleet = stock(coordinator, "1:3", restarts=3)
    fleet.add(3)
    fleet.world(3)
    stopped = agent_of(fleet, 2)
    at = stopped.stop(signal.SIGTERM)
    if not STOPS_ALONE:
        fleet.eventually(lambda: (coordinator.look("status", "job") or {}).get("phase") == "closed", "the end of the run")
        return
    fleet.world(2, since=at)
    fleet.end()
    codes = {agent.process.returncode for agent in fleet.agents.values() if agent is not stopped}
    assert codes == {0} and stopped.process.returncode != 0, (codes, stopped.process.returncode)


@test
def a_worker_that_crashes_costs_a_restart_and_the_job_goes_on(coordinator):
    fleet = stock(coordinator, "2", restarts=2)
    fleet.add(2)
    fleet.world(2)
    at = time.time()
    os.kill(fleet.alive()[0].workers()[0], signal.SIGKILL)
    fleet.world(2, since=at)
    assert set(fleet.end().values()) == {0}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--reknit", required=True, help="the program `reknit`")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    failed = 0
    for _ in range(options.repeat):
        for function in TESTS:
            if options.names and not any(name in function.__name__ for name in options.names):
                continue
            coordinator, began = Coordinator(options.reknit), time.time()
            try:
                function(coordinator)
                outcome = "ok"
            except Exception as error:  # noqa: BLE001 - shown, and counted
                traceback.print_exc()
                outcome, failed = f"FAILED: {type(error).__name__}: {error}", failed + 1
                coordinator.log.seek(0)
                print(coordinator.log.read()[-3000:], file=sys.stderr)
            for fleet in FLEETS:
                fleet.close()
            FLEETS.clear()
            coordinator.close()
            print(f"test {function.__name__} (torch {torch.__version__}) … {outcome} ({time.time() - began:.0f} s)", flush=True)
    sys.exit(1 if failed else 0)


main()
