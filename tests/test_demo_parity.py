"""transformers loads the bundled checkpoint's directory and gives the same tokens."""

import demo_reference

from demo import evaluate


def test_transformers_gives_the_same_tokens():
    """A reading, a count and a list of boxes on each of a few pictures, in float32."""
    exams = evaluate.compose(4, seed=7)
    kinds = {exam.turn.kind for exam in exams}
    assert kinds == {"read", "count", "find"}
    for ours, theirs in demo_reference.same_tokens(evaluate.CHECKPOINT, exams):
        assert ours == theirs and len(ours) > 1
