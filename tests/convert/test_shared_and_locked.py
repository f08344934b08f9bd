"""If these fail, a layer under two names is mixed where one of them must not, or a model that cannot be copied is trusted."""

import threading

import pytest
import torch
from tiny_models import SEQUENCE
from torch import nn

from strassen_tile import STLConfig, STLLinear, check_mixing, convert, quantize_fp8
from strassen_tile.errors import ConversionError


class Towers(nn.Module):
    """A causal tower and one that may mix, with one layer for both."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Module(), nn.Module()
        self.decoder.ff = self.encoder.ff = nn.Linear(8, 8)

    def forward(self, x, y):
        return torch.tanh(self.decoder.ff(x.cumsum(1))) + x.cumsum(1), torch.tanh(self.encoder.ff(y))


INPUTS = torch.randn(2, 8, 8), torch.randn(2, 8, 8)


def test_a_shared_layer_is_forced_by_all_of_its_names_only():
    model = Towers()
    with pytest.raises(ConversionError, match=r"called decoder\.ff, encoder\.ff, and decoder\.ff is not asked for"):
        convert(model, SEQUENCE, example_inputs=INPUTS, force_mixing=["encoder.*"])
    assert type(model.decoder.ff) is nn.Linear
    done = convert(model, SEQUENCE, example_inputs=INPUTS, force_mixing=["encoder.*", "decoder.ff"])
    assert type(model.decoder.ff) is STLLinear and list(done.converted) == ["decoder.ff"]


class Nested(nn.Module):
    """Its mask is in a nest, where none of its modules is given one."""

    def __init__(self, lock=None, config=None):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.lock = lock
        if config is not None:
            self.up = STLLinear(8, 8, config=config)

    def forward(self, batch):
        x, hidden = batch["x"], batch["attention_mask"] == 0
        x = x + self.attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
        return self.head(x + self.down(self.up(x).relu()))[:, :, :2]


BATCH = ({"x": torch.randn(2, 10, 8), "attention_mask": torch.tensor([[1] * 10, [1] * 6 + [0] * 4])},)


def test_a_model_that_cannot_be_copied_is_not_trusted_with_padding():
    """It was held against itself, and found to be the same."""
    for lock in (None, threading.Lock()):
        with pytest.raises(ConversionError, match="no mask of the call tells it which rows are padding"):
            convert(Nested(lock), SEQUENCE, example_inputs=BATCH)
    with pytest.raises(ConversionError, match="Nested cannot be copied"):
        check_mixing(Nested(threading.Lock(), SEQUENCE), BATCH)
    assert not check_mixing(Nested(None, SEQUENCE), BATCH)


def test_padding_is_no_reason_to_leave_layers_whose_rows_stay_apart():
    done = convert(
        Nested(), STLConfig(mixing="none"), example_inputs=BATCH, layer_configs={"up": SEQUENCE, "down": SEQUENCE},
        filter_fn=lambda _, name: name in ("up", "down", "head"), dry_run=True,
    )  # fmt: skip
    assert list(done.converted) == ["head"]


def test_layers_in_fp8_are_to_be_checked_before():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    convert(model, SEQUENCE, example_inputs=INPUTS[0], filter_fn=lambda *_: True, force_mixing="*")
    quantize_fp8(model)
    with pytest.raises(ConversionError, match=r"0 is in fp8, .* check before quantize_fp8"):
        check_mixing(model, INPUTS[0])
