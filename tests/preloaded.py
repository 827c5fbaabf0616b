"""What the fork server of tests imports, once for all ranks and trainers that are forked from it."""

import gc
import importlib
import sys

_WORKER = "trainer_service.engine.__main__"
worker = importlib.import_module(_WORKER)
worker._import_peft()
for name in (*worker._LIBRARIES, "trainer_service.trainer", "tests.rank_tasks"):
    importlib.import_module(name)
# It runs as __main__, for the first time.
del sys.modules[_WORKER]
# A search for garbage, which ranks do for every model they make, need not look at these.
gc.collect()
gc.freeze()
