"""The devices of a machine that is not here, from the compilers' own descriptions."""

import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.experimental import topologies

from qwen3vl_jax.errors import InputError
from qwen3vl_jax.planning.machines import GPUS_A_HOST, Machine, check_installed
from qwen3vl_jax.runtime.chips import GPU_SHARE

_GPU_NAMES = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
# What XLA must be told of a GPU that it cannot ask: NVIDIA's figures of the Hopper chips.
_HOPPER = """gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {rate}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{name}"
"""


def devices_of(machine: Machine) -> list[Any]:
    """The devices of a machine, to compile for and not to run on. Raises InputError."""
    check_installed(machine)
    options: dict[str, Any] = {}
    if machine.chip.platform == "tpu":
        name, platform = f"{machine.name}:{'x'.join(map(str, machine.shape))}", "tpu"
        # Both cores of a chip as one device, as on a VM.
        if machine.name == "v4":
            options["chip_config_name"] = "megacore"
        if machine.slices > 1:
            options["num_slices"] = machine.slices
        # Less than the chips of a host.
        if machine.chips < 4:
            options["chips_per_host_bounds"] = (*machine.shape, 1, 1)[:3]
    else:
        _find_ptxas()
        hosts = max(machine.chips // GPUS_A_HOST, 1)
        # Partitions, hosts, devices of a host.
        name, platform = f"1x{hosts}x{machine.chips // hosts}", "cuda"
        memory = round(machine.chip.hbm / GPU_SHARE)
        sizes = {"rate": round(machine.chip.hbm_rate), "memory": memory}
        target = _HOPPER.format(name=_GPU_NAMES[machine.name], **sizes)
        options = {"topology": name, "target_config": target}
    try:
        return list(topologies.get_topology_desc(name, platform, **options).devices)
    # The compilers raise whatever they like.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"--plan {machine}: the compiler refuses this shape: {reason}") from None


def first_devices(devices: Sequence[Any], used: int) -> list[Any]:
    """The first `used` of a machine's devices; all for as many or more.

    Raises InputError where they are a part of a TPU that no slice looks like: its compiler aborts.
    """
    if used >= len(devices) or _is_slice(devices[:used]):
        return list(devices[:used])
    counts = [2**n for n in range(len(devices).bit_length()) if _is_slice(devices[: 2**n])]
    known = ", ".join(str(n) for n in counts if n < len(devices))
    raise InputError(
        f"mesh: {used} of {len(devices)} devices, which are no slice of a TPU: take a mesh of all "
        f"{len(devices)}, or of {known} of them, or a smaller machine"
    )


def _is_slice(devices: Sequence[Any]) -> bool:
    """Whether devices fill a box of a torus whose sizes are powers of two; of GPUs any do."""
    if devices[0].platform != "tpu":
        return True
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        return False
    places = {(*device.coords, device.core_on_chip) for device in devices}
    sizes = [max(axis) - min(axis) + 1 for axis in zip(*places, strict=True)]
    return math.prod(sizes) == len(devices) and not any(n & (n - 1) for n in sizes)


def _find_ptxas() -> None:
    """Puts the assembler of NVIDIA's wheels on the path, where XLA looks for it."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        binaries = Path(folder) / "cuda_nvcc" / "bin"
        if binaries.is_dir():
            os.environ["PATH"] = f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"
