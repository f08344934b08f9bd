"""Products of real layers: what they are fed, without padding, and no row both fitted to and measured on."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel

from strassen_tile.errors import ConfigError
from strassen_tile.experiments import real_layers
from strassen_tile.integrations import pretrained


@pytest.fixture
def model(monkeypatch):
    """A BERT of two layers in MiniLM's place, whose tokens are the letters of a piece, the first few of them."""
    torch.manual_seed(0)
    lengths = []
    config = BertConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=128)
    model = BertModel(config).eval()

    def tokens(texts, *, max_length, **options):
        rows = [
            [ord(letter) % 128 for letter in text[: 3 + len(text) % 7 + number % 5]]
            for number, text in enumerate(texts)
        ]
        lengths.extend(map(len, rows))
        width = max(lengths)
        assert width <= max_length
        return {
            "input_ids": torch.tensor([row + [0] * (width - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        }

    monkeypatch.setattr(pretrained, "pretrained", lambda name: SimpleNamespace(model=model, tokenizer=tokens))
    return model, lengths


LAYERS = ("0.attention.self.query", "1.output.dense")


def test_rows_are_what_layers_are_fed(model) -> None:
    """Padding counted as rows, pieces read together mixed up, or a weight the wrong way round."""
    model, lengths = model
    fed, made = {name: [] for name in LAYERS}, {name: [] for name in LAYERS}

    def note(name, args, out) -> None:
        fed[name].append(args[0])
        made[name].append(out)

    for name in LAYERS:
        module = model.get_submodule(f"encoder.layer.{name}")
        module.register_forward_hook(lambda _, args, out, name=name: note(name, args, out))
    found = real_layers.minilm(LAYERS, rows=10_000, pieces=70)  # more than are read together
    for problem, name in zip(found, LAYERS, strict=True):
        assert name in problem.name
        x, y = torch.cat(fed[name]), torch.cat(made[name])
        assert len(x) == 70
        rows = {tuple(row.tolist()): out for row, out in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True)}
        bias = model.get_submodule(f"encoder.layer.{name}").bias
        for part in (problem.x, problem.rows):
            expected = torch.stack([rows[tuple(row.tolist())] for row in part])
            torch.testing.assert_close(part @ problem.w + bias, expected)
        assert len(problem.rows) + len(problem.x) == sum(lengths) < x.shape[0] * x.shape[1]
        assert len(problem.rows) == sum(lengths[:35])
    lengths.clear()
    few = real_layers.minilm(LAYERS, rows=20, pieces=70)[0]
    assert len(few.x) == len(few.rows) == 20


@pytest.mark.usefixtures("model")
def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"no layers 7\.output\.dense"):
        real_layers.minilm(("7.output.dense",))
