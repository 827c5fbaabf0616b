"""Calls to a cluster's API server: plain JSON objects over the official client's connection.

Objects stay as the API server sends them: the client's models reject what newer and older servers send.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.config.config_exception import ConfigException

from trainer_service.command_lines import SettingsError

logger = logging.getLogger(__name__)

Object = dict[str, Any]
"""An object in the cluster, as JSON."""
PLURALS = {
    "Service": ("/api/v1", "services"),
    "Secret": ("/api/v1", "secrets"),
    "StatefulSet": ("/apis/apps/v1", "statefulsets"),
    "PersistentVolumeClaim": ("/api/v1", "persistentvolumeclaims"),
    "Pod": ("/api/v1", "pods"),
    "Event": ("/api/v1", "events"),
}
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_CALL_TIMEOUT_S = 20.0
_WATCH_S = 300
"""After this long the API server ends a watch, and the next one continues from there."""
_MAX_BACKOFF_S = 10.0


class ApiError(Exception):
    """An error that the API server answered.

    Attributes:
        status: HTTP status; 0 if it did not answer.
        reason: Its word for the error, such as "Forbidden".
        message: Its explanation.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message


class KubernetesApi:
    """Calls in one namespace.

    Args:
        configuration: The official client's: where the API server is, and who we are.
        namespace: Where all objects are.
    """

    def __init__(self, configuration: client.Configuration, namespace: str) -> None:
        if urlsplit(configuration.host).hostname in ("127.0.0.1", "localhost", "::1"):
            # A proxy would take "this machine" for its own.
            configuration.client_session_kwargs = {"trust_env": False}
        self._client = client.ApiClient(configuration)
        self.namespace = namespace

    @classmethod
    async def connect(cls, namespace: str) -> "KubernetesApi":
        """Calls as the pod's ServiceAccount or, outside a cluster, as the current context of $KUBECONFIG.

        Args:
            namespace: "" takes the one of the pod or the context.

        Raises:
            SettingsError: There is neither, or it cannot be used.
        """
        configuration = client.Configuration()
        try:
            config.load_incluster_config(client_configuration=configuration)
            found = await asyncio.to_thread(_pods_namespace)
        except ConfigException:
            try:
                await config.load_kube_config(client_configuration=configuration, persist_config=False)
                _, context = config.list_kube_config_contexts()
            except (ConfigException, OSError, ValueError) as exc:
                raise SettingsError(
                    f"--backend kubernetes: this is not a pod with a ServiceAccount, and there is no kubeconfig: {exc}"
                ) from exc
            found = context.get("context", {}).get("namespace", "")
        return cls(configuration, namespace or found or "default")

    async def close(self) -> None:
        """Closes its connections."""
        await self._client.close()

    async def create(self, kind: str, body: Object) -> Object:
        """Creates an object; returns it as the server created it.

        Raises:
            ApiError: It was refused.
        """
        return await self._json("POST", self._path(kind), body=body)

    async def patch(self, kind: str, name: str, body: Object) -> Object:
        """Merges a patch into an object; returns the result.

        Raises:
            ApiError: It was refused.
        """
        merge = "application/merge-patch+json"
        return await self._json("PATCH", f"{self._path(kind)}/{quote(name, safe='')}", body=body, content_type=merge)

    async def listing(self, kind: str, selector: str) -> tuple[list[Object], str]:
        """(objects that match the label selector, version of the list).

        Raises:
            ApiError: It was refused.
        """
        answer = await self._json("GET", self._path(kind), query=[("labelSelector", selector)])
        return answer["items"], answer["metadata"]["resourceVersion"]

    async def delete(self, kind: str, name: str, *, wait_for_dependents: bool = False) -> None:
        """Deletes an object; does nothing if it does not exist.

        Raises:
            ApiError: It was refused.
        """
        policy = "Foreground" if wait_for_dependents else "Background"
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": policy}
        try:
            await self._json("DELETE", f"{self._path(kind)}/{quote(name, safe='')}", body=body)
        except ApiError as exc:
            if exc.status != 404:
                raise

    async def log_tail(self, pod: str, *, lines: int, previous: bool) -> str:
        """The last log lines of a pod's only container, or of its previous one; "" if there are none."""
        query = [("tailLines", str(lines)), ("limitBytes", "65536"), ("previous", str(previous).lower())]
        try:
            return (await self._call("GET", f"{self._path('Pod')}/{quote(pod, safe='')}/log", query=query)).decode(
                errors="replace"
            )
        except ApiError:
            # It never ran, its node is gone, or its log was discarded.
            return ""

    async def follow(self, kind: str, selector: str) -> AsyncGenerator[tuple[str, Object], None]:
        """Watches objects without end: ("LISTED", {"items": …}) first and whenever something may have been missed, then
        ("ADDED" | "MODIFIED" | "DELETED", object). Reconnects when a connection breaks."""
        backoff_s = 0.1
        while True:
            try:
                items, version = await self.listing(kind, selector)
                yield "LISTED", {"items": items}
                backoff_s = 0.1
                while version:
                    ended = ""
                    async for what, body in self._watch(kind, selector, version):
                        if what == "ERROR":
                            # Usually 410: the version is too old for the server to know what came after it.
                            ended = body.get("message", "")
                            break
                        version = body["metadata"]["resourceVersion"]
                        if what != "BOOKMARK":
                            yield what, body
                    if ended:
                        logger.info("A watch begins again.", extra={"fields": {"kind": kind, "reason": ended}})
                        break
            except (ApiError, aiohttp.ClientError, TimeoutError, ValueError) as exc:
                fields = {"kind": kind, "error": str(exc)}
                logger.warning("The API server cannot be watched at the moment.", extra={"fields": fields})
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)

    async def _watch(self, kind: str, selector: str, version: str) -> AsyncGenerator[tuple[str, Object], None]:
        query = [("watch", "true"), ("allowWatchBookmarks", "true"), ("resourceVersion", version)]
        query += [("timeoutSeconds", str(_WATCH_S)), *([("labelSelector", selector)] if selector else [])]
        response = await self._open("GET", self._path(kind), query=query, timeout_s=_WATCH_S + 30)
        try:
            await _refuse_errors(response)
            async for line in response.response.content:
                event = json.loads(line)
                if not event.keys() >= {"type", "object"}:
                    raise ValueError(f"a watch sent {event.get('kind', 'something else')} instead of an event")
                yield event["type"], event["object"]
        finally:
            response.response.close()

    async def _json(self, method: str, path: str, **arguments: Any) -> Object:
        return json.loads(await self._call(method, path, **arguments))

    async def _call(self, method: str, path: str, **arguments: Any) -> bytes:
        try:
            response = await self._open(method, path, timeout_s=_CALL_TIMEOUT_S, **arguments)
            await _refuse_errors(response)
            return await response.read()
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise ApiError(0, "Unreachable", str(exc) or type(exc).__name__) from exc

    async def _open(
        self,
        method: str,
        path: str,
        *,
        timeout_s: float,
        query: list[tuple[str, str]] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> Any:
        request = await self._client.param_serialize(
            method,
            path,
            query_params=[one for one in query or [] if one[1]],
            header_params={"Accept": "application/json", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        return await self._client.call_api(*request, _request_timeout=timeout_s)

    def _path(self, kind: str) -> str:
        root, plural = PLURALS[kind]
        return f"{root}/namespaces/{quote(self.namespace, safe='')}/{plural}"


def _pods_namespace() -> str:
    return _NAMESPACE_FILE.read_text().strip() if _NAMESPACE_FILE.exists() else ""


async def _refuse_errors(response: Any) -> None:
    if response.status < 300:
        return
    try:
        status = json.loads(await response.read())
        raise ApiError(response.status, status.get("reason", ""), status.get("message", ""))
    except (ValueError, AttributeError):
        raise ApiError(response.status, str(response.reason), "it gave no reason") from None
