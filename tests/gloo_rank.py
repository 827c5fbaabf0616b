"""A rank that makes a process group and nothing else: python -m tests.gloo_rank FOLDER.

Writes the sum of all ranks to FOLDER/<rank> and waits to be ended.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed

from trainer_service.processes import die_with_parent
from trainer_service.worker_config import RANK_STORE_VARIABLE

if __name__ == "__main__":
    die_with_parent()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = f"file://{os.environ[RANK_STORE_VARIABLE]}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    total = torch.tensor([float(rank + 1)])
    torch.distributed.all_reduce(total)
    part = Path(sys.argv[1], f".{rank}")
    part.write_text(str(total.item()))
    part.rename(part.with_name(str(rank)))
    time.sleep(600)
