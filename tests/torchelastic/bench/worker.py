"""What torchrun starts in these measurements: a worker that reduces without end, and says when it was how far.

    worker.py LOG STEPS --until FILE

Each line of LOG is one JSON object; the agents write theirs beside them (`agent.py`).
"""

import time

# Before anything is imported: importing torch takes longer than all the rest.
executed = time.time()

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

imported = time.time()

# One line for many steps, or writing and reading the log would be part of what is measured.
SAY_EVERY = 0.5


def main():
    log, steps, until = sys.argv[1], int(sys.argv[2]), sys.argv[4]
    lines = open(log, "a", buffering=1)
    world = int(os.environ["WORLD_SIZE"])

    def say(event, **what):
        what.update(event=event, at=time.time(), pid=os.getpid(), agent=os.getppid(), rank=int(os.environ["RANK"]), world=world)
        lines.write(json.dumps(what) + "\n")

    say("started")
    dist.init_process_group("gloo")
    initialized = time.time()
    reduced = torch.ones(1)
    dist.all_reduce(reduced)
    assert reduced.item() == world, reduced
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    say("first", executed=executed, imported=imported, initialized=initialized, restarts=restarts)

    said = last = time.monotonic()
    gap = 0.0
    for step in range(steps):
        gradient = torch.full((10_000,), float(step))
        # All see the end at the same step, or some would wait for the others.
        gradient[0] = os.path.exists(until)
        dist.all_reduce(gradient)
        now = time.monotonic()
        gap, last = max(gap, now - last), now
        if dist.get_rank() == 0 and now - said > SAY_EVERY:
            say("steps", step=step, gap=gap)
            said, gap = now, 0.0
        if gradient[0].item():
            break
        # Stands for the computation of a step.
        time.sleep(0.02)
    dist.destroy_process_group()


main()
# Gloo's threads may abort a process that ends in another way: see the tests' worker.
os._exit(0)
