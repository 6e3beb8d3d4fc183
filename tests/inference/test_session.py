"""A conversation with its cache kept: the vision tower runs once a picture, answers are the same."""

import contextlib
import dataclasses
import io
import shutil
import signal
import sys
from pathlib import Path

import clips
import jax
import numpy as np
import pytest

import qwen3vl_jax as q3
from demo import evaluate, examples
from qwen3vl_jax.cli import chat as terminal
from qwen3vl_jax.inference import chat_session, generate
from qwen3vl_jax.model import cache
from qwen3vl_jax.processing.encoded_prompt import EncodedPrompt


@pytest.fixture(scope="module")
def demo():
    proc, params = evaluate.load(examples.CHECKPOINT)
    return proc, params


def picture(seed):
    (exam,) = evaluate.compose(1, seed=seed)[:1]
    return {"type": "image", "image": exam.picture.pixels}


def text(words):
    return {"type": "text", "text": words}


def user(*items):
    return {"role": "user", "content": list(items)}


def said(words):
    return {"role": "assistant", "content": words}


def finish(turn):
    """(pieces, what the generator returns)."""
    pieces = []
    while True:
        try:
            pieces.append(next(turn))
        except StopIteration as end:
            return pieces, end.value


def anew(params, proc, messages, count, **options):
    batch = proc(messages)
    out = q3.generate(
        params, proc.config, batch, max_new_tokens=count, stop_ids=proc.stop_ids, **options
    )
    return proc.decode(out.tokens[0, : out.lengths[0]])


GRID = str(evaluate.CHECKPOINT.parent / "pictures" / "grid.png")
TURNS = (
    [picture(3), text("Read the digits.")],
    [text("How many digits are there?")],
    [picture(5), text("and here?"), picture(7)],
    [
        {"type": "video", "video": clips.waves(5, 40, 70), "video_metadata": {"fps": 2}},
        text("Count the nines."),
    ],
    [text("Find every 4.")],
)


PENALTIES = q3.Sampling(0.7, top_k=5, repetition_penalty=4.0)  # of earlier turns too


@pytest.mark.parametrize(
    ("count", "chunk", "sampling"),  # to the end of answers; cut off, and each turn in pieces
    [(40, None, None), (6, 16, None), (12, None, PENALTIES)],
)
def test_each_turn_answers_as_the_whole_conversation(demo, monkeypatch, count, chunk, sampling):
    """Five turns, pictures and a clip among them; the tower's calls and patches are counted."""
    proc, params = demo
    pieces = []
    monkeypatch.setattr(
        cache,
        "_prefill_in_chunks",
        lambda *given, fill=cache._prefill_in_chunks: pieces.append(given[-1]) or fill(*given),
    )
    monkeypatch.setattr(
        generate,
        "_extend",
        lambda *given, more=generate._extend, **named: (
            pieces.append(named["chunk"]) or more(*given, **named)
        ),
    )
    encoded, encode = [], generate.vision_encode

    def counted(params, cfg, vision):
        if isinstance(vision.pixels, np.ndarray):  # not where shapes alone are asked for
            encoded.append(len(vision.pixels))
        return encode(params, cfg, vision)

    monkeypatch.setattr(generate, "vision_encode", counted)
    messages, kept = [], None
    for number, items in enumerate(TURNS):
        messages.append(user(*items))
        encoded.clear()
        turn = chat_session.take_turn(
            params,
            proc,
            messages,
            kept,
            max_new_tokens=count,
            prefill_chunk=chunk,
            sampling=sampling,
            seed=number,
        )
        texts, (answer, kept) = finish(turn)
        assert "".join(texts) == answer
        seen = any(item["type"] != "text" for item in items)
        assert len(encoded) == seen, number
        assert answer == anew(params, proc, messages, count, sampling=sampling, seed=number), number
        assert len(kept.ids) == int(kept.cache.length[0])
        messages.append(proc.parse(answer).message())
    assert set(pieces) - {None} == ({chunk} if chunk else set())


def test_only_what_is_new_is_run(demo):
    """The second turn's batch holds the new turn alone, at the positions of the whole."""
    proc, params = demo
    messages = [user(*TURNS[0])]
    _, (answer, kept) = finish(
        chat_session.take_turn(params, proc, messages, None, max_new_tokens=40)
    )
    messages += [{"role": "assistant", "content": answer}, user(*TURNS[2])]
    (prompt,) = proc.encode(messages)
    batch, cache = chat_session.continue_from(proc.config, prompt.with_digests(), kept)
    ids = prompt.ids
    start = int(cache.length[0])
    assert start >= len(kept.ids) - 1 and (batch.segment_ids[0] > 0).sum() == len(ids) - start
    whole = proc(messages)
    used = len(ids) - start
    np.testing.assert_array_equal(
        batch.positions[:, 0, :used] + start + int(cache.delta[0]),
        whole.positions[:, 0, start : len(ids)],
    )


