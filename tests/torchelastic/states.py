"""Prints two rendezvous states as the installed release of PyTorch writes them: one with everything in it, and an empty one.

    python states.py >crates/torchelastic/tests/states/$(python -c 'import torch; print(torch.__version__.split("+")[0])').txt
"""

import base64
import datetime
import pickle

import torch
import torch.distributed.elastic.rendezvous.dynamic_rendezvous as rendezvous

# From 2.6 on, instants are written with their time zone.
AWARE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)


def at(*parts):
    return datetime.datetime(*parts, tzinfo=datetime.timezone.utc if AWARE else None)


def full():
    state = rendezvous._RendezvousState()
    a = rendezvous._NodeDesc("node-a", 4321, 0)
    b = rendezvous._NodeDesc("node-b.example.org", 70000, 1)
    c = rendezvous._NodeDesc("node-c", 3, 0)
    state.round = 300
    state.complete = True
    state.deadline = at(2026, 2, 28, 23, 59, 59, 999999)
    state.closed = False
    state.participants = {a: 0, b: 1}
    state.wait_list = {c}
    if hasattr(state, "redundancy_list"):
        state.redundancy_list = {rendezvous._NodeDesc("node-e", 5, 0)}
    state.last_heartbeats = {
        a: at(2026, 11, 27, 1, 2, 3, 4),
        b: at(2024, 2, 29, 12, 0, 0, 0),
        c: at(2026, 1, 1, 0, 0, 0, 1),
    }
    return state


for state in (full(), rendezvous._RendezvousState()):
    print(base64.b64encode(pickle.dumps(state)).decode())
