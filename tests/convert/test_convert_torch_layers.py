"""If these fail, PyTorch's own transformer layers, or our T2T-ViT, compute something else once converted."""

import pytest
import torch
from tiny_models import APART, SEQUENCE
from torch import nn

from strassen_tile import STLConfig, STLLinear, baselines, convert, models

EXACT = STLConfig(tile=2, rank=7, basis="strassen")
X = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def encoder(layers=2, **options):
    options = {"batch_first": True, **options}
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, dtype=torch.float64, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=options["batch_first"]).eval()


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_encoder_leaves_the_fused_path_that_reads_weights_itself():
    model = encoder()
    with torch.no_grad():
        fused = model(X, src_key_padding_mask=PADDING)
        expected = model(X)
        done = convert(model, EXACT, example_inputs=X)
        assert list(done.converted) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
        torch.testing.assert_close(model(X), expected)
        real = ~PADDING
        torch.testing.assert_close(model(X, src_key_padding_mask=PADDING)[real], fused[real])
        done.undo()
        assert torch.equal(model(X), expected)
        assert torch.equal(model(X, src_key_padding_mask=PADDING), fused)  # and takes it again


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("mask", [None, PADDING], ids=["whole", "padded"])
def test_pruned_weights_are_not_read_unpruned_by_the_fused_path(mask):
    model = encoder()
    baselines.sparse_24().apply(model, None, None)
    real = torch.ones_like(PADDING) if mask is None else ~mask
    with torch.no_grad():
        fused = model(X, src_key_padding_mask=mask)
    torch.testing.assert_close(fused[real], model.train()(X, src_key_padding_mask=mask)[real])


@pytest.mark.parametrize("config", [SEQUENCE, APART], ids=["sequence", "none"])
def test_attention_projections_are_left_to_their_owner(config):
    model = encoder(1)
    attention = model.layers[0].self_attn
    weight = attention.out_proj.weight
    skipped = convert(model, config, example_inputs=X).skipped
    assert attention.out_proj.weight is weight
    assert set(skipped) == {"layers.0.self_attn", "layers.0.self_attn.out_proj"}


def test_decoders_are_left_dense_where_their_rows_must_not_meet():
    def made():
        return nn.Transformer(8, 2, 1, 1, 16, batch_first=True, dtype=torch.float64).eval()

    causal = nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64)
    done = convert(made(), SEQUENCE, example_inputs={"src": X, "tgt": X[:, :3], "tgt_mask": causal})
    assert list(done.converted) == ["encoder.layers.0.linear1", "encoder.layers.0.linear2"]
    assert "depend on tgt[0, " in done.skipped["decoder.layers.0.linear1"]
    both_ways = convert(made(), SEQUENCE, example_inputs={"src": X, "tgt": X[:, :3]})  # without a mask rows do meet
    assert "decoder.layers.0.linear1" in both_ways.converted
    model = made()
    assert "decoder.layers.0.linear1" in convert(model, APART).converted
    assert model(X, X[:, :3]).shape == (2, 3, 8)


@pytest.mark.slow
def test_t2t_vit_blocks():
    model = models.t2t_vit("t2t_vit_nano", num_classes=10, image_size=8, in_channels=1).double().eval()
    pixels = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    expected = model(pixels)
    done = convert(model, EXACT, example_inputs=pixels, filter_fn=lambda module, name: name.startswith("blocks."))
    linears = [name for name, m in done.converted.items() if isinstance(m, STLLinear)]
    depth = model.config.depth
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert linears == [f"blocks.{i}.{part}" for i in range(depth) for part in parts]
    assert set(done.skipped.values()) == {"excluded by filter_fn"}
    torch.testing.assert_close(model(pixels), expected, rtol=1e-10, atol=1e-10)
    # Images stay apart, and every converted parameter is trained.
    other = torch.randn_like(pixels)
    other[1] = pixels[1]
    assert torch.equal(model(other)[1], model(pixels)[1])
    model.train()(pixels).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for m in done.converted.values() for p in m.parameters())


@pytest.mark.slow
def test_t2t_vit_without_a_filter_leaves_its_head():
    model = models.t2t_vit("t2t_vit_nano", num_classes=10, image_size=8, in_channels=1).double()
    done = convert(model, SEQUENCE, example_inputs=torch.randn(2, 1, 8, 8, dtype=torch.float64))
    assert done.skipped["head"] == "a head: it makes the model's output"
    assert any(name.startswith("tokens_to_token.") for name in done.converted)


def test_lazy_layers_that_the_examples_materialise_are_converted():
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU())
    assert convert(model, APART, example_inputs=torch.randn(2, 5, 6)).converted["0"].in_features == 6


def test_a_parallel_wrapper_is_seen_through():
    model = nn.DataParallel(nn.Sequential(nn.Linear(8, 8, dtype=torch.float64), nn.ReLU()))
    expected = model(X)
    assert list(convert(model, EXACT, example_inputs=X, force_mixing=["*"]).converted) == ["module.0"]
    torch.testing.assert_close(model(X), expected)
