"""Sessions of the page: it asks for a key once, and from then on a cookie stands for the key.

The cookie holds a random token, not the key; only its digest is kept here. It is valid as long as its key, and until
the trainer ends.
"""

import hashlib
import secrets
import time
from collections import OrderedDict
from http.cookies import CookieError, SimpleCookie

from trainer_service.access import ANYBODY, ApiKeys, Caller

_MAX_AGE_S = 30 * 24 * 3600
_MAX_SESSIONS = 1024
"""Simultaneous sessions; a further one replaces the one unused for longest."""


class Sessions:
    """Tokens, and whose they are.

    Args:
        api_keys: The trainer's keys.
        port: The page's, so that pages of several trainers on one host do not share a cookie.
        secure: Whether the page is served over TLS.
    """

    def __init__(self, api_keys: ApiKeys, *, port: int, secure: bool) -> None:
        self._api_keys = api_keys
        self._secure = secure
        self._cookie = f"{'__Host-' if secure else ''}gradwire-{port}"
        self._callers: OrderedDict[bytes, tuple[Caller, float]] = OrderedDict()

    @property
    def required(self) -> bool:
        """Whether the page requires a key."""
        return self._api_keys.required

    def open(self, key: str) -> tuple[Caller, str] | None:
        """(the key's owner, the Set-Cookie header of a new session); None for a wrong key."""
        caller = self._api_keys.find(key)
        if caller is None:
            return None
        token = secrets.token_urlsafe(32)
        self._callers[_digest(token)] = caller, time.monotonic()
        while len(self._callers) > _MAX_SESSIONS:
            self._callers.popitem(last=False)
        return caller, self._header(token, _MAX_AGE_S)

    def close(self, cookies: str) -> str:
        """Ends the session of a Cookie header. Returns the Set-Cookie header that removes it."""
        self._callers.pop(_digest(self._token(cookies)), None)
        return self._header("", 0)

    def caller(self, cookies: str) -> Caller | None:
        """Whose session a Cookie header names; None if unknown."""
        if not self._api_keys.required:
            return ANYBODY
        digest = _digest(self._token(cookies))
        caller, opened_s = self._callers.get(digest, (None, 0.0))
        if caller is None:
            return None
        if time.monotonic() - opened_s > _MAX_AGE_S or not self.opens(caller):
            del self._callers[digest]
            return None
        self._callers.move_to_end(digest)
        return caller

    def opens(self, caller: Caller) -> bool:
        """Whether a caller's key is still valid."""
        return self._api_keys.still_opens(caller)

    def _token(self, cookies: str) -> str:
        try:
            found = SimpleCookie(cookies).get(self._cookie)
        except CookieError:
            return ""
        return "" if found is None else found.value

    def _header(self, token: str, max_age_s: int) -> str:
        secure = "; Secure" if self._secure else ""
        return f"{self._cookie}={token}; Path=/; Max-Age={max_age_s}; HttpOnly; SameSite=Strict{secure}"


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
