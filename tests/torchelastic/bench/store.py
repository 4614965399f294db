"""Store operations per second, and what they cost the server, beside PyTorch's own server in the same run.

    python store.py --reknit PATH_OF_BINARY [--seconds S] [--repeat N] [--json FILE]

Clients are PyTorch's own, one process each. Each round measures both servers, one after the other and in changing order; what is shown is the
median over the rounds, with the least and the most. CPU is that of the server's process alone. Beside both stands what the least
possible servers take (`floor.c`: with epoll, and with io_uring in two ways), for the operations with one reply, and what a server that
takes no CPU at all could reach if all cores were always busy, and with nothing else: the clients want theirs too.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

VALUE = "v" * 64
# How floor.c can do it, and what it answers with one reply.
FLOORS = ("epoll", "uring", "sqpoll")
FLOOR_OPERATIONS = ("get", "add", "check")
# How many wait for one key, and how often that is done in a round.
WAITERS, WAVES = 64, 20
TICK = os.sysconf("SC_CLK_TCK")
RELEASE = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def connect(address):
    host, port = address
    return dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))


def op_set(store, me, i):
    store.set(f"{me}/{i % 100}", VALUE)


def op_get(store, me, i):
    store.get(f"{me}/fixed")


def op_add(store, me, i):
    store.add(f"{me}/n", 1)


def op_compare_set(store, me, i):
    store.compare_set(f"{me}/c", str(i - 1) if i else "", str(i))


def op_multi_set(store, me, i):
    store.multi_set([f"{me}/m{k}" for k in range(8)], [VALUE] * 8)


def op_multi_get(store, me, i):
    store.multi_get([f"{me}/g{k}" for k in range(8)])


def op_check(store, me, i):
    store.check([f"{me}/fixed"])


OPERATIONS = {
    "set": op_set,
    "get": op_get,
    "add": op_add,
    "compare_set": op_compare_set,
    "multi_set": op_multi_set,
    "multi_get": op_multi_get,
    "check": op_check,
}


def client(address, operation, me, seconds, ready, go, done):
    store = connect(address)
    store.set(f"{me}/fixed", VALUE)
    store.delete_key(f"{me}/c")
    for k in range(8):
        store.set(f"{me}/g{k}", VALUE)
    function = OPERATIONS[operation]
    ready.release()
    go.wait()
    end, count = time.perf_counter() + seconds, 0
    while True:
        # The clock is looked at seldom.
        for _ in range(32):
            function(store, me, count)
            count += 1
        if time.perf_counter() > end:
            break
    # What has no reply is carried out when this has one.
    store.num_keys()
    done.put((count, time.perf_counter()))


def serve_theirs(pipe):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=True)
    pipe.send(store.port)
    pipe.recv()


class Theirs:
    name = "pytorch"

    def __init__(self):
        self.pipe, other = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=serve_theirs, args=(other,))
        self.process.start()
        self.address, self.pid = ("127.0.0.1", self.pipe.recv()), self.process.pid

    def close(self):
        self.pipe.send(None)
        self.process.join()


class Ours:
    name = "reknit"

    def __init__(self, binary):
        from fleet import Coordinator

        self.coordinator = Coordinator(binary)
        host, port = self.coordinator.endpoint.rsplit(":", 1)
        self.address, self.pid = (host, int(port)), self.coordinator.process.pid

    def close(self):
        self.coordinator.close()


class Floor:
    """The least that a server could do: see floor.c. It says no port if the system forbids io_uring."""

    def __init__(self, how):
        self.name = how
        self.dir = tempfile.TemporaryDirectory(prefix="reknit-floor-")
        program = os.path.join(self.dir.name, "floor")
        source = os.path.join(os.path.dirname(os.path.abspath(__file__)), "floor.c")
        subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-o", program, source], check=True)
        self.process = subprocess.Popen([program, how], stdout=subprocess.PIPE, text=True)
        self.port, self.pid = self.process.stdout.readline(), self.process.pid
        self.address = ("127.0.0.1", int(self.port or 0))

    def close(self):
        self.process.kill()
        self.process.wait()
        self.dir.cleanup()


def cpu(pid):
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def rate(server, operation, clients, seconds):
    """Operations per second, and the server's CPU microseconds per operation."""
    ready, go, done = multiprocessing.Semaphore(0), multiprocessing.Event(), multiprocessing.Queue()
    processes = [
        multiprocessing.Process(
            target=client, args=(server.address, operation, f"c{me}", seconds, ready, go, done)
        )
        for me in range(clients)
    ]
    for process in processes:
        process.start()
    for _ in processes:
        ready.acquire()
    before, began = cpu(server.pid), time.perf_counter()
    go.set()
    results = [done.get() for _ in processes]
    ended, used = max(at for _, at in results), cpu(server.pid) - before
    for process in processes:
        process.join()
    count = sum(count for count, _ in results)
    return count / (ended - began), used / count * 1e6


