"""A cluster as tests see it: plain JSON over the official client's connection, everything counted in the API server."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes.client
import kubernetes.config
from kubernetes.client.exceptions import ApiException

KINDS = {
    "v1": ("services", "secrets", "configmaps", "persistentvolumeclaims", "pods"),
    "apps/v1": ("statefulsets", "deployments"),
}
"""What the product makes in a namespace, or has made."""


class Cluster:
    """Calls of an API server.

    Args:
        kubeconfig: Whose current context says which, and as whom.
    """

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig
        self._client = kubernetes.config.new_client_from_config(str(kubeconfig))

    def request(
        self, method: str, path: str, body: Any = None, *, content_type: str = "application/json", user: str = ""
    ) -> Any:
        """The JSON answer of a call.

        Args:
            method: GET, POST, PATCH or DELETE.
            path: From /api or /apis on.
            body: Sent as JSON.
            content_type: Of the body.
            user: Made as this user in place of the administrator.

        Raises:
            ApiException: The API server refused.
        """
        headers = {"Content-Type": content_type, "Accept": "application/json"}
        if user:
            headers["Impersonate-User"] = user
            if user.startswith("system:serviceaccount:"):
                # What the API server itself adds to an account; whoever is impersonated is taken as said.
                headers["Impersonate-Group"] = "system:authenticated"
        response = self._client.call_api(*self._signed(method, path, headers, body), _request_timeout=30)
        data = response.read()
        if response.status >= 300:
            raise ApiException(http_resp=response)
        return json.loads(data)

    def _signed(self, method: str, path: str, headers: dict[str, str], body: Any) -> tuple[Any, ...]:
        return self._client.param_serialize(
            method, path, header_params=headers, body=body, auth_settings=["BearerToken"]
        )

    def create(self, api: str, plural: str, body: Any, namespace: str = "") -> Any:
        """Makes an object."""
        return self.request("POST", path_of(api, plural, namespace), body)

    def get(self, api: str, plural: str, name: str, namespace: str = "") -> Any:
        """An object."""
        return self.request("GET", f"{path_of(api, plural, namespace)}/{name}")

    def list(self, api: str, plural: str, namespace: str = "") -> list[Any]:
        """All objects of a kind."""
        return self.request("GET", path_of(api, plural, namespace))["items"]

    def patch(self, api: str, plural: str, name: str, body: Any, namespace: str = "", *, status: bool = False) -> Any:
        """Merges into an object."""
        path = f"{path_of(api, plural, namespace)}/{name}{'/status' if status else ''}"
        return self.request("PATCH", path, body, content_type="application/merge-patch+json")

    def delete(self, api: str, plural: str, name: str, namespace: str = "", *, grace_s: int | None = None) -> None:
        """Deletes an object; one that is not there is deleted already."""
        body: dict[str, Any] = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        try:
            self.request("DELETE", f"{path_of(api, plural, namespace)}/{name}", body)
        except ApiException as exc:
            if exc.status != 404:
                raise

    def make_namespace(self) -> str:
        """A new namespace."""
        return self.create("v1", "namespaces", {"metadata": {"generateName": "gradwire-tests-"}})["metadata"]["name"]

    def everything(self, namespace: str) -> set[str]:
        """ "kind/name" of all there is in a namespace, less what Kubernetes puts into each."""
        found = {
            f"{plural}/{item['metadata']['name']}"
            for api, plurals in KINDS.items()
            for plural in plurals
            for item in self.list(api, plural, namespace)
            if item.get("type") != "kubernetes.io/service-account-token"
        }
        return found - {"configmaps/kube-root-ca.crt"}


def path_of(api: str, plural: str, namespace: str = "") -> str:
    """Where objects of a kind are."""
    root = f"/api/{api}" if "/" not in api else f"/apis/{api}"
    return f"{root}/namespaces/{namespace}/{plural}" if namespace else f"{root}/{plural}"


def eventually(what: Callable[[], Any], *, timeout_s: float = 60.0) -> Any:
    """The first true value of `what`, an AssertionError of which counts as false."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            value = what()
            if value:
                return value
        except AssertionError:
            if time.monotonic() > deadline:
                raise
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.1)
