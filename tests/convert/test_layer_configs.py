"""If these fail, a layer gets a config that was meant for another, or a pattern that means nothing passes in silence."""

import pytest
import torch
import zoo
from tiny_models import APART, CAUSAL, IDS, MASK, SEQUENCE, Classifier, Tokens, bert
from torch import nn

from strassen_tile import STLConfig, STLLinear, check_mixing, convert
from strassen_tile.errors import ConversionError

FEW = IDS % zoo.VOCABULARY
X = torch.randn(2, 12, zoo.D, generator=torch.Generator().manual_seed(1))


def blocks():
    return nn.ModuleDict(
        {
            f"{i}": nn.ModuleDict({"mlp": nn.ModuleDict({"up": nn.Linear(8, 8)}), "q": nn.Linear(8, 8)})
            for i in (0, 1, 10)
        }
    )


def test_the_first_pattern_that_matches_counts():
    model, wide, fine = blocks(), STLConfig(tile=(1, 4, 4), rank=12), STLConfig(tile=(1, 2, 2), rank=3)
    done = convert(model, APART, layer_configs={"0.mlp.*": None, "*.mlp.*": wide, "1.*": fine})
    assert {name: layer.config for name, layer in done.converted.items()} == {
        "1.mlp.up": wide,
        "10.mlp.up": wide,
        "1.q": fine,
        "0.q": APART,
        "10.q": APART,
    }
    assert done.skipped == {"0.mlp.up": "excluded by layer_configs"}
    assert model["1"]["mlp"]["up"].encoder.shape == (12, 1, 4)
    lines = str(done).splitlines()
    assert any(line.startswith("2 layers (1,10.mlp.up)  ") for line in lines)  # no star: 0.mlp.up is on another line
    assert any(line.startswith("1.q ") and "tile 1×2×2, rank 3" in line for line in lines)


def test_any_name_of_a_shared_layer_matches():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "other": nn.Linear(8, 8)})
    model["again"] = model["a"]
    done = convert(model, APART, layer_configs={"again": STLConfig(tile=(1, 2, 2), rank=3)})
    assert done.converted["a"].config.rank == 3
    assert model["a"] is model["again"]


@pytest.mark.parametrize(
    "patterns,said",
    [
        ({"*": APART, "block*": None}, r"'block\*' matches no linear layer; there are 0.mlp.up, 0.q, 1.mlp.up"),
        ({"MLP.*": None}, "matches no linear layer"),
        ({"*": None, "0.*": APART}, r"earlier patterns match all that '0\.\*' matches; put it before them"),
        ({"0.q": "rank 16"}, "patterns to STLConfig or None; got '0.q': 'rank 16'"),
        ({0: APART}, "patterns to STLConfig or None; got 0"),
        ([("0.q", APART)], "must be a dict"),
        ({"*": None}, r"6 layers \(.*\): excluded by layer_configs$"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(patterns, said):
    model = blocks()
    before = dict(model.named_modules())
    with pytest.raises(ConversionError, match=said):
        convert(model, APART, layer_configs=patterns)
    assert dict(model.named_modules()) == before


def test_a_basis_that_does_not_exist_is_said_first():
    model = blocks()
    with pytest.raises(ValueError, match="no/such"):
        convert(model, APART, layer_configs={"10.q": STLConfig(rank=24, basis="no/such.json")})
    assert not any(isinstance(module, STLLinear) for module in model.modules())


def test_filters_and_heads_are_kept():
    model = Classifier()
    done = convert(model, APART, layer_configs={"last": STLConfig(tile=(1, 2, 2), rank=3)}, example_inputs=X[..., :8])
    assert done.skipped["last"] == "a head: it makes the model's output"
    done.undo()
    keep = {"first", "last"}
    done = convert(
        model, APART, filter_fn=lambda _, name: name in keep, layer_configs={"first": None}, example_inputs=X[..., :8]
    )
    assert list(done.converted) == ["last"]
    assert done.skipped["first"] == "excluded by layer_configs"
    assert done.skipped["second"] == "excluded by filter_fn"


def test_rows_may_mix_in_each_layer_as_its_own_config_says():
    """A causal model with a head beside it that reads both ways; windows of six rows, which tiles of four cross."""
    model = zoo.SideHead()
    done = convert(model, CAUSAL, example_inputs=FEW, layer_configs={"side": SEQUENCE}, filter_fn=lambda *_: True)
    assert model.side.config == SEQUENCE
    assert {layer.config for layer in done.converted.values()} == {SEQUENCE, CAUSAL}
    assert check_mixing(model, FEW)
    done = convert(
        zoo.SideHead(), CAUSAL, example_inputs=FEW, layer_configs={"blocks.0.up": SEQUENCE}, filter_fn=lambda *_: True
    )
    assert "blocks.0.up" in done.skipped
    assert "blocks.0.down" in done.converted
    pairs = STLConfig(tile=2)
    for configs, mixes in (({}, False), ({"after": pairs}, True)):
        done = convert(zoo.Windows(6), SEQUENCE, example_inputs=X, layer_configs=configs)
        assert ("after" in done.converted) is mixes
    with pytest.raises(ConversionError, match="pass example_inputs"):
        convert(blocks(), APART, layer_configs={"0.q": pairs})


@torch.no_grad()
def test_layers_of_all_kinds_share_a_padding_mask():
    pytest.importorskip("transformers")
    model = bert()
    pairs = STLConfig(tile=2, rank=4)
    done = convert(
        model,
        SEQUENCE,
        example_inputs={"input_ids": IDS, "attention_mask": MASK},
        layer_configs={"*.query": pairs, "*.intermediate.*": APART},
    )
    kinds = {layer.config: layer.padding for layer in done.converted.values()}
    assert kinds == {SEQUENCE: done.padding, pairs: done.padding, APART: None}
    padded = model(input_ids=IDS, attention_mask=MASK).logits[2]
    torch.testing.assert_close(padded, model(input_ids=IDS[2:, :3]).logits[0], rtol=1e-10, atol=1e-10)
    done.undo()
    assert not model._forward_pre_hooks


def test_no_mask_is_attached_where_no_row_mixes():
    model = Tokens(backwards_only=True)
    done = convert(model, APART, example_inputs=IDS, layer_configs={"inner": SEQUENCE})
    assert "inner" in done.skipped
    assert done.padding is None
    assert not model._forward_pre_hooks


def test_speed_is_predicted_for_each_layers_own_config(monkeypatch):
    import sys

    from strassen_tile import cost

    flat = ((128, 1e11), (2048, 1e11))
    machine = cost.Machine(
        "cpu", "float32", 2, gemm=flat, batched=flat, transform=1e11, copy=1e30, fresh=1e30, call=0.0
    )
    monkeypatch.setattr(sys.modules["strassen_tile.convert.stl"], "machine", lambda *_: machine)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
    cheap, dear = STLConfig(tile=(1, 4, 4), rank=4), STLConfig(tile=(1, 4, 4), rank=12)
    # of a row: dense 2·512², STL that times r/16 and 2r for each of 512 + 512 numbers: 3.8× and 1.2×
    done = convert(model, cheap, layer_configs={"2": dear}, example_inputs=torch.randn(2, 8, 512), min_speedup=2)
    assert list(done.converted) == ["0"]
    assert done.skipped["2"].startswith("predicted 1.2")
