"""gs:// in place of folders: the same bytes, where nothing is renamed, appended to or locked."""

import json
import types

import adapters
import fake_gcs
import fsspec
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import train_files
from etils import epath
from PIL import Image

import qwen3vl_jax as q3
import train
from qwen3vl_jax import device_mesh
from qwen3vl_jax.checkpoint import orbax_io
from qwen3vl_jax.checkpoint.hf_reader import open_hf
from qwen3vl_jax.checkpoint.peft_io import load_adapter, save_adapter
from qwen3vl_jax.cli.batch import answer_file
from qwen3vl_jax.cli.batch_journal import Journal, read_lines
from qwen3vl_jax.cli.batch_lines import Settings
from qwen3vl_jax.cli.convert import main as convert
from qwen3vl_jax.convert.to_orbax import to_orbax
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.inference import engine
from qwen3vl_jax.processing.processor import Processor
from qwen3vl_jax.storage import paths, remote_files
from qwen3vl_jax.storage.paths import as_path
from qwen3vl_jax.storage.remote_files import Growing
from qwen3vl_jax.storage.safetensors_files import read_tensors
from qwen3vl_jax.training import run_dir, train_model
from qwen3vl_jax.training.data import records
from qwen3vl_jax.training.recipe import Source
from qwen3vl_jax.training.reporting.metrics_table import read_table

BUCKET = "gs://bucket"


@pytest.fixture(scope="module")
def store():
    with fake_gcs.served() as found:
        yield found


@pytest.fixture
def bucket(store):
    """The objects, none of them there yet."""
    store.objects.clear()
    return store


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A folder with a checkpoint (hf/), its Orbax twin, conversations and their pictures."""
    folder = tmp_path_factory.mktemp("local")
    train_files.checkpoint(folder / "hf")
    to_orbax(folder / "hf", folder / "orbax")
    train_files.conversations(folder / "chats.jsonl")
    return folder


def put(store, folder, name=""):
    """Copies a folder's files to the bucket; gives their place there."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        store.put(
            "/".join(["bucket", *name.split(), str(path.relative_to(folder))]), path.read_bytes()
        )
    return f"{BUCKET}/{name}".rstrip("/")


def held(store, name):
    """{relative name: bytes} of what lies at a place."""
    place = f"bucket/{name}/"
    return {n.removeprefix(place): store.objects[n][0] for n in store.names(place)}


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def absent(name):
    raise ImportError(f"no {name}")


def test_what_a_place_is(bucket, tmp_path, monkeypatch):
    """Strings become pathlib's or epath's paths; other schemes and missing packages are refused."""
    assert as_path("a/b") == paths.Path("a/b") and not paths.is_remote("a/b")
    place = as_path(f"{BUCKET}/a/b.json")
    assert isinstance(place, epath.Path) and str(place) == f"{BUCKET}/a/b.json"
    assert as_path(place) == place and paths.absolute(place) == place
    with pytest.raises(InputError, match=r"knows no ftp://; expected a folder, gs://"):
        as_path("ftp://host/file")
    with monkeypatch.context() as patch:
        patch.setattr(fsspec, "get_filesystem_class", absent)
        with pytest.raises(InputError, match=r"s3:// needs a package: no s3; .*qwen3vl-jax\[s3\]"):
            as_path("s3://bucket/x")
    with pytest.raises(InputError, match="in folders and on gs:// only"):
        paths.for_orbax(epath.Path("s3://bucket/x"))
    data = bytes(range(256)) * 40
    bucket.put("bucket/bytes", data)
    monkeypatch.setattr(paths, "PIECE", 100)
    for start, size in ((0, 0), (3, 90), (7, 1000), (10, 10_000)):
        assert (
            paths.read_range(as_path(f"{BUCKET}/bytes"), start, size) == data[start : start + size]
        )
    with pytest.raises(InputError, match=r"no such directory"):
        q3.load(f"{BUCKET}/nothing")


