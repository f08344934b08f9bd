"""Checkpoints: round trips to the bit, the published files' wrapping, and what is refused."""

import argparse
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from strassen_tile import STLConfig, STLLinear
from strassen_tile.errors import ConfigError, DataError
from strassen_tile.models import load_checkpoint, t2t_vit


def small(seed, **options):
    torch.manual_seed(seed)
    return t2t_vit("t2t_vit_micro", image_size=8, **{"num_classes": 5, "depth": 2, **options})


def save_torch(state, path):
    torch.save(state, path)


def save_wrapped(state, path):
    wrapped = {"module." + key: value for key, value in state.items()}
    spoilt = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"epoch": 3, "state_dict": spoilt, "state_dict_ema": wrapped}, path)


def save_legacy(state, path):
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)


WRITERS = {
    "plain.pt": save_torch,
    "published.pth.tar": save_wrapped,
    "old.pth": save_legacy,
    "a.safetensors": save_file,
}


@pytest.mark.parametrize("name", WRITERS)
def test_round_trip_gives_the_same_bits(tmp_path, name):
    saved, loaded = small(0).eval(), small(1).eval()
    pixels = torch.randn(2, 3, 8, 8)
    assert not torch.equal(loaded(pixels), saved(pixels))  # else the test below could not fail
    WRITERS[name](saved.state_dict(), tmp_path / name)
    load_checkpoint(loaded, tmp_path / name)
    assert torch.equal(loaded(pixels), saved(pixels))
    assert not loaded.pos_embed.requires_grad


def refused(model, path, *fragments):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(DataError) as caught:
        load_checkpoint(model, path)
    for fragment in (path.name, *fragments):
        assert fragment in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_missing_unexpected_and_reshaped_keys_are_named_and_nothing_is_loaded(tmp_path):
    state = small(0).state_dict()
    state["blocks.1.extra"] = state.pop("norm.weight")
    state["head.weight"] = torch.zeros(7, 128)
    torch.save(state, tmp_path / "other.pt")
    refused(
        small(1),
        tmp_path / "other.pt",
        "missing (1): norm.weight",
        "unexpected (1): blocks.1.extra",
        "of another shape (1): head.weight: expected (5, 128), got (7, 128)",
    )


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("meaning", ["absent", "of bools"])
def test_files_from_before_layers_said_what_their_numbers_mean(tmp_path, root, meaning):
    config = STLConfig(tile=4, rank=16)
    saved, loaded = (STLLinear(8, 8, config=config) for _ in range(2))
    if not root:
        saved, loaded = (nn.Sequential(nn.Linear(8, 8), layer, layer) for layer in (saved, loaded))
    state = {
        key: value.bool() if key.endswith("meaning") else value
        for key, value in saved.state_dict().items()
        if meaning == "of bools" or not key.endswith("meaning")
    }
    torch.save(state, tmp_path / "old.pt")
    load_checkpoint(loaded, tmp_path / "old.pt")
    x = torch.randn(2, 4, 8)
    assert torch.equal(loaded(x), saved(x))
    del state[next(key for key in state if key.endswith("encoder"))]
    torch.save(state, tmp_path / "short.pt")
    refused(loaded, tmp_path / "short.pt", "missing (1)")


def test_a_deeper_model_is_named_in_short(tmp_path):
    torch.save(small(0).state_dict(), tmp_path / "shallow.pt")
    refused(small(1, depth=4), tmp_path / "shallow.pt", "missing (22): blocks.2.attn.proj.bias", "and 14 more")


def test_files_that_are_no_checkpoints_are_named(tmp_path):
    model = small(0)
    refused(model, tmp_path / "absent.pt", "no such")
    (tmp_path / "text.pt").write_text("hello")
    refused(model, tmp_path / "text.pt")
    (tmp_path / "text.safetensors").write_text("hello")
    refused(model, tmp_path / "text.safetensors", "not a safetensors file")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    refused(model, tmp_path / "list.pt", "no state dict")


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"state_dict": small(0).state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "args.pt")
    refused(small(1), tmp_path / "args.pt", "tensors alone")


