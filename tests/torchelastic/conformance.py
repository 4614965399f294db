"""One suite of checks for the TCPStore protocol, run unchanged against PyTorch's own server and against reknit's.

    python conformance.py --reknit PATH_OF_BINARY

Every check describes what it sees as a value. What the two servers show must be the same, and what the check expects; except
for the differences that are listed in DIFFERENCES, each with its reason, where reknit must show what is written there.
"""

import argparse
import base64
import os
import pickle
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch  # noqa: E402 - it reads the variable when it is loaded
import torch.distributed as dist  # noqa: E402
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _RendezvousState  # noqa: E402

RELEASE = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
MAGIC = 0x3C85F7CE
CHECKS = []

# What reknit does otherwise, and why.
DIFFERENCES = {
    "a greeting that comes byte by byte": (
        ["answered"],
        "PyTorch's server closes the connection if the greeting is split after its first byte; clients then try again",
    ),
    "a first message with another magic number": (
        ["closed"],
        "PyTorch's server leaves the connection open and mute, and the client waits until its own time-out",
    ),
    "a first message that is a request": (
        ["closed"],
        "as above: clients of PyTorch before 2.2 begin like this, and are told that they are not understood",
    ),
    "a compare-and-set that writes nothing wakes nobody": (
        ["mute"],
        "PyTorch's server tells a waiting client that its key is there, although it is not",
    ),
    "a sum that is no 64-bit number": (
        ["closed"],
        "PyTorch's server lets it overflow",
    ),
    "parts of a multi-set count only when all of it is there": (
        [b""],
        "PyTorch's server stores the first pairs while it waits for the rest, and again with each part",
    ),
    "a rendezvous state that is none": (
        ["closed"],
        "agents unpickle what is there, which may run anything (--torchelastic-without guard: it is stored)",
    ),
    "a rendezvous state that is set, added to or deleted": (
        ["closed"] * 3,
        "torchrun writes it by compare-and-set alone, and the repairs follow it: with or without the guard nothing else is taken",
    ),
}


def check(name, since=(2, 2)):
    def register(function):
        if RELEASE >= since:
            CHECKS.append((name, function))
        return function

    return register


class Raw:
    """A client that speaks bytes."""

    def __init__(self, server, greet=True):
        self.socket = socket.create_connection((server.host, server.port), timeout=5)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if greet:
            self.send(b"\x00" + struct.pack("<I", MAGIC))

    def send(self, data):
        self.socket.sendall(data)

    def read(self, count):
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise ConnectionResetError
            data += more
        return data

    def text(self):
        return self.read(struct.unpack("<Q", self.read(8))[0])

    def number(self):
        return struct.unpack("<q", self.read(8))[0]

    def sees(self, patience=0.3):
        """What comes next: bytes, "mute" if nothing does, "closed" if the connection is."""
        self.socket.settimeout(patience)
        try:
            data = self.socket.recv(1)
        except (socket.timeout, TimeoutError):
            return "mute"
        except ConnectionError:
            return "closed"
        finally:
            self.socket.settimeout(5)
        return data if data else "closed"

    def is_alive(self, server):
        """Whether the connection still answers."""
        try:
            self.send(request(7))
            self.number()
            return "answered"
        except (ConnectionError, socket.timeout):
            return "closed"

    def close(self):
        self.socket.close()


def text(data):
    data = data if isinstance(data, bytes) else data.encode()
    return struct.pack("<Q", len(data)) + data


def request(op, *parts):
    return bytes([op]) + b"".join(part if isinstance(part, bytes) else text(part) for part in parts)


def keys(*names):
    return struct.pack("<Q", len(names)) + b"".join(text(name) for name in names)


def i64(number):
    return struct.pack("<q", number)


SET, COMPARE_SET, GET, ADD, CHECK, WAIT, COUNT, DELETE, APPEND = range(1, 10)
MULTI_GET, MULTI_SET, CANCEL, PING, PUSH, POP, LENGTH, LIST, BARRIER = range(10, 19)


def asks(server, *requests):
    """The first eight bytes, the text or the byte that each is answered with."""
    client = Raw(server)
    answers = []
    for data, kind in requests:
        client.send(data)
        if kind == "text":
            answers.append(client.text())
        elif kind == "number":
            answers.append(client.number())
        elif kind == "byte":
            answers.append(client.read(1))
    client.close()
    return answers


# Values.


