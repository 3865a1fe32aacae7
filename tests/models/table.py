"""Writes docs/models.md from what the tests check: `python -m tests.models.table [--compile] [FAMILY ...]`.

One row per family: the parameter count of a published size, the largest error of its tiny checkpoints' logits (padded
and not), greedy ids, the round trip, and whether a train and a decode step compile for a TPU. --compile asks the TPU
compiler anew (5 to 10 seconds a family); without it that column is kept from the page, as are rows of families that are
not named, if any is.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the compiling child alone sees a TPU's compiler

import jax
import jax.numpy as jnp
import numpy as np

import jaxllm
from jaxllm import apply, cache, encoder_decoder, transformer, vision_language
from jaxllm.architectures import model_params
from jaxllm.config import DynamicNTK, EncoderDecoder, Transformer, TwoTower, VisionLanguage
from jaxllm.convert.hf import save_folder
from jaxllm.convert.safetensors_io import open_folder
from jaxllm.models.families import FAMILIES, spec_of_config
from jaxllm.models.presets import toy
from jaxllm.nn.patch import cut
from jaxllm.nn.position import by_length
from jaxllm.params import abstract, count
from jaxllm.records import Inputs, Memory, inputs
from jaxllm.runtime import Runtime
from tests.tpu_aot import Job, compile_all

ROOT = Path(__file__).parents[2]
PAGE, GOLDENS = ROOT / "docs" / "models.md", ROOT / "tests" / "goldens"
HEAD = ("family", "published size", "parameters", "logits, largest error", "greedy", "round trip", "TPU compile")
TPU = Runtime("bfloat16", attention="tpu")
WITHOUT = {
    "baichuan": "below 1e-4 of a numpy transcription",
    "chatglm": "below 1e-4 of a numpy transcription",
    "qwen": "below 1e-4 of a numpy transcription",
}
"""Families that the reference implementation does not have."""

# ------------------------------------------------------------------------------------------------- what is computed


def run(spec: Any, params: Any, arrays: Any, case: str, runtime: Runtime = Runtime()) -> jax.Array:
    """The main result of a model for a case's arrays ("" or "padded."), as the tests ask for it."""

    def get(name: str) -> Any:
        own = f"{case}{name}"
        return arrays[own] if own in arrays else arrays.get(name)

    ids, mask = get("input_ids"), get("attention_mask")
    match spec:
        case VisionLanguage():
            names = vision_language.Pixels.__annotations__
            seen = {name: get(name) for name in names if get(name) is not None}
            return apply.logits(spec, params, ids, mask, runtime=runtime, **seen)
        case TwoTower():
            return apply.similarity(spec, params, ids, mask, pixel_values=get("pixel_values")).logits_per_image
        case EncoderDecoder():
            return apply.logits(spec, params, ids, mask, decoder_input_ids=get("decoder_input_ids"))
        case _:
            types = get("token_type_ids") if spec.embed.types else None
            everywhere = get("global_attention_mask")
            return apply.logits(spec, params, ids, mask, token_type_ids=types, global_attention_mask=everywhere)


def errors(folder: Path) -> tuple[float, str]:
    """Largest absolute error at real tokens over plain and padded cases, and what became of the greedy ids."""
    model, arrays = jaxllm.load(folder), dict(np.load(folder / "golden.npz"))
    main = next(n for n in ("logits", "prediction_logits", "logits_per_image") if n in arrays)
    worst = 0.0
    for case in ("", "padded."):
        if f"{case}{main}" in arrays:
            mask = arrays[f"{case}attention_mask"] > 0
            got, want = np.asarray(run(model.spec, model.params, arrays, case)), arrays[f"{case}{main}"]
            alike = got.shape[:2] == mask.shape
            worst = max(worst, float(np.abs(got - want)[mask if alike else ...].max()))
    if "gen.greedy" not in arrays:
        return worst, "no decoding"
    return worst, "equal" if greedy(model, arrays) else "DIFFERS"


