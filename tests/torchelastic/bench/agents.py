"""How long torchrun's agents take to form a group, to lose a member, to take one in, and what the loss of the coordinator costs them:
stock, and with reknit.

    python agents.py --reknit PATH_OF_BINARY [--repeat N] [--ways A,B] [--agents 2,4,8] [--json FILE] [NAME …]

NAME is a scenario (`SCENARIOS`); all are run if none is named. It needs a Python with torch and, for the way `package`, the package
reknit. Each measurement has agents, workers and a coordinator of its own; rounds go through all scenarios and ways in turn, so that the
machine's noise hits all alike. Agents run one worker each, on the CPU with Gloo (`worker.py`), and are killed for real.

What is shown, in seconds:

* total: from the event (the first agent is started, or the victim killed, or the newcomer started) until the last member of the new
  world has done its first all_reduce there.
* without import: the same less what the slowest worker took to import torch. (New agents import it too. That remains.)
* noticed: from the event until the last of the agents that are running begins to stop its workers. The event is here the instant at
  which the newcomer has started up and enters the rendezvous, if there is one.
* agreed: from when the last agent (of those that were running, if some were) enters the rendezvous until the last of all leaves it.
* connected: from when the last worker has imported torch until the last of all has done its first all_reduce.
* rendezvous part: the sum of these three. That is everything but starting, importing and stopping. For a formation from cold it is
  `agreed` alone.
* agent CPU: what an agent takes of one core while its worker trains and nothing happens, in percent; the mean of those that run.

If the agents needed more than one rendezvous, `agreed` is from the first to the last, with the starting of workers in between, and the
remarks say so; they also count what was taken off --max-restarts. The JSON has the rest too: `starting`, `stopping`, and `told`, which
is when the last of those running agents that the rendezvous told of it was told (others see their worker crash).

A world that does not form is a result, not an error: `not within 75 s`, or `all agents died after 4.1 s`.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))

from fleet import PATIENCE, Coordinator, Fleet, Relay  # noqa: E402

# How long a loss of the coordinator is watched.
WATCH = 15.0


# The ways in which agents find each other. To add one, write its class and name it in WAYS: what it needs is started when it is made,
# `coordinator` is what the scenario of that name kills, and `options` is asked for torchrun's options once for each agent.


class StockStore:
    """PyTorch's own store in a process of its own, so that no agent is special. It ends when this program does."""

    SERVE = """if True:
        import sys
        from torch.distributed import TCPStore
        store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
        print(store.port, flush=True)
        sys.stdin.read()"""

    def __init__(self):
        self.serve(0)

    def serve(self, port):
        command = [sys.executable, "-c", self.SERVE, str(port)]
        environment = dict(os.environ, TORCH_CPP_LOG_LEVEL="ERROR")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.port = int(self.process.stdout.readline())

    def kill_and_restart(self):
        self.process.kill()
        self.process.wait()
        # It first has to import torch. That makes no difference to agents, which never connect a second time.
        self.serve(self.port)

    def close(self):
        self.process.kill()
        self.process.wait()


class Stock:
    """Nothing of reknit, and everything as it is by default."""

    # Cases that never come to an end are not tried again and again.
    may_be_hopeless = True
    environment = {}
    # Whoever else is on the machine of each agent, and dies with it.
    beside = ()
    # Where it differs from another way.
    scenarios = None

    def __init__(self, reknit):
        self.coordinator = StockStore()

    def options(self, nodes):
        return ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.coordinator.port}", "--rdzv-conf=is_host=0"]

    def close(self):
        self.coordinator.close()


class StockUnshared(Stock):
    """Each world's workers make a store of their own, as they did before 2.5."""

    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Endpoint(Stock):
    """Stock agents at the coordinator's endpoint for them."""

    may_be_hopeless = False

    def __init__(self, reknit):
        self.coordinator = Coordinator(reknit)

    def options(self, nodes):
        return ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.coordinator.endpoint}", "--rdzv-conf=is_host=0"]


class Relayed(Endpoint):
    """Stock agents, each behind a relay of its own as if it were on a machine of its own."""

    def __init__(self, reknit):
        super().__init__(reknit)
        self.beside = []

    def options(self, nodes):
        self.beside.append(Relay(self.coordinator, nodes))
        return ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.beside[-1].endpoint}", "--rdzv-conf=is_host=0"]

    def close(self):
        for relay in self.beside:
            relay.close()
        super().close()