@check("a value is what was set last")
def _(server):
    client = Raw(server)
    client.send(request(SET, "/k", "one") + request(SET, "/k", "two") + request(GET, "/k"))
    return [client.text()], [b"two"]


@check("a value may hold any byte, and a key too")
def _(server):
    client = Raw(server)
    client.send(request(SET, text(b"/\x00\xff"), text(bytes(range(256)))) + request(GET, text(b"/\x00\xff")))
    return [client.text()], [bytes(range(256))]


@check("a value that is not there is empty")
def _(server):
    return asks(server, (request(GET, "/none"), "text"), (request(MULTI_GET, keys("/none")), "text")), [b"", b""]


@check("an empty value is a value")
def _(server):
    return asks(
        server, (request(SET, "/k", ""), None), (request(CHECK, keys("/k")), "byte"), (request(COUNT), "number")
    ), [b"\x00", 1]


@check("append makes a value or adds to it")
def _(server):
    return asks(
        server, (request(APPEND, "/k", "a"), None), (request(APPEND, "/k", "b"), None), (request(GET, "/k"), "text")
    ), [b"ab"]


@check("several values are set and read at once, in order")
def _(server):
    pairs = i64(2) + text("/a") + text("1") + text("/b") + text("2")
    client = Raw(server)
    client.send(request(MULTI_SET, pairs) + request(MULTI_GET, keys("/b", "/none", "/a")))
    return [client.text(), client.text(), client.text()], [b"2", b"", b"1"]


@check("parts of a multi-set count only when all of it is there")
def _(server):
    client, other = Raw(server), Raw(server)
    client.send(bytes([MULTI_SET]) + i64(2) + text("/a") + text("1") + text("/b"))
    time.sleep(0.2)
    other.send(request(GET, "/a"))
    return [other.text()], [b"1"]


@check("keys are counted, deleted once, and listed", since=(2, 10))
def _(server):
    client = Raw(server)
    client.send(request(SET, "/a", "1") + request(SET, "/b", "2") + request(COUNT))
    seen = [client.number()]
    client.send(request(DELETE, "/a") + request(DELETE, "/a") + request(LIST))
    seen += [client.number(), client.number()]
    seen += [[client.text() for _ in range(client.number())]]
    return seen, [2, 1, 0, [b"/b"]]


# Numbers.


@check("a number begins at zero and is kept as a decimal")
def _(server):
    return asks(
        server,
        (request(ADD, "/n", i64(5)), "number"),
        (request(ADD, "/n", i64(-7)), "number"),
        (request(GET, "/n"), "text"),
        (request(ADD, "/zero", i64(0)), "number"),
        (request(GET, "/zero"), "text"),
    ), [5, -2, b"-2", 0, b"0"]


@check("a number is read as C reads it")
def _(server):
    seen = []
    for value in [" 7x", "+5", "\t-1", "12abc"]:
        seen += asks(server, (request(SET, "/n", value), None), (request(ADD, "/n", i64(1)), "number"))
    return seen, [8, 6, 0, 13]


@check("what is no number cannot be added to")
def _(server):
    client = Raw(server)
    client.send(request(SET, "/n", "many") + request(ADD, "/n", i64(1)))
    return [client.sees(2)], ["closed"]


@check("a sum that is no 64-bit number")
def _(server):
    client = Raw(server)
    client.send(request(SET, "/n", str(2**63 - 1)) + request(ADD, "/n", i64(1)))
    try:
        return [client.number()], [-(2**63)]
    except ConnectionError:
        return ["closed"], [-(2**63)]


# A run's state.

STATE = base64.b64encode(pickle.dumps(_RendezvousState())).decode()


@check("a rendezvous state that is none")
def _(server):
    client = Raw(server)
    client.send(request(COMPARE_SET, "/torch.rendezvous.run", "", "!") + request(GET, "/torch.rendezvous.run"))
    try:
        return [client.text(), client.text()], [b"!", b"!"]
    except ConnectionError:
        return ["closed"], [b"!", b"!"]


@check("a rendezvous state that is set, added to or deleted")
def _(server):
    key, seen = "/torch.rendezvous.run", []
    agent = Raw(server)
    agent.send(request(COMPARE_SET, key, "", STATE))
    agent.text()
    for data in (request(SET, key, STATE), request(APPEND, key, "="), request(DELETE, key)):
        client = Raw(server)
        client.send(data)
        seen.append("closed" if client.is_alive(server) == "closed" else "taken")
    return seen, ["taken"] * 3


