"""The demo checkpoint here and in transformers: ``python -m benchmarks.demo_parity``.

100 held-out images, every question of ``demo.evaluate`` about them, float32 and greedy on both
sides; counts the answers whose tokens are all the same. Needs the test extra.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


def main() -> int:
    """Compare and print; the exit code is 1 if an answer differs."""
    parser = argparse.ArgumentParser(
        description="The demo here and in transformers, token by token."
    )
    parser.add_argument("--pictures", type=int, default=100)
    args = parser.parse_args()
    import demo_reference

    from demo import evaluate

    start = time.perf_counter()
    exams = evaluate.compose(args.pictures)
    pairs = demo_reference.same_tokens(evaluate.CHECKPOINT, exams)
    same = sum(ours == theirs for ours, theirs in pairs)
    tokens = sum(len(theirs) for _, theirs in pairs)
    seconds = time.perf_counter() - start
    print(
        f"{args.pictures} images, {len(pairs)} questions, {tokens} tokens: "
        f"{same} answers with the same tokens, {len(pairs) - same} without ({seconds:.0f} s)"
    )
    return int(same < len(pairs))


if __name__ == "__main__":
    sys.exit(main())
