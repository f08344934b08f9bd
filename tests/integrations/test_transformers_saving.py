"""If these fail, a converted model that was saved comes back as another one, or as a dense one with random layers."""

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import strassen_tile as st
from strassen_tile.errors import CheckpointError, ConversionError, ShapeError

hf = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_transformers import IDS, MASK, MODELS, TEXT, built, outputs  # noqa: E402

from strassen_tile.integrations.transformers import STLQuantConfig, conversion_of  # noqa: E402


@functools.cache
def _converted(name, options):
    _, _, mixing, inputs = MODELS[name]
    model = built(name)
    st.convert(model, st.STLConfig(mixing=mixing, **dict(options)), example_inputs=inputs)
    return model


def converted(name, **options):
    return copy.deepcopy(_converted(name, tuple(options.items())))  # a conversion takes a second


def stl_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, st.STLLinear)}


@pytest.fixture
def bert():
    return converted("bert", rank=20)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "t5" else n for n in MODELS]
)  # its encoder is there
@pytest.mark.parametrize("how", ["whole", "sharded", "device map", "from disk"])
def test_what_was_saved_comes_back(name, how, tmp_path):
    kind, _, _, inputs = MODELS[name]
    model = converted(name)
    model.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if how == "sharded" else {}))
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or how != "sharded"
    options = {
        "device map": {"device_map": "auto"},
        "from disk": {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "off")},
    }
    again = kind.from_pretrained(tmp_path, **options.get(how, {}))
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))
    assert stl_layers(again).keys() == stl_layers(model).keys() != set()
    found, before = conversion_of(again), conversion_of(model)
    assert (found.converted.keys(), found.skipped) == (before.converted.keys(), before.skipped)


@pytest.mark.parametrize("name", MODELS)
def test_in_bfloat16(name, tmp_path):
    kind, _, _, inputs = MODELS[name]
    built(name).save_pretrained(tmp_path / "dense")
    model = kind.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)  # whose rotary tables stay in float32
    st.convert(model, st.STLConfig(mixing="none"))
    model.save_pretrained(tmp_path / "stl")
    again = kind.from_pretrained(tmp_path / "stl")
    assert again.dtype == torch.bfloat16 == next(iter(stl_layers(again).values())).encoder.dtype
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))


READ = """
import sys, torch
import transformers
import strassen_tile
from pathlib import Path
sys.path.insert(0, {here!r})
from tiny_transformers import MODELS, outputs
for number, (name, (kind, _, _, inputs)) in enumerate(MODELS.items()):
    folder = Path({folder!r}) / str(number)
    model = kind.from_pretrained(folder)
    assert torch.equal(outputs(model, inputs), torch.load(folder / "expected.pt")), name
print("all equal")
"""


def test_in_another_process_after_one_import(tmp_path):
    for number, name in enumerate(MODELS):
        model = converted(name)
        model.save_pretrained(tmp_path / str(number))
        torch.save(outputs(model, MODELS[name][3]), tmp_path / str(number) / "expected.pt")
    code = READ.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "all equal"), done.stderr[-3000:]


@pytest.mark.slow
def test_whoever_forgets_the_import_is_told_so_by_transformers_alone(tmp_path, bert):
    """All that can be reached: it does not know the method, and lists what it left. docs/transformers.md says so."""
    bert.save_pretrained(tmp_path)
    code = f"import transformers; m = transformers.BertForMaskedLM.from_pretrained({str(tmp_path)!r}); print(type(m).__name__)"
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "Unknown quantization type, got stl" in done.stderr
    assert "encoded_weight" in done.stderr and "UNEXPECTED" in done.stderr and "MISSING" in done.stderr


def test_between_a_model_and_its_base_in_both_directions(tmp_path):
    model = converted("bert")
    model.save_pretrained(tmp_path / "head")
    base = hf.BertModel.from_pretrained(tmp_path / "head", add_pooling_layer=False)
    assert torch.equal(outputs(base, TEXT), outputs(model.bert, TEXT))
    base.save_pretrained(tmp_path / "base")
    again = hf.BertForMaskedLM.from_pretrained(tmp_path / "base")
    assert torch.equal(outputs(again.bert, TEXT), outputs(model.bert, TEXT))
    model.bert.save_pretrained(tmp_path / "part")
    part = hf.BertModel.from_pretrained(tmp_path / "part", add_pooling_layer=False)
    assert torch.equal(outputs(part, TEXT), outputs(model.bert, TEXT))


def test_the_encoder_of_an_encoder_decoder_model(tmp_path):
    model = converted("t5")
    model.save_pretrained(tmp_path)
    encoder = hf.T5EncoderModel.from_pretrained(tmp_path)
    assert torch.equal(outputs(encoder, TEXT), outputs(model.encoder, TEXT))