@check("a rendezvous state that is not there is deleted")
def _(server):
    return asks(server, (request(DELETE, "/torch.rendezvous.run"), "number")), [0]


# Compare and set.


@check("compare-and-set makes a key if nothing is expected")
def _(server):
    return asks(
        server, (request(COMPARE_SET, "/k", "", "new"), "text"), (request(GET, "/k"), "text")
    ), [b"new", b"new"]


@check("compare-and-set of a key that is not there replies what is expected, and writes nothing")
def _(server):
    return asks(
        server, (request(COMPARE_SET, "/k", "old", "new"), "text"), (request(CHECK, keys("/k")), "byte")
    ), [b"old", b"\x01"]


@check("compare-and-set replaces what is expected and replies what is there else")
def _(server):
    return asks(
        server,
        (request(SET, "/k", "1"), None),
        (request(COMPARE_SET, "/k", "2", "3"), "text"),
        (request(COMPARE_SET, "/k", "1", "3"), "text"),
        (request(COMPARE_SET, "/k", "", "4"), "text"),
        (request(SET, "/k", ""), None),
        (request(COMPARE_SET, "/k", "", "5"), "text"),
    ), [b"1", b"3", b"3", b"5"]


# Waiting.


@check("no keys are all there")
def _(server):
    return asks(server, (request(CHECK, keys()), "byte"), (request(WAIT, keys()), "byte")), [b"\x00", b"\x00"]


@check("a wait ends when the last key is there, and once")
def _(server):
    client, other = Raw(server), Raw(server)
    client.send(request(WAIT, keys("/a", "/b")))
    other.send(request(SET, "/a", ""))
    seen = [client.sees()]
    other.send(request(SET, "/b", ""))
    seen += [client.sees(2)]
    other.send(request(SET, "/b", "again"))
    return seen + [client.sees()], ["mute", b"\x00", "mute"]


@check("a key that goes again does not have to come again")
def _(server):
    client, other = Raw(server), Raw(server)
    client.send(request(WAIT, keys("/a", "/b")))
    other.send(request(SET, "/a", "") + request(DELETE, "/a") + request(SET, "/b", ""))
    return [client.sees(2)], [b"\x00"]


@check("every way of making a key ends a wait")
def _(server):
    ways = {
        "/add": request(ADD, "/add", i64(1)),
        "/cas": request(COMPARE_SET, "/cas", "", "x"),
        "/append": request(APPEND, "/append", "x"),
        "/multi": request(MULTI_SET, i64(1) + text("/multi") + text("x")),
    }
    seen = []
    for key, way in ways.items():
        client, other = Raw(server), Raw(server)
        client.send(request(WAIT, keys(key)))
        time.sleep(0.05)
        other.send(way)
        seen.append(client.sees(2))
    return seen, [b"\x00"] * 4


@check("a compare-and-set that writes nothing wakes nobody")
def _(server):
    client, other = Raw(server), Raw(server)
    client.send(request(WAIT, keys("/k")))
    time.sleep(0.05)
    other.send(request(COMPARE_SET, "/k", "old", "new"))
    return [client.sees()], [b"\x00"]


@check("a wait is taken back, and the connection can be used")
def _(server):
    client, other = Raw(server), Raw(server)
    client.send(request(WAIT, keys("/k")))
    time.sleep(0.05)
    client.send(request(CANCEL))
    seen = [client.sees(2)]
    other.send(request(SET, "/k", "v"))
    seen += [client.sees()]
    client.send(request(GET, "/k"))
    return seen + [client.text()], [b"\x01", "mute", b"v"]


@check("taking back what is not waited for is answered")
def _(server):
    return asks(server, (request(CANCEL), "byte"), (request(CANCEL), "byte")), [b"\x01", b"\x01"]


@check("who waits and is gone is forgotten")
def _(server):
    client, other = Raw(server), Raw(server)
    client.send(request(WAIT, keys("/k")))
    time.sleep(0.05)
    client.close()
    time.sleep(0.05)
    other.send(request(SET, "/k", "v") + request(GET, "/k"))
    return [other.text()], [b"v"]


# Queues.


