"""A server under load: 64 clients with mixed requests for ten minutes. Errors, leaks, latency.

`minim3 serve` runs in a process of its own on pocket; the clients, in this one, send a request each, read the stream,
and send the next: short and long prompts, pictures, conversations that repeat their beginning, some that end by
themselves and some of a fixed length, several answers at once, and a few clients that leave in the middle. Memory is
that of the server's process alone, once a second. A first minute warms up and is not measured.

    python -m benchmarks.serving_load                        the ten minutes of the claim
    python -m benchmarks.serving_load --minutes 1 --clients 8
"""

import asyncio
import base64
import io
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks.report import Claim, arguments, publish

CLIENTS, MINUTES = 64, 10.0
EARLY, LATE = 3, 10  # the minutes whose memory is compared
LEAVING = 0.03
COLOURS = ((220, 40, 40), (40, 90, 220), (40, 170, 70), (240, 200, 40))
WORDS = ("red", "blue", "green", "circle", "square", "small", "large", "left", "of", "the", "what", "how", "many", "3")


@dataclass
class Figures:
    """What the clients saw."""

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_left: int = 0
    errors: list[str] = field(default_factory=list)


def picture(rng: random.Random) -> str:
    """A data URL of a few coloured rectangles."""
    height, width = rng.choice((84, 112, 168)), rng.choice((84, 112, 168))
    pixels = np.full((height, width, 3), 245, np.uint8)
    for _ in range(rng.randint(1, 4)):
        top, left = rng.randrange(height - 20), rng.randrange(width - 20)
        pixels[top : top + 20, left : left + 20] = rng.choice(COLOURS)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def make_request(rng: random.Random) -> dict[str, Any]:
    """The body of one request."""
    kind = rng.random()
    text = " ".join(rng.choices(WORDS, k=rng.choice((5, 10, 20, 60, 200))))
    messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
    if kind < 0.25:
        content = [{"type": "image_url", "image_url": {"url": picture(rng)}}, {"type": "text", "text": text[:40]}]
        messages = [{"role": "user", "content": content}]
    elif kind < 0.5:  # a long beginning that many share
        shared = " ".join(WORDS * 20)
        messages = [{"role": "system", "content": shared}, *messages]
    elif kind < 0.6:
        messages = [*messages, {"role": "assistant", "content": text[:30]}, {"role": "user", "content": "And now?"}]
    body: dict[str, Any] = {"messages": messages, "stream": True, "max_tokens": rng.choice((8, 32, 64, 128))}
    body["stream_options"] = {"include_usage": True}
    body["ignore_eos"] = rng.random() < 0.6
    if rng.random() < 0.5:
        body |= {"temperature": 1.0, "top_p": 0.95, "seed": rng.randrange(2**31)}
    if rng.random() < 0.05:
        body["n"] = 2
    if rng.random() < 0.1:
        body |= {"logprobs": True, "top_logprobs": 3}
    return body


async def ask(port: int, body: dict[str, Any], rng: random.Random, figures: Figures) -> None:
    """Send one request and read its stream, by hand: a client library would take as much processor as the server."""
    leaves_after = rng.randint(1, 20) if rng.random() < LEAVING else None
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        content = json.dumps(body).encode()
        head = ("POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json", "Connection: close")
        writer.write("\r\n".join((*head, f"Content-Length: {len(content)}", "", "")).encode() + content)
        status = (await reader.readline()).decode().split()[1:2]
        if status != ["200"]:
            figures.errors.append(f"{status}: {(await reader.read())[-300:].decode(errors='replace')}")
            return
        last: float | None = None
        done = False
        usage = None
        async for line in reader:
            if not line.startswith(b"data: "):
                continue
            now = time.perf_counter()
            if line.startswith(b"data: [DONE]"):
                done = True
                break
            if b'"error"' in line:
                figures.errors.append(line.decode()[:300])
                return
            chunk = json.loads(line[6:])
            usage = chunk.get("usage") or usage
            if not chunk["choices"] or not chunk["choices"][0]["delta"].get("content"):
                continue
            if last is None:
                figures.first.append(now - started)
            elif body.get("n", 1) == 1:
                figures.between.append(now - last)
            last = now
            if leaves_after is not None:
                leaves_after -= 1
                if leaves_after == 0:
                    figures.num_left += 1
                    return
        if not done or usage is None:
            figures.errors.append("the stream ended without [DONE] and usage")
            return
        figures.num_tokens += usage["completion_tokens"]
        figures.whole.append(time.perf_counter() - started)
    except (OSError, ValueError) as error:
        figures.errors.append(f"{type(error).__name__}: {error}")
    finally:
        writer.close()