def greedy(model: Any, arrays: dict[str, np.ndarray]) -> bool:
    """Whether every golden token is the argmax after those before it."""
    spec, wanted = model.spec, arrays.get("gen_nocache.greedy", arrays["gen.greedy"])
    case = dict(arrays)
    if isinstance(spec, VisionLanguage):  # through the cache: a token that is drawn may be an image's
        own = "gen_leftpad." if "gen_leftpad.input_ids" in arrays else ""
        rows = zip(arrays[f"{own}input_ids"], arrays[f"{own}attention_mask"], strict=True)
        prompts = [ids[mask == 1].tolist() for ids, mask in rows]
        seen = {n: arrays[n] for n in vision_language.Pixels.__annotations__ if n in arrays}
        wanted = arrays[f"{own or 'gen.'}greedy"]
        out = jaxllm.generate(spec, model.params, prompts, max_new_tokens=wanted.shape[1], **seen)
        return bool((np.asarray(out.ids()) == wanted).all())
    if isinstance(spec, EncoderDecoder):  # column 0 is the start id
        case["decoder_input_ids"] = wanted[:, :-1]
        return bool((np.asarray(run(spec, model.params, case, "")).argmax(-1) == wanted[:, 1:]).all())
    start = arrays["input_ids"].shape[1]
    case.pop("mm_token_type_ids", None)
    # rotations that see the row's length differ at every step: such rows are grown token by token
    grown = isinstance(spec, Transformer) and any(isinstance(s, DynamicNTK) for s in by_length(spec.stacks))
    for t in range(wanted.shape[1]) if grown else [wanted.shape[1] - 1]:
        case["input_ids"] = np.concatenate([arrays["input_ids"], wanted[:, :t]], 1)
        case["attention_mask"] = np.pad(arrays["attention_mask"], ((0, 0), (0, t)), constant_values=1)
        best = np.asarray(run(spec, model.params, case, "")).argmax(-1)[:, start - 1 :]
        if not (best == wanted[:, : t + 1])[:, -1 if grown else 0 :].all():
            return False
    return True


def round_trip(folder: Path) -> bool:
    """Whether export gives the same tensors, bit by bit."""
    model = jaxllm.load(folder)
    with tempfile.TemporaryDirectory() as out:
        save_folder(Path(out, "x"), model.spec, model.params)
        before, after = open_folder(folder), open_folder(Path(out, "x"))
        return before.shapes == after.shapes and all(
            before.read(name).tobytes() == after.read(name).tobytes() for name in before.shapes
        )


# -------------------------------------------------------------------------------------------------- the TPU compiler


def train_step(spec: Any, params: Any, *args: Any) -> Any:
    """One step of gradient descent on the log-sum-exp of the model's result."""

    def loss(params: Any) -> jax.Array:
        match spec:
            case VisionLanguage():
                hidden = vision_language.forward(params, spec, *args, TPU).hidden_BTD
                out = transformer.logits(params["text"], spec.text, hidden, TPU)
            case TwoTower():
                out = apply.compare(params, spec, *args, TPU).logits_per_image
            case EncoderDecoder():
                hidden = encoder_decoder.forward(params, spec, *args, TPU).hidden_BTD
                out = encoder_decoder.logits(params, spec, hidden, TPU)
            case _:
                hidden = transformer.forward(params, spec, *args, TPU).hidden_BTD
                out = hidden if spec.head is None else transformer.logits(params, spec, hidden, TPU)
        return jax.nn.logsumexp(out.astype(jnp.float32), -1).mean()

    return jax.tree.map(lambda p, g: p - 1e-3 * g, params, jax.grad(loss)(params))


def decode_step(spec: Transformer, params: Any, caches: Any, given: Inputs) -> Any:
    """One token of a causal model: forward, logits, commit."""
    out = transformer.forward(params, spec, given, TPU, caches)
    start = given.slot_BT[:, 0]
    return transformer.logits(params, spec, out.hidden_BTD, TPU), cache.commit(
        caches, out.rows, start, jnp.ones_like(start)
    )


def jobs(spec: Any, arrays: dict[str, Any] | None) -> list[Job]:
    """The train step and, of a causal model, the decode step."""
    ids = np.zeros((2, 64), np.int32)
    plain = inputs(jnp.asarray(ids))
    match spec:
        case VisionLanguage():
            seen = {n: arrays[n] for n in vision_language.Pixels.__annotations__ if n in (arrays or {})}
            args = vision_language.prepare(spec, arrays["input_ids"], arrays["attention_mask"], seen)
        case TwoTower():
            args = inputs(jnp.asarray(arrays["input_ids"])), cut(spec.vision, arrays["pixel_values"])
        case EncoderDecoder():
            args = plain, plain
        case _:
            args = (plain,)
    made = abstract(model_params(spec))
    found = [Job(partial(train_step, spec), (made, *shapes(args)), "v5e:2x2")]
    text = {VisionLanguage: lambda: spec.text, EncoderDecoder: lambda: spec.decoder}.get(type(spec), lambda: spec)()
    if isinstance(text, Transformer) and text.causal and text.head is not None:
        one = jnp.zeros((2, 1), jnp.int32)
        memory = None
        if isinstance(spec, EncoderDecoder):
            memory = Memory(jnp.zeros((2, 64, spec.dim)))
            made = jax.eval_shape(partial(encoder_decoder.half, which="decoder"), made)
        elif isinstance(spec, VisionLanguage):
            made = made["text"]
        given = Inputs(one, one, slot_BT=one, memory=memory)
        held = jax.eval_shape(lambda: cache.init(text, 2, 64, jnp.bfloat16))
        found.append(Job(partial(decode_step, text), (made, held, *shapes((given,))), "v5e:2x2"))
    return found