@check("a queue gives its values in order, and says how many there were", since=(2, 8))
def _(server):
    client = Raw(server)
    client.send(request(PUSH, "/q", "1") + request(PUSH, "/q", "2") + request(LENGTH, "/q"))
    seen = [client.number()]
    for _ in range(2):
        client.send(request(POP, "/q"))
        seen += [client.number(), client.text()]
    client.send(request(POP, "/q"))
    seen += [client.number()]
    client.send(request(LENGTH, "/q"))
    return seen + [client.number()], [2, 2, b"1", 1, b"2", 0, 0]


@check("a queue is there like a key, and is none", since=(2, 8))
def _(server):
    client = Raw(server)
    client.send(request(PUSH, "/q", "1") + request(CHECK, keys("/q")) + request(WAIT, keys("/q")))
    seen = [client.read(1), client.read(1)]
    client.send(request(COUNT) + request(DELETE, "/q"))
    return seen + [client.number(), client.number()], [b"\x00", b"\x00", 0, 0]


@check("a pushed value wakes one", since=(2, 8))
def _(server):
    first, second, other = Raw(server), Raw(server), Raw(server)
    first.send(request(WAIT, keys("/q")))
    time.sleep(0.1)
    second.send(request(WAIT, keys("/q")))
    time.sleep(0.1)
    other.send(request(PUSH, "/q", "1"))
    seen = sorted([str(first.sees()), str(second.sees())])
    return seen, [str(b"\x00"), "mute"]


# Barriers.


@check("a barrier opens when the last has come, and stays open", since=(2, 12))
def _(server):
    clients = [Raw(server) for _ in range(4)]
    seen = []
    for client in clients[:2]:
        client.send(request(BARRIER, "/b", i64(3)))
        seen.append(client.sees())
    clients[2].send(request(BARRIER, "/b", i64(3)))
    seen += [client.sees(2) for client in clients[:3]]
    clients[3].send(request(BARRIER, "/b", i64(3)))
    seen += [clients[3].sees(2)]
    clients[3].send(request(GET, "/b"))
    return seen + [clients[3].text()], ["mute", "mute", b"\x00", b"\x00", b"\x00", b"\x00", b"4"]


@check("who gives up at a barrier has come all the same", since=(2, 12))
def _(server):
    first, second = Raw(server), Raw(server)
    first.send(request(BARRIER, "/b", i64(2)))
    seen = [first.sees()]
    first.send(request(CANCEL))
    seen += [first.sees(2)]
    second.send(request(BARRIER, "/b", i64(2)))
    return seen + [second.sees(2), first.sees()], ["mute", b"\x01", b"\x00", "mute"]


# Connections.


@check("a ping is answered", since=(2, 5))
def _(server):
    client = Raw(server)
    client.send(bytes([PING]) + struct.pack("<I", 77))
    return [client.read(4)], [struct.pack("<I", 77)]


@check("requests may come together, and in pieces")
def _(server):
    client = Raw(server)
    data = request(SET, "/k", "value") + request(GET, "/k") + request(COUNT)
    for byte in data:
        client.send(bytes([byte]))
    seen = [client.text(), client.number()]
    client.send(data * 50)
    return seen + [(client.text(), client.number()) for _ in range(50)][-1:], [b"value", 1, (b"value", 1)]


@check("a greeting that comes byte by byte")
def _(server):
    client = Raw(server, greet=False)
    try:
        for byte in b"\x00" + struct.pack("<I", MAGIC):
            client.send(bytes([byte]))
            time.sleep(0.02)
    except ConnectionError:
        return ["closed"], ["closed"]
    return [client.is_alive(server)], ["closed"]


@check("a first message with another magic number")
def _(server):
    client = Raw(server, greet=False)
    client.send(b"\x00" + struct.pack("<I", 1))
    return [client.sees(1)], ["mute"]


@check("a first message that is a request")
def _(server):
    client = Raw(server, greet=False)
    client.send(request(GET, "/k"))
    return [client.sees(1)], ["mute"]


@check("a second greeting")
def _(server):
    client = Raw(server)
    client.send(b"\x00" + struct.pack("<I", MAGIC))
    return [client.sees(2)], ["closed"]


@check("an operation that there is not")
def _(server):
    client = Raw(server)
    client.send(bytes([99]))
    return [client.sees(2)], ["closed"]


@check("a key of 8 KiB is taken, one byte more is not")
def _(server):
    client = Raw(server)
    client.send(request(SET, "k" * 8192, "v") + request(GET, "k" * 8192))
    seen = [client.text()]
    client.send(request(GET, "k" * 8193))
    return seen + [client.sees(2)], [b"v", "closed"]


