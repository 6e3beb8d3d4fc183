"""64 clients at once against `qwen3vl serve` on the demo: `python -m benchmarks.serve`.

Every answer must be the one that its prompt gets alone, none may be lost, and the server's resident
memory may grow by GROWTH at most. The same prompts through the engine without a server, as many at a
time, give the ratio of tokens a second; the clients take a part of the same processor. Ends with 1 where
a bound is missed.
"""

import argparse
import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

import qwen3vl_jax as q3
from demo import evaluate

CLIENTS, ROWS, PROMPTS, GROWTH = 64, 16, 48, 1.2
ANSWERS = 1000  # through the engine without a server
ROOT = Path(__file__).resolve().parent.parent


def prompts() -> list[tuple[list[dict[str, Any]], int]]:
    """(messages, tokens of the answer): images as data URIs, and every fourth a text."""
    found = []
    for i, exam in enumerate(evaluate.compose(PROMPTS)[:PROMPTS]):
        file = io.BytesIO()
        Image.fromarray(exam.picture.pixels).save(file, "png")
        url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        content: Any = [{"type": "image_url", "image_url": {"url": url}}]
        content = [*content, {"type": "text", "text": exam.turn.question}] if i % 4 else f"Say {i}."
        found.append(([{"role": "user", "content": content}], 8 + 7 * i % 57))
    return found


def alone(proc, params, prompts) -> list[str]:
    """The answer of each prompt by itself."""
    return [through_engine(proc, params, [one], 1)[0][0] for one in prompts]


def through_engine(proc, params, prompts, rows: int) -> tuple[list[str], list[float], float]:
    """(answers, seconds to the first tokens, tokens a second) of (prompt, tokens), CLIENTS at a time."""
    start, given, first, found = time.perf_counter(), {}, {}, {}

    def noted(key: int):
        def watch(tokens, _) -> bool:
            if tokens:
                first.setdefault(key, time.perf_counter() - given[key])
            return False

        return watch

    def requests():
        for i, (prompt, count) in enumerate(prompts):
            while i - len(found) >= CLIENTS:
                yield None
            given[i] = time.perf_counter()
            yield q3.Request(i, prompt, count, watch=noted(i))

    options = {"stop_ids": proc.stop_ids, "rows": rows}
    tokens = 0
    for one in q3.generate_many(params, proc.config, requests(), **options):
        found[one.key] = proc.decode(one.tokens)
        tokens += len(one.tokens)
    answers = [found[i] for i in range(len(prompts))]
    return answers, [*first.values()], tokens / (time.perf_counter() - start)


def ask(url: str, messages: Any, count: int) -> tuple[str, float, int]:
    """(answer, seconds to its first token, tokens) of one streamed request."""
    body = {"messages": messages, "max_tokens": count, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    headers = {"Content-Type": "application/json"}
    given = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    start, first, text, tokens = time.perf_counter(), 0.0, "", 0
    with urllib.request.urlopen(given, timeout=600) as lines:
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            first = first or time.perf_counter() - start
            text += "".join(x["delta"].get("content") or "" for x in chunk["choices"])
            tokens = (chunk["usage"] or {}).get("completion_tokens", 0)
    return text, first, tokens


def clients(url: str, asked, expected, seconds: float) -> dict[str, Any]:
    """What CLIENTS at once saw in so many seconds."""
    end, lock = time.perf_counter() + seconds, threading.Lock()
    seen: dict[str, Any] = {"answers": 0, "wrong": 0, "lost": 0, "tokens": 0, "first": []}

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        while time.perf_counter() < end:
            i = int(rng.integers(len(asked)))
            try:
                text, first, tokens = ask(url, *asked[i])
            except (OSError, ValueError) as e:
                print(f"lost: {e}", file=sys.stderr)
                with lock:
                    seen["lost"] += 1
                continue
            with lock:
                seen["answers"] += 1
                seen["wrong"] += text != expected[i]
                seen["tokens"] += tokens
                seen["first"].append(first)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(CLIENTS)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen["rate"] = seen["tokens"] / (time.perf_counter() - start)
    return seen


def faults(seen: dict[str, Any], before: int, after: int) -> list[str]:
    """The bounds that are missed, a line each."""
    found = [f"{seen[k]} answers {k}, expected none" for k in ("wrong", "lost") if seen[k]]
    if not seen["answers"]:
        found.append("no answers, expected some")
    if after > GROWTH * before:
        found.append(f"memory grew from {before} to {after} bytes, expected {GROWTH} times at most")
    return found


def main() -> int:
    """Prints the figures; 1 where a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    seconds = parser.parse_args().seconds
    proc, params = evaluate.load(evaluate.CHECKPOINT)
    asked = prompts()
    encoded = [(proc.encode(messages)[0], count) for messages, count in asked]
    expected = alone(proc, params, encoded)
    command = [
        sys.executable,
        "-m",
        "qwen3vl_jax.cli.main",
        "serve",
        "--port",
        "0",
        "--rows",
        str(ROWS),
    ]
    command += ["--dtype", "float32"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ) as child:
        try:
            lines: Any = child.stderr
            line = next(x for x in iter(lines.readline, "") if "answers at" in x)
            url = line.split()[-1]
            threading.Thread(target=lines.read, daemon=True).start()
            # Programs are compiled, and caches are grown, before memory is read.
            clients(url, asked, expected, min(20.0, seconds))
            before = psutil.Process(child.pid).memory_info().rss
            seen = clients(url, asked, expected, seconds)
            after = psutil.Process(child.pid).memory_info().rss
        finally:
            child.terminate()
            child.wait()
    order = np.random.default_rng(0).integers(len(encoded), size=ANSWERS)
    several = [encoded[i] for i in order]
    through_engine(proc, params, several[:CLIENTS], ROWS)
    _, first, rate = through_engine(proc, params, several, ROWS)
    print(f"answers {seen['answers']}, wrong {seen['wrong']}, lost {seen['lost']}")
    print(f"memory {before / 2**20:.0f} MiB, at the end {after / 2**20:.0f} MiB")
    medians = np.median(seen["first"]) * 1e3, np.median(first) * 1e3
    print("first token {:.0f} ms (median), without a server {:.0f}".format(*medians))
    ratio = seen["rate"] / rate
    print(f"tokens/s {seen['rate']:.0f}, without a server {rate:.0f}, ratio {ratio:.2f}")
    found = faults(seen, before, after)
    print(*found, sep="\n", end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
