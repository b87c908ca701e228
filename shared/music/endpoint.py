"""A language model behind an OpenAI-compatible address of the user's choice."""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from bestiary.shared.core.errors import ConfigError, UserError

AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""Statuses after which a request is sent once more."""

LONGEST_WAIT_S = 60.0


class EndpointError(UserError):
    """An endpoint that does not answer, again and again."""


class Endpoint:
    """Sends prompts to ``BASE_URL/chat/completions`` and returns the answers. No file is fetched.

    An answer that does not come in time, a status that may pass (429, 5xx) or a reply that is not of that kind is tried
    again, each time after twice the wait, or after what the server says in Retry-After. Redirects are refused: the key
    must not go to another host.

    Args:
        base_url: for example ``http://localhost:8000/v1``.
        model: its name there.
        key_env: environment variable that holds the API key; None sends none. The key is never printed or stored.
        timeout: seconds without a byte of an answer.
        retries: how often it is tried again. wait: seconds before the first time.
        max_tokens: longest answer. temperature: of the sampling.
        sleep: waits; for tests.

    Raises:
        ConfigError: for an address that is none, or a key that is not set.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key_env: str | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        wait: float = 1.0,
        max_tokens: int = 2048,
        temperature: float = 0.7,
        sleep: Callable[[float], None] = time.sleep,
    ):
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url is an address such as http://localhost:8000/v1, not {base_url!r}")
        if key_env is not None and not os.environ.get(key_env):
            raise ConfigError(f"the environment variable {key_env} holds no API key: export it, or name another one")
        self.url, self.model = base_url.rstrip("/") + "/chat/completions", model
        self._key = None if key_env is None else os.environ[key_env]
        self.timeout, self.retries, self.wait, self.sleep = timeout, retries, wait, sleep
        self.options = {"max_tokens": max_tokens, "temperature": temperature}
        self._open = urllib.request.build_opener(_NoRedirect).open

    def __call__(self, prompt: str) -> str:
        """The answer to a prompt.

        Raises:
            ConfigError: where the server refuses the request for good (a wrong key, an unknown model).
            EndpointError: where no answer came in ``1 + retries`` tries.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], **self.options}
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        wait, reason = self.wait, ""
        for left in range(self.retries, -1, -1):
            request = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
            asked_to_wait = 0.0
            try:
                with self._open(request, timeout=self.timeout) as reply:
                    return _content(json.loads(reply.read()))
            except urllib.error.HTTPError as error:
                said = error.read(500).decode("utf-8", "replace")
                reason = f"status {error.code}: {' '.join(said.split())[:200]}"
                if error.code not in AGAIN:
                    raise ConfigError(f"{self.url} refuses model {self.model!r}: {self._hidden(reason)}") from None
                asked_to_wait = _seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError, IndexError) as error:
                reason = f"{type(error).__name__}: {error}"
            if left:
                # A little noise, so that several workers do not come back at once.
                self.sleep(min(LONGEST_WAIT_S, max(asked_to_wait, wait * random.uniform(1.0, 1.25))))
                wait *= 2
        tries = f"{self.retries + 1} tries"
        raise EndpointError(f"{self.url} gave no answer in {tries}; the last: {self._hidden(reason)}")

    def _hidden(self, text: str) -> str:
        """The text without the key, which some servers repeat."""
        return text.replace(self._key, "***") if self._key else text


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        """None makes it an HTTPError."""
        return None


def _content(reply: Any) -> str:
    """The text of a chat completion."""
    text = reply["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise ValueError("the reply holds no text")
    return text


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0))
    except ValueError:  # a date, which we do not read
        return 0.0
