"""Collectives read from HLO, on lines as XLA writes them."""

from mora_jax.planning.collectives import Collective, Loops, collectives

GROUP = "replica_groups=mesh['a'=2,'b'=8] {'b'}"
LAYER = 'metadata={op_name="jit(step)/jvp(jit(hidden_states))/while/body/dot_general"}'
HLO = f"""
%fused.1 (p: bf16[4,8]) -> bf16[4,64] {{
  %all-gather.1 = bf16[4,64]{{1,0:T(8,128)}} all-gather(%p), channel_id=1, {GROUP}, {LAYER}
}}
%fused.2 (p: bf16[4,8]) -> bf16[4,64] {{
  %all-gather.2 = bf16[4,64]{{1,0}} all-gather(%p), channel_id=1, {GROUP}, {LAYER}
}}
%windowed_dot_general_body (p: f32[8]) -> f32[8] {{
  %cp = (f32[8], f32[8], u32[], u32[]) collective-permute-start(%p), channel_id=2, {LAYER}
  %cpd = f32[8] collective-permute-done(%cp)
}}
%all-reduce-scatter.1.clone (input.1: f32[8,4]) -> f32[2,4] {{
  %all-reduce.9 = f32[8,4] all-reduce(%input.1), channel_id=9, replica_groups={{{{0,1,2,3}}}}, to_apply=%add
}}
%body (p: f32[8,4]) -> f32[2,4] {{
  %fusion.9 = f32[2,4] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1.clone, {LAYER}
}}
ENTRY %main (p: f32[10]) -> f32[10] {{
  %ar = (f32[10], f32[]) all-reduce(%p, %q), channel_id=3, replica_groups=[4,4]<=[16], metadata={{op_name="sum"}}
  %rs = f32[5] reduce-scatter(%p), channel_id=4, replica_groups={{{{0,1}},{{2,3}}}}, metadata={{op_name="x"}}
  ROOT %one = f32[10] all-reduce(%p), channel_id=5, replica_groups={{{{0}}}}, to_apply=%add, metadata={{op_name="x"}}
}}
"""


def test_kinds_groups_loops_and_copies():
    found = {entry.kind: entry for entry in collectives(HLO, 16, Loops(layers=3, micro_batches=1, chunks=1))}
    # Written twice, one channel: once a layer; seven eighths of 4 × 64 bfloat16 come from others.
    assert found["all-gather"] == Collective("all-gather", 3, 3 * 4 * 64 * 2 * 7 / 8)
    # Three layers, 16 / 4 trips of the window's loop.
    assert found["collective-permute"] == Collective("collective-permute", 12, 12 * 8 * 4)
    # Eleven float32 in groups of four, there and back; the group of one sends nothing.
    assert found["all-reduce"] == Collective("all-reduce", 1, 2 * 11 * 4 * 3 / 4)
    # One that keeps five, and one in each of three layers, of which three quarters go to others.
    assert found["reduce-scatter"] == Collective("reduce-scatter", 4, 5 * 4 + 3 * 8 * 4 * 4 * 3 / 4)


def test_trips_of_nested_loops():
    loops = Loops(layers=5, micro_batches=4, chunks=3)
    assert loops.trips("jit(step)/sum") == 1
    assert loops.trips("jit(step)/while/body/jvp(jit(hidden_states))/while/body/dot") == 20
    assert loops.trips("jit(step)/while/body/jvp()/while/body/dot") == 12
    assert Loops(5, 1, 3).trips("jit(step)/transpose(jvp(jit(hidden_states)))/while/body/x") == 5
    assert Loops(5, 1, 3).trips("jit(step)/jvp()/while/body/x") == 3
    assert Loops(5, 1, 3).trips("jit(step)/jvp()/while/body/while/body/x") == 0  # a loss that isn't finite
    ring = Loops(5, 1, 3, turns=4)
    assert ring.trips("jit(step)/jvp(jit(hidden_states))/while/body/while/body/ppermute") == 20
    assert ring.trips("jit(step)/jvp(jit(hidden_states))/while/body/while/body/while/body/dot") == 20
    assert ring.trips("jit(step)/jvp()/while/body/x") == 3


def test_permutations_that_share_a_channel():
    """Keys and values around a ring in a `shard_map`: one channel and one name, and each is sent."""
    name = 'metadata={op_name="jit(step)/jvp(jit(hidden_states))/while/body/shard_map/while/body/ppermute"}'
    line = "  %{} = bf16[4,8]{{1,0}} collective-permute(%a), channel_id=1, source_target_pairs={{{{0,1}},{{1,0}}}}, {}"
    hlo = "\n".join(["%body (a: bf16[4,8]) -> bf16[4,8] {", *(line.format(one, name) for one in ("k", "v")), "}"])
    (found,) = collectives(hlo, 2, Loops(layers=3, micro_batches=1, chunks=1, turns=2))
    assert found == Collective("collective-permute", 2 * 3 * 2, 2 * 3 * 2 * 4 * 8 * 2)
