"""What torchrun starts in these tests: trains a small model with DDP on Gloo, and writes down what happens.

    worker.py LOG STEPS [--until FILE]

Each line of LOG is one JSON object. The model learns y = 3x - 1 from samples that follow from the step's number, and is saved after
every step by rank 0, so that whoever starts later goes on from there. It ends after STEPS steps, or once FILE is there.
"""

import json
import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

began = time.time()


def main():
    log, steps = sys.argv[1], int(sys.argv[2])
    until = sys.argv[4] if len(sys.argv) > 4 else None
    lines = open(log, "a", buffering=1)

    def say(**what):
        what.update(at=time.time(), pid=os.getpid(), agent=os.getppid(), rank=int(os.environ["RANK"]))
        lines.write(json.dumps(what) + "\n")

    world = int(os.environ["WORLD_SIZE"])
    say(event="started", world=world, restarts=int(os.environ["TORCHELASTIC_RESTART_COUNT"]), imported=began)
    dist.init_process_group("gloo")
    first = torch.ones(1)
    dist.all_reduce(first)
    assert first.item() == world, first
    say(event="first", world=world)

    torch.manual_seed(1)
    model = DistributedDataParallel(torch.nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    saved, step, loss = log + ".state", 0, torch.tensor(float("nan"))
    if os.path.exists(saved):
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        step = state["step"]
    # Everybody goes on from the same step.
    steps_done = [None] * world
    dist.all_gather_object(steps_done, step)
    assert len(set(steps_done)) == 1, steps_done
    while step < steps:
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        x = torch.rand(32, 1, generator=generator) * 2 - 1
        loss = torch.nn.functional.mse_loss(model(x), 3 * x - 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        # Nobody begins the next step before this one is saved.
        if dist.get_rank() == 0:
            torch.save({"model": model.state_dict(), "step": step}, saved + ".new")
            os.replace(saved + ".new", saved)
        dist.barrier()
        if step % 10 == 0:
            say(event="step", step=step, loss=loss.item(), world=world)
        time.sleep(0.02)
        if until:
            # All see it at the same step, or some would wait for the others.
            over = torch.tensor([float(os.path.exists(until))])
            dist.all_reduce(over, op=dist.ReduceOp.MAX)
            if over.item():
                break
    say(event="done", step=step, world=world, loss=loss.item())
    dist.destroy_process_group()


main()
# Not by Python's own end: threads of Gloo outlive their group, and one that lets go of its last tensor while Python ends aborts the
# process ("terminate called without an active exception", exit code -6; PyTorch 2.15, once in some hundred ends on a busy machine).
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
