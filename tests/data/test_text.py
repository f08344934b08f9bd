"""If these fail, a language model is tested on what it was trained on, or reads other text than was given."""

import json

import pytest
import torch

from strassen_tile.data import documents, text
from strassen_tile.data.pieces import Pieces, Windows
from strassen_tile.data.prose import standard_library, standard_library_code
from strassen_tile.data.text import load_text
from strassen_tile.errors import DataError


@pytest.fixture(scope="module")
def python():
    return load_text("python", context=128)


def test_every_machine_has_prose(python):
    sizes = {name: len(getattr(python, name).tokens) for name in ("train", "validation", "test")}
    assert sizes["train"] > 1_000_000
    assert min(sizes.values()) > 20_000
    assert (python.vocabulary, python.tokenizer) == (256, "bytes")
    for name, size in sizes.items():
        assert getattr(python, name).size == size
    said = bytes(python.train.tokens[:2000].tolist()).decode("utf-8", errors="ignore")
    assert " the " in said
    assert python.digest == load_text("python").digest


def test_a_document_is_on_one_side(python):
    documents = standard_library()
    for name in ("train", "validation", "test"):
        mine = [content for at, content in documents.items() if text._side(at) == name]
        whole = b"".join(content.encode("utf-8", errors="replace").replace(b"\0", b" ") + b"\0" for content in mine)
        assert len(mine) > 15
        assert bytes(getattr(python, name).tokens.tolist()) == whole


def test_every_machine_has_code():
    code = load_text("python-code", context=128)
    assert code.train.size > 5_000_000
    assert min(code.validation.size, code.test.size) > 100_000
    assert code.digest != load_text("python").digest
    assert "json.decoder" in standard_library_code()
    assert "def " in bytes(code.train.tokens[:20000].tolist()).decode("utf-8", errors="ignore")


def folder(tmp_path, **files):
    for name, content in files.items():
        path = tmp_path / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(tmp_path)


def test_parts_named_by_files_are_taken(tmp_path):
    lines = "".join(json.dumps({"text": f"line {i}"}) + "\n\n" for i in range(3))
    where = folder(
        tmp_path,
        train__a_txt="Ärger\0",
        train__b_jsonl=lines,
        validation_txt="seen",
        test__c_md="later",
        other_csv="no",
    )
    splits = load_text(where)
    assert bytes(splits.train.tokens.tolist()) == "Ärger \0line 0\0line 1\0line 2\0".encode()
    assert bytes(splits.validation.tokens.tolist()) == b"seen\0"
    assert bytes(splits.test.tokens.tolist()) == b"later\0"
    assert splits.train.size == len(splits.train.tokens)
    assert len(load_text(where, limit=8).train.tokens) == 8
    assert load_text(where, limit=8).validation.size == 5
    assert bytes(load_text(where, limit=11).train.tokens.tolist()) == "Ärger \0li\0".encode()


