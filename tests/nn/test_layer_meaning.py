"""If these fail, numbers saved from one kind of layer are loaded into another without a word."""

import copy

import pytest
import torch
from torch import nn

from strassen_tile import STLConfig, STLLinear, STLLinearFP8

X = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1))


def make(features=8, bias=True, **config):
    return nn.Sequential(STLLinear(features, 8, bias, config=STLConfig(**{"tile": 4, "rank": 16, **config})))


def through_torch(model, path):
    torch.save(model.state_dict(), path)
    return torch.load(path, weights_only=True)


def through_safetensors(model, path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(model.state_dict(), path)
    return safetensors.load_file(path)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("through", [through_torch, through_safetensors])
@pytest.mark.parametrize(("there", "here", "says"), [
    ({"mixing": "causal"}, {}, "mixing='causal'.*mixing='sequence'"),
    ({}, {"mixing": "causal"}, "mixing='sequence'.*mixing='causal'"),
    ({"features": 7}, {}, "7→8.*8→8"),
    ({"tile": (4, 4, 2)}, {"tile": (4, 4, 4)}, r"tile=\(4, 4, 2\)"),
    ({"encoder_scope": "tile"}, {}, "encoder_scope='tile'"),
], ids=str)  # fmt: skip
def test_another_meaning_is_refused(there, here, says, through, strict, tmp_path):
    state, model = through(make(**there), tmp_path / "file"), make(**here)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=says):
        model.load_state_dict(state, strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("through", [through_torch, through_safetensors])
@pytest.mark.parametrize(
    "config", [{}, {"mixing": "causal"}, {"mixing": "none", "rank": 6}, {"encoder_scope": "tile"}], ids=str
)
def test_the_same_meaning_loads_and_says_nothing(config, through, tmp_path):
    saved, model = make(**config), make(**config)
    result = model.load_state_dict(through(saved, tmp_path / "file"))
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(model(X), saved(X))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_files_that_do_not_say_still_load(assign, device):
    saved = make()
    state = {name: value for name, value in saved.state_dict().items() if not name.endswith("meaning")}
    assert len(state) == len(dict(saved.named_parameters())) == 4
    with torch.device(device):
        model = make()
    if device == "meta" and not assign:
        model.to_empty(device="cpu")
    result = model.load_state_dict(state, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(model(X), saved(X))
    model.to("cpu", torch.float64)
    assert {"0.meaning"} == model.state_dict().keys() - state.keys()


def test_layers_that_do_not_mix_mean_the_same_under_every_name():
    make(tile=(1, 4, 4), rank=6, mixing="none").load_state_dict(
        make(tile=(1, 4, 4), rank=6, mixing="causal").state_dict()
    )


def test_no_cast_move_average_or_copy_loses_it():
    causal, model = make(mixing="causal"), make(mixing="causal")
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    for _ in range(3):
        ema.update_parameters(model)
    average = copy.deepcopy(model)
    for name, value in average.state_dict().items():  # as people write it themselves
        value.copy_(0.999 * value + 0.001 * model.state_dict()[name])
    fitted = nn.Sequential(STLLinear.from_linear(nn.Linear(8, 8), STLConfig(tile=4, rank=16, mixing="causal")))
    for twin in (ema.module, average, copy.deepcopy(model).half(), model.to("meta").to_empty(device="cpu"), fitted):
        causal.load_state_dict(twin.state_dict())
        with pytest.raises(RuntimeError, match="mixing='causal'"):
            make().load_state_dict(twin.state_dict())


def lerp(mean, other):
    mean.lerp_(other, 0.1)


def scale_and_add(mean, other):
    mean.mul_(0.9).add_(other, alpha=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_way_of_averaging_takes_it(dtype):
    model = make(mixing="causal").to(dtype)
    assert {value.dtype for value in model.state_dict().values()} == {
        dtype
    }  # so that no cast of all of them trips over it
    plain = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(3):
        plain.update_parameters(model)
    averages = [plain.module]
    for average in (lerp, scale_and_add):
        mean = copy.deepcopy(model)
        for name, value in mean.state_dict().items():
            average(value, model.state_dict()[name])
        averages.append(mean)
    for mean in averages:
        make(mixing="causal").to(dtype).load_state_dict(mean.state_dict())
        with pytest.raises(RuntimeError, match="mixing='causal'"):
            make().to(dtype).load_state_dict(mean.state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_files_in_which_it_is_of_bools_load(assign):
    saved, model, other = make(mixing="causal"), make(mixing="causal"), make()
    state = {name: value.bool() if name.endswith("meaning") else value for name, value in saved.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    assert torch.equal(model(X), saved(X)) and model[0].meaning.dtype == torch.float32
    assert state["0.meaning"].dtype == torch.bool  # the caller's
    with pytest.raises(RuntimeError, match="mixing='causal'"):
        other.load_state_dict(state, assign=assign)


@pytest.mark.parametrize("given", ["sequence", None, 3, (0, 1)], ids=str)
def test_what_is_no_tensor_is_refused_in_words(given):
    saved, model = make(), make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"0: `meaning` must be a tensor without numbers.*got"):
        model.load_state_dict({**saved.state_dict(), "0.meaning": given})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fp8_layers_say_it_too():
    wide, narrow = STLLinearFP8(STLLinear(8, 8, False)), STLLinearFP8(STLLinear(7, 8, False))
    wide.load_state_dict(STLLinearFP8(STLLinear(8, 8, False)).state_dict())
    with pytest.raises(RuntimeError, match=r"7→8.*8→8"):
        wide.load_state_dict(narrow.state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_distributed_checkpoints_keep_it(tmp_path):
    from torch.distributed import checkpoint

    model = make(mixing="causal")
    checkpoint.save(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    state = make(mixing="causal").state_dict()
    checkpoint.load(state, checkpoint_id=tmp_path, no_dist=True)
    fresh = make(mixing="causal")
    fresh.load_state_dict(state)
    assert torch.equal(fresh(X), model(X))
