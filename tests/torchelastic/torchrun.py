"""torchrun with reknit, in all ways: stock (the backend c10d) at the coordinator's own endpoint, stock behind a relay, and with the
package's backend. Real agents, real workers, real SIGKILL.

    python torchrun.py --reknit PATH_OF_BINARY [--way c10d|relay|reknit] [--repeat N] [NAME …]
"""

import argparse
import os
import signal
import sys
import time
import traceback

import torch

from fleet import Coordinator, Fleet, Relay

RELEASE = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])

TESTS = []
FLEETS = []
RELAYS = []


def test(function):
    TESTS.append(function)
    return function


class Way:
    """How agents come to the coordinator."""

    def __init__(self, name):
        self.name = name
        self.backend = "reknit" if name == "reknit" else "c10d"
        self.is_stock = self.backend == "c10d"
        # An agent of 2.5 to 2.12 that has not been the first one from the beginning ends itself when it becomes that.
        self.survives_rank_0 = not self.is_stock or not (2, 5) <= RELEASE < (2, 13)
        # An agent of 2.5 that is told to stop closes the run for everybody (`LocalElasticAgent._shutdown`).
        self.stops_alone = not self.is_stock or RELEASE != (2, 5)
        # Members of a job like any other: ranks stay, the coordinator may die, a job that is done stays done.
        self.is_member = name != "c10d"
        # Stock agents look once a second: they see a loss after their workers' crash, if that is quick.
        self.restarts = 3 if self.is_stock else 0

    def fleet(self, coordinator, nodes, run="job", restarts=None, conf=(), **more):
        restarts = self.restarts if restarts is None else restarts
        options = [f"--nnodes={nodes}", "--nproc-per-node=1", f"--rdzv-id={run}", f"--max-restarts={restarts}"]
        options += [f"--rdzv-backend={self.backend}"]
        if self.is_stock:
            endpoint = coordinator.endpoint
            if self.is_member:
                RELAYS.append(Relay(coordinator, nodes))
                endpoint = RELAYS[-1].endpoint
            options += [f"--rdzv-endpoint={endpoint}", "--rdzv-conf=is_host=0"]
        else:
            options += [f"--rdzv-endpoint={coordinator.url}", "--rdzv-conf=" + ",".join(conf)]
        # torchrun finds backends of packages since 2.6.
        module = "torch.distributed.run" if self.is_stock or RELEASE >= (2, 6) else "reknit.torchrun"
        FLEETS.append(Fleet(options, module=module, **more))
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
def a_job_trains_and_ends_with_success(way, coordinator):
    fleet = way.fleet(coordinator, "2")
    fleet.add(2)
    fleet.world(2)
    fleet.eventually(lambda: len(fleet.events("step")) > 8, "some steps")
    status = coordinator.look("status", "job")
    assert status["phase"] == "running" and status["ranks"] == 2, status
    assert sorted(member["rank"] for member in status["members"]) == [0, 1], status
    codes = fleet.end()
    assert set(codes.values()) == {0}, codes
    loses_little(fleet)
    if way.is_member:
        # A late node must not begin anew what is done: somebody says that.
        late = way.fleet(coordinator, "2")
        (agent,) = late.add(1)
        code = agent.process.wait(60)
        assert way.is_stock or (code == 0 and "reknit forget job" in agent.shown()), (code, agent.shown())
        coordinator.run("forget", "job")
    # Its id can be used again.
    again = way.fleet(coordinator, "2")
    again.add(2)
    again.world(2)
    assert set(again.end().values()) == {0}


@test
def a_node_that_vanishes_is_gone_at_once_and_one_that_comes_is_taken_in(way, coordinator):
    fleet = way.fleet(coordinator, "2:4")
    fleet.add(4)
    fleet.world(4)
    for round in range(2):
        victim = agent_of(fleet, 0 if round == 1 and way.survives_rank_0 else 3)
        at = victim.kill()
        took = fleet.world(3, since=at) - at
        print(f"    {3} of 4 go on after {took:.1f} s", flush=True)
        at = time.time()
        fleet.add(1)
        took = fleet.world(4, since=at) - at
        print(f"    {4} again after {took:.1f} s", flush=True)
    if not way.is_stock:
        # What ended their worlds cost none of them a restart: there was none to spend.
        assert {line["restarts"] for line in fleet.events("started")} == {0}
    history = coordinator.look("history", "job")
    # Agents do not start alike: on a busy machine the first worlds may be smaller.
    sizes = [(change["before"], change["after"]) for change in history]
    full = [after for _, after in sizes].index(4)
    assert sizes[full + 1 :] == [(4, 3), (3, 4), (4, 3), (3, 4)], history
    assert all(agent.process.poll() is None for agent in fleet.alive())
    codes = fleet.end()
    assert set(codes.values()) == {0}, codes


@test
def rank_0_may_vanish_too(way, coordinator):
    fleet = way.fleet(coordinator, "1:3")
    fleet.add(3)
    fleet.world(3)
    at = agent_of(fleet, 0).kill()
    if not way.survives_rank_0:
        # Seen, so that it is known when it changes: the one that is to be the first now ends itself.
        fleet.eventually(lambda: any("AssertionError" in agent.shown() for agent in fleet.agents.values()), "it")
        return
    fleet.world(2, since=at)
    assert set(fleet.end().values()) == {0}


