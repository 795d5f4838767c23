"""What operators rely on: keys, limits, the queue, disconnects, failures, draining, logs and figures."""

import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from minim3.server import generation
from minim3.server.logs import configure_logs
from minim3.server.settings import ServerSettings
from tests.running_servers import Running, ScriptedEngine, pocket, running

QUESTION = [{"role": "user", "content": "What is 3 plus 4?"}]
BODY: dict[str, Any] = {"messages": QUESTION, "chat_template_kwargs": {"thinking_mode": "disabled"}}


def long_answer(num_tokens: int) -> list[int]:
    (token,) = pocket()[1].tokenizer.encode("7")
    return [token] * num_tokens


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    settings = ServerSettings(
        api_keys=("first-key", "second-key"), cors_origins=("https://good.example",), max_body_bytes=5000
    )
    with running(settings) as server:
        yield server


def routes(server: Running) -> list[tuple[str, str]]:
    """Every method and path that the application has, and some it has not."""
    spec = httpx.get(f"{server.url}/openapi.json", headers={"Authorization": "Bearer first-key"}).json()
    known = [(method.upper(), path) for path, methods in spec["paths"].items() for method in methods]
    assert len(known) > 8
    return [*known, ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/nothing"), ("GET", "/static/x.js")]


def test_no_route_opens_without_a_key(guarded: Running) -> None:
    """Each route, known or not: 401 without a key, with a wrong one, and with a piece of a right one."""
    with guarded.http() as client:
        for method, path in routes(guarded):
            for headers in (
                {},
                {"Authorization": "Bearer wrong"},
                {"Authorization": "Bearer first-ke"},
                {"Authorization": "Bearer first-key2"},
                {"Authorization": "first-key"},
                {"Authorization": "Basic first-key"},
                {"X-Api-Key": "nope"},
                {"Authorization": "Bearer"},
            ):
                answer = client.request(method, path.replace("{name}", "pocket"), headers=headers)
                if path in ("/", "/health", "/ready"):
                    assert answer.status_code in (200, 404), path
                else:
                    assert answer.status_code == 401, (method, path, headers)
                    assert answer.json()["error"]["code"] == "invalid_api_key"
                    assert answer.headers["www-authenticate"] == "Bearer"


def test_tricks_with_the_path_do_not_open_it(guarded: Running) -> None:
    """Middleware and router must read the same path."""
    host, port = guarded.url.removeprefix("http://").split(":")
    import http.client

    tricks = ("//v1/models", "/health/../v1/models", "/%2e/v1/models", "/health%2f..%2fv1/models", "/v1/models?/health")
    for path in tricks:
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        connection.request("GET", path)
        assert connection.getresponse().status in (401, 404), path
        connection.close()


def test_each_key_opens(guarded: Running) -> None:
    for headers in (
        {"Authorization": "Bearer first-key"},
        {"Authorization": "bearer second-key"},
        {"X-Api-Key": "second-key"},
    ):
        with guarded.http(headers=headers) as client:
            assert client.get("/v1/models").json()["data"][0]["id"] == "pocket"
    with pytest.raises(openai.AuthenticationError):
        guarded.client("wrong").models.list()
    assert guarded.client("second-key").models.list().data[0].id == "pocket"


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """`==` ends at the first byte that differs; a set lookup tells by its hash."""
    from minim3.server import auth

    compared: list[tuple[bytes, bytes]] = []

    def spy(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return left == right

    monkeypatch.setattr(auth.hmac, "compare_digest", spy)
    keys = auth.KeyMiddleware(None, ("one", "a much longer second key"))  # type: ignore[arg-type]
    for given, known in ((b"one", True), (b"x", False), (b"", False)):
        compared.clear()
        assert keys._is_known(given) is known
        assert len(compared) == 2, "all keys are compared, also after a match"
        assert {len(side) for pair in compared for side in pair} == {32}, "of one length, whatever was sent"


def test_keys_do_not_show(guarded: Running) -> None:
    """Not in the settings' repr, which ends up in tracebacks."""
    assert "first-key" not in repr(guarded.state.settings)


def test_cors_is_for_the_listed_origins(guarded: Running) -> None:
    asked = "authorization,content-type,x-stainless-os,x-stainless-retry-count"  # as OpenAI's client in a browser
    preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": asked}
    with guarded.http() as client:
        good = client.options("/v1/chat/completions", headers={"Origin": "https://good.example", **preflight})
        bad = client.options("/v1/chat/completions", headers={"Origin": "https://bad.example", **preflight})
        refused = client.get("/v1/models", headers={"Origin": "https://good.example"})
    assert good.status_code == 200, good.text
    assert good.headers["access-control-allow-origin"] == "https://good.example"
    assert "access-control-allow-origin" not in bad.headers
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://good.example", "or a page cannot read why"


def test_a_body_over_the_limit_is_413_with_and_without_a_length(guarded: Running) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 6000}]}).encode()

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    headers = {"Authorization": "Bearer first-key", "Content-Type": "application/json"}
    for content in (body, pieces()):
        answer = httpx.post(f"{guarded.url}/v1/chat/completions", content=content, headers=headers, timeout=20)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
        assert "5000" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status"),
    [
        ("POST", "/nothing", b"{}", {}, 404),
        ("GET", "/v1/models/other", b"", {}, 404),
        ("GET", "/v1/chat/completions", b"", {}, 405),
        ("DELETE", "/v1/models", b"", {}, 405),
        ("POST", "/v1/chat/completions", b"", {}, 400),
        ("POST", "/v1/chat/completions", b"[1]", {}, 400),
        ("POST", "/v1/chat/completions", b'{"a"', {}, 400),
        ("POST", "/v1/chat/completions", b'\xff\xfe{"', {}, 400),
        ("POST", "/v1/chat/completions", b'{"messages": NaN}', {}, 400),
        ("POST", "/v1/chat/completions", b'{"messages":' + b"[" * 2000 + b"]" * 2000 + b"}", {}, 400),
        ("POST", "/v1/chat/completions", b'{"messages":[{"role":"user","content":"\\ud800"}]}', {}, 400),
        ("POST", "/v1/chat/completions", b'{"seed":' + b"9" * 4500 + b"}", {}, 400),
        ("POST", "/v1/chat/completions", b"{}", {"Content-Type": "text/plain"}, 400),
        ("POST", "/v1/chat/completions", b"{}", {"Content-Type": ""}, 400),
    ],
)
def test_every_error_has_the_openai_shape(
    guarded: Running, method: str, path: str, content: bytes, headers: dict[str, str], status: int
) -> None:
    headers = {"Authorization": "Bearer first-key", "Content-Type": "application/json", **headers}
    answer = httpx.request(method, guarded.url + path, content=content, headers=headers, timeout=20)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    assert answer.headers["x-request-id"]


