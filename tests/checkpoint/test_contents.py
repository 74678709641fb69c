"""What becomes of the files of a model folder, by their names alone."""

from __future__ import annotations

import pytest

from pessa_cli.checkpoint.contents import ADAPTER, COPY, HIDDEN, TRAINING, UNFINISHED, contents_of, left_out_text

OWN = {"config.json", "model.safetensors", "model.safetensors.index.json"}
# Lists of files as they are found: each ends with what is copied, left out, and unknown.
FOLDERS: dict[str, tuple[str, list[str], dict[str, str], list[str]]] = {
    "a checkpoint of Trainer": (
        "config.json model.safetensors optimizer.pt scheduler.pt rng_state.pth rng_state_0.pth scaler.pt "
        "training_args.bin trainer_state.json tokenizer.json runs/a/events.out.tfevents.1 latest zero_to_fp32.py "
        "global_step500/mp_rank_00_model_states.pt checkpoint-500/model.safetensors __pycache__/a.pyc modeling.py",
        ["modeling.py", "tokenizer.json"],
        {
            **dict.fromkeys(["__pycache__/", "checkpoint-500/", "global_step500/", "latest", "optimizer.pt"], TRAINING),
            **dict.fromkeys(["rng_state.pth", "rng_state_0.pth", "runs/", "scaler.pt", "scheduler.pt"], TRAINING),
            **dict.fromkeys(["trainer_state.json", "training_args.bin", "zero_to_fp32.py"], TRAINING),
        },
        [],
    ),
    "parts of FSDP and accelerate": (
        "config.json model.safetensors pytorch_model_fsdp_0/__0_0.distcp optimizer_0/__0_0.distcp optimizer.bin "
        "scheduler.bin random_states_0.pkl sampler.bin model_head.pkl",
        ["model_head.pkl"],  # the classifier of SetFit
        {
            **dict.fromkeys(["optimizer.bin", "optimizer_0/", "pytorch_model_fsdp_0/"], TRAINING),
            **dict.fromkeys(["random_states_0.pkl", "sampler.bin", "scheduler.bin"], TRAINING),
        },
        [],
    ),
    "a repository in all formats": (
        "config.json model.safetensors pytorch_model.bin tf_model.h5 flax_model.msgpack rust_model.ot model.onnx "
        "onnx/model.onnx onnx/model.onnx_data onnx/config.json openvino/openvino_model.bin model-q4.gguf "
        "original/consolidated.00.pth model.fp16.safetensors model.safetensors.index.fp32.json "
        "model.fp32-00001-of-00002.safetensors vocab.json coreml/a.mlpackage/Data/weight.bin",
        ["vocab.json"],
        dict.fromkeys(
            (
                *("coreml/", "flax_model.msgpack", "model-q4.gguf", "model.fp16.safetensors", "model.onnx", "onnx/"),
                *("model.fp32-00001-of-00002.safetensors", "model.safetensors.index.fp32.json", "openvino/"),
                *("original/", "pytorch_model.bin", "rust_model.ot", "tf_model.h5"),
            ),
            COPY,
        ),
        [],
    ),
    "sentence-transformers": (
        "config.json model.safetensors modules.json 1_Pooling/config.json 2_Dense/config.json "
        "2_Dense/model.safetensors 3_Dense/pytorch_model.bin query/0_Dense/model.safetensors onnx/model.onnx",
        [
            *("1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
            *("3_Dense/pytorch_model.bin", "modules.json", "query/0_Dense/model.safetensors"),
        ],
        {"onnx/": COPY},
        [],
    ),
    "BGE-M3, MMS, and a speech recogniser with a language model": (
        "config.json model.safetensors colbert_linear.pt sparse_linear.pt adapter.eng.safetensors adapter.eng.bin "
        "language_model/5gram.bin language_model/unigrams.txt",
        [
            *("adapter.eng.bin", "adapter.eng.safetensors", "colbert_linear.pt", "language_model/5gram.bin"),
            *("language_model/unigrams.txt", "sparse_linear.pt"),
        ],
        {},
        [],
    ),
    "an adapter beside the weights": (
        "config.json model.safetensors adapter_config.json adapter_model.safetensors adapter_model.bin",
        [],
        dict.fromkeys(["adapter_config.json", "adapter_model.bin", "adapter_model.safetensors"], ADAPTER),
        [],
    ),
    "older and unfinished downloads": (
        "config.json model.safetensors model-00001-of-00002.safetensors vocab.json.incomplete vocab.json.part",
        [],
        {
            "model-00001-of-00002.safetensors": COPY,
            **dict.fromkeys(["vocab.json.incomplete", "vocab.json.part"], UNFINISHED),
        },
        [],
    ),
    "weights of nobody": (
        "config.json model.safetensors extra.safetensors head.pt tower/model.safetensors tower/config.json",
        ["tower/config.json"],
        {},
        ["extra.safetensors", "head.pt", "tower/model.safetensors"],
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_what_becomes_of_files(case: str) -> None:
    files, copied, left_out, unknown = FOLDERS[case]
    found = contents_of(files.split(), OWN)
    assert (found.copied, found.left_out, found.unknown) == (copied, left_out, unknown)


def test_what_is_left_out_in_one_line_for_each_reason() -> None:
    left_out = {f"{letter}.pt": TRAINING for letter in "abcdef"} | {".git/": HIDDEN, "onnx/": COPY}
    text = left_out_text(left_out)
    assert text == f"  a.pt, b.pt, c.pt, d.pt and 2 more: {TRAINING}\n  onnx/: {COPY}"
    assert left_out_text({".git/": HIDDEN}) == ""