def test_a_head_that_was_converted_is_left_out_of_a_class_without_one(tmp_path):
    torch.manual_seed(0)
    model = hf.BertForTokenClassification(built("bert").config).eval()
    done = st.convert(model, st.STLConfig(mixing="none"), filter_fn=lambda layer, name: True)
    assert "classifier" in done.converted
    model.save_pretrained(tmp_path)
    base = hf.BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert torch.equal(outputs(base, TEXT), outputs(model.bert, TEXT))


def test_padding_is_kept_out_after_loading_too(tmp_path, bert):
    bert.save_pretrained(tmp_path)
    again = hf.BertForMaskedLM.from_pretrained(tmp_path)
    other = {**TEXT, "input_ids": torch.where(MASK == 1, IDS, (IDS + 7) % 59 + 1)}
    real = MASK.bool()
    assert torch.equal(outputs(again, TEXT)[real], outputs(again, other)[real])
    alone = {"input_ids": IDS[1:, :7], "attention_mask": MASK[1:, :7]}
    torch.testing.assert_close(outputs(again, TEXT)[1, :7], outputs(again, alone)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ShapeError, match="pad on the right"):
        again(**{**TEXT, "attention_mask": MASK.flip(1)})


def test_a_loaded_model_is_like_any_other(tmp_path):
    model = converted("bert", train_encoder=False)
    model.save_pretrained(tmp_path)
    again = hf.BertForMaskedLM.from_pretrained(tmp_path)
    assert not getattr(again, "is_quantized", False) and again.half().float().double().dtype == torch.float64
    layer = again.bert.encoder.layer[0].intermediate.dense
    assert not layer.encoder.requires_grad and layer.decoder.requires_grad and layer.encoded_weight.requires_grad
    again.save_pretrained(tmp_path / "again")
    third = hf.BertForMaskedLM.from_pretrained(tmp_path / "again", dtype=torch.float64)
    assert torch.equal(outputs(third, TEXT), outputs(again, TEXT))
    with pytest.raises(ConversionError, match="dense weights are not here"):
        conversion_of(again).undo()


def test_in_fp8(tmp_path):
    model = converted("bert", rank=24)
    done = st.quantize_fp8(model)
    model.save_pretrained(tmp_path / "fp8")
    again = hf.BertForMaskedLM.from_pretrained(tmp_path / "fp8")
    layer = again.bert.encoder.layer[0].intermediate.dense
    assert (
        type(layer) is st.STLLinearFP8
        and layer.values.dtype == torch.float8_e4m3fn
        and layer.scale.dtype == torch.float32
    )
    assert torch.equal(outputs(again, TEXT), outputs(model, TEXT))
    done.undo()
    model.save_pretrained(tmp_path / "not")
    assert stl_layers(hf.BertForMaskedLM.from_pretrained(tmp_path / "not")).keys() == stl_layers(model).keys()


def test_undone_it_is_saved_as_a_dense_model(tmp_path):
    model = built("bert")
    expected = outputs(model, TEXT)
    done = st.convert(model, st.STLConfig(rank=8), example_inputs=TEXT)
    done.undo()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(outputs(hf.BertForMaskedLM.from_pretrained(tmp_path), TEXT), expected)


def test_another_model_of_the_same_config_stays_dense(tmp_path):
    config = built("bert").config
    one, other = hf.BertForMaskedLM(config).eval(), hf.BertForMaskedLM(config).eval()
    done = st.convert(one, st.STLConfig(mixing="none"))
    assert one.config is one.bert.config is one.bert.encoder.layer[0].attention.self.config is not config
    other.save_pretrained(tmp_path / "other")
    again = hf.BertForMaskedLM.from_pretrained(tmp_path / "other")
    assert not stl_layers(again) and torch.equal(outputs(again, TEXT), outputs(other, TEXT))
    one.save_pretrained(tmp_path / "one")
    assert torch.equal(outputs(hf.BertForMaskedLM.from_pretrained(tmp_path / "one"), TEXT), outputs(one, TEXT))
    done.undo()
    assert not hasattr(one.config, "quantization_config")


def test_each_layer_comes_back_as_what_it_was(tmp_path):
    model = built("bert")
    st.convert(
        model,
        st.STLConfig(rank=20),
        example_inputs=TEXT,
        layer_configs={"*.attention.*": st.STLConfig(tile=2, rank=7, basis="strassen"), "*.1.output.dense": None},
    )
    model.save_pretrained(tmp_path)
    again = hf.BertForMaskedLM.from_pretrained(tmp_path)
    assert {n: m.config for n, m in stl_layers(again).items()} == {n: m.config for n, m in stl_layers(model).items()}
    assert type(again.bert.encoder.layer[1].output.dense) is torch.nn.Linear
    assert torch.equal(outputs(again, TEXT), outputs(model, TEXT))