class Package(Endpoint):
    """Agents with the package's backend."""

    def options(self, nodes):
        return ["--rdzv-backend=reknit", f"--rdzv-endpoint={self.coordinator.url}"]


class PackageLooksOften(Package):
    """The same with agents that look every 20 ms instead of every 100 ms, where they look for a change at all."""

    scenarios = ("kill", "kill-rank-0", "join")

    def options(self, nodes):
        return [*super().options(nodes), "--monitor-interval=0.02"]


WAYS = {
    "stock": Stock,
    "stock-unshared": StockUnshared,
    "endpoint": Endpoint,
    "relay": Relayed,
    "package": Package,
    "package-20ms": PackageLooksOften,
}


def cpu(pid):
    """The seconds that all of its threads have run."""
    total = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/schedstat") as file:
            total += int(file.read().split()[0])
    return total / 1e9


class Job(Fleet):
    """The agents of one measurement. Agents and workers write to the same log."""

    def __init__(self, way, nodes, patience, settle):
        self.way, self.patience, self.settle, self.deaths = way, patience, settle, {}
        self.nodes = nodes
        path = os.pathsep.join([HERE, *filter(None, [os.environ.get("PYTHONPATH")])])
        super().__init__([], module="agent", environment=dict(way.environment, PYTHONPATH=path))
        self.environment.update(BENCH_LOG=self.log)
        self.worker = os.path.join(HERE, "worker.py")

    def add(self, count):
        added = []
        for _ in range(count):
            self.options = [f"--nnodes={self.nodes}", "--nproc-per-node=1", "--rdzv-id=job", "--max-restarts=3"]
            self.options += self.way.options(self.nodes)
            added += super().add(1)
        return added

    def wait(self, look, patience, since=None):
        """What `look` sees, or None when the patience is at an end or all agents are."""
        end = (since or time.time()) + patience
        while time.time() < end:
            seen = look()
            if seen:
                return seen
            for agent in self.agents.values():
                if agent.process.poll() is not None:
                    self.deaths.setdefault(agent.pid, time.time())
            if not self.alive():
                break
            time.sleep(0.02)
        return None

    def first(self, size, since=0.0):
        """What each worker said after its first all_reduce, if all agents that are alive are in a world of that size."""
        alive = {agent.pid for agent in self.alive()}
        lines = self.events("first", since)
        of_agent = {line["agent"]: line for line in lines if line["agent"] in alive and line["world"] == size}
        return of_agent if len(of_agent) == size == len(alive) else None

    def train(self, size):
        """Gets to where a world of that size trains, and lets it do so for a while. Agents do many things every so many seconds, and
        the event should come at any time between."""
        self.add(size)
        formed = self.wait(lambda: self.first(size), PATIENCE)
        if not formed:
            raise RuntimeError(f"there is no world of {size} to begin with; see {self.dir}")
        began, used = time.time(), sum(cpu(agent.pid) for agent in self.alive())
        self.wait(lambda: time.time() > max(line["at"] for line in formed.values()) + self.settle, PATIENCE)
        used = sum(cpu(agent.pid) for agent in self.alive()) - used
        self.agent_cpu = 100 * used / (time.time() - began) / size
        if not self.events("steps"):
            raise RuntimeError(f"the world of {size} does not train; see {self.dir}")
        return formed

    def change(self, event, size, patience, running=(), newcomer=None):
        """Waits until all agents are in a world of that size, and says where the time since the event went."""
        formed = self.wait(lambda: self.first(size, event), patience, event)
        if not formed:
            killed = len(self.agents) - size
            dead = sorted(at - event for at in self.deaths.values())[killed:]
            if not self.alive():
                return {"outcome": f"all agents died after {dead[-1]:.1f} s"}
            some = f", and {len(dead)} of {size} agents died" if dead else ""
            return {"outcome": f"not within {patience:.0f} s{some}"}
        lines = self.events(since=event)

        def instants(kind, agents, pick):
            of_agent = {agent: [line["at"] for line in lines if line["event"] == kind and line["agent"] == agent] for agent in agents}
            return [pick(seen) for seen in of_agent.values() if seen]

        ended = max(line["at"] for line in formed.values())
        imported = max(line["imported"] for line in formed.values())
        left = max(instants("leaves", formed, max))
        entered = max(instants("enters", running or formed, min))
        imports = max(line["imported"] - line["executed"] for line in formed.values())
        seen = {"total": ended - event, "without import": ended - event - imports, "imports": imports}
        seen.update(agreed=left - entered, starting=imported - left, connected=ended - imported, rendezvous=left - entered)
        seen["initialized"] = max(line["initialized"] for line in formed.values()) - imported
        if running:
            # A newcomer is there once it has started up.
            there = instants("enters", [newcomer], min)[0] if newcomer else event
            stops = max(instants("stops", running, min))
            told = instants("told", running, min)
            seen.update(noticed=stops - there, stopping=entered - stops, told=max(told) - there if told else None)
            seen["rendezvous"] = seen["noticed"] + seen["agreed"] + seen["connected"]
            seen["agent CPU"] = self.agent_cpu
        seen["rounds"] = max(sum(line["event"] == "leaves" and line["agent"] == agent for line in lines) for agent in formed)
        seen["restarts"] = sum(line["restarts"] for line in formed.values())
        return dict(outcome="ok", **seen)

    def close(self):
        super().close(keep=True)
        # A worker that has outlived its agent, if any: it has this job's directory in its command line, and nobody else has.
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/cmdline") as file:
                    if self.dir in file.read():
                        os.kill(int(pid), signal.SIGKILL)
            except OSError:
                pass