def test_there_and_back_is_bit_equal(bucket, local):
    """HF -> Orbax -> HF on gs://, in shards: each object the original's; config.json is put last."""
    source = put(bucket, local / "hf", "hf")
    orbax, cut = f"{BUCKET}/orbax", ["--max-shard-size", "100KB"]
    for arguments in (
        [source, orbax],
        ["--to-hf", orbax, f"{BUCKET}/back"],
        ["--to-hf", *cut, orbax, f"{BUCKET}/cut"],
    ):
        bucket.log.clear()
        assert convert(arguments) == 0
        written = [name for kind, name in bucket.log if kind == "put"]
        assert written[-1] == arguments[-1].removeprefix("gs://") + "/config.json"
    assert held(bucket, "back") == held(bucket, "hf")
    shards = {name for name in held(bucket, "cut") if name.endswith(".safetensors")}
    assert len(shards) > 5 and not any(".partial" in name for name in bucket.objects)
    same(q3.load(f"{BUCKET}/cut")[0], q3.load(local / "hf")[0])


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_loads_as_from_a_folder(bucket, local, form):
    """Both forms on one device and in shards."""
    want, cfg = q3.load(local / form)
    if form == "hf":
        place = put(bucket, local / form, form)
    else:
        place = f"{BUCKET}/orbax"
        assert convert([str(local / "hf"), place]) == 0
    got, found = q3.load(place)
    assert found == cfg
    same(got, want)
    mesh = device_mesh.make_mesh({"fsdp": 4, "tensor": 2})
    same(q3.load(place, mesh=mesh)[0], q3.load(local / form, mesh=mesh)[0])


