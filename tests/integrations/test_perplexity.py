"""If these fail, a perplexity that stands beside others' is of other tokens, or of other windows, than it says."""

import json
import math

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from strassen_tile.errors import ConfigError, DataError
from strassen_tile.integrations.perplexity import main, perplexity, text_of

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, max_position_embeddings=64, initializer_range=0.5)).eval()


def scored_alone(model, tokens, context, stride):
    """Token by token: the loss of each in the first window that has it."""
    losses = {}
    for start in range(0, len(tokens) - context + 1, stride):
        for at in range(1, context):
            if start + at not in losses:
                with torch.no_grad():
                    logits = model(input_ids=tokens[None, start : start + at]).logits[0, -1].double()
                losses[start + at] = -float(logits.log_softmax(-1)[tokens[start + at]])
    return losses


@pytest.mark.parametrize(("context", "stride", "batch"), [(8, 8, 1), (8, 8, 3), (9, 4, 2), (16, 1, 5), (30, 7, 1)])
def test_each_token_is_scored_once_in_the_first_window_that_has_it(model, context, stride, batch):
    tokens = torch.randint(40, (37,), generator=torch.Generator().manual_seed(1))
    found = perplexity(model, tokens, context, stride, batch)
    each = scored_alone(model, tokens, context, stride)
    # The first token of a window that overlaps none is known to nobody, and not scored.
    expected = [loss for at, loss in each.items() if stride < context or at % stride]
    assert found.scored == len(expected)
    assert found.nats == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.nats))


def test_what_makes_no_sense_is_refused(model):
    tokens = torch.zeros(70, dtype=torch.long)
    for context, stride, said in ((8, 9, "stride from 1 to context"), (8, 0, "stride"), (1, 1, "context must be 2")):
        with pytest.raises(ConfigError, match=said):
            perplexity(model, tokens, context, stride)
    with pytest.raises(ConfigError, match="the model has 64 positions"):
        perplexity(model, tokens, 65, 65)
    with pytest.raises(DataError, match="the text has 7 tokens, and a window 8"):
        perplexity(model, tokens[:7], 8, 8)


def test_the_command_names_split_context_and_stride(model, tmp_path, capsys):
    letters = {letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz \n.?")}
    tokens = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    hf.PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="?").save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    text = tmp_path / "text"
    text.mkdir()
    (text / "train.txt").write_text("never read")
    (text / "test-1.txt").write_text("the cat sat on the mat.")
    (text / "test-2.txt").write_text("it slept.")
    assert text_of(str(text), "test") == "the cat sat on the mat.\n\nit slept."
    assert text_of(str(text / "train.txt"), "train") == "never read"
    command = [
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(text),
        "--context",
        "12",
        "--out",
        str(tmp_path / "row.json"),
    ]
    assert main([*command, "--stride", "6"]) == 0
    (row,) = json.loads((tmp_path / "row.json").read_text())
    ids = torch.tensor([letters[letter] for letter in text_of(str(text), "test")])
    expected = perplexity(model, ids, 12, 6)
    assert row["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert (row["split"], row["context"], row["stride"], row["tokens"]) == ("test", 12, 6, expected.scored)
    assert "split test, context 12, stride 6" in capsys.readouterr().out
    assert main([*command, "--stride", "0"]) == 1
    assert "stride from 1 to context" in capsys.readouterr().err
    assert main([*command[:4], "--split", "validation"]) == 1
    assert "has no text of a split 'validation'" in capsys.readouterr().err
    assert main([*command[:4]]) == 1  # 2048 positions are wanted
    assert "the model has 64 positions" in capsys.readouterr().err
