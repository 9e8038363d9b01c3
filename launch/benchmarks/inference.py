"""The inference suite: every export beside the dense model: bytes, speed, difference of logits.

A Llama with random weights is pruned by magnitude, or loses a share of its MLP channels, is written
by the export's own code and loaded again. Speed depends on shapes and zeros, not on what the model
knows. `generate` answers one prompt and several, dense and exported models in turn; the forward
pass of a longer prompt is timed apart. Dense is the hf export, which zeros do not change; packed
loads as the same model, so only its bytes are shown. A ratio is to the dense model of the same
dtype.

Break-even: one matrix as CSR against dense, by sparsity and batch.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from launch.benchmarks.shapes import Shape, load_shapes
from launch.benchmarks.timing import Side, alternate, ratios, summary
from pipeline.export import packed, semi_structured
from pipeline.export.csr import CsrLinear
from pipeline.export.formats import FORMATS, logits_difference, prepared
from pipeline.models.prunable import apply_masks, decoder_layers, prunable_weights
from pipeline.sparsity.threshold import masks_by_score

DENSE = "dense"
GOALS = {("csr", 0.95): 2.0, ("csr", 0.9): 1.3}
"""Least tokens a second of the dense model's, at each batch of decode."""
NARROW_GOAL = 0.9
"""Least speed-up of the narrow model, of the ratio of FLOPs."""
PACKED_GOAL = 6.0
"""Least bits of a dense bf16 weight to those of a packed one at a sparsity of 0.9."""
PROMPT_TOKENS = 4
"""Of what `generate` answers."""


@dataclass(frozen=True, kw_only=True)
class Model(Shape):
    """A Llama and how it is timed."""

    batch_sizes: list[int]
    """Prompts answered at once."""
    new_tokens: int
    """Of each answer."""
    prefill_tokens: int
    """Of the prompt that is timed alone."""
    num_rounds: int
    """Samples of each side."""
    dtypes: list[str]
    """Of the weights."""
    sparsities: list[float]
    """Of csr and packed."""
    narrow_mlp: float
    """Share of the MLP channels that narrow loses."""