async def client(port: int, number: int, until: float, figures: Figures) -> None:
    rng = random.Random(number)
    await asyncio.sleep(rng.random())
    while time.monotonic() < until:
        await ask(port, make_request(rng), rng, figures)


async def watch(process: psutil.Process, until: float, memory: list[tuple[float, int]]) -> None:
    """Resident memory, once a second."""
    started = time.monotonic()
    while time.monotonic() < until:
        memory.append((time.monotonic() - started, process.memory_info().rss))
        await asyncio.sleep(1)


async def load(port: int, process: psutil.Process, clients: int, minutes: float) -> tuple[Figures, list[Any]]:
    figures, memory = Figures(), []  # type: ignore[var-annotated]
    until = time.monotonic() + 60 * minutes
    await asyncio.gather(watch(process, until, memory), *(client(port, i, until, figures) for i in range(clients)))
    return figures, memory


def start(extra: Sequence[str]) -> tuple[subprocess.Popen[str], int]:
    """`minim3 serve` on a free port, once it is ready; its log goes nowhere."""
    command = [sys.executable, "-m", "minim3", "serve", "--port", "0", "--log-level", "warning", *extra]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    port = None
    for line in process.stderr:
        port = int(found.group(1)) if (found := re.search(r"http://127.0.0.1:(\d+)/v1", line)) else port
        if line.startswith("Ctrl-C"):
            assert port is not None
            return process, port
    raise RuntimeError("the server did not start")


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else float("nan")


def median_of_minute(memory: Sequence[tuple[float, int]], minute: int) -> float:
    """Median MiB within that minute, counted from 1; NaN if it was not reached."""
    found = [size for seconds, size in memory if 60 * (minute - 1) <= seconds < 60 * minute]
    return statistics.median(found) / 2**20 if found else float("nan")


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--warm-up", type=float, default=20.0, metavar="SECONDS")
    parser.add_argument("--model", default=None, help="default: pocket")
    parser.add_argument("serve", nargs="*", help="further options of minim3 serve, after --")
    options = parser.parse_args()
    extra = [*([options.model] if options.model else []), *options.serve]
    process, port = start(extra)
    try:
        server = psutil.Process(process.pid)
        asyncio.run(load(port, server, options.clients, options.warm_up / 60))
        started = time.perf_counter()
        figures, memory = asyncio.run(load(port, server, options.clients, options.minutes))
        seconds = time.perf_counter() - started
    finally:
        process.terminate()
        code = process.wait(90)
    for error in figures.errors[:10]:
        print("error:", error)
    where = f"{options.clients} clients, pocket"
    late = min(LATE, int(options.minutes))
    early = min(EARLY, late)
    growth = 100 * (median_of_minute(memory, late) / median_of_minute(memory, early) - 1) if late else float("nan")
    claims = [
        Claim(f"errors in {options.minutes:g} minutes, {where}", 0, len(figures.errors), "", at_most=True),
        Claim("exit code of the server after SIGTERM", 0, code, "", at_most=True),
        Claim(f"memory, median of minute {early}", None, median_of_minute(memory, early), "MiB"),
        Claim(f"memory, median of minute {late} over that of minute {early}", 5, growth, "% more", at_most=True),
        Claim("time to the first token, median", None, 1000 * percentile(figures.first, 50), "ms"),
        Claim("time to the first token, p99", None, 1000 * percentile(figures.first, 99), "ms"),
        Claim("between two tokens, median", None, 1000 * percentile(figures.between, 50), "ms"),
        Claim("between two tokens, p99", None, 1000 * percentile(figures.between, 99), "ms"),
        Claim("tokens generated", None, figures.num_tokens / seconds, "tokens/s"),
        Claim("requests answered", None, len(figures.whole), ""),
        Claim("clients that left in the middle", None, figures.num_left, ""),
    ]
    publish(claims, options.json)
    if figures.errors or code:
        sys.exit(1)


if __name__ == "__main__":
    main()
