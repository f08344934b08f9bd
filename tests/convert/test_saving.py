"""If these fail, a converted model without transformers is lost with the process, or comes back as another one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import strassen_tile as st
from strassen_tile.errors import CheckpointError, ConversionError, ShapeError

X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
PADDING = torch.arange(9) >= torch.tensor([9, 5])[:, None]


class Block(nn.Module):
    """A block in timm's layout: qkv in one, MLP of fc1 and fc2."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)})

    def forward(self, x):
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)
        x = x + self.attn["proj"]((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
        return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class ViT(nn.Module):
    """(B, 3, 8, 8) → (B, 5)."""

    def __init__(self, width=16):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 2, 2)
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 5)

    def forward(self, pixels):
        x = self.patch_embed(pixels).flatten(2).mT + self.pos_embed
        return self.head(self.blocks(x).mean(dim=1))


class Tied(nn.Module):
    """Two names for one parameter, and a layer that has two."""

    def __init__(self):
        super().__init__()
        self.embed, self.words = nn.Embedding(7, 16), nn.Linear(16, 7, bias=False)
        self.words.weight = self.embed.weight
        self.inner = nn.Linear(16, 16)
        self.again = self.inner

    def forward(self, ids):
        return self.words(self.again(self.inner(self.embed(ids)).relu()))


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 5, 4, 3, 2]])
MODELS = {
    "vision": (lambda: ViT().eval(), (PIXELS,), st.STLConfig(rank=20)),
    "torch's encoder": (encoder, (X,), st.STLConfig(rank=20, train_decoder=False)),
    "tied": (lambda: Tied().eval(), (IDS,), st.STLConfig(rank=6, mixing="none")),
    "exact": (encoder, (X,), st.STLConfig(tile=2, rank=7, basis="strassen")),
}


def saved(name, folder):
    make, inputs, config = MODELS[name]
    torch.manual_seed(0)
    model = make()
    done = st.convert(model, config, example_inputs=inputs)
    st.save_model(model, folder)
    return model, done


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, tmp_path):
    make, inputs, _ = MODELS[name]
    model, done = saved(name, tmp_path)
    again = make()
    found = st.load_model(again, tmp_path)
    assert torch.equal(again(*inputs), model(*inputs))
    assert found.converted.keys() == done.converted.keys()
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    assert [(n, p.requires_grad) for n, p in again.named_parameters()] == flags
    if name == "tied":
        assert again.again is again.inner and again.words.weight is again.embed.weight
    with pytest.raises(ConversionError, match="dense weights are not here"):
        found.undo()


def test_padding_is_kept_out_after_loading_too(tmp_path):
    saved("torch's encoder", tmp_path)
    again = encoder()
    found = st.load_model(again, tmp_path)
    other = X.masked_fill(PADDING[..., None], 7.0)
    with torch.no_grad():
        one, two = (again(x, src_key_padding_mask=PADDING) for x in (X, other))
    assert found.padding is not None and torch.equal(one[~PADDING], two[~PADDING])
    with pytest.raises(ShapeError, match="pad on the right"):
        again(X, src_key_padding_mask=PADDING.flip(1))


def test_a_folder_that_is_refused_leaves_a_converted_model_its_mask(tmp_path):
    model, _ = saved("torch's encoder", tmp_path)
    with torch.no_grad():
        expected = model(X, src_key_padding_mask=PADDING)
        other = ViT(width=32).eval()
        st.convert(other, st.STLConfig(rank=20), example_inputs=PIXELS)
        st.save_model(other, tmp_path / "other")
        with pytest.raises(CheckpointError):
            st.load_model(model, tmp_path / "other")
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "other" / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError):
            st.load_model(model, tmp_path / "other")
        assert torch.equal(model(X, src_key_padding_mask=PADDING), expected)
        with pytest.raises(ShapeError, match="pad on the right"):
            model(X, src_key_padding_mask=PADDING.flip(1))