def waiter(address, me, ready, woken, waves):
    store = connect(address)
    for wave in range(waves):
        ready.release()
        store.get(f"late/{wave}")
        # No queue, no lock: 64 processes on a few cores would measure those.
        woken[wave * WAITERS + me] = time.monotonic()


def fan_out(server, waves):
    """How long after a key is set the first and the last of those who wait for it have it, in milliseconds: medians over the waves."""
    ready, woken = multiprocessing.Semaphore(0), multiprocessing.RawArray("d", waves * WAITERS)
    processes = [
        multiprocessing.Process(target=waiter, args=(server.address, me, ready, woken, waves)) for me in range(WAITERS)
    ]
    for process in processes:
        process.start()
    store, firsts, lasts = connect(server.address), [], []
    for wave in range(waves):
        for _ in processes:
            ready.acquire()
        # All are about to wait; that their waits have arrived cannot be asked.
        time.sleep(0.2)
        at = time.monotonic()
        store.set(f"late/{wave}", VALUE)
        while min(times := woken[wave * WAITERS : (wave + 1) * WAITERS]) == 0:
            time.sleep(0.01)
        firsts.append((min(times) - at) * 1e3)
        lasts.append((max(times) - at) * 1e3)
    for process in processes:
        process.join()
    for wave in range(waves):
        store.delete_key(f"late/{wave}")
    return statistics.median(firsts), statistics.median(lasts)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--reknit", required=True)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json")
    options = parser.parse_args()
    multiprocessing.set_start_method("fork")
    floors = [floor for floor in map(Floor, FLOORS) if floor.port]
    servers = {server.name: server for server in (Theirs(), Ours(options.reknit), *floors)}
    measured = {}
    for round in range(options.repeat):
        order = list(servers.values())
        if round % 2:
            order.reverse()
        for operation in OPERATIONS:
            for clients in (1, 8):
                for server in order:
                    if server.name in FLOORS and operation not in FLOOR_OPERATIONS:
                        continue
                    seen = rate(server, operation, clients, options.seconds)
                    measured.setdefault((operation, clients, server.name), []).append(seen)
        for server in order:
            if server.name in FLOORS:
                continue
            measured.setdefault(("wait fan-out", WAITERS, server.name), []).append(fan_out(server, WAVES))
    rows = []
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {options.repeat} rounds of {options.seconds} s")
    print(f"{'operation':<14} {'clients':>7} {'reknit/s':>10} {'pytorch/s':>10} {'ratio':>6} {'CPU µs':>7} {'theirs':>7} {'ratio':>6}   least possible")
    for (operation, clients, name), seen in measured.items():
        if name != "reknit":
            continue
        theirs = measured[(operation, clients, "pytorch")]
        ours = [statistics.median(values) for values in zip(*seen)]
        peer = [statistics.median(values) for values in zip(*theirs)]
        row = {"operation": operation, "clients": clients, "reknit": seen, "pytorch": theirs}
        row["floors"] = {how: measured[case] for how in FLOORS if (case := (operation, clients, how)) in measured}
        rows.append(row)
        if operation == "wait fan-out":
            print(f"{operation:<14} {clients:>7} first {ours[0]:.2f} ms, last {ours[1]:.2f} ms; pytorch {peer[0]:.2f}, {peer[1]:.2f}")
            continue
        ratios = [o[0] / p[0] for o, p in zip(seen, theirs)]
        floor = ""
        for how, least in row["floors"].items():
            rates, cpus = ([f[i] / p[i] for f, p in zip(least, theirs)] for i in (0, 1))
            floor += f"   {how} {statistics.median(rates):.2f}, CPU {statistics.median(cpus):.2f}"
        if floor and clients >= os.cpu_count():
            # All that the cores do for one operation, against the same without the server's part.
            whole = [os.cpu_count() / rate * 1e6 for rate, _ in theirs]
            floor += f"   nothing {statistics.median(w / (w - p[1]) for w, p in zip(whole, theirs)):.2f}"
        print(
            f"{operation:<14} {clients:>7} {ours[0]:>10.0f} {peer[0]:>10.0f} {statistics.median(ratios):>6.2f} "
            f"{ours[1]:>7.2f} {peer[1]:>7.2f} {ours[1] / peer[1]:>6.2f}   ({min(ratios):.2f} to {max(ratios):.2f}){floor}"
        )
    for server in servers.values():
        server.close()
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file)


if __name__ == "__main__":
    main()