STRANGE = {
    "sparse": (lambda t: t.to_sparse(), "without plain numbers"),
    "meta": (lambda t: t.to("meta"), "on the meta device"),
    "complex": (lambda t: t.to(torch.complex64), "expected torch.float32, got torch.complex64"),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("key", ["norm.weight", "head.weight"])
def test_tensors_that_no_model_holds_change_nothing(tmp_path, kind, key):
    make, fragment = STRANGE[kind]
    state = small(0).state_dict()
    state[key] = make(state[key])
    torch.save(state, tmp_path / "strange.pt")
    refused(small(1), tmp_path / "strange.pt", key, fragment)


def test_fractions_are_not_cut_to_whole_numbers(tmp_path):
    norm = torch.nn.BatchNorm1d(3)
    torch.save({**norm.state_dict(), "num_batches_tracked": torch.tensor(1.5)}, tmp_path / "cut.pt")
    refused(norm, tmp_path / "cut.pt", "num_batches_tracked: expected torch.int64, got torch.float32")


def holder(value):
    model = nn.Module()
    model.register_buffer("value", value)
    return model


F8, LOW, INF = torch.float8_e4m3fn, torch.float8_e5m2, float("inf")
TOO_LARGE = [
    (1e300, torch.float64, torch.float32), (-1e300, torch.float64, torch.float32), (1e39, torch.float64, torch.bfloat16),
    (7e4, torch.float32, torch.float16), (70000, torch.int64, torch.float16), (1e300j, torch.complex128, torch.complex64),
    (1e4, torch.float32, F8), (1e6, torch.bfloat16, LOW), (300, torch.int64, torch.int8), (-1, torch.int64, torch.uint8),
]  # fmt: skip
FITTING = [
    (INF, torch.float64, torch.float32), (-INF, torch.float64, torch.float16), (float("nan"), torch.float64, torch.float32),
    (1e-300, torch.float64, torch.float32), (3e38, torch.float64, torch.float32), (1e4, torch.float16, torch.bfloat16),
    (448, F8, torch.float32), (100, torch.int64, torch.int8), (7, torch.int32, torch.float32), (1, torch.bool, torch.int64),
]  # fmt: skip


@pytest.mark.parametrize(("number", "there", "here"), TOO_LARGE, ids=str)
def test_finite_numbers_do_not_become_infinite(tmp_path, number, there, here):
    torch.save({"value": torch.tensor([0, number], dtype=there)}, tmp_path / "large.pt")
    model = holder(torch.ones(2).to(here))
    with pytest.raises(DataError, match=rf"with numbers too large \(1\): value: for {here}, in {there}"):
        load_checkpoint(model, tmp_path / "large.pt")
    assert (model.value.to(torch.complex64) == 1).all()


@pytest.mark.parametrize(("number", "there", "here"), FITTING, ids=str)
def test_numbers_that_are_infinite_already_or_small_load(tmp_path, number, there, here):
    given = torch.tensor([0, number], dtype=there)
    torch.save({"value": given}, tmp_path / "fits.pt")
    model = holder(torch.ones(2).to(here))
    load_checkpoint(model, tmp_path / "fits.pt")
    assert torch.equal(model.value.double().nan_to_num(nan=5), given.to(here).double().nan_to_num(nan=5))


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_what_fails_half_way_is_taken_back(tmp_path, monkeypatch, error):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    state = {key: value + 1 for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    monkeypatch.setattr(model[1], "_load_from_state_dict", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else DataError):
        load_checkpoint(model, tmp_path / "a.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_name_with_and_without_its_prefix_is_refused(tmp_path):
    model = torch.nn.Linear(2, 2)
    torch.save({**model.state_dict(), "module.weight": torch.zeros(2, 2)}, tmp_path / "twice.pt")
    refused(model, tmp_path / "twice.pt", "twice")


def test_a_model_without_storage_is_refused(tmp_path):
    torch.save(small(0).state_dict(), tmp_path / "a.pt")
    with torch.device("meta"):
        model = small(1)
    with pytest.raises(ConfigError, match="meta device"):
        load_checkpoint(model, tmp_path / "a.pt")


def test_missing_safetensors_says_what_to_install(tmp_path, monkeypatch):
    save_file(small(0).state_dict(), tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"a\.safetensors needs safetensors: pip install safetensors"):
        load_checkpoint(small(1), tmp_path / "a.safetensors")
