"""The store where ranks of several machines meet: torch's Store, asked over a socket."""

import asyncio
from datetime import timedelta

import grpc
import pytest
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]

from trainer_service.engine.rank_store_client import RankStore
from trainer_service.fleet.rank_store import RankStores, rank_store_handler
from trainer_service.fleet.worker_socket import WorkerSocket, store_path


async def test_the_store_does_what_torch_s_own_do():
    stores = RankStores()
    socket = WorkerSocket(store=rank_store_handler(stores.access))
    await socket.open()
    stores.open("start")
    try:
        # As torch asks it: from C++, below prefixes.
        own = RankStore(store_path(socket.folder), "start", timeout_s=30)
        store = PrefixStore("prefix", own)

        def use() -> None:
            assert not store.check(["key"])
            store.set("key", "value")
            assert store.get("key") == b"value"
            assert own.get("prefix/key") == b"value"
            assert store.check(["key"])
            assert not store.check(["key", "other"])
            assert [store.add("number", amount) for amount in (2, 3)] == [2, 5]
            assert store.compare_set("key", "no", "new") == b"value"
            assert store.compare_set("key", "value", "new") == b"new"
            assert store.compare_set("fresh", "", "first") == b"first"
            store.wait(["key", "number"], timedelta(seconds=1))
            assert store.delete_key("fresh")
            assert not store.delete_key("fresh")
            with pytest.raises(Exception, match="Nobody has set prefix/never within 0.05 s"):
                store.wait(["never"], timedelta(seconds=0.05))

        await asyncio.to_thread(use)
        waiting = asyncio.create_task(asyncio.to_thread(store.get, "later"))
        await asyncio.to_thread(
            RankStore(store_path(socket.folder), "start", timeout_s=1).set, "prefix/later", b"\0\xff"
        )
        assert await waiting == b"\0\xff"
        waiting = asyncio.create_task(asyncio.to_thread(own.get, "never"))
        stores.close("start")
        with pytest.raises(grpc.RpcError, match="This start of the worker is over"):
            await waiting
    finally:
        await socket.close()