def test_an_earlier_turn_that_changed_is_run_again(demo):
    """Another first question: nothing of the old answer is used; another picture cuts before it."""
    proc, params = demo
    first = [user(*TURNS[0])]
    _, (_, kept) = finish(chat_session.take_turn(params, proc, first, None, max_new_tokens=40))
    changed = [user(TURNS[0][0], text("Count the digits."))]
    _, (again, _) = finish(chat_session.take_turn(params, proc, changed, kept, max_new_tokens=40))
    assert again == anew(params, proc, changed, 40)


def test_a_stop_text_ends_a_turn(demo):
    """The answer ends before it, and what came after it in the cache is not gone on from."""
    proc, params = demo
    messages = [user({"type": "image", "image": GRID}, text("Read the digits."))]
    _, (answer, kept) = finish(
        chat_session.take_turn(params, proc, messages, max_new_tokens=40, stop=["8", "7"])
    )
    assert answer == "5 6 " and kept.ended  # of "5 6 8 9\n.."
    prompt = proc.inputs(messages)["input_ids"].size
    messages += [{"role": "assistant", "content": answer}, user(*TURNS[1])]
    _, cache = chat_session.continue_from(
        proc.config, proc.encode(messages)[0].with_digests(), kept
    )
    start = int(cache.length[0])
    assert proc.decode(kept.ids[prompt:start]).strip() == "5 6" and start < len(kept.ids)


def typed(*lines):
    """What reads these lines, then the end of input."""
    rest = iter(lines)

    def read(prompt):
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    return read


def test_a_chat_goes_on(demo, capsys, monkeypatch):
    """After reasoning that was cut off, which is no content; and after a turn without room."""
    proc, params = demo
    text = Path(__file__).parents[1].joinpath("thinking.jinja").read_text()
    thinking = type(proc.template)({"default": text})
    proc = dataclasses.replace(proc, template=thinking)
    asked = []

    def turn(params, proc, messages, kept, **options):
        asked.append((list(messages), kept))
        if len(asked) == 2:
            kept.cache["keys"].delete()  # given away, as a turn gives it
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
        yield "hm"
        return "hm", chat_session.ChatState(
            EncodedPrompt(np.zeros(5, int)), {"keys": jax.numpy.ones(3)}, False
        )

    monkeypatch.setattr(terminal, "take_turn", turn)
    read = typed("one", "two", "three")
    terminal.converse(params, proc, None, [], read, max_new_tokens=2)
    out, err = capsys.readouterr()
    assert out == "hm\nhm\n" and err.count("the answer was cut off") == 2
    assert "error: out of memory: weights 0.0" in err and "lower it with /new, " in err
    thought = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    assert [m for m in asked[2][0] if m["role"] == "assistant"] == [thought]
    assert [kept is None for _, kept in asked] == [True, False, True]


def test_reasoning_stays_in_the_text_where_the_template_has_no_place_for_it(demo):
    """As the model wrote it, also what the prompt had opened."""
    proc, _ = demo
    assert terminal._message(proc, "<think>a</think>b", "") == said("<think>a</think>b")
    assert terminal._message(proc, "a</think>b", "x<think>\n") == said("<think>\na</think>b")
    assert terminal._message(proc, "b", "") == said("b")


def test_chat_in_the_terminal(demo, capsys, tmp_path):
    """Commands, questions, what cannot be used, and the end of input; a room that is too small.

    A picture's file is read once: it may go while the chat goes on.
    """
    proc, params = demo
    first = shutil.copy(GRID, tmp_path / "first.png")
    lines = [
        "Read the digits.",
        "/image gone.png",
        "/video gone.mp4",
        "",
        "/what",
        "/help",
        "\x1b[A\x1b[D",
        "/video",
        "How many\x1b[C digits are there?",
        "/new",
        f"/image {GRID}",
        "Count the digits.",
        "exit",
        "unread",
    ]

    def read(prompt):
        if len(lines) == 13:
            first.unlink()
        return lines.pop(0)

    media = [terminal.load_media(proc, "image", str(first), {"template_vars": {"a": 1}})]
    terminal.converse(params, proc, None, media, read, max_new_tokens=40, inputs=None)
    out, err = capsys.readouterr()
    assert out == "5 6 8 9\n5 5 0 2\n9 9 0 4\n12\n12\n"
    assert "error: gone.png: " in err and "error: /what: no such" in err and err.count("error") == 4
    assert "error: /video needs a PATH" in err and f"{GRID}: goes with the next question" in err
    assert lines == ["unread"]
    assert err.count("/help says this") == 3  # at the start, after /help and in the error
    assert out.count("\x1b") == 0
    assert "error: gone.mp4: " in err and "cut off" not in err
    turn = chat_session.take_turn(params, proc, [user(*TURNS[0])], max_new_tokens=9, max_len=20)
    with pytest.raises(q3.InputError, match=r"may have 20 \(max_len\)"):
        next(turn)


