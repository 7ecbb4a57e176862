"""Export models in every form and record how far each export is from its model.

    python benchmarks/exports.py --model runs/quickstart/best --model runs/9m_cpu/best

Writes benchmarks/results/exports.json and the table in docs/exports.md. A row has the model, form, reader,
the largest difference of a logit, whether 64 greedy tokens are the same, and the size. Rows of llama.cpp are
omitted if it is not installed.
"""

import argparse
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, fill_table, markdown_table, provenance, write_result
from transformers import PreTrainedTokenizerBase

from tinystories_slm.export import ExportArgs, export
from tinystories_slm.export.checks import EquivalenceCheck, encode_default_prompt, greedy_ids, probe_ids
from tinystories_slm.model import TinyStoriesForCausalLM
from tinystories_slm.model_folder import load_model_folder

PAGE = ROOT / "docs" / "exports.md"
FORMS = (
    {"format": "custom"},
    {"format": "native"},
    {"format": "gguf", "quantization": "f32"},
    {"format": "gguf", "quantization": "f16"},
    {"format": "gguf", "quantization": "q8_0"},
    {"format": "onnx"},
)
PACKAGES = ("torch", "transformers", "gguf", "llama_cpp_python", "onnxruntime")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, action="append", help="model folder; repeatable")
    args = parser.parse_args()
    forms = [form for form in FORMS if find_spec(f"tinystories_slm.export.{form['format']}")]
    with_llama_cpp = find_spec("llama_cpp") is not None
    rows = []
    for name in args.model:
        model, tokenizer = load_model_folder(name, device="cpu")
        for form in forms:
            with tempfile.TemporaryDirectory() as scratch:
                folder = export(ExportArgs(model=name, output=Path(scratch) / "export", **form))
                checks = [
                    EquivalenceCheck(**check)
                    for check in json.loads((folder / "export.json").read_text())["checks"]
                ]
                if form["format"] == "gguf":
                    checks = checks[1:]  # the first compares equally rounded weights
                    if with_llama_cpp:
                        checks.append(llama_cpp_check(model, tokenizer, folder, form["quantization"]))
                if form["format"] == "onnx":  # the others compare its native intermediate
                    checks = [check for check in checks if check.name.startswith("onnx")]
                rows += [make_row(name, model, form["format"], folder, check) for check in checks]
    write_result("exports", {**provenance(PACKAGES), "rows": rows})
    table = format_table(rows)
    fill_table(PAGE, "python benchmarks/exports.py", table)
    print(table)
    if not with_llama_cpp:
        print("llama.cpp is omitted: llama_cpp is not installed; docs/exports.md has the command")


def make_row(
    name: str, model: TinyStoriesForCausalLM, format: str, folder: Path, check: EquivalenceCheck
) -> dict:
    """Return one row of the table; the size is that of the weight file."""
    files = [folder / check.file] if check.file else [path for path in folder.rglob("*") if path.is_file()]
    return {
        "model": f"{Path(name).parent.name} ({model.config.family})",
        "form": format,
        "loaded as": check.name.removesuffix(", with the model").replace("gguf ", "transformers, "),
        "max_difference": check.max_difference,
        "greedy_match": check.greedy_match,
        "MB": round(max(file.stat().st_size for file in files) / 1e6, 2),
    }


@torch.no_grad()
def llama_cpp_check(
    model: TinyStoriesForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, quantization: str
) -> EquivalenceCheck:
    """Compare logits and greedy tokens of llama.cpp with the model, as the export check does."""
    import llama_cpp

    llama = llama_cpp.Llama(
        str(folder / "model.gguf"),
        n_ctx=model.config.max_position_embeddings,
        logits_all=True,
        verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
    )
    ids = probe_ids(model, tokenizer)
    differences = []
    for text in ids:
        llama.reset()
        llama.eval(text.tolist())
        logits = torch.from_numpy(np.array(llama.scores[: len(text)]))
        differences.append((logits - model(text[None]).logits[0]).abs().max().item())
    start = encode_default_prompt(tokenizer)
    ours = greedy_ids(model, start, ids.shape[1])
    llama.reset()
    generated = list(start)
    for token in llama.generate(start, temp=0.0):
        generated.append(token)
        if token == tokenizer.eos_token_id or len(generated) == ids.shape[1]:
            break
    llama.close()
    return EquivalenceCheck(
        name=f"llama.cpp, {quantization}", max_difference=max(differences), greedy_match=generated == ours
    )


def format_table(rows: list[dict]) -> str:
    return markdown_table(
        ["model", "form", "loaded as", "largest logits difference", "greedy story", "MB"],
        [
            [
                one["model"],
                one["form"],
                one["loaded as"],
                f"{one['max_difference']:.2g}",
                "the same" if one["greedy_match"] else "another",
                one["MB"],
            ]
            for one in rows
        ],
    )


if __name__ == "__main__":
    main()
