"""The gate in front of every route: keys, request ids, and browsers of other origins."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from api.app import ROUTES, make_app
from api.gate import OPEN_PATHS, Gate
from api.keys import Keys
from core.errors import QuireError
from tests.api.serving import TEXT, Doors, doors

KEY = "sk-test-4711"
ORIGIN = "https://app.example"
BODY = {"model": "tiny-chat", "prompt": "abc"}


@pytest.fixture(scope="module")
def keyed() -> Iterator[Doors]:
    """Doors with two keys, which pages of one origin may call."""
    keys = Keys(["another-key", KEY])
    with (
        tempfile.TemporaryDirectory(prefix="qt-") as name,
        doors(Path(name), keys=keys, cors_origins=[ORIGIN]) as running,
    ):
        yield running[0]


def typed_routes(app: Starlette) -> list[Any]:
    assert {type(route) for route in app.routes} == {Route}
    return list(app.routes)


def assert_refused(answer: httpx.Response) -> None:
    assert answer.status_code == 401, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["type"], error["param"]) == ("invalid_api_key", "authentication_error", None)
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(("method", "path"), [(method, path) for method, path, _ in ROUTES])
def test_every_route_asks_for_a_key(keyed: Doors, method: str, path: str) -> None:
    path = path.replace("{model:path}", "tiny-chat")
    assert "{" not in path, "a new kind of path parameter: give this test a value for it"
    answer = httpx.request(method, keyed.url + path)
    if path in ("/health", "/health/live", "/health/ready"):
        assert answer.status_code == 200
    else:
        assert_refused(answer)
        allowed = httpx.request(method, keyed.url + path, headers={"x-api-key": KEY}, json=BODY)
        assert allowed.status_code != 401


def test_the_table_is_all_that_there_is() -> None:
    service: Any = None  # not asked until a request comes
    routes = [(next(iter(route.methods - {"HEAD"})), route.path) for route in typed_routes(make_app(service, Keys()))]
    assert routes == [(method, path) for method, path, _ in ROUTES]


def test_the_open_paths_are_those_of_the_probes() -> None:
    assert set(OPEN_PATHS) == {"/health", "/health/live", "/health/ready"}
    assert set(OPEN_PATHS) <= {path for _, path, _ in ROUTES}


@pytest.mark.parametrize("path", ["/", "/nothing", "//health", "/health/", "/Health", "/%68ealth/x", "/docs", "/v1"])
def test_unknown_paths_ask_for_a_key_too(keyed: Doors, path: str) -> None:
    assert_refused(httpx.get(keyed.url + path))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"authorization": f"Bearer {KEY}x"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": f"Bearer {KEY} {KEY}"},
        {"authorization": f"Bearer {KEY.upper()}"},
        {"authorization": f"Bearer {KEY},another-key"},
        {"authorization": b"Bearer \xff\xfe"},
        {"x-api-key": ""},
        {"x-api-key": f"Bearer {KEY}"},
        {"api-key": KEY},
        {"cookie": f"api_key={KEY}"},
    ],
)
def test_wrong_keys(keyed: Doors, headers: dict[str, Any]) -> None:
    assert_refused(httpx.get(keyed.url + "/v1/models", headers=headers))
    assert_refused(httpx.get(keyed.url + f"/v1/models?api_key={KEY}", headers=headers))


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer  {KEY}"},
        {"authorization": "Bearer another-key"},
        {"x-api-key": KEY},
        {"authorization": "Bearer of-the-proxy", "x-api-key": KEY},
        {"authorization": f"Bearer {KEY}", "x-api-key": "wrong"},
    ],
)
def test_right_keys(keyed: Doors, headers: dict[str, str]) -> None:
    answer = httpx.post(keyed.url + "/v1/completions", json=BODY, headers=headers)
    assert answer.json()["choices"][0]["text"] == TEXT


def test_refusals_are_counted_and_never_tell_a_key(keyed: Doors, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    before = keyed.engine.counts.errors.get("invalid_api_key", 0)
    answer = httpx.get(keyed.url + "/stats", headers={"authorization": "Bearer wrong-secret"})
    assert keyed.engine.counts.errors["invalid_api_key"] == before + 1
    own = {"authorization": f"Bearer {KEY}"}
    pages = [httpx.get(keyed.url + path, headers=own).text for path in ("/stats", "/metrics", "/v1/models", "/version")]
    ours = "".join(record.getMessage() for record in caplog.records if not record.name.startswith("httpcore"))
    for secret in ("wrong-secret", KEY, "another-key"):
        assert secret not in answer.text + "".join(pages) + ours


def test_a_large_body_without_a_key_is_refused_before_it_is_read(keyed: Doors) -> None:
    answer = httpx.post(keyed.url + "/v1/completions", content=b"x" * 3_000_000)
    assert_refused(answer)
    assert answer.headers["connection"] == "close"


def test_openai_client(keyed: Doors) -> None:
    with openai.OpenAI(base_url=keyed.url + "/v1", api_key=KEY, max_retries=0) as client:
        assert client.completions.create(model="tiny-chat", prompt="abc").choices[0].text == TEXT
    with (
        openai.OpenAI(base_url=keyed.url + "/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.completions.create(model="tiny-chat", prompt="abc")
    assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")


def preflight(url: str, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    asked = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    return httpx.options(url + path, headers={**asked, **headers})


def test_a_preflight_needs_no_key(keyed: Doors) -> None:
    answer = preflight(keyed.url)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert answer.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in answer.headers


def test_a_preflight_of_another_origin_allows_nothing(keyed: Doors) -> None:
    answer = preflight(keyed.url, origin="https://evil.example")
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers


def test_options_that_are_no_preflight_need_a_key(keyed: Doors) -> None:
    assert_refused(httpx.options(keyed.url + "/v1/models"))
    assert_refused(httpx.options(keyed.url + "/v1/models", headers={"origin": ORIGIN}))
    assert_refused(httpx.options(keyed.url + "/v1/models", headers={"access-control-request-method": "GET"}))


def test_a_page_of_the_origin_may_read_answers_and_refusals(keyed: Doors) -> None:
    headers = {"origin": ORIGIN, "authorization": f"Bearer {KEY}"}
    answer = httpx.get(keyed.url + "/v1/models", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    refused = httpx.get(keyed.url + "/v1/models", headers={"origin": ORIGIN})
    assert_refused(refused)
    assert refused.headers["access-control-allow-origin"] == ORIGIN
    other = httpx.get(keyed.url + "/v1/models", headers={**headers, "origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_without_cors_there_are_no_preflights(url: str) -> None:
    answer = preflight(url)
    assert answer.status_code == 405
    assert "access-control-allow-origin" not in answer.headers
    assert "access-control-allow-origin" not in httpx.get(url + "/v1/models", headers={"origin": ORIGIN}).headers


async def seen_by_the_app(keys: Keys, path: str, headers: list[tuple[bytes, bytes]]) -> Scope | None:
    """The scope that passes the gate, None when it was refused."""
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    async def refusal(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    def refuse(error: QuireError) -> Any:
        assert error.code == "invalid_api_key"
        return refusal

    async def receive() -> Message:
        raise AssertionError("the gate reads no body")

    async def send(message: Message) -> None:
        raise AssertionError("nobody answered")

    await Gate(app, keys, refuse)({"type": "http", "path": path, "headers": headers}, receive, send)
    return seen[0] if seen else None


async def test_the_request_knows_whose_key_it_came_with(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice: secret-of-alice\n")
    keys = Keys([], str(file))
    keys.load()
    asked = [(b"x-api-key", b"secret-of-alice")]
    assert ((await seen_by_the_app(keys, "/stats", asked)) or {})["key_holder"] == "alice"
    assert ((await seen_by_the_app(keys, "/health", asked)) or {})["key_holder"] is None
    assert ((await seen_by_the_app(Keys(), "/stats", asked)) or {})["key_holder"] is None
    assert await seen_by_the_app(keys, "/stats", []) is None