def test_ctrl_c_stops_an_answer_and_then_the_chat(demo, capsys):
    """What was said stays in the conversation; without an answer that comes, Ctrl-C ends the chat."""
    proc, params = demo
    seen = []

    def read(prompt):
        seen.append(signal.getsignal(signal.SIGINT))
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)
        return "Read the digits."

    class Terminal:
        """stdout: Ctrl-C is pressed at the first piece of an answer."""

        def __init__(self, presses):
            self.presses, self.text = presses, ""

        def write(self, text):
            self.text += text
            for _ in range(self.presses if text.strip() else 0):
                signal.raise_signal(signal.SIGINT)
            self.presses = 0

        def flush(self):
            pass

    media = [terminal.load_media(proc, "image", GRID, {})]
    stdout = Terminal(1)
    with contextlib.redirect_stdout(stdout), pytest.raises(KeyboardInterrupt):
        terminal.converse(params, proc, None, list(media), read, max_new_tokens=60)
    assert (
        "5 6 8 9\n5 5 0 2\n9 9 0 4\n".startswith(stdout.text.rstrip("\n"))
        and stdout.text[-1] == "\n"
    )
    assert len(stdout.text) < 20 and "stopped" in capsys.readouterr().err
    assert seen[0] is seen[1] is signal.default_int_handler
    with contextlib.redirect_stdout(Terminal(2)), pytest.raises(KeyboardInterrupt):
        terminal.converse(
            params, proc, None, list(media), lambda _: "Count all.", max_new_tokens=60
        )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_lines_are_edited_where_there_is_readline(monkeypatch, capsys):
    """readline is loaded for a terminal; a prompt does not go among answers that go to a file."""
    monkeypatch.setitem(sys.modules, "readline", None)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert terminal.read_line("> ") == "hello\n"
    with pytest.raises(EOFError):
        terminal.read_line("> ")
    out, err = capsys.readouterr()
    assert out == "" and err == "> > "
    monkeypatch.delitem(sys.modules, "readline")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert terminal.read_line("> ") == "hello" and capsys.readouterr().out == ""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(EOFError):
        terminal.read_line("> ")
    assert "readline" in sys.modules


def state_of(ids, answers):
    """What a chat keeps of a conversation of text."""
    return chat_session.ChatState(EncodedPrompt(ids), None, True, answers)


def test_an_answer_goes_on_as_the_tokens_that_were_written(demo):
    """Not as those of its text, where that was not changed; spelled special tokens stay characters."""
    proc, _ = demo
    asked = [user(text("Say it."))]
    prompt = proc.encode(asked)[0].ids
    spelled = "ab<|im_end|>\n<|im_start|>system"
    letters = [i for c in spelled for i in proc.tokenizer.encode(c)]
    kept = state_of(np.append(prompt, letters), ((len(prompt), len(prompt) + len(letters)),))
    for words, same in (
        (spelled, True),
        (spelled[:-1], False),
        ("cd", False),
        (spelled + "s", True),
    ):
        chat = [*asked, {"role": "assistant", "content": words}, user(text("Go on."))]
        row = proc.encode(chat)[0]
        assert np.isin(row.ids, list(proc.tokenizer.special.values())).sum() == 7
        found, spans = chat_session.as_written(proc, row, kept)
        assert spans == (kept.answers if same else ())
        assert np.array_equal(found.ids[: len(kept.ids)], kept.ids) == same, words
        assert proc.decode(found.ids, False) == proc.decode(row.ids, False)
    other = state_of(np.append(prompt, proc.config.image_token_id), kept.answers)
    assert chat_session.as_written(proc, row, other)[0] is row
    # The turn after the next: both answers stay as they were written.
    chat[1]["content"] = spelled
    first, _ = chat_session.as_written(proc, proc.encode(chat)[0], kept)
    both = (*kept.answers, (len(first.ids), len(first.ids) + len(letters)))
    kept = state_of(np.append(first.ids, letters), both)
    chat += [{"role": "assistant", "content": spelled}, user(text("And on."))]
    found, spans = chat_session.as_written(proc, proc.encode(chat)[0], kept)
    assert spans == both and np.array_equal(found.ids[: len(kept.ids)], kept.ids)
    chat[1]["content"] = "changed"
    row = proc.encode(chat)[0]
    assert chat_session.as_written(proc, row, kept)[0] is row
