"""Answers by JSON schemas: whether all fit, and what masks cost a decode step.

    python -m benchmarks.constraints [--schemas 500] [--tokens 200] [--repeats 5]

Random schemas, whose answers are bounded, go to the demo and to random weights of its shape, sampled. Then
decode steps are timed with masks and without, in turn; the least of each counts. Exit code 1 if an answer
does not fit its schema, or masks cost random weights of a wider decoder more than 10 %. The demo's step on
a CPU is about as short as the dispatches of one with masks, and has no bound. Other work on the machine
shows in these times.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import random
import re
import sys
import time
from typing import Any

import jax

import qwen3vl_jax as q3
from qwen3vl_jax.cli.common import DEMO

MOST = 1.10  # times the decode step without masks
WIDE: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 12}
WIDE |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema whose answers are of bounded length."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "pattern"]
    kind = rng.choice(kinds + ["object", "object", "array", "anyOf"] * (depth > 0))
    low = rng.randint(-500, 500)
    if kind == "object":
        names = rng.sample(
            ["a", "name", "x y", 'q"', "count", "\u00e9", "long_key_1"], rng.randint(0, 4)
        )
        inner = {name: random_schema(rng, depth - 1) for name in names}
        needed = [name for name in names if rng.random() < 0.7]
        found = {"properties": inner, "required": needed, "additionalProperties": False}
    elif kind == "array":
        least = rng.randint(0, 2)
        found = {"items": random_schema(rng, depth - 1), "minItems": least, "maxItems": least + 2}
    elif kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}
    elif kind == "enum":
        return {"enum": rng.sample(["red", "a\nb", 7, -1.5, None, True, "</think>"], 3)}
    elif kind == "pattern":
        return {"type": "string", "pattern": "^[A-C]{2}-[0-9]{1,3}$"}
    elif kind == "string":
        found = {"minLength": rng.randint(0, 3), "maxLength": rng.randint(3, 12)}
    elif kind == "integer":
        found = {"minimum": low, "maximum": low + rng.choice([0, 9, 1000])}
    elif kind == "number":
        found = {"enum": [low / 4, low / 2 + 0.25]}
    else:
        found = {}
    return {"type": kind, **found}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is one of a schema of `random_schema`."""
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        # As JSON has them: 1 is 1.0, and not true.
        return any(
            value == one and isinstance(value, bool) == (one is True) for one in schema["enum"]
        )
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    if type(value) is not kinds.get(schema["type"], type(None)):
        return False
    right = True
    if schema["type"] == "object":
        inner = schema["properties"]
        right = set(schema["required"]) <= set(value) <= set(inner)
        right = right and all(fits(one, inner[name]) for name, one in value.items())
    elif schema["type"] == "array":
        right = schema["minItems"] <= len(value) <= schema["maxItems"]
        right = right and all(fits(one, schema["items"]) for one in value)
    elif "pattern" in schema:
        right = re.fullmatch("[A-C]{2}-[0-9]{1,3}", value) is not None
    elif schema["type"] == "string":
        right = schema["minLength"] <= len(value) <= schema["maxLength"]
    elif schema["type"] == "integer":
        right = schema["minimum"] <= value <= schema["maximum"]
    return right


def wrong_answers(params, cfg, proc: q3.Processor, schemas: list, rows: int = 16) -> list[str]:
    """A line for each answer that does not end, parse and fit its schema."""
    (prompt,) = proc.encode([{"role": "user", "content": "Tell me."}])
    warm, wrong = q3.Sampling(temperature=1.0), []
    asked = (
        q3.Request(i, prompt, 600, warm, seed=i, constraint=q3.Constraint(proc, schema=schema))
        for i, schema in enumerate(schemas)
    )
    ends = {"stop_ids": proc.stop_ids, "rows": rows}
    for answer in q3.generate_many(params, cfg, asked, **ends):
        text, schema = proc.decode(answer.tokens), schemas[answer.key]
        try:
            right = answer.finish_reason == "stop" and fits(json.loads(text), schema)
        except json.JSONDecodeError:
            right = False
        if not right:
            shown = json.dumps(schema)[:300]
            wrong.append(f"{shown}: {text[:200]!r}, {answer.finish_reason} {answer.error}")
    return wrong


def step_times(
    params, cfg, proc: q3.Processor, rows: int, tokens: int, repeats: int
) -> list[float]:
    """Seconds of a decode step: without masks, with them; the least of several runs, in turn."""
    batch = proc([[{"role": "user", "content": f"Say {i}."}] for i in range(rows)])
    schema = {"type": "array", "minItems": 4 * tokens, "items": {"type": "string", "maxLength": 8}}
    constraint = q3.Constraint(proc, schema=schema)
    how = {"stop_ids": proc.stop_ids, "sampling": q3.Sampling(min_new_tokens=tokens)}
    found: dict[Any, list[float]] = {None: [], constraint: []}
    for _ in range(repeats + 1):  # the first compiles
        for given, times in found.items():
            run = functools.partial(q3.generate, params, cfg, batch, constraint=given, **how)
            spans = []
            for count in (2, tokens):
                start = time.perf_counter()
                run(max_new_tokens=count)
                spans.append(time.perf_counter() - start)
            times.append((spans[1] - spans[0]) / (tokens - 2))
    return [min(times[1:]) for times in found.values()]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    for name, default in (("schemas", 500), ("tokens", 200), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    params, cfg = q3.load(DEMO, dtype="float32")
    proc = q3.Processor.from_pretrained(DEMO)
    rng = random.Random(0)
    schemas, faults = [random_schema(rng) for _ in range(args.schemas)], 0
    weights = {"the demo": params, "random weights": q3.init_params(jax.random.key(0), cfg)}
    for name, these in weights.items() if schemas else ():
        wrong = wrong_answers(these, cfg, proc, schemas)
        print(f"{name}: {len(schemas) - len(wrong)} of {len(schemas)} answers fit their schema")
        print("\n".join(wrong[:10]))
        faults += len(wrong)
    wide = dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, **WIDE))
    models = {"the demo": (params, cfg), "wider": (q3.init_params(jax.random.key(0), wide), wide)}
    for (name, model), rows in itertools.product(models.items(), (1, 8)):
        free, masked = step_times(*model, proc, rows, args.tokens, args.repeats)
        times = f"{1e3 * free:.2f} ms, with masks {1e3 * masked:.2f} ms"
        print(f"decode step, {name}, {rows} rows: {times}, {masked / free:.2f} times")
        faults += name == "wider" and masked > MOST * free
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