def test_a_shard_fetches_its_part_of_a_tensor(bucket, local):
    """A quarter of the outermost axis is a quarter of the bytes, of parts side by side too."""
    place = as_path(put(bucket, local / "hf", "hf"))
    leaves, cfg = open_hf(local / "hf", q3.Config.from_hf(local / "hf")), q3.Config.from_hf(place)
    remote = open_hf(place, cfg)
    assert cfg == q3.Config.from_hf(local / "hf")
    for path, axis in (
        (("embed",), 0),
        (("layers", 0, "attn", "qkv"), 0),
        (("layers", 1, "mlp", "gate_up"), 1),
        (("vision", "blocks", 0, "mlp", "fc1"), 0),
    ):
        leaf = leaves[path]
        cut = max(leaf.shape[axis] // 4, 1)
        whole = tuple(slice(0, n) for n in leaf.shape)
        index = (*whole[:axis], slice(cut, 2 * cut), *whole[axis + 1 :])
        bucket.fetched = 0
        (got,) = remote[path].parts([index])
        np.testing.assert_array_equal(got, leaf.load()[index])
        assert bucket.fetched == got.nbytes, path
        np.testing.assert_array_equal(remote[path].load(), leaf.load())
    (other,) = remote["layers", 0, "attn", "o"].parts([(slice(None), slice(0, 1), slice(None))])
    np.testing.assert_array_equal(other, leaves["layers", 0, "attn", "o"].load()[:, :1])


@pytest.mark.parametrize("direction", ["to_orbax", "to_hf"])
def test_a_stopped_convert_leaves_nothing_loadable(bucket, local, direction, monkeypatch):
    """An error removes what was written; a kill leaves what does not load and the next run clears."""
    flags, source = (["--to-hf"], local / "orbax") if direction == "to_hf" else ([], local / "hf")
    out, killed = f"{BUCKET}/out", {}
    copied = paths.copy_file

    def stop(source, target):
        killed.update(bucket.objects)
        raise RuntimeError("stopped")

    monkeypatch.setattr("qwen3vl_jax.checkpoint.config_files.copy_file", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        convert([*flags, str(source), out])
    assert not bucket.objects and len(killed) > 1
    bucket.objects.update(killed)
    with pytest.raises(InputError, match=r"config\.json"):
        q3.load(out)
    monkeypatch.setattr("qwen3vl_jax.checkpoint.config_files.copy_file", copied)
    bucket.put("bucket/out/rest", b"of the killed one")
    assert convert([*flags, str(source), out]) == 0
    assert "rest" not in held(bucket, "out")
    same(q3.load(out)[0], q3.load(source)[0])
    before = dict(bucket.objects)
    assert convert([*flags, "--force", str(source), out]) == 2
    assert bucket.objects == before


def test_another_store_holds_all_but_orbax(bucket, local, tmp_path, capsys):
    """s3:// takes and gives Hugging Face files; Orbax's and runs are refused before anything is done."""
    place = "s3://bucket/hf"
    assert convert(["--to-hf", str(local / "orbax"), place]) == 0
    same(q3.load(place)[0], q3.load(local / "hf")[0])
    before = dict(bucket.objects)
    assert convert([place, "s3://bucket/orbax"]) == 2
    recipe = train_files.write_recipe(tmp_path / "r.toml", local / "hf", local / "chats.jsonl")
    assert train.main(["--config", str(recipe), "--out", "s3://bucket/run"]) == 2
    assert capsys.readouterr().err.count("in folders and on gs:// only") == 2
    assert bucket.objects == before


def test_an_unfinished_orbax_checkpoint_is_refused(bucket, local):
    """Without Orbax's own mark a directory with a config.json does not load."""
    assert convert([str(local / "hf"), f"{BUCKET}/orbax"]) == 0
    del bucket.objects["bucket/orbax/params/commit_success.txt"]
    with pytest.raises(InputError, match="Orbax"):
        q3.load(f"{BUCKET}/orbax")


def test_adapters_and_save_params(bucket, local, tmp_path):
    """What is saved from Python goes there and comes back."""
    params, cfg = q3.load(local / "hf")
    q3.save_params(f"{BUCKET}/saved", params, files_from=local / "hf")
    same(q3.load(f"{BUCKET}/saved")[0], params)
    weights, adapter = adapters.random(cfg, ("text",))
    save_adapter(f"{BUCKET}/adapter", cfg, weights, adapter)
    got, found = load_adapter(f"{BUCKET}/adapter", cfg)
    assert found.ranks == adapter.ranks
    same(got, {name: weights[name] for name in got})
    with pytest.raises(InputError, match="already exists"):
        save_adapter(f"{BUCKET}/adapter", cfg, weights, adapter)


def test_records_and_their_media(bucket, local, tmp_path):
    """JSONL, JSON and parquet give the records of a folder, pictures beside them and by address."""
    lines = [json.loads(line) for line in (local / "chats.jsonl").read_text().splitlines()]
    (tmp_path / "list.json").write_text(json.dumps(lines))
    (tmp_path / "chats.jsonl").write_bytes((local / "chats.jsonl").read_bytes())
    pyarrow.parquet.write_table(
        pyarrow.table({"messages": [json.dumps(line["messages"]) for line in lines]}),
        tmp_path / "chats.parquet",
        row_group_size=8,
    )
    put(bucket, tmp_path)
    put(bucket, local)
    for name in ("chats.jsonl", "list.json", "chats.parquet"):
        there = records.open_records(Source(f"{BUCKET}/{name}"))
        here = records.open_records(Source(str(tmp_path / name), media=BUCKET))
        assert len(there) == len(lines)
        assert [there.name(i) for i in (0, 9)] == [here.name(i) for i in (0, 9)]
        assert [there.read(i) for i in range(12)] == [here.read(i) for i in range(12)]
    bucket.fetched = 0
    picture = records.open_records(Source(f"{BUCKET}/chats.jsonl")).read(3)
    image = picture["messages"][0]["content"][0]["image"]
    assert image == f"{BUCKET}/chats_3.png"
    want = Image.open(local / "chats_3.png").convert("RGB")
    proc = Processor.from_pretrained(put(bucket, local / "hf", "hf"))
    got = proc.inputs(picture["messages"])
    told = proc.inputs(
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": want}, {"type": "text", "text": "say 3"}],
            },
            picture["messages"][1],
        ]
    )
    assert got.keys() == told.keys()
    for name, x in got.items():
        np.testing.assert_array_equal(x, told[name])
    with pytest.raises(InputError, match="no such file"):
        proc.inputs([{"role": "user", "content": [{"type": "image", "image": f"{BUCKET}/x.png"}]}])
    bucket.put("bucket/x.array_record", b"x")
    with pytest.raises(InputError, match="use JSONL or parquet"):
        records.open_records(Source(f"{BUCKET}/x.array_record"))


def plain_step(recipe, cfg, rule, join, like):
    """A step that costs nothing: weights move with the tokens that were drawn."""

    def step(state, frozen, packed):
        drawn = np.float32(np.asarray(packed.batch.tokens).mean())
        weights = {n: x + np.float32(1e-3) * drawn for n, x in state.weights.items()}
        loss = drawn + np.float32(np.asarray(next(iter(weights.values()))).mean())
        new = state.replace(step=state.step + 1, weights=weights)
        told = {
            "loss": loss,
            "grad_norm": np.float32(1),
            "tokens": np.float32(packed.batch.tokens.size),
        }
        return new, told

    return step