def test_factors_travel_and_no_path_of_this_machine(tmp_path):
    basis = st.bases.random((4, 4, 4), 20, seed=3)
    basis.save(tmp_path / "mine.json")
    model = built("bert")
    st.convert(model, st.STLConfig(rank=20, basis=str(tmp_path / "mine.json")), example_inputs=TEXT)
    expected = outputs(model, TEXT)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "mine.json").unlink()
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    again = hf.BertForMaskedLM.from_pretrained(tmp_path / "model")
    assert torch.equal(outputs(again, TEXT), expected)
    assert next(iter(stl_layers(again).values())).config.basis == "mine.json"


def test_converted_while_it_is_loaded(tmp_path):
    model = built("bert")
    model.save_pretrained(tmp_path)
    how = STLQuantConfig(st.STLConfig(tile=2, rank=7, basis="strassen"), example_inputs=TEXT)
    again = hf.BertForMaskedLM.from_pretrained(tmp_path, quantization_config=how)
    assert len(stl_layers(again)) == 13
    real = MASK.bool()
    torch.testing.assert_close(outputs(again, TEXT)[real], outputs(model, TEXT)[real], rtol=1e-4, atol=1e-4)
    again.save_pretrained(tmp_path / "stl")
    third = hf.BertForMaskedLM.from_pretrained(tmp_path / "stl")
    assert torch.equal(outputs(third, TEXT), outputs(again, TEXT))


def test_converting_while_loading_refuses_what_convert_refuses(tmp_path):
    built("llama").save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match="mixing its rows would"):
        hf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=STLQuantConfig(example_inputs=TEXT))
    with pytest.raises(ConversionError, match="example_inputs"):
        hf.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=STLQuantConfig())


def change(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def damage_layers(folder):
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    change(folder, layers=dict(list(layers.items())[:-1]))


def rename_layer(folder):
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    change(folder, layers={name.replace("layer.1.", "layer.7."): at for name, at in layers.items()})


def swap_layers(folder):
    """As many of each kind, elsewhere."""
    tensors = load_file(folder / "model.safetensors")
    old, new = "bert.encoder.layer.0.output.dense.", "bert.encoder.layer.9.output.dense."
    moved = {key.replace(old, new): value for key, value in tensors.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["bert.encoder.layer.0.output.dense.encoded_weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "a layer fewer": (damage_layers, "config.json and the tensors disagree"),
    "another rank": (lambda f: change(f, kinds=[{"layer": "STLLinear", "rank": 21}]), "disagree.*rank 21"),
    "another mixing": (
        lambda f: change(f, kinds=[{"layer": "STLLinear", "rank": 20, "mixing": "causal"}]), "disagree.*causal",
    ),
    "names of another model": (rename_layer, "layer.7.*no layer.*of another model"),
    "tensors elsewhere": (swap_layers, "has no bert.encoder.layer.0.output.dense"),
    "a tensor fewer": (drop_tensor, "has no bert.encoder.layer.0.output.dense.encoded_weight"),
    "truncated": (truncate, "truncated, damaged"),
    "newer": (lambda f: change(f, format=2, version="9.0"), "strassen-tile 9.0 in format 2.*pip install --upgrade"),
    "of no format": (lambda f: change(f, format=None), "no format"),
    "of no layers": (lambda f: change(f, layers={}), "layers"),
    "unknown setting": (lambda f: change(f, kinds=[{"layer": "STLLinear", "shape": 4}]), "unknown keys shape"),
    "unknown layer": (lambda f: change(f, kinds=[{"layer": "os.system"}]), "names none of STLLinear"),
    "index out of range": (lambda f: change(f, layers={"bert.encoder.layer.0.output.dense": 3}), "one of 1 kinds"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_what_does_not_fit_is_refused(what, tmp_path, bert):
    damage, message = DAMAGES[what]
    bert.save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        hf.BertForMaskedLM.from_pretrained(tmp_path)


def test_sentence_transformers(tmp_path):
    sentences = pytest.importorskip("sentence_transformers")
    words = "the a cat dog sat ran on under mat house red blue big small and then it was very quick"
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words.split()]))
    tokenizer = hf.BertTokenizerFast(str(tmp_path / "vocab.txt"))
    base = hf.BertModel(built("bert").config, add_pooling_layer=False).eval()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = sentences.SentenceTransformer(str(tmp_path / "base"), device="cpu")  # with a mean over real rows
    texts = ["the cat sat on the mat", "a dog ran", "then it was very quick and the big red house was small"]
    inner = next(module for module in model.modules() if isinstance(module, hf.PreTrainedModel))
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    st.convert(inner, st.STLConfig(rank=20), example_inputs={k: tokens[k] for k in ("input_ids", "attention_mask")})
    expected = model.encode(texts)
    model.save(str(tmp_path / "saved"))
    again = sentences.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert any(isinstance(m, st.STLLinear) for m in again.modules())
    assert (again.encode(texts) == expected).all()
    for one, vector in zip(texts, expected, strict=True):
        torch.testing.assert_close(torch.tensor(again.encode([one])[0]), torch.tensor(vector), rtol=1e-5, atol=1e-5)
