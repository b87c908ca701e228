"""A model behind an address: a server on this machine that answers, fails, redirects, echoes the key and is silent."""

import threading
import time

import pytest

from bestiary.shared.core.errors import ConfigError
from bestiary.shared.music import endpoint as module
from bestiary.shared.music.endpoint import Endpoint, EndpointError

pytest.importorskip("openai")
KEY = "sk-0123456789abcdefghij"
FOREIGN = {
    "OPENAI_API_KEY": "sk-of-another-host",
    "OPENAI_ADMIN_KEY": "sk-of-an-admin",
    "OPENAI_ORG_ID": "org-of-the-user",
    "OPENAI_PROJECT_ID": "proj-of-the-user",
    "OPENAI_CUSTOM_HEADERS": "X-Secret: of-a-gateway\nAuthorization: Bearer of-a-gateway",
    "OPENAI_BASE_URL": "http://127.0.0.1:9/v1",
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setattr(module, "WAIT_S", 0.001)
    monkeypatch.setenv("MY_KEY", KEY)
    for name, value in FOREIGN.items():
        monkeypatch.setenv(name, value)


def test_an_answer(server):
    ask = Endpoint(server.url + "/", "some-model", "MY_KEY", max_tokens=7, temperature=0.25)
    assert ask("What?") == "yes"
    ((path, headers, body),) = server.asked
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body == {
        "model": "some-model",
        "messages": [{"role": "user", "content": "What?"}],
        "max_tokens": 7,
        "temperature": 0.25,
    }


@pytest.mark.parametrize("key_env", [None, "MY_KEY"])
def test_nothing_of_the_environment_goes_out(server, key_env):
    Endpoint(server.url, "m", key_env)("x")
    ((_, headers, _),) = server.asked
    sent = {name.lower(): value for name, value in headers.items()}
    assert sent.pop("authorization") == f"Bearer {'none' if key_env is None else KEY}"
    assert sent.keys() <= {
        *("host", "content-type", "content-length", "accept", "accept-encoding", "connection", "user-agent")
    }
    assert not any(secret in str(headers) for secret in ("of-the-user", "gateway", "another", "admin"))


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_what_may_pass_is_tried_again(server, status):
    server.replies = [server.error(status, "busy"), server.error(status, "busy"), server.chat("late")]
    assert Endpoint(server.url, "m")("x") == "late"
    assert len(server.asked) == 3


def test_the_server_says_how_long_to_wait(server):
    status, _, body = server.error(429, "slow down")
    server.replies = [(status, {"Retry-After": "0.3"}, body), server.chat("late")]
    began = time.monotonic()
    assert Endpoint(server.url, "m")("x") == "late"
    assert time.monotonic() - began >= 0.3


def test_always_failing_ends_with_an_error_that_says_so(server):
    server.replies = [server.error(500, f"the key {KEY} broke it")]
    with pytest.raises(EndpointError, match=r"no answer, tried up to 3 times; the last: status 500.*the key \*\*\*"):
        Endpoint(server.url, "m", "MY_KEY", retries=2)("x")
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("status", "text"), [(401, f"Incorrect API key: {KEY}"), (404, "no model"), (400, "too long"), (403, "no")]
)
def test_refusals_for_good_are_not_tried_again_and_hide_the_key(server, status, text):
    server.replies = [server.error(status, text)]
    with pytest.raises(ConfigError, match="refuses model 'mo'") as caught:
        Endpoint(server.url, "mo", "MY_KEY")("x")
    message = str(caught.value)
    assert text.replace(KEY, "***") in message
    assert str(status) in message
    assert KEY not in repr(caught.value.__dict__) + message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert len(server.asked) == 1


def test_a_key_at_the_border_of_what_is_shown_is_hidden(server):
    """Cut first, half a key would be left."""
    for length in range(150, 300, 10):
        server.replies = [(401, {}, ("x" * length + KEY).encode())]
        with pytest.raises(ConfigError) as caught:
            Endpoint(server.url, "m", "MY_KEY")("x")
        assert KEY[:6] not in str(caught.value)


def test_a_redirect_is_refused(server):
    server.replies = [(307, {"Location": "http://localhost:9/v1/chat/completions"}, b"")]
    with pytest.raises(ConfigError, match="redirects to http://localhost:9/v1/chat/completions"):
        Endpoint(server.url, "m", "MY_KEY")("x")
    assert len(server.asked) == 1


