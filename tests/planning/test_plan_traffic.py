"""--plan: what a compiled text moves, and how long that takes on a machine."""

from types import SimpleNamespace

import numpy as np
import pytest

from qwen3vl_jax.device_mesh import compiler_options
from qwen3vl_jax.planning import hlo, machines, report
from qwen3vl_jax.planning.traffic import FROM_HOST, TO_HOST, Collective, Traffic, traffic

TEXT = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%sliced (p0: f32[6,256], p1: s32[]) -> f32[1,256] {
  %p0 = f32[6,256]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,256]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,256}
}

%fused_gather.1 (q: bf16[128]) -> bf16[512] {
  %q = bf16[128]{0} parameter(0)
  ROOT %all-gather.5 = bf16[512]{0} all-gather(%q), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%fused_gather.2 (q: bf16[128]) -> bf16[512] {
  %q = bf16[128]{0} parameter(0)
  ROOT %all-gather.6 = bf16[512]{0} all-gather(%q), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%all-reduce-scatter.1 (r: f32[64]) -> f32[16] {
  %r = f32[64]{0} parameter(0)
  %all-reduce.9 = f32[64]{0} all-reduce(%r), channel_id=9, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %at = s32[] constant(0)
  ROOT %mine = f32[16]{0} dynamic-slice(%all-reduce.9, %at), dynamic_slice_sizes={16}
}

%body (state: (s32[], f32[6,256], bf16[128])) -> (s32[], f32[6,256], bf16[128]) {
  %state = (s32[], f32[6,256]{1,0}, bf16[128]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %w = f32[6,256]{1,0} get-tuple-element(%state), index=1
  %x = bf16[128]{0} get-tuple-element(%state), index=2
  %taken = f32[1,256]{1,0:T(8,128)S(1)} fusion(%w, %i), kind=kLoop, calls=%sliced
  %g1 = bf16[512]{0} fusion(%x), kind=kCustom, calls=%fused_gather.1
  %g2 = bf16[512]{0} fusion(%x), kind=kCustom, calls=%fused_gather.2
  ROOT %next = (s32[], f32[6,256]{1,0}, bf16[128]{0}) tuple(%i, %w, %x)
}

%cond (state: (s32[], f32[6,256], bf16[128])) -> pred[] {
  %state = (s32[], f32[6,256]{1,0}, bf16[128]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %six = s32[] constant(6)
  ROOT %lt = pred[] compare(%i, %six), direction=LT
}

ENTRY %main (w: f32[6,256], x: bf16[128], r: f32[64]) -> f32[16] {
  %w = f32[6,256]{1,0} parameter(0)
  %x = bf16[128]{0} parameter(1)
  %r = f32[64]{0} parameter(2)
  %start = s32[] constant(0)
  %init = (s32[], f32[6,256]{1,0}, bf16[128]{0}) tuple(%start, %w, %x)
  %loop = (s32[], f32[6,256]{1,0}, bf16[128]{0}) while(%init), condition=%cond, body=%body
  %sum = f32[64] all-reduce(%r), channel_id=3, replica_groups=MESH
  %moved = f32[64]{0} collective-permute(%sum), channel_id=4, source_target_pairs={{0,1},{1,0}}
  ROOT %out = f32[16]{0} fusion(%moved), kind=kCustom, calls=%all-reduce-scatter.1
}
""".replace("MESH", "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}")


def test_collectives_of_a_loop_count_as_often_as_it_runs():
    """Kinds, times, bytes received and groups; a gather in two fusions is one; a cut sum is a scatter."""
    module = hlo.parse(TEXT)
    found = traffic(module, 8)
    assert found.unknown_loops == 0
    assert sorted(found.collectives) == sorted(
        [
            Collective("all-gather", 6.0, 1024 * 3 / 4, (0, 1, 2, 3), beside=True),
            Collective("all-reduce", 1.0, 2 * 256 / 2, (0, 1)),
            Collective("collective-permute", 1.0, 256.0, (0, 1)),
            Collective("reduce-scatter", 1.0, 256 * 3 / 4, (0, 2, 4, 6)),
        ]
    )
    in_loop = (
        1024 + 2 * (256 + 1024) + 4
    )  # a slice of w and none of what S(1) holds; both gathers; i
    assert found.memory == 6 * in_loop + 4 * 256 + 256 + 64


SPARSE_CORE = """HloModule jit_step, num_partitions=4

%on_sparse_core (p: bf16[64]) -> bf16[256] {
  %p = bf16[64]{0} parameter(0)
  ROOT %gather = bf16[256]{0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (w: bf16[64], r: f32[64]) -> bf16[256] {
  %w = bf16[64]{0} parameter(0)
  %r = f32[64]{0} parameter(1)
  %begun = ((bf16[64]{0}, token[]), bf16[256]{0}) call-start(%w), to_apply=%on_sparse_core
  %sum = f32[64]{0} all-reduce(%r), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %out = bf16[256]{0} call-done(%begun)
}
"""


def test_exchanges_of_a_sparse_core_run_while_the_chip_computes():
    """What is called there counts, as beside; an all-reduce of the chip's own does not run beside."""
    found = traffic(hlo.parse(SPARSE_CORE), 4).collectives
    assert sorted(found) == [
        Collective("all-gather", 1.0, 512 * 3 / 4, (0, 1, 2, 3), beside=True),
        Collective("all-reduce", 1.0, 2 * 256 * 3 / 4, (0, 1, 2, 3), beside=False),
    ]


def test_what_a_start_holds_runs_beside():
    """An async-start holds a gather; an all-reduce-start has one array, a group of one no bytes."""
    text = SPARSE_CORE.replace("call-start(%w), to_apply=", "async-start(%w), calls=")
    text = text.replace(
        "(%r), channel_id=2, replica_groups={{0,1,2,3}}", "(%r), replica_groups={{0}}"
    )
    text = text.replace("f32[64]{0} all-reduce(", "(f32[64]{0}) all-reduce-start(")
    found = traffic(hlo.parse(text), 4)
    assert sorted(found.collectives) == [
        Collective("all-gather", 1.0, 512 * 3 / 4, (0, 1, 2, 3), beside=True),
        Collective("all-reduce", 1.0, 0.0, (0,), beside=True),
    ]


def test_options_by_chip():
    """What libtpu refuses on a chip is not asked of it; other platforms have no options."""

    def options(kind, platform="tpu"):
        device = SimpleNamespace(platform=platform, device_kind=kind)
        return compiler_options(SimpleNamespace(devices=np.array([device])))  # type: ignore[arg-type]

    assert options("cpu", "cpu") is None
    assert len(options("TPU v4")) == 1
    fused = "xla_tpu_enable_async_collective_fusion"
    assert options("TPU v5 lite")[fused] == "true"
    for kind in ("TPU v4", "TPU v5", "TPU v5p", "TPU v6 lite", "TPU7x"):
        assert fused not in options(kind)
    assert "xla_tpu_enable_all_gather_offload_tracing" in options("TPU v6 lite")


def test_collectives_outside_of_fusions_all_count():
    """Two sums with one channel, as those of a shard_map have, are two."""
    first = next(line for line in TEXT.splitlines() if "%sum = f32[64]" in line)
    again = first.replace("%sum", "%twice").replace("%r)", "%sum)")
    found = traffic(hlo.parse(TEXT.replace(first, f"{first}\n{again}")), 8).collectives
    assert found.count(Collective("all-reduce", 1.0, 2 * 256 / 2, (0, 1))) == 2
    assert sum(c.kind == "all-gather" for c in found) == 1  # in two fusions


def test_a_loop_without_a_constant_is_counted_once_and_told():
    """The end of a loop that the program works out is not known."""
    text = TEXT.replace("%six = s32[] constant(6)", "%six = s32[] add(%i, %i)")
    assert traffic(hlo.parse(text), 8).unknown_loops == 1


@pytest.mark.parametrize(
    ("name", "rings"),
    [
        ("v5e:16x16", (True, True)),
        ("v5e:8x16", (False, True)),
        ("v6e:4x4", (False, False)),
        ("v5p:4x8x8", (True, True, True)),
        ("v4:2x2x4", (False, False, False)),
        ("h100:8", (False,)),
    ],
)
def test_axes_of_a_torus_are_rings_where_their_ends_are_linked(name, rings):
    """v5e and v6e: 16 chips; v4, v5p, tpu7x: whole cubes of 4x4x4."""
    assert machines.read_machine(name).rings == rings


def test_a_ring_has_twice_the_links_of_a_line():
    """A group of all 16 chips of a row of v5e:16x16, of half of it, of the whole slice."""
    machine = machines.read_machine("v5e:16x16")
    devices = [SimpleNamespace(coords=(i % 16, i // 16, 0)) for i in range(256)]

    def lanes(group):
        moved = Traffic(0.0, [Collective("all-gather", 1.0, 1e9, tuple(group))], 0)
        return 1e9 / report.times_of(machine, devices, 0.0, moved).links / machine.chip.link

    assert lanes(range(16)) == pytest.approx(2)
    assert lanes(range(8)) == pytest.approx(1)
    assert lanes(range(32)) == pytest.approx(3)
    assert lanes(range(256)) == pytest.approx(4)


def test_a_slice_goes_over_its_links_and_slices_over_the_network():
    """A line along one axis, along two, and over two slices whose devices share the network."""
    machine = machines.read_machine("v5p:2x2x1", 2)
    devices = [SimpleNamespace(coords=(i % 2, i // 2 % 2, 0), slice_index=i // 4) for i in range(8)]
    chip, size = machine.chip, 1e9

    def seconds(group):
        moved = Traffic(0.0, [Collective("all-gather", 2.0, size, group)], 0)
        return report.times_of(machine, devices, 0.0, moved)[2:4]

    assert seconds((0, 1)) == pytest.approx((2 * size / chip.link, 0))
    assert seconds((0, 1, 2, 3)) == pytest.approx((2 * size / (2 * chip.link), 0))
    assert seconds((0, 4)) == pytest.approx((0, 2 * size / chip.network))
    assert seconds((0, 1, 4, 5))[1] == pytest.approx(2 * size / 2 / chip.network)


BETWEEN_SLICES = """
  %before = token[] after-all()
  %send.1 = (f32[64]{0}, u32[], token[]) send(%r, %before), channel_id=2, is_host_transfer=true, ATTRIBUTES
  %sent = token[] send-done(%send.1), channel_id=2, is_host_transfer=true
  %recv.1 = (f32[64]{0}, u32[], token[]) recv(%before), channel_id=1, is_host_transfer=true, ATTRIBUTES
  %got = (f32[64]{0}, token[]) recv-done(%recv.1), channel_id=1, is_host_transfer=true
""".replace(
    "ATTRIBUTES",
    'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}',
)


GROUPS = "{{100000,200000},{100001,200001},{100002,200002},{100003,200003}}"


@pytest.mark.parametrize(
    ("kind", "target", "name", "moved"),
    [
        ("ALL_GATHER", '"{1,2}x{0:3}"', "all-gather", 128),
        ("REDUCE_SCATTER", '"{1,2}x{0:3}"', "reduce-scatter", 256),
        ("ALL_TO_ALL", GROUPS, "all-to-all", 128),
        ("ONE_TO_ONE", GROUPS.replace("0,2", "0->2"), "collective-permute", 256),
    ],
)
def test_exchanges_between_slices(kind, target, name, moved):
    """Of 256 bytes that come in, what is not a device's own; a pair as libtpu writes it is one, too."""
    lines = BETWEEN_SLICES.replace('"{1,2}x{0:3}"', target).replace("ALL_REDUCE", kind)
    text = TEXT.replace("\n  %start = s32[] constant(0)", lines + "  %start = s32[] constant(0)")
    found = [c for c in traffic(hlo.parse(text), 8).collectives if "slices" in c.kind]
    assert found == [Collective(f"{name} between slices", 1.0, float(moved), (0, 4))]


def test_what_the_hosts_exchange_between_slices_is_on_the_network():
    """A send and a recv of libtpu are one all-reduce; of two slices a device receives its array once."""
    text = TEXT.replace(
        "\n  %start = s32[] constant(0)", BETWEEN_SLICES + "  %start = s32[] constant(0)"
    )
    found, without = traffic(hlo.parse(text), 8), traffic(hlo.parse(TEXT), 8)
    assert [c for c in found.collectives if c not in without.collectives] == [
        Collective("all-reduce between slices", 1.0, 256.0, (0, 4))
    ]
    assert found.memory == without.memory + 2 * 256
    machine = machines.read_machine("v5e:2x2", 2)
    devices = [SimpleNamespace(coords=(i % 2, i // 2 % 2, 0), slice_index=i // 4) for i in range(8)]
    moved = Traffic(0.0, [c for c in found.collectives if "slices" in c.kind], 0)
    times = report.times_of(machine, devices, 0.0, moved)
    assert times.links == 0 and times.network == pytest.approx(256 / machine.chip.network)


OFFLOAD = """HloModule jit_step, is_scheduled=true

%update (p0: bf16[6,256], p1: bf16[1,256], p2: s32[]) -> bf16[6,256] {
  %p0 = bf16[6,256]{1,0:S(5)} parameter(0)
  %p1 = bf16[1,256]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  ROOT %put = bf16[6,256]{1,0:S(5)} dynamic-update-slice(%p0, %p1, %p2, %p2)
}

%body (state: (s32[], bf16[6,256], bf16[1,256])) -> (s32[], bf16[6,256], bf16[1,256]) {
  %state = (s32[], bf16[6,256]{1,0:S(5)}, bf16[1,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %kept = bf16[6,256]{1,0:S(5)} get-tuple-element(%state), index=1
  %x = bf16[1,256]{1,0} get-tuple-element(%state), index=2
  %put-start = ((bf16[6,256]{1,0:S(5)}, bf16[1,256]{1,0}, s32[]), bf16[6,256]{1,0:S(5)}, u32[]) PUT
  %put-done = bf16[6,256]{1,0:S(5)} FINISH(%put-start)
  ROOT %next = (s32[], bf16[6,256]{1,0:S(5)}, bf16[1,256]{1,0}) tuple(%i, %put-done, %x)
}

%cond (state: (s32[], bf16[6,256], bf16[1,256])) -> pred[] {
  %state = (s32[], bf16[6,256]{1,0:S(5)}, bf16[1,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %six = s32[] constant(6)
  ROOT %lt = pred[] compare(%i, %six), direction=LT
}

ENTRY %main (x: bf16[1,256]) -> bf16[6,256] {
  %x = bf16[1,256]{1,0} parameter(0)
  %start = s32[] constant(0)
  %room = bf16[6,256]{1,0:S(5)} custom-call(), custom_call_target="AllocateBuffer"
  %init = (s32[], bf16[6,256]{1,0:S(5)}, bf16[1,256]{1,0}) tuple(%start, %room, %x)
  %loop = (s32[], bf16[6,256]{1,0:S(5)}, bf16[1,256]{1,0}) while(%init), condition=%cond, body=%body
  %kept = bf16[6,256]{1,0:S(5)} get-tuple-element(%loop), index=1
  %take-start = ((bf16[6,256]{1,0:S(5)}, s32[]), bf16[1,256]{1,0}, u32[]) dynamic-slice-start(%kept, %start)
  %take-done = bf16[1,256]{1,0} dynamic-slice-done(%take-start)
  %all-start = (bf16[6,256]{1,0}, bf16[6,256]{1,0:S(5)}, u32[]) copy-start(%kept)
  ROOT %all-done = bf16[6,256]{1,0} copy-done(%all-start)
}
"""


@pytest.mark.parametrize(
    ("put", "done"),
    [
        ("fusion-start(%kept, %x, %i), kind=kCustom, calls=%update", "fusion-done"),  # of GPUs
        ("dynamic-update-slice-start(%kept, %x, %i, %i)", "dynamic-update-slice-done"),  # of TPUs
    ],
)
def test_copies_to_the_host_and_back_are_counted(put, done):
    """Of a loop as often as it runs; of a slice its bytes; the rate of a GPU's link is known."""
    moved = traffic(hlo.parse(OFFLOAD.replace("PUT", put).replace("FINISH", done)), 1)
    assert [c for c in moved.collectives if c.kind == TO_HOST] == [
        Collective(TO_HOST, 6.0, 512.0, ())
    ]
    back = [c.moved for c in moved.collectives if c.kind == FROM_HOST]
    assert back == [512.0, 6 * 512.0]
    times = report.times_of(machines.read_machine("h100:1"), [object()], 0.0, moved)
    assert times.host == pytest.approx(13 * 512 / 64e9) and times.most >= times.host
    assert report.times_of(machines.read_machine("v5e:2x2"), [object()], 0.0, moved).host == 0
