"""qwen3vl serve: the model behind OpenAI's HTTP API.

qwen3vl serve --ckpt Qwen/Qwen3-VL-2B-Instruct --port 8000
"""

import argparse
import contextlib
import dataclasses
import ipaddress
import os
import socket
import sys
from typing import Any

from qwen3vl_jax.cli.foreign_options import FOREIGN
from qwen3vl_jax.cli.infer_arguments import media_rules, mesh_sizes
from qwen3vl_jax.errors import InputError, check_int
from qwen3vl_jax.runtime.chips import allow_gpu_memory, quiet_libtpu
from qwen3vl_jax.runtime.compile_cache import HELP
from qwen3vl_jax.runtime.console import Parser, Status, one_line_errors
from qwen3vl_jax.runtime.native_output import tidy_output
from qwen3vl_jax.storage.paths import argument

KEY = "QWEN3VL_API_KEY"
PREFILL = 8192  # prompt tokens of a step
USUAL = 32_768  # tokens of prompt and answer, where the model allows more
MEDIA = 4 << 30  # bytes of images and videos, as patches, of all requests
IDLE = 60  # seconds in which a connection sends nothing that can be answered


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options, checked. Raises InputError."""
    parser = Parser("qwen3vl serve", foreign=FOREIGN, description=__doc__)
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    add = parser.add_argument_group("the model").add_argument
    add("--ckpt", metavar="DIR|ID", help="a checkpoint or a Hub id (default: the bundled demo)")
    add("--revision", help="branch, tag or commit of a Hub id")
    add(
        "--served-model-name",
        metavar="NAME",
        help="what clients call it (default: what --ckpt says)",
    )
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="as in infer.py")
    add("--weights", choices=("fp8", "int8", "int4"), help="as in infer.py")
    add("--adapter", metavar="DIR|ID", help="a LoRA adapter (PEFT's files, or a Hub id)")
    add("--mesh", metavar="AXIS=N[,AXIS=N]", help="shard the model, as in infer.py")
    add("--chat-template", type=argument, metavar="FILE", help="in place of the checkpoint's")
    add("--no-compile-cache", action="store_true", help=HELP)
    add = parser.add_argument_group("the address").add_argument
    add("--host", default="127.0.0.1", help="where to listen (default: this machine alone)")
    add("--port", default=8000, **number, help="0 is any that is free (default: 8000)")
    key = os.environ.get(KEY)
    add(
        "--api-key", default=key, help=f"what clients must send as a key (default: ${KEY}, or none)"
    )
    add = parser.add_argument_group("limits").add_argument
    add("--rows", default=16, **number, help="answers generated at a time (default: 16)")
    most = f"most tokens of prompt and answer (default: the model's, up to {USUAL:,})"
    add("--max-len", **number, help=most)
    most = "most tokens of an answer to a request that does not say (default: 4096)"
    add("--max-new-tokens", default=4096, **number, help=most)
    add("--max-queue", default=256, **number, help="requests that may wait (default: 256)")
    add("--timeout", default=600, **number, help="seconds that a request may take (default: 600)")
    add("--max-body", default=64, **number, help="MiB that a request may have (default: 64)")
    add = parser.add_argument_group("images and videos named by requests").add_argument
    add("--media-root", metavar="DIR", help="read files below this folder (default: no files)")
    hosts = "the only hosts and gs://buckets to read, private ones too (default: any public host)"
    add("--allow-hosts", metavar="HOST[,HOST]", help=hosts)
    # What the other command lines ask; without --chat, --mesh would be for all hosts of a slice.
    parser.set_defaults(
        chat=True, embed=False, rerank=False, input=None, profile=None, image=[], thinking=None
    )
    args = parser.parse_args(argv)
    for name in ("rows", "max_len", "max_new_tokens", "max_queue", "timeout", "max_body"):
        if (count := getattr(args, name)) is not None:
            check_int(f"--{name.replace('_', '-')}", count)
    if not 0 <= args.port < 2**16:
        raise InputError(f"--port: got {args.port}, expected 0 to 65535")
    if args.api_key is not None and not args.api_key.strip():
        raise InputError("--api-key: is empty, expected a key")
    args.mesh = mesh_sizes(args.mesh)
    return args


def listen(host: str, port: int) -> socket.socket:
    """A socket at the address, which does not listen yet. Raises InputError where it is taken."""
    try:
        (family, kind, number, _, place), *_ = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        found = socket.socket(family, kind, number)
    except OSError as e:
        raise InputError(f"--host {host}: {e.strerror}; give another") from e
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(place)
    except OSError as e:
        found.close()
        raise InputError(f"--host {host}, --port {port}: {e.strerror}; give another") from e
    return found


def main(argv: list[str] | None = None) -> None:
    """The command line; exits 2 with one line for bad input."""
    with one_line_errors(), Status() as status, contextlib.ExitStack() as scope:
        args = arguments(argv)
        rules = media_rules(args)
        # A root that no file is below.
        rules = rules if rules.root else dataclasses.replace(rules, root=os.devnull)
        place = scope.enter_context(listen(args.host, args.port))
        allow_gpu_memory()
        quiet_libtpu()
        tidy_output()
        status.show(f"loading {args.ckpt or 'the bundled demo'}", line=False)
        try:
            from qwen3vl_jax.serve.http import run
        except ModuleNotFoundError as e:
            raise InputError(f"{e.name} is missing: pip install 'qwen3vl-jax[serve]'") from e
        from qwen3vl_jax.cli import common
        from qwen3vl_jax.serve.app import Limits, Server, start_engine

        directory, proc = common.open_checkpoint(args)
        proc = dataclasses.replace(proc, media_rules=rules)
        args.max_len = args.max_len or min(USUAL, proc.config.text.max_position_embeddings)
        max_len = common.max_length(args, proc)
        params, _ = common.load_checkpoint(args, directory, scope, status)
        status.show("compiling")
        engine = start_engine(proc, params, args.rows, PREFILL)
        status.stop()
        requests, body = args.rows + args.max_queue, args.max_body << 20
        limits = Limits(requests, args.timeout, body, MEDIA, args.api_key or "")
        name = args.served_model_name or args.ckpt or "demo"
        server = Server(proc, params, engine, name, limits, max_len, args.max_new_tokens)
        place.listen()
        host, port, *_ = place.getsockname()
        if not args.api_key and not ipaddress.ip_address(host).is_loopback:
            print(
                f"--host {args.host}: whoever reaches it may ask, give --api-key", file=sys.stderr
            )
        host = f"[{host}]" if ":" in host else host
        print(f"{name} answers at http://{host}:{port}/v1", file=sys.stderr, flush=True)
        run(server.app, place, min(IDLE, args.timeout))
        engine.stop()
