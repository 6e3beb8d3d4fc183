"""Counters of the server, as Prometheus reads them."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate

_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)  # seconds
_HELP = {
    "first_token_seconds": "from a chat request to its first token",
    "request_seconds": "from a request to the end of its response",
}


class Metrics:
    """What was counted so far; used in the event loop alone."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by path and status
        self.tokens: Counter[str] = Counter()  # prompt, completion
        self.counts = {name: [0] * (len(_BOUNDS) + 1) for name in _HELP}
        self.sums = dict.fromkeys(_HELP, 0.0)

    def observe(self, name: str, seconds: float) -> None:
        """Adds to a histogram."""
        self.counts[name][bisect_left(_BOUNDS, seconds)] += 1
        self.sums[name] += seconds

    def text(self, gauges: Mapping[str, int]) -> str:
        """All of them in the text format; gauges: what is so now, by name."""
        lines = _head("requests_total", "counter", "requests by path and status")
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'qwen3vl_requests_total{{path="{path}",status="{status}"}} {count}')
        lines += _head("tokens_total", "counter", "tokens of prompts and of answers")
        lines += [f'qwen3vl_tokens_total{{kind="{k}"}} {n}' for k, n in sorted(self.tokens.items())]
        for name, value in gauges.items():
            lines += [*_head(name, "gauge", "at this moment"), f"qwen3vl_{name} {value}"]
        for name, about in _HELP.items():
            lines += _head(name, "histogram", about)
            for bound, count in zip((*_BOUNDS, "+Inf"), accumulate(self.counts[name])):
                lines.append(f'qwen3vl_{name}_bucket{{le="{bound}"}} {count}')
            lines.append(f"qwen3vl_{name}_sum {self.sums[name]:.6f}")
            lines.append(f"qwen3vl_{name}_count {sum(self.counts[name])}")
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP qwen3vl_{name} {about}", f"# TYPE qwen3vl_{name} {kind}"]