@dataclass(frozen=True, kw_only=True)
class Models:
    """What the suite measures."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    models: dict[str, Model]
    """Timed."""
    break_even_sparsities: list[float]
    """Of one matrix of the first model on a CPU."""


@dataclass
class Loaded:
    """An export that was written and loaded again."""

    model: LlamaForCausalLM | None
    """None: not timed."""
    row: dict
    """What is told about it."""


def run(config: Path, save: Callable[[dict], None]) -> dict:
    """Measures every model of a YAML file.

    Raises:
        UserError: The file is at fault.
    """
    wanted = load_shapes(config, Models)
    disable_progress_bar()
    result: dict = {"models": {}, "goals": []}
    for name, shape in wanted.models.items():
        if shape.device == "cuda" and not torch.cuda.is_available():
            result["models"][name] = {"not_run": "no CUDA device"}
            continue
        if "break_even" not in result and shape.device == "cpu":
            result["break_even"] = break_even(shape, wanted.break_even_sparsities)
        result["models"][name] = measure(shape)
        result["goals"] = goals(result["models"])
        save(result)
        print(f"{name}: measured", flush=True)
    return result


@torch.inference_mode()
def measure(shape: Model) -> dict:
    """Everything about one model."""
    exports = load_exports(shape)
    sides = {index: e.model for index, e in enumerate(exports) if e.model is not None}
    for batch_size in shape.batch_sizes:
        decoders = {i: decoder(model, batch_size, shape) for i, model in sides.items()}
        taken = timed(decoders, shape)
        note(exports, taken, f"decode_{batch_size}", batch_size * shape.new_tokens)
    prefills = {i: Side(partial(prefill, model, shape), once=True) for i, model in sides.items()}
    taken = timed(prefills, shape)
    note(exports, taken, "prefill", shape.prefill_tokens)
    num_prunable = sum(size.numel() for size in shape.prunable_shapes().values())
    return {
        "device": shape.device,
        "num_prunable_weights": num_prunable,
        "num_weights": sum(p.numel() for p in shape.model("meta").parameters()),
        "batch_sizes": shape.batch_sizes,
        "new_tokens": shape.new_tokens,
        "prefill_tokens": shape.prefill_tokens,
        "num_rounds": shape.num_rounds,
        "exports": [export.row for export in exports],
    }


def load_exports(shape: Model) -> list[Loaded]:
    """Writes and loads every export; the dense model of a dtype comes before its exports."""
    exports = []
    for dtype in shape.dtypes:
        exports.append(_export(DENSE, 0.0, random_llama(shape, dtype), shape))
        for sparsity in shape.sparsities if shape.device == "cpu" else ():
            pruned = random_llama(shape, dtype, sparsity)
            exports += [_export(name, sparsity, pruned, shape) for name in ("packed", "csr")]
        if shape.device == "cuda" and semi_structured.missing() is None:
            pruned = random_llama(shape, dtype, 0.5, "2:4")
            exports.append(_export("semi_structured", 0.5, pruned, shape))
        without = random_llama(shape, dtype)
        drop_channels(without, shape.narrow_mlp)
        exports.append(_export("narrow", shape.narrow_mlp, without, shape))
    return exports


def _export(name: str, sparsity: float, model: LlamaForCausalLM, shape: Model) -> Loaded:
    """One export of a model. `sparsity`: of narrow, the share of the MLP channels."""
    format_name = "hf" if name == DENSE else name
    written = prepared(format_name, model, width_multiple=32)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        FORMATS[format_name].save(written, folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        loaded = (
            semi_structured.load(folder)
            if name == "semi_structured"
            else FORMATS[format_name].load(folder).to(shape.device)
        )
        prunable_ratio = packed.measure(folder).prunable_ratio if name == "packed" else None
    prompt = torch.arange(shape.prefill_tokens) % shape.vocab_size
    difference, largest = logits_difference(model, loaded, [prompt.tolist()])
    row = {
        "export": name,
        "sparsity": sparsity,
        "dtype": str(model.dtype).removeprefix("torch."),
        "bytes": size,
        "flop_ratio": flops(shape.model("meta")) / flops(written),
        "largest_logit_difference": difference,
        "largest_logit": largest,
    }
    if prunable_ratio is not None:
        row["prunable_ratio"] = prunable_ratio
    return Loaded(None if name == "packed" else loaded, row)


def random_llama(
    shape: Model, dtype: str, sparsity: float = 0.0, scope: str = "matrix"
) -> LlamaForCausalLM:
    """The same random Llama each time, pruned by magnitude."""
    torch.manual_seed(0)
    model = shape.model("cpu").eval()
    for parameter in model.parameters():  # alone: rotary frequencies stay fp32, as when loaded
        parameter.data = parameter.data.to(getattr(torch, dtype))
    if sparsity:
        scores = {n: w.detach().float().abs() for n, w in prunable_weights(model).items()}
        apply_masks(model, masks_by_score(scores, sparsity, scope))
    return model


def drop_channels(model: LlamaForCausalLM, share: float) -> None:
    """Zeroes the last channels of every MLP."""
    for layer in decoder_layers(model):
        kept = round((1 - share) * layer.mlp.down_proj.in_features)
        layer.mlp.down_proj.weight[:, kept:] = 0
        layer.mlp.gate_proj.weight[kept:] = 0
        layer.mlp.up_proj.weight[kept:] = 0


def flops(model: LlamaForCausalLM) -> int:
    """Multiplications and additions of a token's matrix products; attention scores left out."""
    modules = (m for m in model.modules() if isinstance(m, nn.Linear))
    return sum(2 * module.in_features * module.out_features for module in modules)


def timed(sides: dict[int, Side], shape: Model) -> dict[int, list[float]]:
    """Seconds of each export, by its index, round by round."""
    named = {str(index): side for index, side in sides.items()}
    taken = alternate(named, torch.device(shape.device), shape.num_rounds)
    return {int(index): seconds for index, seconds in taken.items()}


def note(exports: list[Loaded], taken: dict[int, list[float]], key: str, num_tokens: int) -> None:
    """Puts tokens a second, and their ratio to the dense model's, into the rows."""
    dense: list[float] = []
    for index, seconds in taken.items():
        row = exports[index].row
        dense = seconds if row["export"] == DENSE else dense
        row[key] = {
            "tokens_per_second": summary([num_tokens / value for value in seconds]),
            "ratio": ratios(dense, seconds),
        }


def decoder(model: LlamaForCausalLM, batch_size: int, shape: Model) -> Side:
    """Greedy answers of a fixed length by `generate`, after a prompt that is in the cache."""
    ids = torch.arange(PROMPT_TOKENS, device=model.device).repeat(batch_size, 1)
    caches = []

    def prepare() -> None:
        caches[:] = [model.model(ids[:, :-1], use_cache=True).past_key_values]

    def run() -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=caches[0],
            max_new_tokens=shape.new_tokens,
            min_new_tokens=shape.new_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    return Side(run, prepare, once=True)