def test_killed_between_its_two_files_the_folder_is_refused(tmp_path, monkeypatch):
    """A dense model was there: under the old config its new tensors would be none of its own."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    save_file(ViT().state_dict(), tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    replace = Path.replace

    def killed(self, target):
        if target.name == "model.safetensors":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        saved("vision", tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    with pytest.raises(CheckpointError, match="disagree"):
        st.load_model(ViT(), tmp_path)


def test_views_of_one_tensor_are_saved_each_by_itself_and_what_is_no_tensor_is_said(tmp_path):
    model, table = ViT().eval(), torch.arange(6.0)
    model.register_buffer("sines", table[:3])
    model.register_buffer("cosines", table[3:])
    st.convert(model, st.STLConfig(mixing="none"))
    st.save_model(model, tmp_path)
    again = ViT().eval().requires_grad_(False)
    again.register_buffer("sines", torch.zeros(3))
    again.register_buffer("cosines", torch.zeros(3))
    with torch.inference_mode():
        st.load_model(again, tmp_path)
    assert torch.equal(again.cosines, table[3:]) and not any(p.requires_grad for p in again.parameters())
    again.requires_grad_()(PIXELS).sum().backward()
    model.norm = type("Counting", (nn.Identity,), {"get_extra_state": lambda self: {"step": 3}})()
    with pytest.raises(ConversionError, match=r"norm\._extra_state is a dict"):
        st.save_model(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("strict", [False, True])
def test_a_dense_state_dict_is_refused(strict):
    """`strict=False` would leave every layer as it was started: so the Trainer resumes."""
    model = ViT()
    state = model.state_dict()
    st.convert(model, st.STLConfig(mixing="none"))
    with pytest.raises(RuntimeError, match="this is an STL layer, and what is loaded has the weight of a dense one"):
        model.load_state_dict(state, strict=strict)


def test_it_keeps_the_dtype_and_mode_of_the_model_it_is_put_into(tmp_path):
    model, _ = saved("vision", tmp_path)
    again = ViT().double().train()
    st.load_model(again, tmp_path)
    layer = again.blocks[0].mlp["fc1"]
    assert layer.training and layer.encoded_weight.dtype == torch.float64
    assert torch.equal(layer.encoded_weight, model.blocks[0].mlp["fc1"].encoded_weight.double())


def test_layers_that_the_model_builds_itself(tmp_path):
    def make():
        return nn.Sequential(st.STLLinear(16, 16, config=st.STLConfig(rank=9)), nn.ReLU(), nn.Linear(16, 16)).eval()

    model = make()
    st.save_model(model, tmp_path)
    again = make()
    st.load_model(again, tmp_path)
    assert torch.equal(again(X), model(X))


def test_in_fp8(tmp_path):
    model, _ = saved("vision", tmp_path)
    st.quantize_fp8(model)
    st.save_model(model, tmp_path)
    again = ViT().eval()
    st.load_model(again, tmp_path)
    assert type(again.blocks[1].mlp["fc2"]) is st.STLLinearFP8
    with torch.no_grad():
        assert torch.equal(again(PIXELS), model(PIXELS))


def test_what_else_is_in_the_folder_stays(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mine", "width": 16}')
    saved("vision", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["width"], config["quantization_config"]["quant_method"]) == ("mine", 16, "stl")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="several files"):
        saved("vision", tmp_path)


def test_what_transformers_saved_is_read_without_it(tmp_path):
    hf = pytest.importorskip("transformers")
    config = hf.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    ids = IDS.repeat(1, 2)
    model = hf.BertModel(config, add_pooling_layer=False).eval()
    st.convert(model, st.STLConfig(rank=20), example_inputs={"input_ids": ids})
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    again = hf.BertModel(config, add_pooling_layer=False).eval()
    st.load_model(again, tmp_path)
    assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)


class Other(ViT):
    def __init__(self):
        super().__init__()
        self.blocks[1].mlp["fc1"] = nn.Identity()


REFUSED = {
    "another depth": (lambda: nn.Sequential(*[nn.Linear(16, 16)] * 2), None, "of another model"),
    "another width": (lambda: ViT(20), None, "of another shape"),
    "no linear layer there": (Other, None, "an? Identity, no nn.Linear"),
    "on the meta device": (lambda: ViT().to("meta"), None, "meta device"),
    "no tensors": (ViT, lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "no config": (ViT, lambda f: (f / "config.json").unlink(), "cannot read .*config.json"),
    "config of nothing": (ViT, lambda f: (f / "config.json").write_text("{}"), "there is no converted model in it"),
    "config cut": (ViT, lambda f: (f / "config.json").write_text('{"quant'), "cannot read"),
    "cut": (ViT, lambda f: (f / "model.safetensors").write_bytes(b"12345678" * 40), "truncated, damaged"),
    "a file elsewhere": (
        ViT,
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}'),
        "names a file elsewhere",
    ),
    "a shard missing": (
        ViT,
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "has no b.safetensors",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_changes_nothing(what, tmp_path):
    make, damage, message = REFUSED[what]
    saved("vision", tmp_path)
    if damage is not None:
        damage(tmp_path)
    model = make()
    before = {name: (id(m), type(m)) for name, m in model.named_modules()}
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        st.load_model(model, tmp_path)
    assert {name: (id(m), type(m)) for name, m in model.named_modules()} == before
    assert all(t.is_meta or torch.equal(t, tensors[n]) for n, t in model.state_dict().items())


def test_a_dense_model_is_not_saved(tmp_path):
    with pytest.raises(ConversionError, match="no STL layers"):
        st.save_model(ViT(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    model, _ = saved("vision", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    with torch.no_grad():
        model.head.weight.zero_()
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        st.save_model(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