def test_documents_without_a_part_are_parted_by_name(tmp_path):
    lines = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(400))
    splits = load_text(folder(tmp_path, all_jsonl=lines))
    counts = [bytes(part.tokens.tolist()).count(b"\0") for part in (splits.train, splits.validation, splits.test)]
    assert sum(counts) == 400
    assert all(8 <= count <= 36 for count in counts[1:])
    little = load_text(str(tmp_path), limit=40)
    assert torch.equal(little.validation.tokens, splits.validation.tokens)
    assert torch.equal(little.test.tokens, splits.test.tokens) and len(little.train.tokens) == 40
    more = lines + json.dumps({"text": "one more"}) + "\n"
    (tmp_path / "all.jsonl").write_text(more)
    again = load_text(str(tmp_path))
    assert all(
        bytes(getattr(splits, name).tokens.tolist()) in bytes(getattr(again, name).tokens.tolist())
        for name in ("train", "validation", "test")
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a_csv": "x"}, "has no files that end in .txt"),
        ({"train_txt": "long enough to train on", "test_txt": "yes, this too"}, "the validation text has 0 tokens"),
        (
            {"train_txt": "x", "validation_txt": "a" * 9, "test_txt": "a" * 9},
            "the train text has 2 tokens, and a piece is 5",
        ),
        ({"train_jsonl": '{"text": 3}'}, 'line 1 has no "text"'),
        ({"train_jsonl": "{"}, "cannot be read as text"),
    ],
)
def test_what_is_no_text_is_one_line(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        load_text(folder(tmp_path, **files), context=5)
    with pytest.raises(DataError, match="no such file or folder; give one, python, python-code, or hub:NAME"):
        load_text(str(tmp_path / "nowhere"))


def test_no_tokenizer_is_one_line(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(DataError, match=f"tokenizer={tmp_path}: cannot be loaded"):
        load_text("python", tokenizer=str(tmp_path))


def test_a_tokenizer_of_transformers(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<end>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="?").save_pretrained(
        tmp_path / "t"
    )
    where = folder(tmp_path / "d", train_txt="a b a", validation_txt="b", test_txt="a c")
    splits = load_text(where, tokenizer=str(tmp_path / "t"))
    assert splits.train.tokens.tolist() == [1, 2, 1, 0]
    assert splits.test.tokens.tolist() == [1, 3, 0]
    assert (splits.train.size, splits.vocabulary, splits.lossy) == (6, 4, True)  # of "a c" not all is there
    where = folder(tmp_path / "e", train_txt="a b a", validation_txt="b", test_txt="a b")
    assert not load_text(where, tokenizer=str(tmp_path / "t")).lossy
    for name, held in (("f", "a c"), ("g", "a\n  b")):  # unknown, or without its spaces, in what is validated on alone
        where = folder(tmp_path / name, train_txt="a b a", validation_txt=held, test_txt="a b")
        assert load_text(where, tokenizer=str(tmp_path / "t")).lossy


def test_what_else_is_in_a_folder(tmp_path):
    """Folders and broken links of such a name are passed over, suffixes may be large; another encoding is refused."""
    where = folder(tmp_path, train_txt="a b a", validation_txt="b", test_txt="a c")
    (tmp_path / "chapter.txt").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "train-2.TXT").write_text("more", encoding="utf-8-sig")
    assert load_text(where).train.size == 11
    (tmp_path / "train-3.txt").write_bytes("Zürich".encode("latin-1"))
    with pytest.raises(DataError, match=r"train-3.txt: is not UTF-8 .* at byte 1"):
        load_text(where)


def test_pieces_follow_each_other_and_windows_are_the_seeds():
    tokens = torch.arange(23, dtype=torch.uint8)
    pieces = Pieces(tokens, 5)
    assert len(pieces) == 4
    assert [piece["input_ids"].tolist() for piece in (pieces[0], pieces[3])] == [[0, 1, 2, 3, 4], [15, 16, 17, 18, 19]]
    assert pieces[3]["labels"].tolist() == [16, 17, 18, 19, 20]
    few = Pieces(tokens, 5, most=2)  # from all over, not from the start
    assert len(few) == 2
    assert few[0]["input_ids"][0] == tokens[0]
    assert few[1]["input_ids"][0] == tokens[len(pieces) // 2 * 5]
    windows = Windows(tokens, 5, 400, seed=3)
    first = [windows[i]["input_ids"].tolist() for i in range(400)]
    assert {piece[0] for piece in first} == set(range(18))
    assert all(windows[i]["labels"].tolist() == [n + 1 for n in first[i]] for i in range(400))
    windows.set_epoch(1)
    assert [windows[i]["input_ids"].tolist() for i in range(400)] != first
    windows.set_epoch(0)
    torch.manual_seed(7)  # of no consequence
    assert [windows[i]["input_ids"].tolist() for i in range(400)] == first
    assert [Windows(tokens, 5, 400, seed=4)[i]["input_ids"].tolist() for i in range(400)] != first


def test_a_stream_of_the_hub_ends_with_the_limit(monkeypatch):
    class Stream:
        def __init__(self, rows, document="document {}"):
            self.rows, self.read, self.document = rows, 0, document

        def __iter__(self):
            for i in range(self.rows):
                self.read += 1
                yield {"text": self.document.format(i)}

    class Datasets:
        parts = {}  # noqa: RUF012

        @staticmethod
        def load_dataset(name, config, streaming):
            assert (name, config, streaming) == ("some/text", "en", True)
            return Datasets.parts

    monkeypatch.setattr(documents, "need", lambda *_: Datasets)
    Datasets.parts = {"train": Stream(100_000), "validation": Stream(30), "test": Stream(20)}
    splits = load_text("hub:some/text:en", limit=1000)
    assert 1000 <= splits.train.size < 1020
    assert Datasets.parts["train"].read < 100
    assert bytes(splits.test.tokens.tolist()).count(b"\0") == 20
    Datasets.parts = {"train": Stream(100_000)}
    splits = load_text("hub:some/text:en", limit=10_000)
    assert Datasets.parts["train"].read < 1200
    assert splits.validation.size and splits.test.size
    for limit in range(200, 212):  # a letter of three bytes that does not fit leaves some that no document fills
        Datasets.parts = {"train": Stream(100_000, "\u6f22\u5b57"), "validation": Stream(30), "test": Stream(20)}
        splits = load_text("hub:some/text:en", limit=limit)
        assert limit - 3 <= len(splits.train.tokens) <= limit
        assert Datasets.parts["train"].read < 60
    Datasets.parts = {"train": [{"body": "x"}]}
    with pytest.raises(DataError, match=r'cannot be loaded .ValueError: train, row 0 has no "text"'):
        load_text("hub:some/text:en")


def test_a_text_that_is_tested_on_itself_is_said(tmp_path):
    for part in ("train", "validation", "test"):
        (tmp_path / f"{part}.txt").write_text("once and again, " + ("or not" if part == "validation" else ""))
    (remark,) = load_text(str(tmp_path)).remarks()
    assert remark.startswith("The test text is the training text")
    (tmp_path / "test.txt").write_text("another, ")
    assert load_text(str(tmp_path)).remarks() == []
