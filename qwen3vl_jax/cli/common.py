"""What the modes of infer.py share: the demo's files, the processor, the sampling, the weights."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import qwen3vl_jax as q3
from qwen3vl_jax.errors import InputError
from qwen3vl_jax.runtime.cloud_host import slice_hosts
from qwen3vl_jax.runtime.compile_cache import KEPT_PROGRAMS, keep_programs
from qwen3vl_jax.runtime.console import Status, memory_advice
from qwen3vl_jax.storage import hub, paths
from qwen3vl_jax.storage.json_text import read_json_file
from qwen3vl_jax.storage.paths import BUNDLED

DEMO = BUNDLED / "demo" / "checkpoint"
DEMO_IMAGE = BUNDLED / "demo" / "pictures" / "grid.png"
DEMO_PROMPT = "Read the digits row by row."


def open_checkpoint(args: argparse.Namespace) -> tuple[Path, q3.Processor]:
    """The checkpoint's directory and its processor. Raises InputError."""
    asks = not (args.chat or args.embed or args.rerank)
    if not args.input and not (args.mesh and asks) and (hosts := slice_hosts()) > 1:
        found = f"devices: this is one of {hosts} hosts of a TPU slice"
        advice = "; start the same command with --mesh on all of them" if asks else ""
        raise InputError(f"{found}, expected a slice of one host{advice}")
    directory = hub.resolve(args.ckpt or DEMO, args.revision)
    processor = q3.Processor.from_pretrained(directory, args.chat_template)
    if args.thinking and "enable_thinking" not in processor.template.text(False):
        found = "the chat template has no enable_thinking: it always thinks, or never"
        raise InputError(f"--thinking: {found}; --thinking-budget 0 ends thinking at once")
    return directory, processor


def response_format(args: argparse.Namespace) -> dict[str, Any] | None:
    """That of --schema, as `read_constraint` takes it. Raises InputError."""
    if args.schema is None:
        return None
    schema = read_json_file(args.schema, f"--schema {args.schema}")
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def max_length(args: argparse.Namespace, processor: q3.Processor) -> int:
    """Tokens that prompt and answer may have together."""
    positions = processor.config.text.max_position_embeddings
    if args.max_len is not None and args.max_len > positions:
        has = f"the model has {positions} positions (max_position_embeddings)"
        print(f"--max-len {args.max_len}: {has}, answers beyond may be bad", file=sys.stderr)
    return args.max_len or positions


def read_sampling(args: argparse.Namespace, processor: q3.Processor) -> q3.Sampling:
    """The checkpoint's sampling, changed by the options. Raises InputError."""
    from qwen3vl_jax.inference.sampling import row_seeds

    names = (field.name for field in dataclasses.fields(q3.Sampling))
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    sampling = q3.Sampling(**(processor.sampling | given))
    sampling.check()
    row_seeds(args.seed, 1)
    return sampling


def _demo_notice(args: argparse.Namespace, messages: Sequence[dict]) -> str:
    """What the bundled checkpoint can do. messages: the conversation, where it is known."""
    import numpy as np

    from qwen3vl_jax.cli.demo_notice import notice

    content = messages[-1]["content"] if messages and not args.messages else []
    images = [x["image"].convert("RGB") for x in content if x["type"] == "image"]
    small = [np.asarray(image.resize((128, 128), 0)) for image in images]
    shown = DEMO_IMAGE.relative_to(BUNDLED) if args.image == [str(DEMO_IMAGE)] else ""
    return notice(content[-1]["text"] if content else None, small, str(shown))


def load_checkpoint(
    args: argparse.Namespace,
    directory: Path,
    scope: ExitStack,
    status: Status,
    messages: Sequence[dict] = (),
) -> tuple[Any, q3.Config]:
    """(params, cfg) in --dtype; the default on a CPU is float32. Raises InputError where it does not fit.

    They are on --mesh, or the devices that a large model needs, which is ambient until `scope` ends.
    Until then --profile traces. messages: the conversation, which the demo's notice speaks of.
    """
    import jax

    from qwen3vl_jax.checkpoint.auto_mesh import mesh_for
    from qwen3vl_jax.loading import source_of

    files = paths.files_under(directory, [KEPT_PROGRAMS])
    stored = sum(paths.file_size(directory / name) for name in files)
    advice = "--dtype bfloat16, --weights int8 or int4, or a smaller checkpoint"
    with memory_advice({"checkpoint on disk": stored}, advice):
        keep_programs(not args.no_compile_cache)
        dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else None)
        source = source_of(directory, q3.Config.from_hf(directory), args.weights)
        devices = jax.local_devices() if args.input else jax.devices()
        mesh = mesh_for(args.mesh, source, dtype, devices)
        status.show(f"loading {directory}")
        options = {"mesh": mesh, "dtype": dtype, "weights": args.weights, "adapter": args.adapter}
        loaded = jax.block_until_ready(q3.load(directory, **options))
    if mesh is not None:
        scope.enter_context(jax.set_mesh(mesh))
    status.stop()
    if not (args.ckpt or args.adapter):
        print(_demo_notice(args, messages), file=sys.stderr)
    if args.profile:
        from qwen3vl_jax.cli.profile import profiled

        part = "experts" if loaded[1].text.num_experts else "mlp"
        scope.enter_context(profiled(args.profile, part))
    return loaded