@check("a value of 8 MiB is taken, one byte more is not")
def _(server):
    client = Raw(server)
    client.send(request(SET, "/k", "v" * (8 << 20)) + request(GET, "/k"))
    seen = [len(client.text())]
    try:
        client.send(request(SET, "/k", "v" * ((8 << 20) + 1)))
        seen.append(client.sees(2))
    except ConnectionError:
        seen.append("closed")
    return seen, [8 << 20, "closed"]


@check("a list of too many items")
def _(server):
    client = Raw(server)
    client.send(bytes([MULTI_GET]) + struct.pack("<Q", (128 << 10) + 1))
    return [client.sees(2)], ["closed"]


# What PyTorch's own client makes of it.


def store(server, **options):
    options.setdefault("timeout", timedelta(seconds=10))
    return dist.TCPStore(server.host, server.port, is_master=False, wait_for_workers=False, **options)


@check("PyTorch's client: values, numbers, waits")
def _(server):
    one, two = store(server), store(server)
    waiting = []
    thread = threading.Thread(target=lambda: waiting.append(two.get("late")))
    thread.start()
    one.set("a", "1")
    seen = [one.get("a"), one.add("n", 3), one.compare_set("a", "1", "2"), one.check(["a", "b"]), one.num_keys()]
    one.set("late", "v")
    thread.join()
    seen += waiting + [one.delete_key("a"), one.delete_key("a")]
    one.append("l", "x")
    one.multi_set(["m", "n2"], ["1", "2"])
    seen += [one.multi_get(["m", "n2", "l"])]
    try:
        one.wait(["never"], timedelta(seconds=0.2))
    except dist.DistStoreError:
        seen += ["timed out"]
    return seen + [one.get("m")], [
        b"1", 3, b"2", False, 2, b"v", True, False, [b"1", b"2", b"x"], "timed out", b"1",
    ]


@check("PyTorch's client: prefixes")
def _(server):
    plain = store(server)
    nested = dist.PrefixStore("p2", dist.PrefixStore("pre", plain))
    nested.set("k", "v")
    return [plain.get("pre/p2/k"), nested.get("k")], [b"v", b"v"]


@check("PyTorch's client: queues", since=(2, 8))
def _(server):
    one = store(server)
    one.queue_push("q", "1")
    one.queue_push("q", "2")
    return [one.queue_len("q"), one.queue_pop("q"), one.queue_pop("q")], [2, b"1", b"2"]


@check("PyTorch's client: clones", since=(2, 8))
def _(server):
    one = store(server)
    two = one.clone()
    one.set("k", "v")
    return [two.get("k")], [b"v"]


class Theirs:
    """PyTorch's own server."""

    name = "pytorch"

    def __init__(self):
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=True)
        self.host, self.port = "127.0.0.1", self.store.port

    def close(self):
        del self.store


class Ours:
    """reknit's."""

    name = "reknit"

    def __init__(self, binary):
        self.log = tempfile.TemporaryFile()
        command = [binary, "serve", "--listen", "127.0.0.1:0", "--store", "memory", "--announce"]
        command += ["--torchelastic", "127.0.0.1:0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.process.stdout.readline()
        self.host, port = self.process.stdout.readline().strip().rsplit(":", 1)
        self.port = int(port)

    def close(self):
        self.process.terminate()
        self.process.wait()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--reknit", required=True, help="the program `reknit`")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    wrong = 0
    for name, function in CHECKS:
        seen = {}
        for make in (Theirs, lambda: Ours(options.reknit)):
            # Each on an empty server.
            server = make()
            try:
                shown, expected = function(server)
            except Exception as error:  # noqa: BLE001 - whatever it is, the check has failed
                shown, expected = repr(error), None
            server.close()
            seen[server.name] = shown
        theirs, ours = seen["pytorch"], seen["reknit"]
        wanted = DIFFERENCES[name][0] if name in DIFFERENCES else expected
        is_right = theirs == expected and ours == wanted
        wrong += not is_right
        if not is_right or options.verbose:
            print(f"{'ok  ' if is_right else 'FAIL'} {name}")
        if not is_right:
            print(f"     expected {expected}\n     pytorch  {theirs}\n     reknit   {ours} (wanted {wanted})")
    known = sum(name in DIFFERENCES for name, _ in CHECKS)
    print(f"torch {torch.__version__}: {len(CHECKS)} checks, {known} of them known differences, {wrong} wrong")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
