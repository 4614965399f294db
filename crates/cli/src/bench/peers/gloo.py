"""Times torch.distributed's all_reduce over Gloo in place, the way the benchmark times its own: one check, a warm-up, then
back-to-back calls; the median of each rank's calls, the maximum over ranks.

    gloo.py RANK WORLD MEETING_FILE BUDGET_MS CALLS_MIN CALLS_MAX TYPE:ELEMENTS...

One line of JSON for each TYPE:ELEMENTS on rank 0's standard output. It ends when its standard input does.
"""

import datetime
import json
import os
import sys
import threading
import time

import torch
import torch.distributed as dist

DIFFERENT = 7
WARM_UP, WARM_UP_SHORT, SHORT_BYTES = 3, 10, 4 << 20
PATIENCE = datetime.timedelta(seconds=120)
TYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i32": torch.int32,
    "i64": torch.int64,
    "u8": torch.uint8,
}


def end_with_input():
    sys.stdin.read()
    os._exit(1)


def one_sum(data):
    began = time.perf_counter_ns()
    dist.all_reduce(data)
    return time.perf_counter_ns() - began


def time_sums(rank, world, name, elements, budget_ms, least, most):
    place = torch.arange(elements, dtype=torch.int32) % DIFFERENT
    data = (place + rank + 1).to(TYPES[name])
    dist.all_reduce(data)
    expected = (place * world + world * (world + 1) // 2).to(TYPES[name])
    if not torch.equal(data, expected):
        sys.exit(f"rank {rank} of {world}: a wrong sum of {elements} {name}s")
    del place, expected
    data.zero_()

    warm_up = WARM_UP_SHORT if data.nbytes < SHORT_BYTES else WARM_UP
    shortest = min(one_sum(data) for _ in range(warm_up))
    calls = torch.tensor([min(max(budget_ms * 1_000_000 // max(shortest, 1), least), most)])
    dist.broadcast(calls, 0)
    took = sorted(one_sum(data) for _ in range(int(calls[0])))
    slowest = torch.tensor([took[(len(took) + 1) // 2 - 1] / 1e3], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    if rank == 0:
        print(json.dumps({"type": name, "elements": elements, "median_us": float(slowest[0])}), flush=True)


def main():
    rank, world, meeting = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    budget_ms, least, most = (int(word) for word in sys.argv[4:7])
    threading.Thread(target=end_with_input, daemon=True).start()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=PATIENCE
    )
    for case in sys.argv[7:]:
        name, elements = case.split(":")
        time_sums(rank, world, name, int(elements), budget_ms, least, most)
    dist.destroy_process_group()


main()
