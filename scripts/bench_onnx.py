"""Compare a pruned Whisper or BERT with its original in onnxruntime: encoders, and a decoding step with a cache.

The original is exported twice: with torch's exporter and transformers' attention (`stock`), and by pessa, whose graphs
are faster for unpruned models too. All graphs run in turns in one process on the same inputs. The figures are medians
of times, and medians of the ratios within a round. CPU time is that of all threads, for machines with other load.

    python scripts/bench_onnx.py models/minilm out/
    python scripts/bench_onnx.py models/whisper-tiny.en out/ [--threads 2 --rounds 41 --past 32]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import AutoConfig, AutoModel, DynamicCache, EncoderDecoderCache, WhisperForConditionalGeneration

from pessa_cli.exports.onnx import export_onnx

ENCODER, STEP, TEXT = "encoder_model.onnx", "decoder_with_past_model.onnx", "model.onnx"


class StockEncoder(nn.Module):
    """The encoder with transformers' own attention."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.model.encoder

    def forward(self, input_features: Tensor) -> Any:
        return self.encoder(input_features).last_hidden_state


class StockStep(nn.Module):
    """The decoder with transformers' own attention and caches."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.head = model.model.decoder, model.proj_out

    def forward(self, input_ids: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        own = DynamicCache(list(zip(past[::4], past[1::4], strict=True)))
        frames = DynamicCache(list(zip(past[2::4], past[3::4], strict=True)))
        cache = EncoderDecoderCache(own, frames)
        found = self.decoder(input_ids, encoder_hidden_states=past[2], past_key_values=cache, use_cache=True)
        grown = [each for layer in cache.self_attention_cache.layers for each in (layer.keys, layer.values)]
        return self.head(found.last_hidden_state), *grown


class StockText(nn.Module):
    """BERT with transformers' own attention."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Any:
        return self.model(input_ids, attention_mask, token_type_ids).last_hidden_state


def export_stock_text(folder: Path, out: Path) -> None:
    """Export the original BERT with torch's exporter, as `export_stock` does for Whisper."""
    names, tokens = ["input_ids", "attention_mask", "token_type_ids"], torch.ones(2, 9, dtype=torch.long)
    axes = {0: Dim("batch_size"), 1: Dim("sequence_length")}
    module = StockText(AutoModel.from_pretrained(folder, dtype=torch.float32)).eval()
    program = torch.onnx.export(
        module, (tokens,) * 3, dynamo=True, input_names=names, dynamic_shapes=(axes,) * 3, verbose=False
    )
    assert program is not None
    out.mkdir()
    program.save(out / TEXT)


def export_stock(folder: Path, out: Path) -> None:
    """Export the original with torch's exporter, with the same names and dynamic axes as pessa's export."""
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    config = model.config
    heads, head_dim = config.decoder_attention_heads, config.d_model // config.decoder_attention_heads
    names = [
        f"{i}.{kind}.{side}"
        for i in range(config.decoder_layers)
        for kind in ("decoder", "encoder")
        for side in ("key", "value")
    ]
    past = [torch.randn(2, heads, 5 if "decoder" in name else 7, head_dim) for name in names]
    batch, tokens, cached, source = Dim("batch_size"), Dim("tokens"), Dim("past_tokens"), Dim("frames")
    past_shapes = [{0: batch, 2: cached if "decoder" in name else source} for name in names]
    features = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)
    out.mkdir()
    for file, module, samples, shapes, inputs in (
        (ENCODER, StockEncoder(model), (features,), ({0: batch},), ["input_features"]),
        (
            STEP,
            StockStep(model),
            (torch.ones(2, 3, dtype=torch.long), past),
            ({0: batch, 1: tokens}, past_shapes),
            ["input_ids", *(f"past_key_values.{name}" for name in names)],
        ),
    ):
        program = torch.onnx.export(
            module.eval(), samples, dynamo=True, input_names=inputs, dynamic_shapes=shapes, verbose=False
        )
        assert program is not None
        program.save(out / file)


def session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning threads would count as CPU time
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def inputs_of(running: Any, past: int, frames: int) -> dict[str, Any]:
    """Return random inputs in the shapes that a graph expects, with batch size 1 and one new token."""
    sizes = {"past_decoder_sequence_length": past, "past_tokens": past, "encoder_sequence_length": frames}
    sizes |= {"frames": frames, "sequence_length": frames}
    arrays = {}
    for each in running.get_inputs():
        shape = [axis if isinstance(axis, int) else sizes.get(axis, 1) for axis in each.shape]
        arrays[each.name] = (torch.ones(shape, dtype=torch.long) if "int" in each.type else torch.randn(shape)).numpy()
    return arrays


def compare(file: str, folders: dict[str, Path], args: argparse.Namespace, frames: int) -> None:
    """Print one row of the table per folder."""
    sessions = {name: session(folder / file, args.threads) for name, folder in folders.items()}
    inputs = {name: inputs_of(running, args.past, frames) for name, running in sessions.items()}
    wall: dict[str, list[float]] = {name: [] for name in sessions}
    cpu: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(args.rounds if file != STEP else 10 * args.rounds):
        for name, running in sessions.items():
            start, busy = time.perf_counter(), time.process_time()
            running.run(None, inputs[name])
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - busy)
    for name in sessions:
        cells = [f"{statistics.median(times[name]) * 1e3:.1f}" for times in (wall, cpu)]
        for other in ("stock", "original"):
            cells += [f"{_ratio(times[name], times[other]):.2f}" for times in (wall, cpu)]
        cache = sum(array.nbytes for key, array in inputs[name].items() if "past" in key)
        size = (folders[name] / file).stat().st_size
        what = f"{file}, {frames} tokens" if file == TEXT else file
        print(f"| {what} | {name} | {' | '.join(cells)} | {cache / 1e6:.1f} | {size / 1e6:.0f} |", flush=True)


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("pruned", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--past", type=int, default=32)
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        folders = {"stock": Path(place) / "stock", "original": Path(place) / "original"}
        kind = AutoConfig.from_pretrained(args.original)
        text = kind.model_type == "bert"
        (export_stock_text if text else export_stock)(args.original, folders["stock"])
        export_onnx(args.original, folders["original"])
        for folder in args.pruned:
            folders[folder.name] = Path(place) / f"pruned-{folder.name}"
            export_onnx(folder, folders[folder.name])
        print("| graph | model | ms | CPU ms | of stock | CPU | of original | CPU | cache MB | file MB |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for tokens in (16, 128, 512) if text else ():
            compare(TEXT, folders, args, tokens)
        for file in () if text else (ENCODER, STEP):
            compare(file, folders, args, kind.max_source_positions)


if __name__ == "__main__":
    main()
