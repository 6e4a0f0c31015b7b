"""What holds for every size: sums merge, triangles pack, shards come back."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from probes.layout import Layer, Layout
from probes.shard import read_shard, shard_name, shard_steps, write_shard
from probes.statistics import DEPTH_METRICS, DepthSums, Moments, add_moments, clear, token_mean_square

quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def layers_of(count: int) -> list[Layer]:
    return [
        Layer(i, "mlp" if i % 2 == 0 else "attention", (i + 1) // 2, f"layer{i}") for i in range(1, count + 1)
    ]


def block_layout(layers: int, size: int) -> Layout:
    return Layout.build(layers_of(layers), [1 + -(-row // size) for row in range(layers + 1)])


sizes = st.tuples(st.integers(1, 30), st.integers(1, 35))


# Statistics


@quick
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 2**31), st.floats(-4, 4))
def test_rms_of_micro_batches_is_the_rms_of_the_whole(lengths, seed, magnitude):
    generator = torch.Generator().manual_seed(seed)
    parts = [10**magnitude * torch.randn(length, 3, generator=generator) for length in lengths]
    moments, whole = Moments(2, torch.device("cpu")), torch.cat(parts)
    for part in parts:
        add_moments(part, moments.squares[1], moments.count[1])
    expected = whole.double().square().mean().sqrt().float()
    torch.testing.assert_close(moments.finish()[1], expected, rtol=1e-6, atol=0)
    assert moments.finish()[0].isnan()  # row 0 saw nothing
    clear(moments.tensors())
    assert moments.finish().isnan().all()


@quick
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.integers(1, 9),
    st.floats(0, 3),
    st.integers(0, 2**31),
)
def test_depth_sums_of_micro_batches_are_those_of_the_whole(lengths, sources, sharpness, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    logits = 10**sharpness * torch.randn(sources, 1, tokens, generator=generator) - 1
    weight = torch.softmax(logits, 0)
    values = torch.randn(sources, 1, tokens, 4, generator=generator)

    def finish(cuts):
        sums = DepthSums([sources], torch.device("cpu"))
        for part, source in zip(weight.split(cuts, 2), values.split(cuts, 2), strict=True):
            sums.add(0, part, [token_mean_square(v) for v in source])
        return sums.finish()

    merged, whole = finish(lengths), finish([tokens])
    assert set(whole) == set(DEPTH_METRICS)
    for name in whole:
        torch.testing.assert_close(merged[name], whole[name], rtol=1e-5, atol=2e-4, equal_nan=True)
    torch.testing.assert_close(
        whole["depth_weight"], weight.double().mean((1, 2)).float(), rtol=1e-5, atol=1e-7
    )
    assert whole["depth_weight"].sum() == pytest.approx(1, abs=1e-5)
    assert (whole["depth_entropy"].isnan() if sources == 1 else whole["depth_entropy"] <= 1 + 1e-6).all()


def test_weights_too_small_for_a_logarithm_add_nothing_to_the_entropy():
    weight = torch.tensor([1.0, 1e-40, 0.0]).repeat(16, 1).T[:, None].contiguous()
    sums = DepthSums([3], torch.device("cpu"))
    sums.add(0, weight, [torch.ones(1, 16)] * 3)
    assert sums.finish()["depth_entropy"].item() == pytest.approx(0, abs=1e-30)


@given(st.integers(2, 60), st.floats(1e-7, 1e-4))
@quick
def test_a_small_spread_around_the_even_average_is_not_lost(sources, spread):
    """Weights near 1/S: the naive E[w²] - E[w]² in float32 would be all rounding."""
    tokens = 512
    wave = spread * torch.linspace(-1, 1, tokens, dtype=torch.float64)
    weight = torch.full((sources, 1, tokens), 1 / sources, dtype=torch.float64)
    weight[0, 0] += wave
    weight[1, 0] -= wave
    sums = DepthSums([sources], torch.device("cpu"))
    sums.add(0, weight.float(), [torch.ones(1, tokens)] * sources)
    stored = weight.float().double()  # what float32 can hold of it
    expected = stored.std((1, 2), correction=0).float()
    torch.testing.assert_close(sums.finish()["depth_weight_std"][:2], expected[:2], rtol=1e-3, atol=1e-10)


# Layout


@quick
@given(sizes)
def test_columns_of_block_attnres(size):
    """Against a construction that goes layer by layer and keeps the open depth block by hand."""
    layers, per_block = size
    layout = block_layout(layers, per_block)
    spans, reads = [(0, 0)], []
    for layer in range(1, layers + 1):
        reads.append(len(spans))
        if (layer - 1) % per_block == 0:
            spans.append((layer, layer))
        else:
            spans[-1] = spans[-1][0], layer
    reads.append(len(spans))
    assert [(source.first, source.last) for source in layout.sources] == spans
    assert [read.sources for read in layout.reads] == reads
    assert layout.triangle().sum() == sum(reads)
    assert [read.layer for read in layout.reads] == [*range(1, layers + 1), None]


@quick
@given(sizes, st.data())
def test_triangles_pack_and_unpack(size, data):
    layout = block_layout(*size)
    cells = int(layout.triangle().sum())
    packed = data.draw(arrays.arrays(np.float32, (2, cells), elements=st.floats(-1, 1, width=32)))
    dense = layout.unpack(packed)
    assert dense.shape == (2, layout.length("read"), layout.length("source"))
    np.testing.assert_array_equal(layout.pack(dense), packed)
    by_hand = [dense[:, r, : read.sources] for r, read in enumerate(layout.reads)]
    np.testing.assert_array_equal(np.concatenate(by_hand, 1), packed)
    assert np.isnan(dense[:, ~layout.triangle()]).all()


@quick
@given(sizes)
def test_a_layout_survives_json(size):
    layout = block_layout(*size)
    assert Layout.from_json(layout.to_json()) == layout


def test_full_has_one_column_per_output():
    layout = Layout.build(layers_of(5))
    assert [source.label for source in layout.sources] == layout.outputs
    assert layout.length("read") == layout.length("source") == 6
    assert layout.blocks == 3


# Shards

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
tensors = st.dictionaries(
    names,
    arrays.arrays(
        st.sampled_from([np.float32, np.float16, np.int64]), arrays.array_shapes(min_dims=0, min_side=0)
    ),
    max_size=4,
)


@quick
@given(tensors, st.dictionaries(names.filter(lambda n: n != "crc32"), st.text(max_size=8), max_size=3))
def test_a_shard_comes_back_as_it_was(tmp_path_factory, content, metadata):
    path = tmp_path_factory.mktemp("shard") / shard_name(0, 1)
    size = write_shard(path, content, metadata)
    assert path.stat().st_size == size
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file left
    read = read_shard(path).tensors
    assert set(read) == set(content)
    for name, value in content.items():
        assert read[name].dtype == value.dtype
        np.testing.assert_array_equal(read[name], value)


def test_a_shard_is_never_rewritten(tmp_path):
    path = tmp_path / shard_name(0, 1)
    write_shard(path, {"a": np.zeros(1, np.float32)}, {})
    with pytest.raises(FileExistsError):
        write_shard(path, {"a": np.ones(1, np.float32)}, {})
    assert read_shard(path).tensors["a"] == 0


@quick
@given(st.integers(0, 10**15), st.integers(0, 10**15))
def test_names_of_shards(first, last):
    assert shard_steps(shard_name(first, last)) == (first, last)
    if max(first, last) < 10**12:
        assert (shard_name(first, last) < shard_name(first + 1, last)) == (first + 1 < 10**12)


@pytest.mark.parametrize(
    "name", ["", "x", "1-2", ".safetensors", "1.safetensors", "-1.safetensors", "a-b.safetensors"]
)
def test_other_names_are_no_shards(name):
    assert shard_steps(name) is None
