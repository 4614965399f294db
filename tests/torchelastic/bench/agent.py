"""torchrun that also says when its agent does what, for `agents.py`: the same for all ways, and nothing of the agent is changed.

Started as `python -m agent` with torchrun's arguments. To the file that BENCH_LOG names it adds one JSON object a line:
`enters` and `leaves` (the rendezvous), `fails` (it left that with an exception), `told` (the rendezvous said for the first time
in this round that somebody is waiting, so that the workers are to be stopped), `stops` and `stopped` (its workers).
"""

import functools
import json
import os
import time

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.run import main

LOG = open(os.environ["BENCH_LOG"], "a", buffering=1)


def say(event, **what):
    what.update(event=event, at=time.time(), agent=os.getpid())
    LOG.write(json.dumps(what) + "\n")


def watched(name, begin, end):
    inner = getattr(LocalElasticAgent, name)

    @functools.wraps(inner)
    def outer(*arguments, **named):
        say(begin)
        try:
            result = inner(*arguments, **named)
        except BaseException as why:
            say("fails", of=begin, why=repr(why)[:300])
            raise
        say(end)
        return result

    setattr(LocalElasticAgent, name, outer)


def watch_the_question(agent, worker_group):
    """Writes down when the agent's handler, which is known only now, first says that nodes are waiting."""
    handler = worker_group.spec.rdzv_handler
    ask = type(handler).num_nodes_waiting
    has_said = False

    def asked():
        nonlocal has_said
        waiting = ask(handler)
        if waiting > 0 and not has_said:
            has_said = True
            say("told")
        return waiting

    handler.num_nodes_waiting = asked
    return rendezvous(agent, worker_group)


watched("_rendezvous", "enters", "leaves")
watched("_stop_workers", "stops", "stopped")
rendezvous = LocalElasticAgent._rendezvous
LocalElasticAgent._rendezvous = watch_the_question

if __name__ == "__main__":
    main()