def form(job, size):
    event = time.time()
    job.add(size)
    return job.change(event, size, PATIENCE)


def kill(job, size, pick=max):
    formed = job.train(size)
    line = pick(formed.values(), key=lambda line: line["rank"])
    ((number, victim),) = [(i, agent) for i, agent in enumerate(job.agents.values()) if agent.pid == line["agent"]]
    beside = [other.process.pid for other in job.way.beside[number : number + 1]]
    event = time.time()
    for pid in (victim.pid, line["pid"], *beside):
        os.kill(pid, signal.SIGKILL)
    victim.process.wait()
    return job.change(event, size - 1, job.patience, running=[agent.pid for agent in job.alive()])


def kill_rank_0(job, size):
    return kill(job, size, pick=min)


def join(job, size):
    running = list(job.train(size - 1))
    event = time.time()
    (newcomer,) = job.add(1)
    return job.change(event, size, job.patience, running, newcomer.pid)


def coordinator(job, size):
    job.train(size)
    event = time.time()
    # What the machine itself makes of it.
    usual = max(line["gap"] for line in job.events("steps"))
    job.way.coordinator.kill_and_restart()
    job.wait(lambda: False, WATCH, event)
    if not job.alive():
        return {"outcome": f"all agents die after {max(job.deaths.values()) - event:.1f} s"}
    if job.deaths:
        return {"outcome": f"{len(job.deaths)} of {size} agents die"}
    if restarted := len(job.events("started", event)):
        return {"outcome": f"{restarted} workers are started again"}
    steps = job.events("steps", event)
    # If they do not go on at all, nobody says so.
    silent = time.time() - (steps[-1]["at"] if steps else event)
    gap = max([line["gap"] for line in steps] + [silent if silent > 2 else 0])
    return {"outcome": "nobody is started again", "total": gap, "usual": usual}


# What is done, and torchrun's --nnodes for that.
SCENARIOS = {
    "form-at-max": (form, "{size}:{size}"),
    "form-below-max": (form, "{size}:{more}"),
    "kill": (kill, "2:{size}"),
    "kill-rank-0": (kill_rank_0, "2:{size}"),
    "join": (join, "2:{size}"),
    "coordinator": (coordinator, "{size}:{size}"),
}


def measure(scenario, way_name, size, options, settle):
    run, nodes = SCENARIOS[scenario]
    way, job, is_expected = WAYS[way_name](options.reknit), None, True
    try:
        job = Job(way, nodes.format(size=size, more=size + 1), options.patience, settle)
        seen = run(job, size)
        is_expected = "total" in seen or way.may_be_hopeless or run is coordinator
        return seen
    except Exception:
        is_expected = False
        raise
    finally:
        if job:
            job.close()
            if is_expected:
                shutil.rmtree(job.dir, ignore_errors=True)
            else:
                print(f"(what it printed is kept in {job.dir}) ", end="", flush=True)
        way.close()


def sizes(scenario, options):
    return options.agents if scenario.startswith("form") else [2] if scenario == "coordinator" else [4]


def span(samples, name, with_range=False):
    values = [sample[name] for sample in samples if sample.get(name) is not None]
    if not values:
        return "-"
    range = f" ({min(values):.2f}-{max(values):.2f})" if with_range else ""
    return f"{statistics.median(values):.2f}{range}"