def told(out):
    """What a run said of its steps, without what a clock says."""
    timed = ("seconds", "tokens_per_s", "tflops", "mfu", "mfu_padded", "memory_gib")
    rows = read_table(out / "metrics.csv")
    return [{name: x for name, x in row.items() if not name.endswith(timed)} for row in rows]


def test_a_killed_run_goes_on_as_a_local_one(bucket, local, tmp_path, monkeypatch):
    """Model, data and RUN_DIR on gs://, killed between two saves: steps, state and files of one run."""
    monkeypatch.setattr(train_model, "make_step", plain_step)
    place = put(bucket, local)
    data = (local / "chats.jsonl").read_text() + '{"messages": [{"role": "user"\n'
    (local / "chats.jsonl").write_text(data)
    bucket.put("bucket/chats.jsonl", data.encode())
    settings = {
        "steps": 9,
        "save_every": 3,
        "data": {"bad_fraction": 0.5},
        "optimizer": {"ema": 0.0},
        "report": {"every": 4, "tensorboard": True},
    }
    commands = []
    for folder, out in ((str(local), str(tmp_path / "run")), (place, f"{BUCKET}/run")):
        recipe = tmp_path / f"{len(commands)}.toml"
        train_files.write_recipe(recipe, f"{folder}/hf", f"{folder}/chats.jsonl", **settings)
        commands.append(["--config", str(recipe), "--out", out])
    assert train.main(commands[0]) == 0

    killed, step = {}, plain_step(*[None] * 5)

    def dying(*_):
        def once(state, frozen, packed):
            if int(state.step) == 7:
                killed.update(bucket.objects)
                raise RuntimeError("killed")
            return step(state, frozen, packed)

        return once

    monkeypatch.setattr(train_model, "make_step", dying)
    with pytest.raises(RuntimeError, match="killed"):
        train.main(commands[1])
    bucket.objects.clear()
    bucket.objects.update(killed)
    out = as_path(f"{BUCKET}/run")
    assert 3 in run_dir.saved_steps(out) and len(told(out)) < 7
    monkeypatch.setattr(train_model, "make_step", plain_step)
    assert train.main(commands[1]) == 0
    assert told(out) == told(tmp_path / "run") and len(told(out)) == 9
    assert run_dir.saved_steps(out) == run_dir.saved_steps(tmp_path / "run") == [6, 9]
    arrays = []
    for run in (out, tmp_path / "run"):
        found = arrays.append({}) or arrays[-1]
        for item in ("weights", "state"):
            folder = run / "checkpoints" / "9" / item
            for path, leaf in orbax_io.open_tree(folder).items():
                found[item, *path] = leaf.load()
    assert arrays[0].keys() == arrays[1].keys()
    for place, x in arrays[0].items():
        assert x.tobytes() == arrays[1][place].tobytes(), place
    names = {name.split("/")[0] for name in held(bucket, "run")}
    assert names == {path.name for path in (tmp_path / "run").iterdir()}
    assert held(bucket, "run")["refused.csv"] == (tmp_path / "run" / "refused.csv").read_bytes()
    assert held(bucket, "run")["curves.png"][:4] == b"\x89PNG"
    assert sum("tfevents" in name for name in held(bucket, "run")) == 2
    assert convert(["--to-hf", f"{BUCKET}/run", f"{BUCKET}/out"]) == 0
    assert convert(["--to-hf", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert held(bucket, "out")["model.safetensors"] == weights


def test_a_run_does_not_take_a_place_that_holds_other_things(bucket, local):
    bucket.put("bucket/other/thing", b"x")
    with (
        pytest.raises(InputError, match=r"holds files and no config\.toml"),
        run_dir.locked(as_path(f"{BUCKET}/other")),
    ):
        pass


def test_a_table_is_rewritten_now_and_then(bucket, monkeypatch):
    """Rows wait until they are due, asked for, or the table is closed."""
    table = Growing(as_path(f"{BUCKET}/t.csv"), "step\n")
    table.write("1\n")
    assert bucket.objects["bucket/t.csv"][0] == b"step\n"
    table.sync()
    assert bucket.objects["bucket/t.csv"][0] == b"step\n1\n"
    monkeypatch.setattr(Growing, "EVERY", 0.0)
    table.write("2\n")
    assert bucket.objects["bucket/t.csv"][0] == b"step\n1\n2\n"
    table.write("3\n")
    table.close()
    assert bucket.objects["bucket/t.csv"][0] == b"step\n1\n2\n3\n"


@pytest.fixture
def asked(bucket, local, tmp_path, monkeypatch):
    """What answers a file, its lines here and there; the engine answers each with its own number."""

    def answered(params, cfg, requests, **options):
        for request in requests:
            if request is not None:
                yield types.SimpleNamespace(
                    key=request.key, tokens=[10 + request.key], finish_reason="stop", logprobs=[0.0]
                )

    monkeypatch.setattr(engine, "generate_many", answered)
    lines = [
        {"id": f"q{i}", "messages": [{"role": "user", "content": f"say {i}"}]} for i in range(9)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + "not JSON\n"
    (tmp_path / "in.jsonl").write_text(text)
    bucket.put("bucket/in.jsonl", text.encode())
    proc = Processor.from_pretrained(local / "hf")
    settings = Settings({}, 4, 0, (), 64, {}, rows=1)

    def run(source, out):
        files = as_path(source), as_path(out)
        return answer_file(lambda scope: (None, None), proc, *files, settings)

    return run


def test_answers_outlive_a_kill(asked, bucket, tmp_path, monkeypatch):
    """What was put before the kill is not asked again; OUT and its order are those of a folder."""
    assert asked(tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 1
    want = (tmp_path / "out.jsonl").read_bytes()
    source, out = f"{BUCKET}/in.jsonl", f"{BUCKET}/out.jsonl"
    monkeypatch.setattr(remote_files, "SYNC_EVERY", 0.0)
    add, count, killed = Journal.add, [], {}

    def dying(self, line, result):
        add(self, line, result)
        count.append(line.number)
        if len(count) == 4:
            killed.update(bucket.objects)
            raise RuntimeError("killed")

    monkeypatch.setattr(Journal, "add", dying)
    with pytest.raises(RuntimeError, match="killed"):
        asked(source, out)
    bucket.objects.clear()
    bucket.objects.update(killed)
    assert "bucket/out.jsonl" not in bucket.objects
    assert (
        len(held(bucket, "out.jsonl.partial")) == 5
    )  # one a write: what was asked, and four answers
    first, count[:] = list(count), [None] * 10
    assert asked(source, out) == 1
    assert not set(first) & set(count[10:])
    assert bucket.objects["bucket/out.jsonl"][0] == want
    bucket.put(
        "bucket/in.jsonl",
        bucket.objects["bucket/in.jsonl"][0].replace(
            b"not JSON", b'{"messages": [{"role": "user", "content": "mended"}]}'
        ),
    )
    assert asked(source, out) == 0
    assert not held(bucket, "out.jsonl.partial")
    with pytest.raises(InputError, match=r"has no out\.jsonl\.partial to go on from"):
        asked(source, out)


def test_the_share_of_another_process_is_taken_over(asked, bucket):
    """Parts of OUT.partial.1 come into OUT.partial, and are gone then."""
    out = as_path(f"{BUCKET}/out.jsonl")
    lines = read_lines(as_path(f"{BUCKET}/in.jsonl"))
    with Journal(out, lines, {"seed": 0}, 1) as share:
        share.add(lines[2], {"id": "q2", "text": "two"})
        share.sync()
        share.add(lines[0], {"id": "q0", "text": "none"})
    assert len(held(bucket, "out.jsonl.partial.1")) == 3  # what was asked, and one a sync
    with Journal(out, lines, {"seed": 0}) as journal:
        assert set(journal.done) == {1, 3}
    assert not held(bucket, "out.jsonl.partial.1") and "bucket/out.jsonl" not in bucket.objects
    with pytest.raises(InputError, match="was begun with seed 0"):
        Journal(out, lines, {"seed": 1})


def test_tensors_of_an_object_that_is_cut_are_refused(bucket, local):
    place = as_path(put(bucket, local / "hf", "hf"))
    data = bucket.objects["bucket/hf/model.safetensors"][0]
    bucket.put("bucket/hf/model.safetensors", data[:-10])
    with pytest.raises(InputError, match="truncated"):
        read_tensors(place)


def test_a_file_copied_onto_itself_is_refused_and_kept(tmp_path):
    """Opening the target would empty it."""
    (tmp_path / "a").write_bytes(b"kept")
    with pytest.raises(OSError, match="same file"):
        paths.copy_file(tmp_path / "a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"kept"
