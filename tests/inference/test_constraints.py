"""Answers under control: thinking budgets, schemas and grammars, loops; rows of all kinds mixed."""

import functools
import json
import random
from pathlib import Path

import jax
import numpy as np
import ours
import pytest
import tiny
from meshes import mesh_of, on_mesh
from ours import SimpleNamespace

import qwen3vl_jax as q3
from benchmarks.constraints import fits, random_schema
from qwen3vl_jax.cli.common import DEMO
from qwen3vl_jax.inference.constraints import CLOSING, RowConstraint, masks_of, read_constraint
from qwen3vl_jax.inference.row_answer import RowAnswer

THINKING = Path(__file__).parents[1] / "thinking.jinja"
STOP, OPEN, CLOSE = 488, 510, 511
FORM = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 6}, "b": {"enum": [True, "</think>"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@functools.cache
def model():
    """A random model of few layers with the demo's vocabulary."""
    config = tiny.config_dict("golden")
    config["text_config"]["vocab_size"] = 512
    names = ("vision_start", "vision_end", "image", "video")
    config |= {f"{name}_token_id": i for name, i in zip(names, (495, 496, 498, 499))}
    return ours.build(SimpleNamespace(config=config, weights=tiny.weights(config, 0)))


@functools.cache
def processor(template=None):
    return q3.Processor.from_pretrained(DEMO, template)


def prompts(count, template=None):
    """Prompts of several lengths."""
    asked = ["Hi.", "Count from one to ten, please.", "What is that?"]
    chats = [[{"role": "user", "content": asked[i % 3] * (i + 1)}] for i in range(count)]
    return [prompt.ids.tolist() for prompt in processor(template).encode(chats)]


def batch_of(rows):
    real = np.array(
        [[False] * (max(map(len, rows)) - len(ids)) + [True] * len(ids) for ids in rows]
    )
    ids = np.full(real.shape, tiny.PAD)
    ids[real] = np.concatenate(rows)
    return q3.make_batch(model()[1], input_ids=ids, attention_mask=real.astype(int))


def generate(rows, count, constraint=(), **options):
    """Answers of four rows, whose programs all tests share; those that are missing are the last again."""
    more = 4 - len(rows)
    constraint = [*constraint, *[None] * (4 - len(constraint))]
    how = {"max_new_tokens": count, "stop_ids": processor().stop_ids, **options}
    return q3.generate(*model(), batch_of([*rows, *rows[-1:] * more]), constraint=constraint, **how)


def many(rows, count, constraints, params=None, **options):
    """The answers of the engine, four rows at a time, in order; free ones of 24 tokens at most."""
    chats = [{"input_ids": np.array([ids])} for ids in rows]
    asked = (
        q3.Request(i, ids, count if one else min(count, 24), constraint=one, **options)
        for i, (ids, one) in enumerate(zip(chats, constraints, strict=True))
    )
    how = {"stop_ids": processor().stop_ids, "rows": 4}
    found = q3.generate_many(params or model()[0], model()[1], asked, **how)
    return sorted(found, key=lambda one: one.key)


def test_answers_fit_their_schemas_and_free_rows_stay():
    """In the engine, beside rows without a constraint, whose tokens are those of a run of their own."""
    rng, warm = random.Random(3), q3.Sampling(temperature=1.0, top_k=20)
    schemas = [random_schema(rng) if i % 4 else None for i in range(40)]
    given = [schema and q3.Constraint(processor(), schema=schema) for schema in schemas]
    rows = prompts(3) * 14
    mixed = many(rows[:40], 300, given, sampling=warm)
    free = many(rows[:40:4], 300, [None] * 10, sampling=warm)
    for answer, schema in zip(mixed, schemas, strict=True):
        if schema is not None:
            assert answer.finish_reason == "stop" and answer.tokens[-1] in (STOP, 486), answer
            assert fits(json.loads(processor().decode(answer.tokens)), schema), schema
            assert max(answer.tokens[:-1]) < 486  # no special token
    assert [one.tokens for one in mixed[::4]] == [one.tokens for one in free]


def test_rows_of_generate_mixed():
    """Constraints one a row and for all rows, copies with a state each, chunks of any size."""
    rows, form = prompts(4), q3.Constraint(processor(), schema=FORM)
    given, ends = [form, None, form, None], {"stop_ids": (STOP, 486), "max_new_tokens": 80}
    free, mixed = generate(rows, 80), generate(rows, 80, given)
    np.testing.assert_array_equal(mixed.tokens[1::2], free.tokens[1::2])
    for steps in (1, 5):
        how = {"constraint": given, "steps": steps, **ends}
        tokens = np.concatenate(list(q3.stream(*model(), batch_of(rows), **how)), axis=1)
        for row, length in enumerate(mixed.lengths):
            np.testing.assert_array_equal(tokens[row, :length], mixed.tokens[row, :length])
    how = {"constraint": form, "copies": 4, "sampling": q3.Sampling(temperature=1.0), **ends}
    several = q3.generate(*model(), batch_of(rows[:1]), **how)
    texts = [processor().decode(row[:n]) for row, n in zip(several.tokens, several.lengths)]
    assert len(set(texts)) == 4
    for text in texts:
        found = json.loads(text)
        assert (
            found.keys() == {"a", "b"} and len(found["a"]) <= 6 and found["b"] in (True, "</think>")
        )


def test_on_a_mesh_as_on_one_device():
    """Masks are sharded as rows of logits are; budgets and schemas in the engine, four rows."""
    params, cfg = model()
    rows, form = prompts(4, THINKING), q3.Constraint(processor(), 3, FORM)
    given = [form, None, q3.Constraint(processor(), 5), form]
    want = many(rows, 60, given)
    mesh = mesh_of(data=2, tensor=2)
    with jax.set_mesh(mesh):
        got = many(rows, 60, given, params=on_mesh(params, cfg, mesh))
    assert [one.tokens for one in got] == [one.tokens for one in want]
    assert json.loads(processor().parse(processor().decode(want[0].tokens), "<think>").content)


def test_budgets_of_one_batch_are_exact():
    """0, 16 and 256 tokens of thinking, then the closing ids, then what that thinking alone gives."""
    rows, budgets = prompts(3, THINKING), (0, 16, 256)
    assert all(ids[-2] == OPEN for ids in rows)
    closing = processor().tokenizer.encode(CLOSING)
    given = [q3.Constraint(processor(), thinking_budget=budget) for budget in budgets]
    count, after = 256 + len(closing) + 12, 12
    free = generate(rows, count, stop_ids=()).tokens
    assert not any(CLOSE in row[:end] for row, end in zip(free, budgets))  # it ends nothing itself
    made = generate(rows, count, given, stop_ids=()).tokens
    asked = many(rows, count, given, sampling=q3.Sampling(min_new_tokens=count))
    ends = [budget + len(closing) for budget in budgets]
    thought = [ids + made[row, :end].tolist() for row, (ids, end) in enumerate(zip(rows, ends))]
    told = generate(thought, after, stop_ids=()).tokens
    for row, (budget, end) in enumerate(zip(budgets, ends)):
        assert made[row, :end].tolist() == free[row, :budget].tolist() + closing
        np.testing.assert_array_equal(made[row, end : end + after], told[row])
        assert asked[row].tokens[: end + after] == made[row, : end + after].tolist()


def row_of(prompt, **given):
    constraint = q3.Constraint(processor(), **given)
    return RowConstraint(constraint, np.array(prompt), processor().stop_ids)


def test_thinking_that_the_answer_opens_or_ends_itself():
    closing = processor().tokenizer.encode(CLOSING)
    row = row_of([OPEN, 198], thinking_budget=5)
    assert row.free() == 5 and row.take(40) and row.free() == 4
    assert row.take(CLOSE) and row.free() is None and row.take(STOP)
    row = row_of([487, 198], thinking_budget=2)
    assert row.free() == 3 and row.take(198) and row.free() == 3  # a line break opens nothing
    assert row.take(OPEN) and row.free() == 2 and row.take(40) and row.take(41)
    for token in closing:
        bits = masks_of([None, row], 512)
        assert (bits[0] == 2**32 - 1).all()
        assert np.flatnonzero(np.unpackbits(bits[1].view(np.uint8), bitorder="little")) == [token]
        assert row.free() == 0 and row.take(token)
    assert row.free() is None and masks_of([row], 512) is None
    assert row_of([487, 198], thinking_budget=2).take(40)
    row = row_of([OPEN, CLOSE, 198], thinking_budget=0)
    assert row.take(40) and row.free() is None  # it did not open its thinking


def test_json_comes_after_the_thinking():
    """A row each: cut off by the budget, ended by itself, free of thinking, and one that would stop."""
    form, cut = q3.Constraint(processor(), schema=FORM), q3.Constraint(processor(), 7, FORM)
    (opened,) = prompts(1, THINKING)
    closed = [*opened, *processor().tokenizer.encode(CLOSING)]

    def steer(logits, state):
        """Row 1 says </think> as token 4, row 3 <|im_end|>; none says them before."""
        say = np.zeros((4, 512), np.float32)
        say[:, [CLOSE, STOP, 486]] = -1e9
        late = say.copy()
        late[1, CLOSE] = late[3, STOP] = 1e9
        count = state.count[:, None]
        return logits + (count < 3) * say + (count == 3) * late

    rows = [opened, opened, closed, opened]
    made = generate(rows, 90, [cut, form, form, cut], logits_fn=steer)
    closing = processor().tokenizer.encode(CLOSING)
    assert made.tokens[0, 7:11].tolist() == closing and made.tokens[1, 3:6].tolist() == closing[1:]
    assert made.tokens[3, 3] != STOP and made.tokens[3, 7:11].tolist() == closing
    for row, start in ((0, 11), (1, 6), (2, 0), (3, 11)):
        text = processor().decode(made.tokens[row, start : made.lengths[row]])
        assert json.loads(text).keys() == {"a", "b"}
    assert made.finish_reasons == ["stop"] * 4


def test_no_token_left_is_an_error_and_not_silent():
    """min_new_tokens forbids the stop id where the grammar allows nothing else."""
    rows, grammar = prompts(2), q3.Constraint(processor(), grammar='start: "ab"')
    late = q3.Sampling(min_new_tokens=50)
    made = generate(rows, 60, [grammar], sampling=late)
    assert processor().decode(made.tokens[0, : made.lengths[0]]) == "ab"
    assert made.finish_reasons[0] == "error" and "constraint" in made.errors[0]
    first, second = many(rows, 60, [grammar, None], sampling=late)
    assert first.finish_reason == "error" and second.tokens == made.tokens[1, :24].tolist()
    row = row_of([1], grammar='start: "ab"')
    assert not row.take(5) and not masks_of([row], 512).any()


@pytest.mark.parametrize("period", [1, 3, 64])
def test_loops_end_at_one_token_whatever_the_chunks(period):
    rng = np.random.default_rng(period)
    block = rng.permutation(400)[:period]
    tokens = np.append(rng.permutation(400)[:50], np.tile(block, 700))
    want = 50 + max(256, 8 * period)
    for size in (1, 16):
        answer = RowAnswer(len(tokens), max_repeats=8)
        for start in range(0, len(tokens), size):
            if not answer.finish_reason:
                answer.add(tokens[start : start + size], ())
        assert answer.finish_reason == "repetition" and len(answer.tokens) == want
    answer = RowAnswer(len(tokens))
    answer.add(tokens, ())
    assert answer.finish_reason == "length"
    # A block of 65 is none, and seven of 64 are too few.
    for others in (np.tile(np.arange(65), 20), np.tile(np.arange(64), 7)):
        answer = RowAnswer(len(others), max_repeats=8)
        answer.add(others, ())
        assert answer.finish_reason == "length"


def test_generate_and_engine_end_a_loop():
    rows, grammar = prompts(2), q3.Constraint(processor(), grammar='start: "ab"*')
    how = {"max_repeats": 8, "sampling": q3.Sampling(min_new_tokens=300)}
    made = generate(rows, 300, [grammar], **how)
    assert made.finish_reasons[0] == "repetition" and 256 <= made.lengths[0] < 300
    (answer,) = many(rows[:1], 300, [grammar], **how)
    assert answer.finish_reason == "repetition"
    assert answer.tokens == made.tokens[0, : made.lengths[0]].tolist()


def test_what_is_refused():
    proc = processor()
    assert read_constraint(proc) is read_constraint(proc, None, {"type": "text"}) is None
    schema = {"type": "json_schema", "json_schema": {"schema": FORM, "name": "x", "strict": True}}
    assert read_constraint(proc, 3, schema).schema == FORM
    assert read_constraint(proc, None, {"type": "json_object"}).schema == {"type": "object"}
    lark = {"type": "grammar", "grammar": "start: /x+/"}
    assert read_constraint(proc, None, lark).grammar == "start: /x+/"
    inner = schema["json_schema"]
    for wrong in (
        5,
        "json_object",
        {},
        {"type": "xml"},
        {"type": ["text"]},
        {"type": "json_object", "schema": FORM},
        {"type": "json_schema", "schema": FORM},
        {"type": "json_schema", "json_schema": {"schema": None}},
        {"type": "json_schema", "json_schema": {**inner, "other": 1}},
        {"type": "grammar", "grammar": None},
    ):
        with pytest.raises(q3.InputError, match=r"response_format: got .*, expected "):
            read_constraint(proc, None, wrong)
    for key, value, why in (
        ("thinking_budget", -1, "whole number"),
        ("thinking_budget", True, "whole number"),
        ("thinking_budget", "5", "whole number"),
        ("schema", {"type": "objekt"}, "Invalid type: objekt"),
        ("schema", {"type": "array", "uniqueItems": True}, "uniqueItems"),
        ("schema", [], "schema: "),
        ("grammar", "start: nothing", "nothing"),
        ("grammar", 5, "grammar: "),
    ):
        with pytest.raises(q3.InputError, match=why):
            q3.Constraint(proc, **{key: value})
    with pytest.raises(q3.InputError, match="give one of them"):
        q3.Constraint(proc, None, FORM, "start: /x/")
    form = q3.Constraint(proc, schema=FORM)
    with pytest.raises(
        q3.InputError, match=r"stop_ids: got \[\], expected \[488, 486\] among them"
    ):
        generate(prompts(1), 5, [form], stop_ids=())
    for wrong in ([form], [form, FORM], FORM):
        with pytest.raises(q3.InputError, match=r"constraint: got .*, expected Constraints"):
            q3.generate(*model(), batch_of(prompts(4)), max_new_tokens=5, constraint=wrong)
    for wrong in (1, -1, True, 2.5):
        with pytest.raises(q3.InputError, match="max_repeats: got"):
            generate(prompts(1), 5, max_repeats=wrong)