@test
def half_of_eight_may_vanish_at_once(way, coordinator):
    fleet = way.fleet(coordinator, "2:8")
    fleet.add(8)
    fleet.world(8)
    of_rank = {agent_of(fleet, rank): rank for rank in range(8)}
    parity = 0 if way.survives_rank_0 else 1
    victims = [agent for agent, rank in of_rank.items() if rank % 2 == parity]
    at = max(victim.kill() for victim in victims)
    fleet.world(4, since=at)
    assert set(fleet.end().values()) == {0}


@test
def an_agent_that_is_told_to_stop_is_not_waited_for(way, coordinator):
    fleet = way.fleet(coordinator, "1:3")
    fleet.add(3)
    fleet.world(3)
    stopped = agent_of(fleet, 2)
    at = stopped.stop(signal.SIGTERM)
    if not way.stops_alone:
        fleet.eventually(lambda: (coordinator.look("status", "job") or {}).get("phase") == "closed", "the end of the run")
        return
    fleet.world(2, since=at)
    fleet.end()
    codes = {agent.process.returncode for agent in fleet.agents.values() if agent is not stopped}
    assert codes == {0} and stopped.process.returncode != 0, (codes, stopped.process.returncode)


@test
def a_notice_is_a_planned_leave(way, coordinator):
    if way.is_stock:
        return
    fleet = way.fleet(coordinator, "1:3", conf=["notice_signal=USR1"])
    fleet.add(3)
    fleet.world(3)
    leaving = agent_of(fleet, 0)
    at = leaving.stop(signal.SIGUSR1)
    fleet.world(2, since=at)
    assert leaving.process.wait(60) == 0, leaving.shown()
    (change,) = [change for change in coordinator.look("history", "job") if change["before"] == 3]
    assert "notice" in str(change["causes"]).lower(), change
    at = time.time()
    name = next(member["name"] for member in coordinator.look("status", "job")["members"] if member["rank"] == 1)
    coordinator.run("drain", "job", name)
    fleet.world(1, since=at)
    assert set(fleet.end().values()) == {0}


@test
def one_node_too_many_closes_nothing(way, coordinator):
    fleet = way.fleet(coordinator, "2", restarts=1)
    fleet.add(2)
    fleet.world(2)
    (spare,) = fleet.add(1)
    fleet.eventually(lambda: len((coordinator.look("status", "job") or {"members": []})["members"]) == 3, "the spare")
    at = time.time()
    fleet.eventually(lambda: len(fleet.events("step", at)) > 4, "steps beside it")
    agent_of(fleet, 1).kill()
    fleet.world(2, since=time.time())
    assert spare.pid in {line["agent"] for line in fleet.events("first")}
    assert set(fleet.end().values()) == {0}


@test
def a_coordinator_that_dies_while_workers_train_costs_nothing(way, coordinator):
    if not way.is_member:
        # Agents that are connected to it directly die with it.
        return
    fleet = way.fleet(coordinator, "2")
    fleet.add(2)
    fleet.world(2)
    coordinator.kill_and_restart()
    at = time.time()
    fleet.eventually(lambda: len(fleet.events("step", at)) > 8, "steps after it")
    fleet.eventually(lambda: (coordinator.look("status", "job") or {}).get("phase") == "running", "the job to be known")
    assert len(fleet.events("first")) == 2, "nobody was started again"
    assert set(fleet.end().values()) == {0}
    status = coordinator.look("status", "job")
    assert (status["phase"], status["generation"]) == ("closed", 1), status


@test
def a_worker_that_fails_for_good_ends_the_job(way, coordinator):
    fleet = way.fleet(coordinator, "2", restarts=0)
    fleet.add(2)
    fleet.world(2)
    os.kill(fleet.alive()[0].workers()[0], signal.SIGKILL)
    fleet.eventually(lambda: not fleet.alive(), "the end of all agents")
    assert all(agent.process.returncode != 0 for agent in fleet.agents.values())


@test
def a_worker_that_crashes_costs_a_restart_and_the_job_goes_on(way, coordinator):
    fleet = way.fleet(coordinator, "2", restarts=2)
    fleet.add(2)
    fleet.world(2)
    at = time.time()
    os.kill(fleet.alive()[0].workers()[0], signal.SIGKILL)
    fleet.world(2, since=at)
    assert set(fleet.end().values()) == {0}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--reknit", required=True, help="the program `reknit`")
    parser.add_argument("--way", choices=["c10d", "relay", "reknit"], help="one of them; all if not said")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    failed = 0
    # Behind a relay the workers of 2.5 would look for each other in their agents' own store.
    names = [options.way] if options.way else ["c10d", "relay", "reknit"] if RELEASE >= (2, 6) else ["c10d", "reknit"]
    ways = [Way(name) for name in names]
    for way, function in [(way, function) for _ in range(options.repeat) for way in ways for function in TESTS]:
        if options.names and not any(name in function.__name__ for name in options.names):
            continue
        coordinator, began = Coordinator(options.reknit), time.time()
        try:
            function(way, coordinator)
            outcome = "ok"
        except Exception as error:  # noqa: BLE001 - shown, and counted
            traceback.print_exc()
            outcome, failed = f"FAILED: {type(error).__name__}: {error}", failed + 1
            coordinator.log.seek(0)
            print(coordinator.log.read()[-3000:], file=sys.stderr)
        for fleet in FLEETS:
            fleet.close()
        FLEETS.clear()
        for relay in RELAYS:
            relay.close()
            if outcome != "ok":
                relay.log.seek(0)
                print(relay.log.read()[-3000:], file=sys.stderr)
        RELAYS.clear()
        coordinator.close()
        print(f"test {function.__name__} ({way.name}, torch {torch.__version__}) … {outcome} ({time.time() - began:.0f} s)", flush=True)
    sys.exit(1 if failed else 0)


main()