@pytest.mark.parametrize("kind", ["application/json", "text/html"])
@pytest.mark.parametrize(
    "body",
    [b"<html>{", b"[]", b"{}", b"3", b"null", b'"yes"', b"\xff\xfe", b'{"choices": []}', b'{"choices": [{}]}', b""],
)
def test_garbage_is_tried_again(server, kind, body):
    server.replies = [(200, {"Content-Type": kind}, body), server.chat("late")]
    assert Endpoint(server.url, "m")("x") == "late"
    server.replies, server.asked = [(200, {"Content-Type": kind}, body)], []
    with pytest.raises(EndpointError, match="tried up to 2 times; the last: a reply that is no chat completion"):
        Endpoint(server.url, "m", retries=1)("x")
    assert len(server.asked) == 2


@pytest.mark.parametrize("text", [None, "", " \n", ["yes"]])
def test_replies_without_text(server, text):
    server.replies = [server.chat(text), server.chat("late")]
    assert Endpoint(server.url, "m")("x") == "late"
    server.replies = [server.chat(text, "length")]
    with pytest.raises(EndpointError, match="without text: it came to max_tokens"):
        Endpoint(server.url, "m", retries=1)("x")


@pytest.mark.parametrize("message", [{"finish": "content_filter"}, {"refusal": "I cannot"}])
def test_a_refusal_of_one_prompt_is_an_empty_answer(server, message):
    """It ends no run of thousands of songs: the writer counts it as dropped."""
    server.replies = [server.chat(None, **message)]
    assert Endpoint(server.url, "m")("x") == ""
    assert len(server.asked) == 1


def test_silence_is_no_answer(server):
    server.replies = [0.6]
    began = time.monotonic()
    with pytest.raises(EndpointError, match=r"tried up to 2 times.*timed out"):
        Endpoint(server.url, "m", timeout=0.1, retries=1)("x")
    assert time.monotonic() - began < 2
    assert len(server.asked) == 2
    server.replies = [0.6, server.chat("late")]
    assert Endpoint(server.url, "m", timeout=0.1, retries=1)("x") == "late"


def test_nobody_there():
    with pytest.raises(EndpointError, match=r"127.0.0.1:9/v1 gave no answer.*refused"):
        Endpoint("http://127.0.0.1:9/v1", "m", retries=0)("x")


def test_several_threads_share_one(server):
    server.replies = [lambda prompt: server.chat(f"to {prompt}")]
    ask, got = Endpoint(server.url, "m", "MY_KEY"), {}
    threads = [threading.Thread(target=lambda n=n: got.update({n: ask(str(n))})) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {n: f"to {n}" for n in range(20)}


@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_key_that_is_not_set(monkeypatch, value):
    monkeypatch.delenv("MY_KEY") if value is None else monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(ConfigError, match="MY_KEY holds no API key"):
        Endpoint("http://localhost:1/v1", "m", "MY_KEY")


def test_a_key_that_no_header_can_hold_is_not_shown(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-12\n34")
    with pytest.raises(ConfigError, match="characters that no API key has") as caught:
        Endpoint("http://localhost:1/v1", "m", "MY_KEY")
    assert "sk-12" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    ["", "localhost:8000/v1", "ftp://localhost", "http://", "http:///v1", "http://a b/v1", "http://a:b/v1", "//a/v1"]
    + ["http://[::1/v1", "http://a\n/v1", "http://a<b>/v1", "http://a:99999/v1"],
)
def test_an_address_that_is_none(address):
    with pytest.raises(ConfigError, match="base_url is an address such as"):
        Endpoint(address, "m")


@pytest.mark.parametrize("address", ["https://me:secret@host/v1", "https://host/v1?api-key=secret", "http://h/v1#x"])
def test_an_address_holds_no_key(address):
    with pytest.raises(ConfigError, match="without a name, a password or parameters") as caught:
        Endpoint(address, "m")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["http://[::1]:80/v1", "https://api.example.org/v1/", "http://my_box:1234", "HTTP://h"]
)
def test_addresses(address):
    assert Endpoint(address, "m").url == address.rstrip("/")


@pytest.mark.parametrize(
    "option", [{"timeout": 0.0}, {"timeout": float("nan")}, {"retries": -1}, {"max_tokens": 0}, {"temperature": -0.1}]
)
def test_numbers_that_cannot_be(option):
    with pytest.raises(ConfigError, match="timeout is above 0"):
        Endpoint("http://localhost:1/v1", "m", **option)