def shapes(x: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.asarray(a).dtype), x)


def compiled(families: dict[str, list[Job]]) -> dict[str, str]:
    """Family -> "train, decode", or what failed. One child process compiles all of them."""
    reports = iter(compile_all([job for found in families.values() for job in found], timeout=7200))
    out = {}
    for name, found in families.items():
        mine = [next(reports) for _ in found]
        steps = zip(("train", "decode"), mine, strict=False)
        out[name] = ", ".join(step if report.error is None else report.error[:80] for step, report in steps)
    return out


# ----------------------------------------------------------------------------------------------------------- the page


def published(make: Any) -> tuple[str, str]:
    """(name, count) of a preset; the count is marked when it is not what the docstring states."""
    found = re.search(r"([\d,]{7,}) parameters", make.__doc__ or "")
    assert found, f"preset {make.__name__}: its docstring must state its parameters, as in '6,738,415,616 parameters'"
    real = f"{count(model_params(make())):,}"
    return make.__name__, f"{found[1]} exact" if real == found[1] else f"{found[1]} BUT {real}"


def folders() -> dict[str, list[Path]]:
    """Model type -> its tiny checkpoints."""
    found = defaultdict(list)
    for folder in sorted(GOLDENS.iterdir()):
        if (folder / "model.safetensors").exists() and (folder / "golden.npz").exists():
            found[json.loads((folder / "config.json").read_text())["model_type"]].append(folder)
    return found


def kept() -> dict[str, list[str]]:
    """Model type -> the cells of the page as it is."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): cells for cells in lines if len(cells) == len(HEAD)}


def row(family: str, presets: Sequence[Any], held: list[Path]) -> list[str]:
    """One line of the table, without its last column."""
    sizes = [published(make) for make in presets]
    results = [errors(folder) for folder in held]
    error = f"{max(e for e, _ in results):.1e} ({len(held)})" if held else WITHOUT[family]
    decoding = sorted({g for _, g in results}) or ["equal to its own full forward"]
    same = "bitwise" if all(map(round_trip, held)) else "DIFFERS"
    names, counts = "<br>".join(n for n, _ in sizes), "<br>".join(c for _, c in sizes)
    jax.clear_caches()
    return [f"`{family}`", names, counts, error, ", ".join(decoding), same]


def steps_of(presets: Sequence[Any], held: list[Path]) -> list[Job]:
    """What is compiled of a family: of its first tiny checkpoint, or of a toy of its preset."""
    if not held and isinstance(presets[0](), VisionLanguage):  # Qwen-VL
        from tests.models.test_vision_tpu import pixels_of, spec_named

        spec, ids = spec_named("qwen_vl"), np.ones((2, 256), np.int32)
        ids[:, 10:26] = spec.image_token
        return jobs(spec, {"input_ids": ids, "attention_mask": np.ones_like(ids), **pixels_of("qwen_vl")})
    if not held:
        return jobs(toy(presets[0]()), None)
    spec = spec_of_config(json.loads((held[0] / "config.json").read_text()))
    return jobs(spec, dict(np.load(held[0] / "golden.npz")))


def main() -> None:
    """Measure, and write the table between the page's marks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all")
    options = parser.parse_args()
    held, last, families = folders(), kept(), dict(sorted(FAMILIES.items()))
    asked = options.families or list(families)
    tpu = {name: cells[-1] for name, cells in last.items()}
    if options.compile:
        tpu |= compiled({name: steps_of(families[name].PRESETS, held[name]) for name in asked})
    for name in asked:
        last[name] = [*row(name, families[name].PRESETS, held[name]), tpu.get(name, "not asked")]
        print(*last[name], sep=" | ", flush=True)
    rows = [last[name] for name in families if name in last]
    table = ["| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD), *rows)]
    before, rest = PAGE.read_text().split("<!-- table -->\n")[0], PAGE.read_text().split("<!-- /table -->\n")[1]
    PAGE.write_text(before + "<!-- table -->\n" + "\n".join(table) + "\n<!-- /table -->\n" + rest)


if __name__ == "__main__":
    from tests.models import table  # the compiling child must find these functions by a module's name

    table.main()
