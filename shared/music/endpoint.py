"""A language model behind an OpenAI-compatible address of the user's choice."""

from __future__ import annotations

import os
import re
import time
from typing import Any
from urllib.parse import urlsplit

from bestiary.shared.core.errors import ConfigError, UserError, require

PASSING = (408, 409, 429)
"""Statuses below 500 that may pass: those that the library tries again."""

WAIT_S = 0.5
"""Seconds before a reply without an answer is asked for again; twice as long each time."""

PLACEHOLDER = "none"
"""Sent as the key where there is none."""

SENT = ("host", "content-type", "content-length", "accept", "accept-encoding", "connection", "user-agent")
"""Headers that go out beside the key."""


class EndpointError(UserError):
    """An endpoint that does not answer, again and again."""


class Endpoint:
    """Sends prompts to ``BASE_URL/chat/completions`` and returns the answers. Several threads may share one.

    An answer that does not come in time and a status that may pass (429, 5xx) are tried again by the library
    ``openai``, each time after a longer wait, or after what the server says in Retry-After. Redirects are refused: the
    key must not go to another host. Nothing that the library would take from the environment is sent: neither
    OPENAI_API_KEY, which is another host's, nor an organisation, nor headers of the user's.

    Args:
        base_url: for example ``http://localhost:8000/v1``.
        model: its name there.
        key_env: environment variable that holds the API key; None sends a placeholder. The key is never printed or
            stored.
        timeout: seconds without a byte of an answer.
        retries: how often it is tried again.
        max_tokens: longest answer, thoughts included. temperature: of the sampling.

    Raises:
        ConfigError: for an address that is none, a key that is not set, or numbers that cannot be.
        MissingExtraError: without the library.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key_env: str | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        max_tokens: int = 2048,
        temperature: float = 0.7,
    ):
        self.url, self.model, self.retries = _address(base_url), model, retries
        if not timeout > 0 or retries < 0 or max_tokens < 1 or not temperature >= 0:
            raise ConfigError(
                "timeout is above 0, retries and temperature are 0 or more, and max_tokens is 1 or more, not "
                f"{timeout:g}, {retries}, {temperature:g} and {max_tokens}"
            )
        self._key = None if key_env is None else _key(key_env)
        self.options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        self._openai: Any = require("openai", "endpoint")
        http = self._openai.DefaultHttpxClient(
            follow_redirects=False, timeout=timeout, event_hooks={"request": [self._only_what_is_meant]}
        )
        self._client = self._openai.OpenAI(
            api_key=self._key or PLACEHOLDER, base_url=self.url, timeout=timeout, max_retries=retries, http_client=http
        )

    def __call__(self, prompt: str) -> str:
        """The answer to a prompt; empty where the model, or a filter before it, refused to give one.

        Raises:
            ConfigError: where the server refuses the request for good (a wrong key, an unknown model).
            EndpointError: where no answer came in ``1 + retries`` tries.
        """
        openai, messages = self._openai, [{"role": "user", "content": prompt}]
        reason = ""
        for number in range(self.retries + 1):
            if number:
                time.sleep(WAIT_S * 2 ** (number - 1))
            try:
                reply = self._client.chat.completions.create(model=self.model, messages=messages, **self.options)
            except openai.APIStatusError as error:
                raise self._refused(error) from None
            except openai.APIConnectionError as error:  # a timeout too
                cause = error.__cause__
                raise self._none(f"{error}{f' {cause}' if cause and str(cause) else ''}") from None
            except (openai.OpenAIError, ValueError) as error:
                reason = f"a reply that is no chat completion: {error}"
                continue
            text, reason = _answer(reply)
            if text is not None:
                return text
        raise self._none(reason)

    def _refused(self, error: Any) -> UserError:
        """What a status means."""
        code, said = error.status_code, f"status {error.status_code}: {error.message}"
        if code >= 500 or code in PASSING:
            return self._none(said)
        if code < 400:
            to = self._hidden(str(error.response.headers.get("location")))
            return ConfigError(f"{self.url} redirects to {to}, and redirects are not followed: give the address itself")
        return ConfigError(f"{self.url} refuses model {self.model!r}: {self._hidden(said)}")

    def _none(self, reason: str) -> EndpointError:
        return EndpointError(
            f"{self.url} gave no answer, tried up to {self.retries + 1} times; the last: {self._hidden(reason)}"
        )

    def _hidden(self, text: str) -> str:
        """A line without the key, which some servers repeat."""
        whole = text.replace(self._key, "***") if self._key else text
        return " ".join(whole.split())[:300]

    def _only_what_is_meant(self, request: Any) -> None:
        for name in list(request.headers):
            if name.lower() not in SENT:
                del request.headers[name]
        request.headers["Authorization"] = f"Bearer {self._key or PLACEHOLDER}"


def _address(base_url: str) -> str:
    """The address without its last slash, if it is one."""
    try:
        parts = urlsplit(base_url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    good = parts.scheme in ("http", "https") and host and re.fullmatch(r"[\w.:%-]+", host)
    if not good or any(c.isspace() or not c.isprintable() for c in base_url):
        raise ConfigError(f"base_url is an address such as http://localhost:8000/v1, not {base_url!r}")
    if parts.query or parts.fragment or parts.username is not None or parts.password is not None:
        # Not shown: it may hold a key.
        raise ConfigError("base_url is an address alone, without a name, a password or parameters: see key_env")
    return base_url.rstrip("/")


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"the environment variable {variable} holds no API key: export it, or name another one")
    if not re.fullmatch(r"[!-~]+", key):
        raise ConfigError(f"the environment variable {variable} holds characters that no API key has")
    return key


def _answer(reply: Any) -> tuple[str | None, str]:
    """The text of a chat completion, or None and why there is none."""
    try:
        choice = reply.choices[0]
        text, ended = choice.message.content, choice.finish_reason
        refused = ended == "content_filter" or getattr(choice.message, "refusal", None)
    except (AttributeError, TypeError, IndexError):
        return None, "a reply that is no chat completion"
    if isinstance(text, str) and text.strip():
        return text, ""
    if refused:
        return "", ""
    why = ": it came to max_tokens before any, perhaps in its thoughts" if ended == "length" else ""
    return None, f"a reply without text{why}"
