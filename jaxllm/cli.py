"""`jaxllm VERB`: a thin face over the library.

Expected mistakes (a wrong path, value or file) end in one line on stderr and exit code 2; set JAXLLM_TRACEBACK=1 to see
where they were noticed. Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from jaxllm import experiment, host
from jaxllm.conversion import convert_command
from jaxllm.data.audit import show_batch
from jaxllm.data.mixture import batch_at
from jaxllm.decode import chat
from jaxllm.decode.rules import Sampling
from jaxllm.decode.sample import generate
from jaxllm.decode.stream import require_tokenizer, stream
from jaxllm.decode.weights import prepare
from jaxllm.doctor import doctor_command
from jaxllm.model import Model, load
from jaxllm.plan.choose import cheapest_command, decode_command, search_command
from jaxllm.plan.report import find, info_command, plan_command
from jaxllm.runtime import Runtime
from jaxllm.show_mask import draw, pattern_of, patterns_in
from jaxllm.train import dataset
from jaxllm.train.evaluate import evaluate_corpus
from jaxllm.train.loop import Options, train

EXPECTED = (ValueError, OSError, FloatingPointError, TimeoutError)


def entry() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Run one verb; returns the exit code."""
    args = parser().parse_args(argv)
    host.prepare()
    try:
        return args.run(args)
    except EXPECTED as error:
        if os.environ.get("JAXLLM_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


# ----------------------------------------------------------------------------------------------------------- verbs


def train_verb(args: argparse.Namespace) -> int:
    """Train, or continue a run; then print samples."""
    if args.coordinator is not None:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)
    elif args.distributed:
        jax.distributed.initialize()
    exp = experiment.load_config(args.config, args.overrides)
    console = Console(quiet=jax.process_index() != 0)
    state = train(exp, console, Options(args.profile, args.layer_norms))
    if jax.process_index() == 0 and exp.samples and int(state.step) >= exp.steps:
        show_samples(exp, console)
    return 0


def show_samples(exp: experiment.Experiment, console: Console) -> None:
    """Continue the experiment's sample prompts with the newest checkpoint."""
    model = load(exp.run_dir)
    prompts = [encode(model, text) for text in exp.samples]
    room = min(120, model.spec.context - max(map(len, prompts)))
    out = generate(
        model.spec, model.params, prompts, max_new_tokens=room, sampling=Sampling(0.8, top_p=0.95), eos=model.eos
    )
    for text, ids in zip(exp.samples, out.ids(), strict=True):
        console.rule(f"sample: {text.strip()[:40]!r}")
        console.print(text + decode(model, ids), markup=False, highlight=False)
    console.print(f"\nmore: jaxllm generate {exp.run_dir} --prompt 'HAMLET.\\n' --temperature 0.8", markup=False)


def generate_verb(args: argparse.Namespace) -> int:
    """Continue prompts; one is streamed, several are printed as they stand."""
    model = load(args.model, dtype=args.dtype)
    prompts = [encode(model, text) for text in args.prompt for _ in range(args.samples)]
    runtime = Runtime(compute_dtype=args.dtype)
    params = prepare(model.params, model.spec, runtime)
    options = {"max_new_tokens": args.max_new_tokens, "sampling": sampling(args), "eos": model.eos, "runtime": runtime}
    if len(prompts) == 1:
        print(args.prompt[0], end="", flush=True)
        for piece in stream(
            Model(model.spec, params, model.tokenizer, model.eos), prompts[0], seed=args.seed, **options
        ):
            print(piece, end="", flush=True)
        print()
        return 0
    out = generate(model.spec, params, prompts, seeds=args.seed, **options)
    console = Console()
    for prompt, ids in zip(prompts, out.ids(), strict=True):
        console.rule()
        console.print(decode(model, prompt + ids), markup=False, highlight=False)
    return 0


def encode(model: Model, text: str) -> list[int]:
    """Ids of a raw prompt, begun as the model's documents begin."""
    tokenizer = require_tokenizer(model)
    return tokenizer.encode(text, bos=tokenizer.add_bos)


def decode(model: Model, ids: list[int]) -> str:
    """Text of ids, control tokens left out."""
    return require_tokenizer(model).decode(ids)