def test_a_full_queue_is_429_with_retry_after_and_gives_places_back() -> None:
    """Two run or wait, the third is told when to come again; afterwards there is room."""
    engine = ScriptedEngine(lambda _, i: long_answer(4))
    settings = ServerSettings(page=False, max_running=1, max_waiting=1, retry_after_seconds=3)
    with running(settings, engine) as server, ThreadPoolExecutor(4) as pool:
        engine.gate.clear()
        url = f"{server.url}/v1/chat/completions"
        under_way = [pool.submit(httpx.post, url, json=BODY, timeout=60) for _ in range(2)]
        while server.state.driver.num_active < 2:
            time.sleep(0.01)
        refused = httpx.post(url, json=BODY)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "3"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            server.client().chat.completions.create(model="pocket", messages=QUESTION)  # type: ignore[arg-type]
        assert httpx.get(f"{server.url}/health").status_code == 200, "probes pass a full queue"
        engine.gate.set()
        assert [one.result().status_code for one in under_way] == [200, 200]
        server.wait_idle()
        assert httpx.post(url, json=BODY).status_code == 200


def test_n_counts_as_n_requests() -> None:
    with running(ServerSettings(page=False, max_running=2, max_waiting=1)) as server:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json={**BODY, "n": 4})
        assert answer.status_code == 429


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_pages(stream: bool) -> None:
    """Otherwise every closed browser tab goes on computing."""
    engine = ScriptedEngine(lambda _, i: long_answer(4000), step_seconds=0.005)
    with running(engine=engine) as server:
        with httpx.Client(timeout=60) as client:
            if stream:
                body = {**BODY, "stream": True}
                with client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as answer:
                    for number, _ in enumerate(answer.iter_lines()):
                        if number > 10:
                            break
                    assert engine.cache.pool.num_used_pages > 0
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=0.5)
        server.wait_idle()
        assert b"minim3_disconnects_total 1.0" in httpx.get(f"{server.url}/metrics").content


