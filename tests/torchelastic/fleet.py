"""Agents of torchrun on one machine, for tests and measurements: real processes, killed for real."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
PATIENCE = 120.0


class Coordinator:
    """`reknit serve` with its endpoint for torchrun."""

    def __init__(self, binary, *options):
        self.binary = binary
        self.dir = tempfile.TemporaryDirectory(prefix="reknit-store-")
        self.options = options
        self.log = tempfile.NamedTemporaryFile("w+", prefix="reknit-", suffix=".log")
        self.serve("127.0.0.1:0", "127.0.0.1:0")

    def serve(self, listen, endpoint):
        command = [self.binary, "serve", "--listen", listen, "--store", self.dir.name, "--announce"]
        command += ["--torchelastic", endpoint, *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.address = self.process.stdout.readline().strip()
        self.url = "http://" + self.address
        self.endpoint = self.process.stdout.readline().strip()

    def kill_and_restart(self):
        """As if its machine had been reset: it comes back with what it has saved."""
        self.process.kill()
        self.process.wait()
        self.serve(self.address, self.endpoint)

    def look(self, *what):
        """What `reknit WHAT --json` shows; nothing if it fails."""
        command = [self.binary, *what, "--json", "--coordinator", self.url]
        done = subprocess.run(command, capture_output=True, text=True)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def run(self, *what):
        subprocess.run([self.binary, *what, "--coordinator", self.url], check=True, capture_output=True)

    def close(self):
        self.process.terminate()
        self.process.wait()
        self.dir.cleanup()


class Relay:
    """`reknit relay`, as on a machine that runs torchrun."""

    def __init__(self, coordinator, nodes):
        self.log = tempfile.NamedTemporaryFile("w+", prefix="reknit-relay-", suffix=".log")
        command = [coordinator.binary, "relay", "--listen", "127.0.0.1:0", "--nodes", nodes, "--announce"]
        command += ["--coordinator", coordinator.url]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.endpoint = self.process.stdout.readline().strip()

    def close(self):
        self.process.terminate()
        self.process.wait()


class Agent:
    """One `torchrun`, in a process group of its own with its workers."""

    def __init__(self, fleet, name):
        self.name = name
        self.output = open(os.path.join(fleet.dir, f"{name}.out"), "w")
        command = [sys.executable, "-m", fleet.module, *fleet.options, fleet.worker, *fleet.arguments]
        environment = dict(os.environ, OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR", TMPDIR=fleet.dir, **fleet.environment)
        self.process = subprocess.Popen(
            command, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        self.started = time.time()

    @property
    def pid(self):
        return self.process.pid

    def workers(self):
        """The processes that it has started."""
        done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.pid)], capture_output=True, text=True)
        return [int(pid) for pid in done.stdout.split()]

    def kill(self):
        """As if its machine were gone: agent and workers at once. torchrun gives each worker a session of its own."""
        at = time.time()
        for pid in [self.pid, *self.workers()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()
        return at

    def stop(self, how=signal.SIGTERM):
        at = time.time()
        self.process.send_signal(how)
        return at

    def shown(self):
        with open(self.output.name) as file:
            return file.read()


class Fleet:
    """The agents of one job."""

    def __init__(self, options, module="torch.distributed.run", steps=1_000_000, environment=None):
        self.dir = tempfile.mkdtemp(prefix="reknit-torch-")
        self.options = options
        self.module = module
        self.worker = os.path.join(HERE, "worker.py")
        self.log = os.path.join(self.dir, "log")
        self.over = os.path.join(self.dir, "over")
        self.arguments = [self.log, str(steps), "--until", self.over]
        self.environment = environment or {}
        self.agents = {}
        self.count = 0

    def add(self, count=1):
        added = []
        for _ in range(count):
            name = f"agent-{self.count}"
            self.count += 1
            self.agents[name] = Agent(self, name)
            added.append(self.agents[name])
        return added

    def alive(self):
        return [agent for agent in self.agents.values() if agent.process.poll() is None]

    def events(self, event=None, since=0.0):
        try:
            with open(self.log) as file:
                lines = [json.loads(line) for line in file if line.endswith("\n")]
        except FileNotFoundError:
            return []
        return [line for line in lines if line["at"] >= since and event in (None, line["event"])]

    def world(self, size, since=0.0, patience=PATIENCE):
        """Waits until `size` workers have begun in a world of that size, each of another agent that is alive. Returns the
        instant of the last of them."""

        def look():
            alive = {agent.pid for agent in self.alive()}
            first = {}
            for line in self.events("first", since):
                if line["agent"] in alive and line["world"] == size:
                    first[line["agent"]] = line["at"]
            return max(first.values()) if len(first) == size else None

        return self.eventually(look, f"a world of {size}", patience)

    def eventually(self, look, what, patience=PATIENCE):
        end = time.time() + patience
        while time.time() < end:
            seen = look()
            if seen is not None and seen is not False:
                return seen
            time.sleep(0.02)
        for agent in self.agents.values():
            print(f"--- {agent.name} (exit {agent.process.poll()})\n{agent.shown()[-3000:]}", file=sys.stderr)
        raise AssertionError(f"waited {patience} s for {what}; events: {self.events()[-10:]}")

    def end(self, patience=PATIENCE):
        """Ends the job as a job ends: after steps in its last world, the workers exit with success. Returns the agents' exit codes."""
        begun = max(line["at"] for line in self.events("first"))
        self.eventually(lambda: self.events("step", begun), "steps before the end")
        open(self.over, "w").close()
        codes = {}
        for agent in self.agents.values():
            if agent.process.returncode is None:
                self.eventually(lambda: agent.process.poll() is not None, f"the end of {agent.name}", patience)
                codes[agent.name] = agent.process.returncode
        return codes

    def close(self, keep=False):
        for agent in self.alive():
            agent.kill()
        # What it printed has been shown, if anybody needs it.
        if not keep:
            shutil.rmtree(self.dir, ignore_errors=True)
