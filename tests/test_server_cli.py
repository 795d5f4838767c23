"""`minim3 serve` as a process: options, messages, signals."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from minim3.cli.app import main
from minim3.cli.serve import read_keys, read_limits
from minim3.server.settings import ServerSettings

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Count."}], "ignore_eos": True}


@contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A server on a free port, ready; its process, its URL, and the lines it wrote so far."""
    command = [sys.executable, "-m", "minim3", "serve", "--port", "0", "--threads", "1", *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    lines: list[str] = []
    assert server.stderr is not None

    def read() -> None:
        assert server.stderr is not None
        lines.extend(iter(server.stderr.readline, ""))

    url = ""
    for line in server.stderr:
        lines.append(line)
        if found := re.search(r"API +(http://\S+)/v1", line):
            url = found.group(1)
        if line.startswith("Ctrl-C"):
            break
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert url, "".join(lines)
        yield server, url, lines
    finally:
        if server.poll() is None:
            server.kill()
        server.wait(20)
        reader.join(10)


def fails(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    """The one line said by a command line that is refused."""
    assert main(["serve", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("minim3: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_taken_port_is_said_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    """Not after minutes of loading, and not as a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = fails(capsys, ["/no/such/model", "--port", str(port)])
    assert f"port {port} of 127.0.0.1 is taken" in message
    assert "--port" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/no/such/model", "--port", "0"], "/no/such/model does not exist"),
        (["a", "--model", "b"], "two models"),
        (["--limit", "max_frames"], "NAME=VALUE"),
        (["--limit", "max_frame=3"], "max_frames"),
        (["--limit", "max_frames=many"], "'many' is not a whole number"),
        (["--limit", "max_frames=0"], "max_frames is 0"),
        (["--limit", "request_seconds=soon"], "is not a number"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key-file", "/no/such/file"], "/no/such/file"),
        (["--log-level", "loud"], "debug, info, warning, error"),
        (["--request-timeout", "0"], "request_seconds is 0"),
        (["--port", "70000"], "65535"),
    ],
)
def test_wrong_options_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert words in fails(capsys, arguments)


def test_keys_come_from_options_files_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfrom-file\n\nboth\n")
    monkeypatch.setenv("MINIM3_API_KEY", "from-environment, both")
    assert read_keys(["given"], file) == ("given", "from-environment", "both", "from-file")
    monkeypatch.delenv("MINIM3_API_KEY")
    assert read_keys([], None) == ()
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="no API key"):
        read_keys([], file)


def test_looking_inside_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that no option reaches."""
    found: list[Any] = []

    def run_serve(_: Any, settings: Any, **options: Any) -> int:
        found.append(ServerSettings(**{**settings, "model_name": "m"}).look_inside)
        return 0

    monkeypatch.setattr("minim3.cli.serve.run_serve", run_serve)
    for arguments in ([], ["--no-look-inside"]):
        assert main(["serve", *arguments]) == 0
    assert found == [True, False]


def test_every_limit_can_be_set_from_the_command_line() -> None:
    found = read_limits(["max_frames=100", "request_seconds=1.5", "max-body-bytes=1_000_000", "num_pages=none"])
    assert found == {"max_frames": 100, "request_seconds": 1.5, "max_body_bytes": 1_000_000, "num_pages": None}
    assert ServerSettings(**found).max_body_bytes == 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_under_load_loses_no_request(number: signal.Signals, code: int) -> None:
    """Every request that was taken gets its whole answer; those that come later hear 503 or find nobody."""
    with process("--log-level", "warning") as (server, url, lines):
        taken: list[int] = []
        stop = threading.Event()

        def ask(which: int) -> None:
            while not stop.is_set():
                body = {**BODY, "max_tokens": 60, "stream": which % 2 == 0}
                try:
                    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
                except httpx.ConnectError:
                    return
                if answer.status_code == 503:
                    assert "retry-after" in answer.headers
                    return
                assert answer.status_code == 200
                whole = "[DONE]" in answer.text if body["stream"] else answer.json()["usage"]["completion_tokens"] == 60
                assert whole, answer.text
                taken.append(which)

        with ThreadPoolExecutor(8) as pool:
            asking = [pool.submit(ask, which) for which in range(8)]
            while len(taken) < 8:
                time.sleep(0.05)
            server.send_signal(number)
            assert server.wait(60) == code
            stop.set()
            for one in asking:
                one.result()
        assert "stopped" in "".join(lines)
        assert not any("Traceback" in line for line in lines), "".join(lines)


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once() -> None:
    with process("--log-level", "warning") as (server, url, lines), ThreadPoolExecutor(1) as pool:
        asked = pool.submit(
            lambda: httpx.post(f"{url}/v1/chat/completions", json={**BODY, "max_tokens": 8000}, timeout=60)
        )
        while "minim3_requests_running 1.0" not in httpx.get(f"{url}/metrics").text:
            time.sleep(0.02)
        server.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert server.poll() is None
        assert any("1 request to finish" in line for line in lines)
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 130
        with suppress(httpx.HTTPError):  # the connection may be cut, or the route with nobody to answer for it
            assert asked.result().status_code in (500, 503)


@pytest.mark.slow
def test_the_first_lines_say_where_to_go() -> None:
    with process("--api-key", "k", "--host", "0.0.0.0", "--served-model-name", "mine") as (_, url, lines):
        text = "".join(lines)
        assert "mine is ready" in text
        assert f"chat page  {url}/" in text
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{url}/v1/models").status_code == 401
        models = httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer k"}).json()
        assert models["data"][0]["id"] == "mine"