def test_a_client_that_leaves_during_the_prompt_frees_its_pages() -> None:
    """Nothing is sent then, so only the closed connection itself tells."""
    engine = ScriptedEngine(lambda _, i: long_answer(5), step_seconds=0.2, max_tokens_per_step=32)
    with running(engine=engine) as server:
        body = {**BODY, "messages": [{"role": "user", "content": "a b " * 600}], "stream": True}
        with (
            httpx.Client(timeout=60) as client,
            client.stream("POST", f"{server.url}/v1/chat/completions", json=body) as answer,
        ):
            next(answer.iter_lines())
        server.wait_idle()
        assert engine.stats.num_computed_tokens < 600


def test_a_silent_stream_is_kept_open_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy closes a connection on which nothing comes for a minute; clients skip comments."""
    monkeypatch.setattr(generation, "PING_SECONDS", 0.1)
    engine = ScriptedEngine(lambda _, i: long_answer(2), step_seconds=0.5)
    with running(engine=engine) as server:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json={**BODY, "stream": True}, timeout=60)
        assert answer.text.count(": working\n\n") >= 3
        assert answer.text.endswith("data: [DONE]\n\n")
        chunks = list(server.client().chat.completions.create(model="pocket", messages=QUESTION, stream=True))  # type: ignore[call-overload]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "77"


def test_a_failing_step_fails_its_requests_and_the_server_goes_on() -> None:
    """500 whole, an error event in a stream, nothing of the exception's text; then a normal answer."""
    engine = ScriptedEngine(lambda _, i: long_answer(3))
    with running(engine=engine) as server:
        engine.fail_steps = 1
        with pytest.raises(openai.InternalServerError, match="RuntimeError") as caught:
            server.client().chat.completions.create(model="pocket", messages=QUESTION)  # type: ignore[arg-type]
        assert "secret" not in str(caught.value)
        engine.fail_steps = 1
        with pytest.raises(openai.APIError, match="send it again"):
            list(server.client().chat.completions.create(model="pocket", messages=QUESTION, stream=True))  # type: ignore[call-overload]
        server.wait_idle()
        answer = server.client().chat.completions.create(model="pocket", messages=QUESTION)  # type: ignore[arg-type]
        assert answer.choices[0].message.content == "777"
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert b"minim3_step_failures_total 2.0" in httpx.get(f"{server.url}/metrics").content