def chat_verb(args: argparse.Namespace) -> int:
    """Talk to a model in the terminal."""
    model, runtime = load(args.model, dtype=args.dtype), Runtime(compute_dtype=args.dtype)
    chat.run(model, sampling(args), system=args.system, seed=args.seed, runtime=runtime)
    return 0


def eval_verb(args: argparse.Namespace) -> int:
    """Perplexity and bits per byte of a corpus, by channel."""
    model, console = load(args.model), Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    values = evaluate_corpus(model.spec, model.params, model.tokenizer, args.corpus, context=args.context, say=say)
    table = Table("channel", "loss (nats per token)", "bits per byte", box=None)
    channels = [key.removeprefix("val/loss/") for key in values if key.startswith("val/loss/")]
    for name in channels:
        table.add_row(name, f"{values[f'val/loss/{name}']:.4f}", f"{values[f'val/bits_per_byte/{name}']:.4f}")
    table.add_row("all", f"{values['val/loss']:.4f}", f"{values['val/bits_per_byte']:.4f}", style="bold")
    console.print(table)
    console.print(f"perplexity {values['val/perplexity']:.2f} per token", highlight=False)
    return 0


def data_verb(args: argparse.Namespace) -> int:
    """Show packed training rows in colour: segments, loss weights, channels."""
    exp = experiment.load_config(args.config, args.overrides)
    console = Console()
    data = dataset.prepare(exp, lambda line: console.print(line, highlight=False))
    show_batch(batch_at(data.train, args.step, slice(0, args.rows)), data.tokenizer, data.channels, console)
    return 0


def plan_verb(args: argparse.Namespace) -> int:
    """Compile a config's train step for chips that need not be there: memory, traffic and, on TPUs, time per chip."""
    config, overrides = args.config, args.overrides
    if args.cheapest is not None:
        tokens, days = args.cheapest
        return cheapest_command(config, overrides, tokens, days, args.json)
    if args.topology is None:
        raise ValueError("plan: --topology NAME is needed, such as v5e:16x16 (all but --cheapest plan for one slice)")
    if args.out is not None and not args.search:
        raise ValueError("plan: --out is what --search writes; add --search")
    if args.decode is not None:
        return decode_command(config, overrides, args.topology, args.decode, args.json)
    if args.search:
        files = {"out": args.out, "json_path": args.json, "picture": args.report}
        return search_command(config, overrides, args.topology, minutes=args.minutes, **files)
    return plan_command(config, overrides, args.topology, args.json, args.timeout, args.report)


def info_verb(args: argparse.Namespace) -> int:
    """Parameters, FLOPs per token, cache and training memory; nothing is allocated."""
    return info_command(args.config, args.overrides, args.json, args.devices)


def show_mask_verb(args: argparse.Namespace) -> int:
    """Draw which token sees which, for a pattern or the layers of a model, as PNG."""
    written = "(" in args.what
    found = None if written else find(args.what)
    spec = found.model if isinstance(found, experiment.Experiment) else found
    patterns = {args.what: pattern_of(args.what)} if spec is None else patterns_in(spec)
    for line in draw(patterns, args.length, Path(args.out)):
        print(line)
    print(f"wrote {args.out}")
    return 0


def doctor_verb(args: argparse.Namespace) -> int:
    """What is installed, and which devices jax does not see."""
    return doctor_command()


def sampling(args: argparse.Namespace) -> Sampling:
    """The sampling options of a verb."""
    return Sampling(args.temperature, args.top_k, args.top_p)


# ---------------------------------------------------------------------------------------------------------- parser


def parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    top = argparse.ArgumentParser(prog="jaxllm", description="Language models in JAX: train, sample, chat, plan.")
    verbs = top.add_subparsers(required=True, metavar="VERB")

    p = _verb(verbs, "train", train_verb, "train a config, or continue its run")
    _config(p)
    p.add_argument("--profile", action="store_true", help="write an xprof trace of three steps to RUN_DIR/profile")
    p.add_argument("--layer-norms", action="store_true", help="log every parameter's gradient norm")
    p.add_argument("--distributed", action="store_true", help="several hosts, found by jax itself (TPU pods, Slurm)")
    p.add_argument("--coordinator", metavar="HOST:PORT", help="several hosts, given by hand: where process 0 listens")
    p.add_argument("--processes", type=int, help="with --coordinator: how many there are")
    p.add_argument("--process", type=int, help="with --coordinator: which one this is, from 0")

    p = _verb(verbs, "generate", generate_verb, "continue a prompt")
    p.add_argument("model", help="run directory, Hugging Face folder, .gguf file, or a name (smollm2)")
    p.add_argument("--prompt", action="append", required=True, help="may be given several times")
    p.add_argument("--samples", type=int, default=1, help="continuations of each prompt")
    p.add_argument("--max-new-tokens", type=int, default=128)
    _sampling(p, temperature=None)

    p = _verb(verbs, "chat", chat_verb, "talk to a model")
    p.add_argument("--model", default="smollm2", help="as for generate; it needs a chat template (default: smollm2)")
    p.add_argument("--system", help="system message")
    _sampling(p, temperature=0.7)

    p = _verb(verbs, "eval", eval_verb, "perplexity and bits per byte of a corpus")
    p.add_argument("model")
    p.add_argument("corpus", help="text, JSONL(.gz), a directory or a glob")
    p.add_argument("--context", type=int, help="tokens per row (default: the model's, at most 2,048)")

    p = _verb(verbs, "data", data_verb, "show packed training rows")
    _config(p)
    p.add_argument("--step", type=int, default=0)
    p.add_argument("--rows", type=int, default=2)

    p = _verb(verbs, "plan", plan_verb, "compile for a TPU slice or GPUs")
    _config(p)
    p.add_argument("--topology", help="such as v5e:16x16, v5p:4x4x4, v6e:4x4, h100:8")
    p.add_argument("--json", metavar="FILE", help="write the figures here too")
    p.add_argument("--report", metavar="FILE", help="draw memory and time: .png, or .html with the figures")
    p.add_argument("--search", action="store_true", help="find the fastest layout, recomputation and micro-batch")
    p.add_argument("--minutes", type=float, default=20.0, help="with --search: how long to compile (default: 20)")
    p.add_argument("--out", metavar="FILE", help="with --search: write the best as a config file")
    cheapest = {"nargs": 2, "type": float, "metavar": ("TOKENS", "DAYS")}
    p.add_argument("--cheapest", **cheapest, help="the slices that train on TOKENS in DAYS, by chip-hours")
    p.add_argument("--decode", type=int, metavar="BATCH", help="cache and speed limit of decoding BATCH rows")
    p.add_argument("--timeout", type=float, default=1800.0, metavar="SECONDS", help="give up after so long")

    p = _verb(verbs, "info", info_verb, "count without allocating")
    _config(p, "config file, run directory, model folder or file, or a preset's name")
    p.add_argument("--devices", type=int, default=1, help="devices that share the training memory")
    p.add_argument("--json", metavar="FILE", help="write the figures here too")

    p = _verb(verbs, "convert", convert_command, "write a model in another format")
    p.add_argument("source", help="as for generate")
    p.add_argument("target", help="a new folder")
    p.add_argument("--to", choices=("hf", "native"), required=True, help="Hugging Face folder, or run directory")
    p.add_argument("--family", help="with hf: the model_type to write, if the model is an equal function in it")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: the source's)")
    p.add_argument("--shard-size", default="5GB", help="the largest safetensors file (default: %(default)s)")

    p = _verb(verbs, "show-mask", show_mask_verb, "draw which token sees which")
    p.add_argument("what", help="a pattern such as 'Causal() & Local(64)', or a model as for info")
    p.add_argument("--length", type=int, default=512, help="tokens (default: 512)")
    p.add_argument("--out", default="mask.png", metavar="FILE")

    _verb(verbs, "doctor", doctor_verb, "what is installed, and what jax does not see")
    return top


def _verb(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    p = verbs.add_parser(name, help=text, description=(run.__doc__ or text).splitlines()[0])
    p.set_defaults(run=run)
    return p


def _config(p: argparse.ArgumentParser, text: str = "config file") -> None:
    p.add_argument("config", help=text)
    p.add_argument("overrides", nargs="*", metavar="path=value", help="typed overrides, such as optimizer.peak_lr=3e-4")


def _sampling(p: argparse.ArgumentParser, temperature: float | None) -> None:
    p.add_argument("--temperature", type=float, default=temperature, help="0 is greedy (default: %(default)s)")
    p.add_argument("--top-k", type=int)
    p.add_argument("--top-p", type=float)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
