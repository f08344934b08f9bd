"""The pages that users copy from, run as they stand."""

import re
from pathlib import Path

import pytest
import torch

hf = pytest.importorskip("transformers")
from tiny_transformers import built  # noqa: E402

import strassen_tile as st  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs"
WORDS = "the a cat dog sat ran on under mat house red blue big small and then it was very quick"


def blocks(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL))


@pytest.mark.slow
def test_your_own_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]))
    hf.BertTokenizerFast("vocab.txt").save_pretrained("my-model")
    built("bert").save_pretrained("my-model")
    built("llama").save_pretrained("my-language-model")
    generator = torch.Generator().manual_seed(0)
    lines = [[WORDS.split()[i] for i in torch.randint(0, 20, (n,), generator=generator)] for n in range(9, 25)]
    Path("my-text.txt").write_text("\n".join(map(" ".join, lines)))
    names: dict[str, object] = {}
    exec(compile(blocks("your-own-model.md"), "your-own-model.md", "exec"), names)
    trained, again = names["model"], names["again"]
    assert sum(isinstance(module, st.STLLinear) for module in again.modules()) == 13
    assert sum(isinstance(module, st.STLLinear) for module in trained.modules()) == 14
    x = torch.randn(3, 9, 64)
    assert torch.equal(names["same"](x), names["encoder"](x))