def test_an_engine_that_cannot_go_on_is_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever watches /health must see it and restart the process; nobody may hang."""
    engine = ScriptedEngine(lambda _, i: long_answer(3))

    def broken() -> None:
        raise AssertionError("a page was lost")

    with running(engine=engine) as server:
        monkeypatch.setattr(engine, "check_integrity", broken)
        engine.fail_steps = 1
        with pytest.raises(openai.InternalServerError):
            server.client().chat.completions.create(model="pocket", messages=QUESTION)  # type: ignore[arg-type]
        deadline = time.monotonic() + 10
        while httpx.get(f"{server.url}/health").status_code != 503 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert httpx.get(f"{server.url}/ready").status_code == 503
        assert httpx.post(f"{server.url}/v1/chat/completions", json=BODY).status_code == 503


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_over_its_time_ends_with_an_error(stream: bool) -> None:
    engine = ScriptedEngine(lambda _, i: long_answer(4000), step_seconds=0.01)
    with running(ServerSettings(page=False, request_seconds=0.5), engine) as server:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json={**BODY, "stream": stream}, timeout=60)
        assert "longer than the limit of 0.5 s" in answer.text
        assert answer.status_code == (200 if stream else 504)
        server.wait_idle()
        figures = httpx.get(f"{server.url}/metrics").text
    assert 'minim3_errors_total{status="504"} 1.0' in figures, "of a stream, too, whose status was 200"
    assert "minim3_disconnects_total 0.0" in figures


def test_draining_finishes_what_is_under_way_and_refuses_the_rest() -> None:
    """SIGTERM without a lost request: both kinds of answer arrive whole, new ones are told to go elsewhere."""
    engine = ScriptedEngine(lambda _, i: long_answer(60), step_seconds=0.01)
    with running(engine=engine) as server, ThreadPoolExecutor(2) as pool, httpx.Client(base_url=server.url) as kept:
        assert kept.get("/ready").status_code == 200
        url = f"{server.url}/v1/chat/completions"
        whole = pool.submit(httpx.post, url, json=BODY, timeout=60)
        streamed = pool.submit(httpx.post, url, json={**BODY, "stream": True}, timeout=60)
        while engine.stats.num_generated_tokens < 10:
            time.sleep(0.01)
        server.server.handle_exit(15, None)
        refused = kept.post("/v1/chat/completions", json=BODY)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "2", "as the settings say"
        assert kept.get("/ready").status_code == 503
        assert kept.get("/health").status_code == 200
        assert whole.result().json()["choices"][0]["message"]["content"] == "7" * 60
        assert streamed.result().text.endswith("data: [DONE]\n\n")
        assert streamed.result().text.count('"content":"7') >= 1
        server.thread.join(20)
        assert not server.thread.is_alive()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


def test_a_drain_has_an_end() -> None:
    """A request that would take for ever must not keep the process: it is told, and told what to do."""
    engine = ScriptedEngine(lambda _, i: long_answer(5000), step_seconds=0.01)
    with running(ServerSettings(page=False, drain_seconds=0.5), engine) as server, ThreadPoolExecutor(2) as pool:
        url = f"{server.url}/v1/chat/completions"
        whole = pool.submit(httpx.post, url, json=BODY, timeout=60)
        streamed = pool.submit(httpx.post, url, json={**BODY, "stream": True}, timeout=60)
        while engine.stats.num_generated_tokens < 10:
            time.sleep(0.01)
        server.server.handle_exit(15, None)
        assert whole.result().status_code == 503
        assert "send it again" in whole.result().json()["error"]["message"]
        assert '"code":"unavailable"' in streamed.result().text
        server.thread.join(20)
        assert not server.thread.is_alive()


def test_logs_are_json_with_the_request_id_and_without_the_prompt() -> None:
    """A log that holds what people write is a leak; one without ids is useless."""
    stream = io.StringIO()
    secret = "my-secret-word"
    try:
        with running() as server:
            configure_logs("info", as_json=True, stream=stream)
            with server.http(headers={"X-Request-Id": "from-the-client-1"}) as client:
                body = {**BODY, "messages": [{"role": "user", "content": secret}], "max_tokens": 3}
                assert client.post("/v1/chat/completions", json=body).headers["x-request-id"] == "from-the-client-1"
                client.post("/v1/chat/completions", json={**body, "messages": [{"role": secret, "content": "x"}]})
            bad = httpx.get(f"{server.url}/v1/models", headers={"X-Request-Id": 'a"b\\n{}'})
            assert bad.headers["x-request-id"].startswith("req-")
            server.wait_idle()
    finally:
        for name in ("minim3.server", "uvicorn"):
            logging.getLogger(name).handlers = []
            logging.getLogger(name).propagate = True
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    answered = [line for line in lines if line.get("request_id") == "from-the-client-1"]
    assert [line["status"] for line in answered] == [200, 400]
    assert answered[0]["completion_tokens"] >= 1
    assert (answered[1]["error"], answered[1]["param"]) == ("invalid_request_error", "messages")
    assert answered[0]["prompt_tokens"] > 10
    assert answered[0]["seconds"] > 0
    assert secret not in stream.getvalue()


def test_a_path_cannot_write_lines_of_its_own_into_the_log() -> None:
    stream = io.StringIO()
    try:
        with running() as server:
            configure_logs("info", as_json=False, stream=stream)
            httpx.get(f"{server.url}/x%0a12:00:00%20GET%20/admin%20200")
            server.wait_idle()
    finally:
        for name in ("minim3.server", "uvicorn"):
            logging.getLogger(name).handlers = []
            logging.getLogger(name).propagate = True
    assert len(stream.getvalue().splitlines()) == 1


def test_prompts_are_logged_when_asked_for() -> None:
    stream = io.StringIO()
    try:
        with running(ServerSettings(page=False, log_prompts=True)) as server:
            configure_logs("info", as_json=True, stream=stream)
            httpx.post(f"{server.url}/v1/chat/completions", json={**BODY, "stream": True})
            server.wait_idle()
            time.sleep(0.05)
    finally:
        for name in ("minim3.server", "uvicorn"):
            logging.getLogger(name).handlers = []
            logging.getLogger(name).propagate = True
    (line,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert "3 plus 4" in line["prompt"]
    assert line["answers"] == ["7"]


def test_metrics_count_what_happened() -> None:
    with running() as server:
        for _ in range(2):
            httpx.post(f"{server.url}/v1/chat/completions", json={**BODY, "max_tokens": 3})
        httpx.post(f"{server.url}/v1/chat/completions", json={})
        httpx.get(f"{server.url}/a/made/up/path")
        server.wait_idle()
        text = httpx.get(f"{server.url}/metrics").text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0) + sample.value
    assert found["minim3_answers_total"] == 2
    assert found["minim3_errors_total"] == 2
    assert found["minim3_time_to_first_token_seconds_count"] == 2
    assert found["minim3_completion_tokens_total"] == 2 + found["minim3_inter_token_seconds_count"]
    assert found["minim3_prompt_tokens_total"] > 40
    assert found["minim3_cached_prompt_tokens_total"] > 0, "the second prompt is the first one again"
    assert found["minim3_requests_running"] == found["minim3_requests_waiting"] == 0
    assert found["minim3_pages_free"] == found["minim3_pages_total"] > 0
    assert "made/up" not in text, "what clients make up must not become a label"


def test_the_engine_can_be_asked_between_two_steps() -> None:
    """`run_in_engine` runs in the engine's thread, while answers go on, and passes exceptions on."""
    engine = ScriptedEngine(lambda _, i: long_answer(30), step_seconds=0.005)
    with running(engine=engine) as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json=BODY, timeout=60)
        loop = server.state.driver._loop
        assert loop is not None
        import asyncio

        def ask(function: Any) -> Any:
            return asyncio.run_coroutine_threadsafe(server.state.driver.run_in_engine(function), loop).result(20)

        assert ask(lambda engine: threading.current_thread().name) == "minim3-engine"
        with pytest.raises(ZeroDivisionError):
            ask(lambda engine: 1 // 0)
        assert answer.result().json()["choices"][0]["message"]["content"] == "7" * 30


def test_many_clients_at_once_get_their_own_answers() -> None:
    """Answers must not cross: each conversation has its own script."""

    def script(prompt: list[int], _: int) -> list[int]:
        tokenizer = pocket()[1].tokenizer
        text = tokenizer.decode(prompt)
        number = text.split("number ")[1].split(".")[0]
        return [*tokenizer.encode(f"You said {number}."), tokenizer.eos_token_id]

    with running(engine=ScriptedEngine(script)) as server, ThreadPoolExecutor(16) as pool:

        def ask(number: int) -> str:
            body = {**BODY, "messages": [{"role": "user", "content": f"number {number}."}], "stream": number % 2 == 0}
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
            if number % 2:
                text: str = answer.json()["choices"][0]["message"]["content"]
                return text
            lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
            deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
            return "".join(delta.get("content", "") for delta in deltas)

        assert list(pool.map(ask, range(40))) == [f"You said {number}." for number in range(40)]
        server.wait_idle()


def test_a_cache_of_fixed_size_bounds_answers_and_refuses_no_ordinary_request() -> None:
    """A request that names no max_tokens asks for the model's whole context, which a small cache can never hold."""
    with running(ServerSettings(page=False, num_pages=6)) as server, server.http() as http:
        size = server.engine.cache.page_size
        assert http.get("/v1/models").json()["data"][0]["max_model_len"] == 6 * size
        ids = [100] * (5 * size)
        plain = {"messages": BODY["messages"]}
        assert http.post("/v1/chat/completions", json=plain).status_code == 200
        for limit in ({}, {"max_tokens": 10_000}):
            full = http.post("/v1/chat/completions", json={**plain, "ignore_eos": True, **limit}).json()
            assert full["choices"][0]["finish_reason"] == "length"
            assert full["usage"]["total_tokens"] == 6 * size + 1, "the last token is not stored"
        assert http.post("/v1/completions", json={"prompt": ids, "max_tokens": size}).status_code == 200
        refused = http.post("/v1/completions", json={"prompt": [*ids, *ids]})
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        server.wait_idle()
