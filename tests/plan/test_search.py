"""Layouts compared by formula and by what a compiler says, here one that is made up."""

import json
from dataclasses import replace

import pytest

from jaxllm.experiment import Data, Experiment, Optimizer, Source, load_config, resolve
from jaxllm.models.presets import PRESETS
from jaxllm.plan import choose
from jaxllm.plan.search import cached, candidates, decoding, offers, search
from jaxllm.plan.topology import parse
from jaxllm.runtime import Runtime
from jaxllm.sharding import Layout

EXP = resolve(
    Experiment(
        PRESETS["llama31_8b"](),
        Data((Source("corpus"),), 8192),
        1000,
        256,
        "runs/plan",
        optimizer=Optimizer(),
        runtime=Runtime("bfloat16", remat="full", layout=Layout()),
    )
)
V5E = parse("v5e:16x16")


def figures(candidate, seconds, fits=True):
    wire = {"data": 40.0, "tensor": 60.0 * (candidate.exp.runtime.layout.tensor > 1)}
    return {
        "fits": fits,
        "tokens": 8192,
        "step_seconds": seconds,
        "wire_gb": sum(wire.values()),
        "wire_gb_by_axes": wire,
        "wire_seconds": sum(wire.values()) / 200,
    }


def test_candidates_are_admitted_and_ranked():
    found = candidates(EXP, V5E)
    speeds = [c.tokens_per_second for c in found]
    assert speeds == sorted(speeds, reverse=True)
    layouts = {(c.exp.runtime.layout.tensor, c.exp.runtime.remat, c.exp.accumulate) for c in found}
    assert (1, "full", 1) in layouts and (2, "full", 2) in layouts
    assert all(c.exp.runtime.layout.tensor <= 8 for c in found), "8 key heads bound tensor parallelism"
    assert all(256 % (256 // c.exp.runtime.layout.tensor * c.exp.accumulate) == 0 for c in found)


def test_a_known_cell_is_predicted():
    """Compiled: docs/benchmarks.md, cell a: 4.5 GiB; 3.3 s of XLA and 0.5 s of attention."""
    one = next(c for c in candidates(EXP, V5E) if c.label == "ZeRO 3, remat full, accumulate 1")
    assert one.bytes / 2**30 == pytest.approx(4.48, rel=0.15)
    assert one.seconds == pytest.approx(3.8, rel=0.15)


def test_an_offload_is_kept_where_something_is_saved():
    offloading = replace(EXP, runtime=replace(EXP.runtime, remat="full", offload=("stream",)))
    found = {c.exp.runtime.remat: c.exp.runtime.offload for c in candidates(offloading, V5E)}
    assert all(offload == (() if remat == "none" else ("stream",)) for remat, offload in found.items())


def test_no_formula_no_offers():
    staged = replace(EXP, runtime=replace(EXP.runtime, layout=Layout(stage=2)))
    with pytest.raises(ValueError, match="no formula gives the memory of a pipeline"):
        offers(staged, 1e12, 30)


def test_what_cannot_fit_says_what_would():
    with pytest.raises(ValueError, match=r"fits v5e:2x2 in no way: the least is .* take a larger slice"):
        candidates(replace(EXP, batch_size=4), parse("v5e:2x2"))
    with pytest.raises(ValueError, match="must be a multiple of"):
        candidates(replace(EXP, batch_size=257), V5E)


def test_the_search_keeps_to_its_time_and_passes_over_the_hopeless():
    wanted = candidates(EXP, V5E)
    found = list(search(wanted, lambda c: figures(c, 3.0), minutes=0))
    assert len(found) == 1 and found[0].tokens_per_second is not None

    asked = []

    def too_big(candidate):
        asked.append(candidate)
        return figures(candidate, 1.0, fits=False)

    assert all(f.tokens_per_second is None for f in search(wanted, too_big, minutes=1))
    for i, later in enumerate(asked):
        for before in asked[:i]:
            assert later.exp.runtime.layout != before.exp.runtime.layout or later.bytes < before.bytes


def test_activations_travel_in_turn_with_arithmetic():
    plain, tensor = (next(c for c in candidates(EXP, V5E) if c.exp.runtime.layout.tensor == n) for n in (1, 2))
    made = [next(search([c], lambda c: figures(c, 3.0), minutes=1)) for c in (plain, tensor)]
    assert made[0].tokens_per_second == pytest.approx(8192 / 3.0)
    assert made[1].tokens_per_second == pytest.approx(8192 / 3.3)


def test_a_compiler_that_fails_is_reported():
    def fails(candidate):
        raise RuntimeError("the compiler crashed")

    (one,) = search(candidates(EXP, V5E)[:1], fails, minutes=1)
    assert one.problem == "the compiler crashed" and one.tokens_per_second is None


def test_what_was_compiled_is_kept(tmp_path):
    asked = []

    def slow(candidate):
        asked.append(candidate)
        return figures(candidate, 3.0)

    first, second = candidates(EXP, V5E)[:2]
    get = cached(slow, tmp_path / "plans")
    assert get(first) == get(first) == get(replace(first, exp=replace(first.exp, run_dir="elsewhere")))
    get(second)
    assert len(asked) == 2


def test_offers_are_in_time_and_sorted():
    found = offers(EXP, 1e12, 30, ("v5e", "v5p"))
    assert [o.chip_hours for o in found] == sorted(o.chip_hours for o in found)
    for o in found:
        assert o.days <= 30
        chips = o.candidate.target.devices
        assert o.chip_hours == pytest.approx(24 * o.days * chips)
    with pytest.raises(ValueError, match="no slice sees 1e\\+15 tokens in 1 days; the fastest"):
        offers(EXP, 1e15, 1, ("v5e",))


def test_decoding_is_bound_by_bytes():
    """Llama-3.1-8B: 16.06 GB of weights and 128 KiB per token."""
    made = decoding(EXP, parse("v5e:4x4"), 16)
    assert made.weight_bytes == 2 * 8_030_261_248 // 16
    assert made.cache_bytes == 16 * 8192 * 131_072 // 16
    assert made.tokens_per_second == pytest.approx(16 * 819e9 / (made.weight_bytes + made.cache_bytes))
    assert made.fits and not decoding(EXP, parse("v5e:2x2"), 256).fits


def test_the_winner_is_a_config(tmp_path):
    base = "configs/llama3_8b.py"
    best = next(c for c in candidates(load_config(base), V5E) if c.exp.runtime.layout.tensor == 2)
    choose.write_config(tmp_path / "best.py", base, ["steps=7"], best, "v5e:16x16")
    exp = load_config(str(tmp_path / "best.py"))
    assert (exp.steps, exp.accumulate, exp.runtime.remat) == (7, best.exp.accumulate, best.exp.runtime.remat)
    assert exp.runtime.layout == best.exp.runtime.layout and exp.model == best.exp.model


@pytest.mark.parametrize("layout", ["None", "Layout(data=8, replicate_below=7)"])
def test_the_winner_does_not_keep_its_base_s_layout(tmp_path, layout):
    base = tmp_path / "base.py"
    base.write_text(
        "from dataclasses import replace\nfrom jaxllm.experiment import load_config\n"
        "from jaxllm.sharding import Layout\ndef config():\n"
        "    exp = load_config('configs/smollm2_135m.py')\n"
        f"    return replace(exp, runtime=replace(exp.runtime, layout={layout}))\n"
    )
    best = candidates(load_config(str(base)), parse("v5e:2x2"))[0]
    choose.write_config(tmp_path / "best.py", str(base), [], best, "v5e:2x2")
    assert load_config(str(tmp_path / "best.py")).runtime.layout == best.exp.runtime.layout


def test_files_are_checked_before_anything_is_compiled(tmp_path):
    for files in ({"out": "best.json"}, {"out": str(tmp_path / "none" / "best.py")}, {"picture": "plans.pdf"}):
        with pytest.raises(ValueError, match="in a directory that exists"):
            choose.search_command("configs/llama3_8b.py", [], "v5e:16x16", minutes=1, **files)


def test_commands_by_formula(tmp_path, capsys):
    out = tmp_path / "x.json"
    assert choose.cheapest_command("configs/smollm2_135m.py", [], 1e9, 10, str(out)) == 0
    assert json.loads(out.read_text())[0]["chip_hours"] > 0
    assert choose.decode_command("configs/llama3_8b.py", [], "v5e:2x2", 256, str(out)) == 1
    assert "at most" in capsys.readouterr().out and not json.loads(out.read_text())["fits"]


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib", reason="drawing is an extra")
    parts = {"parameters": 1.0, "saved": 2.0}
    plan = {"hbm_by_part": parts, "hbm_limit_gib": 16.0, "hbm_gib": 3.0, "step_seconds": 2.0, "xla_seconds": 1.5,
            "pallas_seconds": 0.5, "grouped_seconds": 0.0, "wire_seconds": 0.1, "wire_gb": 20.0, "mfu": 0.5,
            "versions": {"jax": "0"}}  # fmt: skip
    for name in ("plan.png", "plan.html"):
        choose.draw("title <a>", [("one & only", plan), ("two", plan | {"pallas_seconds": None})], tmp_path / name)
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "plan.html").read_text()
    assert "one &amp; only" in page and "title &lt;a&gt;" in page and "base64" in page
    with pytest.raises(ValueError, match=r"\.png or \.html"):
        choose.draw("t", [("a", plan)], tmp_path / "plan.pdf")
    with pytest.raises(ValueError, match="in a directory that exists"):
        choose.draw("t", [("a", plan)], tmp_path / "none" / "plan.png")