def prefill(model: LlamaForCausalLM, shape: Model) -> Tensor:
    """The logits after one prompt."""
    ids = torch.arange(shape.prefill_tokens, device=model.device)[None] % shape.vocab_size
    return model(ids, use_cache=False, logits_to_keep=1).logits


@torch.inference_mode()
def break_even(shape: Model, sparsities: list[float]) -> dict:
    """Dense seconds / CSR seconds of one MLP matrix, in fp32 and, dense, in bf16.

    Returns:
        Batch size to dtype to sparsity to the ratio, median with quartiles. Copies of the matrix,
        read in turn, keep it out of the caches as a whole model would.
    """
    torch.manual_seed(0)
    num_copies = 8
    size = shape.intermediate_size, shape.hidden_size
    modules = [nn.Linear(*reversed(size), bias=False) for _ in range(num_copies)]
    found: dict = {}
    sides: dict[str, list[nn.Module]] = {"float32": modules}
    sides["bfloat16"] = [nn.Linear(*reversed(size), bias=False).bfloat16() for _ in modules]
    for sparsity in sparsities:
        for module in modules:
            module.weight.data = torch.randn(size) * (torch.rand(size) >= sparsity)
        sides[str(sparsity)] = [CsrLinear(module) for module in modules]
    for batch_size in shape.batch_sizes:
        inputs = {dtype: torch.randn(batch_size, shape.hidden_size) for dtype in sides}
        inputs["bfloat16"] = inputs["bfloat16"].bfloat16()
        taken = alternate(
            {
                name: Side(lambda layers=layers, x=inputs[name]: [layer(x) for layer in layers])
                for name, layers in sides.items()
            },
            torch.device("cpu"),
            shape.num_rounds,
        )
        found[str(batch_size)] = {
            dtype: {str(s): ratios(taken[dtype], taken[str(s)]) for s in sparsities}
            for dtype in ("float32", "bfloat16")
        }
    return found


def goals(measured: dict[str, dict]) -> list[dict]:
    """One row for each goal and model that was run."""
    rows = []

    def row(model: str, what: str, value: float, goal: float) -> None:
        met = value >= goal
        rows.append({"model": model, "what": what, "measured": value, "goal": goal, "met": met})

    for name, found in measured.items():
        for export in found.get("exports", ()):
            what = f"{export['export']} {export['sparsity']} {export['dtype']}"
            for batch_size in found["batch_sizes"]:
                ratio = export.get(f"decode_{batch_size}", {}).get("ratio", {}).get("median")
                goal = GOALS.get((export["export"], export["sparsity"]))
                if goal is not None:
                    row(name, f"{what}: decode at {batch_size} / dense", ratio, goal)
                if export["export"] == "narrow":
                    part = ratio / export["flop_ratio"]
                    row(name, f"{what}: decode at {batch_size} / FLOP ratio", part, NARROW_GOAL)
            if export["export"] == "narrow":
                part = export["prefill"]["ratio"]["median"] / export["flop_ratio"]
                row(name, f"{what}: prefill / FLOP ratio", part, NARROW_GOAL)
            if what == "packed 0.9 bfloat16":
                row(name, f"{what}: prunable weights", export["prunable_ratio"], PACKED_GOAL)
    return rows


def show(result: dict) -> None:
    """Prints a row for each export, then the goals."""
    for name, found in result["models"].items():
        if "not_run" in found:
            print(f"{name}: not run: {found['not_run']}")
            continue
        print(f"{name}: {found['num_prunable_weights']:,} prunable weights")
        keys = [*(f"decode_{size}" for size in found["batch_sizes"]), "prefill"]
        for row in found["exports"]:
            speeds = [
                f"{key} {row[key]['tokens_per_second']['median']:7.1f}/s"
                f" ({row[key]['ratio']['median']:.2f})"
                for key in keys
                if key in row
            ]
            print(
                f"  {row['export']:15} {row['sparsity']:<5} {row['dtype']:9}"
                f"{row['bytes'] / 1e6:9.1f} MB  {'  '.join(speeds)}"
                f"  logits {row['largest_logit_difference']:.1e}"
            )
    for row in result["goals"]:
        verdict = "met" if row["met"] else "MISSED"
        print(f"{row['model']} {row['what']:48} {row['measured']:7.3g} ({row['goal']:g}) {verdict}")
