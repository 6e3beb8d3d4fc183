"""Chips and their peak rates, and what must be set before jax finds them. No jax."""

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path

# Of a GPU's memory, to programs: jax takes 0.75 by itself; CUDA, cuDNN and NCCL need some GiB beside.
GPU_SHARE = 0.9
_GIB = 2**30
# Two names of one setting; the second is older.
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip. Rates are those of a jax device, in bytes or floating-point operations a second.

    link is one direction of one link (ICI, or NVLink as a whole); network is a device's share of its host's
    cards; host is one direction of its link to the host's memory, 0 where that is not published.
    """

    platform: str  # tpu or gpu
    axes: int  # of its torus; a GPU's is a line
    devices: int  # jax devices a chip
    hbm: int  # bytes
    flops: float  # dense bf16
    hbm_rate: float
    link: float
    network: float
    sizes: str  # an example
    host: float = 0.0


# TPUs: cloud.google.com/tpu/docs/v4 .. v6e, tpu7x: peak bf16 and HBM bandwidth of a chip, its ICI (both
# directions of all ports: 400, 800, 1200 GB/s), the network cards of a host. hbm: what XLA's compiler
# says is available. GPUs: NVIDIA's data sheets of the SXM boards, NVLink 4 at 450 GB/s a direction, one
# 400 Gb/s card a GPU as in DGX, PCIe 5 x16 to the host at 64 GB/s a direction by its specification; hbm:
# the share of CUDA's total that train.py and infer.py let jax take.
CHIPS: dict[str, Chip] = {
    "v4": Chip("tpu", 3, 1, round(30.75 * _GIB), 275e12, 1228e9, 50e9, 6.25e9, "2x2x2"),
    "v5e": Chip("tpu", 2, 1, round(15.75 * _GIB), 197e12, 819e9, 50e9, 3.125e9, "4x4"),
    "v5p": Chip("tpu", 3, 1, round(95.74 * _GIB), 459e12, 2765e9, 100e9, 6.25e9, "4x8x8"),
    "v6e": Chip("tpu", 2, 1, round(31.25 * _GIB), 918e12, 1640e9, 100e9, 12.5e9, "4x4"),
    # Numbers of half a chip, which is a device.
    "tpu7x": Chip("tpu", 3, 2, round(94.75 * _GIB), 1153.5e12, 3690e9, 50e9, 12.5e9, "4x4x4"),
    "h100": Chip(
        "gpu", 1, 1, round(79.1 * GPU_SHARE * _GIB), 989e12, 3352e9, 450e9, 50e9, "8", 64e9
    ),
    "h200": Chip(
        "gpu", 1, 1, round(140.0 * GPU_SHARE * _GIB), 989e12, 4800e9, 450e9, 50e9, "8", 64e9
    ),
}
# Without these libtpu asks the cloud's metadata server, and complains that it is not there.
QUIET_LIBTPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    # For two plans at once.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Warnings are written: the planner reads them.
    "TF_CPP_MIN_LOG_LEVEL": "1",
    "TPU_STDERR_LOG_LEVEL": "1",
}

# Peak rates of devices that no plan is for, dense bf16 FLOP/s; NVIDIA's data sheets.
_OTHER_PEAKS = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA A100": 312e12}
# What jax calls the devices of CHIPS.
_DEVICE_KINDS = {"NVIDIA H100": "h100", "NVIDIA H200": "h200", "TPU v4": "v4", "TPU v5": "v5p"}
_DEVICE_KINDS |= {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v6": "v6e", "TPU7x": "tpu7x"}


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of one device (jax.devices()[0].device_kind); None where it is not known."""
    peaks = {kind: CHIPS[name].flops for kind, name in _DEVICE_KINDS.items()} | _OTHER_PEAKS
    found = [kind for kind in peaks if device_kind.startswith(kind)]
    return peaks[max(found, key=len)] if found else None


def allow_gpu_memory(environ: MutableMapping[str, str] = os.environ) -> None:
    """Lets jax take GPU_SHARE of a GPU, unless a variable says how much; call it before jax is imported."""
    if not any(environ.get(name) for name in _FRACTIONS):
        environ[_FRACTIONS[0]] = str(GPU_SHARE)


def has_tpu(root: str = "/") -> bool:
    """Whether this host has chips of Google's that are no network cards."""
    for card in Path(root, "sys/bus/pci/devices").glob("*"):
        with contextlib.suppress(OSError):
            vendor, device = ((card / name).read_text().strip() for name in ("vendor", "device"))
            if vendor == "0x1ae0" and device != "0x0042":
                return True
    return False


def quiet_libtpu(environ: MutableMapping[str, str] = os.environ, root: str = "/") -> None:
    """Keeps libtpu from printing errors where no TPU is; call it before jax is imported."""
    nodes = (name for kind in ("accel*", "vfio/*") for name in Path(root, "dev").glob(kind))
    if not has_tpu(root) and not any(nodes) and importlib.util.find_spec("libtpu"):
        levels = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
        for name, value in {**QUIET_LIBTPU, **levels}.items():
            if name.startswith("TPU_"):
                environ.setdefault(name, value)