def remarks(samples):
    """What is not a number, and how often."""
    said = {}
    for sample in samples:
        what = [sample["outcome"]] if sample["outcome"] != "ok" else []
        if sample.get("rounds", 1) > 1:
            what.append(f"{sample['rounds']} rounds")
        if sample.get("restarts"):
            what.append(f"{sample['restarts']} restarts spent")
        for one in what:
            said[one] = said.get(one, 0) + 1
    return "; ".join(f"{one} ({count} of {len(samples)})" for one, count in said.items())


def show(samples):
    columns = ["total", "without import", "rendezvous", "noticed", "agreed", "connected", "agent CPU"]
    for scenario, size in dict.fromkeys((sample["scenario"], sample["agents"]) for sample in samples):
        of_case = [sample for sample in samples if (sample["scenario"], sample["agents"]) == (scenario, size)]
        is_gap = scenario == "coordinator"
        # Here there is no new world, and what there is is the longest time between two steps.
        heads = ["longest gap", "before that"] if is_gap else columns
        names = ["total", "usual"] if is_gap else columns
        print(f"\n{scenario}, {size} agents; seconds, median (least-most)")
        print(f"{'':<16}{heads[0]:>22}" + "".join(f"{head:>{max(len(head), 7) + 2}}" for head in heads[1:]) + f"{'n':>4}  remarks")
        for way in dict.fromkeys(sample["way"] for sample in of_case):
            mine = [sample for sample in of_case if sample["way"] == way]
            row = f"{way:<16}{span(mine, names[0], True):>22}"
            row += "".join(f"{span(mine, name):>{max(len(head), 7) + 2}}" for name, head in zip(names[1:], heads[1:]))
            print(f"{row}{len(mine):>4}  {remarks(mine)}")


def run_all(options, samples):
    failed = 0
    for round in range(options.repeat):
        for scenario in options.names or SCENARIOS:
            # How long the world trains before the event: the same for all ways, and another in each round.
            settle = random.Random(f"{scenario} {round}").uniform(2, 7)
            ways = options.ways[round % len(options.ways) :] + options.ways[: round % len(options.ways)]
            for size, way in [(size, way) for size in sizes(scenario, options) for way in ways]:
                if scenario not in (WAYS[way].scenarios or SCENARIOS):
                    continue
                case = {"scenario": scenario, "agents": size, "way": way}
                lost = [sample for sample in samples if case.items() <= sample.items() and "total" not in sample]
                if WAYS[way].may_be_hopeless and len(lost) >= options.repeat_stock:
                    continue
                case.update(round=round, load=os.getloadavg()[0])
                print(f"round {round + 1}: {scenario}, {size} agents, {way} … ", end="", flush=True)
                try:
                    seen = measure(scenario, way, size, options, settle)
                except Exception as error:  # noqa: BLE001 - shown, and counted
                    print(f"FAILED: {error}", flush=True)
                    traceback.print_exc()
                    failed += 1
                    continue
                samples.append(dict(case, **seen))
                numbers = [f"{name} {seen[name]:.2f} s" for name in ("total", "rendezvous") if name in seen]
                print(", ".join([seen["outcome"], *numbers]), flush=True)
    return failed


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--reknit", required=True, help="the program `reknit`")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--repeat-stock", type=int, default=2, help="how often what never comes to an end with stock torchrun is tried")
    parser.add_argument("--patience", type=float, default=75.0, help="how long a change is waited for, in seconds")
    parser.add_argument("--agents", default="2,4,8", help="how many agents form a group")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--json", help="a file for every single sample")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SCENARIOS))
    options = parser.parse_args()
    options.ways = options.ways.split(",")
    options.agents = [int(size) for size in options.agents.split(",")]
    if unknown := [*(set(options.names) - set(SCENARIOS)), *(set(options.ways) - set(WAYS))]:
        parser.error(f"there is no {', '.join(unknown)}")
    # So that whatever was started is ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    samples, failed = [], 1
    print(f"torch {torch.__version__}, {os.cpu_count()} cores", flush=True)
    try:
        failed = run_all(options, samples)
    finally:
        show(samples)
        if options.json:
            with open(options.json, "w") as file:
                json.dump({"torch": torch.__version__, "cores": os.cpu_count(), "samples": samples}, file, indent=1)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
