"""Keeps a fork of the process from disturbing gRPC, and a forked child from using what it inherits of it.

A child has its parent's connections, epoll instances and event descriptors in common with it, and none of the threads
that serve them. A call there hangs or aborts; and what is worse, using or merely freeing an inherited channel shuts the
parent's sockets down. So what the parent had is neither used nor freed in the child: calls are refused with a sentence,
and the child keeps the objects until its process is gone.
"""

import ctypes
import os
from collections.abc import Iterable

# Keeps gRPC's own fork handlers out, unless the user asked for them. They stop and restart its threads around every
# fork of the process, one that has nothing to do with gRPC included, and now and then abort parent or child (grpcio
# 1.80: "ev_epoll1_linux.cc Check failed: next_worker->state == KICKED"). gRPC reads this when it is imported, so it
# stands here, and this module comes first in the package.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")


def keep_for_ever(inherited: Iterable[object]) -> None:
    """Lets nothing free these objects, nor what they refer to: not the collector, not the interpreter's end."""
    for each in inherited:
        # A reference in some module's dict would be dropped when the interpreter ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))
