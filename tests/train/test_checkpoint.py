"""Checkpoints: what is saved comes back bitwise, onto any layout; what is damaged, foreign or too big is said so."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.records import TrainState
from jaxllm.train import folder, manifest
from jaxllm.train.checkpoint import CHECKPOINTS, Checkpointer, load_params, restore, steps

MARK = "jaxllm_checkpoints.txt"


def make_state(step: int, width: int = 16, seed: int = 0) -> TrainState:
    key = jax.random.fold_in(jax.random.key(seed), step)
    params = {
        "embed": {"tokens": jax.random.normal(key, (8, width))},
        "stacks": {"0": {"0": {"q": jax.random.normal(key, (2, width, 8)).astype(jnp.bfloat16)}}},
    }
    opt_state = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    return TrainState(jnp.int32(step), params, opt_state, {"skipped": jnp.int32(step + 1), "ema": None})


def like(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(got: TrainState, want: TrainState) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_all(directory: Path, *wanted: int, **options: object) -> None:
    with Checkpointer(directory, **options) as saver:  # type: ignore[arg-type]
        for step in wanted:
            saver.save(make_state(step), meta={"tokens": step * 10})


def largest(directory: Path) -> Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x10
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------------- round trip


def test_round_trip_is_bitwise_with_tuples_none_and_bfloat16(tmp_path: Path) -> None:
    want = make_state(7)
    with Checkpointer(tmp_path / "c") as saver:
        saver.save(want, metric=2.5, meta={"tokens": 123, "channels": ["comedy"]})
    state, meta = restore(tmp_path / "c", like(want)) or pytest.fail("nothing restored")
    assert_same(state, want)
    assert meta == {"tokens": 123, "channels": ["comedy"]}
    assert steps(tmp_path / "c") == [7]


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert restore(tmp_path / "absent", like(make_state(1))) is None
    Checkpointer(tmp_path / "c").close()
    assert restore(tmp_path / "c", like(make_state(1))) is None
    assert steps(tmp_path / "c") == []


def test_a_state_donated_right_after_save_is_saved_as_it_was(tmp_path: Path) -> None:
    """The copy is taken before `save` returns: 20 donated steps run while Orbax still writes."""
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = advance(TrainState(jnp.int32(0), {"w": jnp.zeros((1 << 20,))}, {"m": jnp.ones((1 << 20,))}, {}))
    with Checkpointer(tmp_path / "c", keep=3) as saver:
        for _ in range(3):
            saver.save(state)
            for _ in range(20):
                state = advance(state)
    assert steps(tmp_path / "c") == [1, 21, 41]
    for step in (41, 21, 1):
        arrays, _ = restore(tmp_path / "c", like(state)) or pytest.fail("nothing restored")
        manifest.unseal(folder.absolute(tmp_path / "c" / str(step)))
        assert (np.asarray(arrays.params["w"]) == step).all()
        assert (np.asarray(arrays.opt_state["m"]) == step + 1).all()


def on_mesh(state: TrainState, shape: tuple[int, int], spec: PartitionSpec) -> TrainState:
    mesh = Mesh(np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape), ("data", "tensor"))

    def place(x: jax.Array) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, spec if x.ndim == 2 else PartitionSpec()))

    return jax.tree.map(place, state)


@pytest.mark.parametrize(
    ("before", "after"),
    [((4, 2), (1, 1)), ((1, 1), (2, 4)), ((2, 4), (8, 1)), ((8, 1), (2, 1))],
    ids=lambda s: f"{s[0]}x{s[1]}",
)
def test_restore_onto_another_device_count_and_layout(
    tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    assert len(jax.devices()) >= 8, "tests run with 8 CPU devices (XLA_FLAGS)"
    want = on_mesh(make_state(3), before, PartitionSpec("data", "tensor"))
    with Checkpointer(tmp_path / "c") as saver:
        saver.save(want)
    target = like(on_mesh(make_state(0), after, PartitionSpec("tensor", "data")))
    state, _ = restore(tmp_path / "c", target) or pytest.fail("nothing restored")
    assert_same(state, want)
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True):
        assert got.sharding.is_equivalent_to(wanted.sharding, got.ndim)


def test_load_params_reads_only_parameters(tmp_path: Path) -> None:
    want = make_state(5)
    save_all(tmp_path / CHECKPOINTS, 5)
    step, params = load_params(tmp_path)
    assert step == 5
    jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.asarray, want.params))
    assert params["stacks"]["0"]["0"]["q"].dtype == jnp.bfloat16


def test_any_orbax_reader_opens_a_checkpoint(tmp_path: Path) -> None:
    save_all(tmp_path / "c", 5)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        tree = reader.metadata(tmp_path / "c" / "5").item_metadata.tree
    assert tuple(tree["params"]["embed"]["tokens"].shape) == (8, 16)


# ------------------------------------------------------------------------------------------------------------- keep


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "c", keep=2, best=True) as saver:
        for step, metric in [(1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, float("nan"))]:
            saver.save(make_state(step), metric=metric)
    assert steps(tmp_path / "c") == [2, 4, 5]


def test_keep_without_best(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "c", keep=1, best=False) as saver:
        for step in (1, 2, 3):
            saver.save(make_state(step), metric=float(step))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["3", MARK]


def test_keep_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint.keep=0 must be at least 1"):
        Checkpointer(tmp_path / "c", keep=0)


def test_an_intact_step_is_not_written_again_and_a_damaged_one_is(tmp_path: Path) -> None:
    save_all(tmp_path / "c", 1, 2)
    seal = tmp_path / "c" / "2" / manifest.NAME
    before = seal.stat().st_mtime_ns
    save_all(tmp_path / "c", 2)
    assert seal.stat().st_mtime_ns == before
    flip(largest(tmp_path / "c" / "2"))
    save_all(tmp_path / "c", 2)
    assert manifest.damage(folder.absolute(tmp_path / "c" / "2")) is None


def test_a_damaged_later_checkpoint_does_not_push_out_the_one_just_saved(tmp_path: Path) -> None:
    save_all(tmp_path / "c", 5, 9)
    flip(largest(tmp_path / "c" / "9"))
    save_all(tmp_path / "c", 6, keep=1)
    assert steps(tmp_path / "c") == [6, 9]
    state, _ = restore(tmp_path / "c", like(make_state(0))) or pytest.fail("nothing restored")
    assert int(state.step) == 6


# ----------------------------------------------------------------------------------------------------------- damage


def every_file(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file())


def test_one_flipped_bit_in_any_file_is_found(tmp_path: Path) -> None:
    save_all(tmp_path / "c", 1)
    place = tmp_path / "c" / "1"
    files = every_file(place)
    assert len(files) >= 8 and place / manifest.NAME in files
    for path in files:
        whole = path.read_bytes()
        for at in (0.0, 0.3, 0.6, 0.999):
            flip(path, at)
            assert str(path) in (manifest.damage(folder.absolute(place)) or ""), (path, at)
            path.write_bytes(whole)
    assert manifest.damage(folder.absolute(place)) is None


def test_missing_extra_and_truncated_files_are_found(tmp_path: Path) -> None:
    save_all(tmp_path / "c", 1)
    place = tmp_path / "c" / "1"
    data = largest(place)
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    assert f"{len(whole) - 1} bytes instead of {len(whole)}" in (manifest.damage(folder.absolute(place)) or "")
    data.unlink()
    assert f"{data} is missing" == manifest.damage(folder.absolute(place))
    data.write_bytes(whole)
    (place / "stray").touch()
    assert f"{place / 'stray'} does not belong there" == manifest.damage(folder.absolute(place))


@pytest.mark.parametrize("harm", ["flip", "remove", "manifest", "unsealed"])
def test_a_damaged_newest_is_named_and_the_one_before_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    save_all(tmp_path / "c", 4, 8)
    newest = tmp_path / "c" / "8"
    match harm:
        case "flip":
            flip(largest(newest))
        case "remove":
            largest(newest).unlink()
        case "manifest":
            flip(newest / manifest.NAME)
        case "unsealed":
            (newest / manifest.NAME).unlink()
    with caplog.at_level(logging.WARNING, "jaxllm"):
        state, meta = restore(tmp_path / "c", like(make_state(0))) or pytest.fail("nothing restored")
    assert_same(state, make_state(4))
    assert meta == {"tokens": 40}
    named = [r.getMessage() for r in caplog.records if str(newest) in r.getMessage()]
    assert len(named) == (0 if harm == "unsealed" else 1)
    assert load_params(_as_run(tmp_path))[0] == 4


def _as_run(tmp_path: Path) -> Path:
    (tmp_path / "c").rename(tmp_path / CHECKPOINTS)
    return tmp_path


def test_all_damaged_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    save_all(tmp_path / "c", 4, 8)
    for step in ("4", "8"):
        flip(largest(tmp_path / "c" / step))
    with pytest.raises(ValueError, match=r"all checkpoints are damaged \(steps \[4, 8\]\)"):
        restore(tmp_path / "c", like(make_state(0)))


def test_leftovers_of_killed_saves_are_cleaned_at_the_next_start(tmp_path: Path) -> None:
    save_all(tmp_path / "c", 4)
    (tmp_path / "c" / "8.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
    (tmp_path / "c" / "9.orbax-checkpoint-tmp-1700000000").mkdir()
    shutil.copytree(tmp_path / "c" / "4", tmp_path / "c" / "6", ignore=shutil.ignore_patterns(manifest.NAME))
    (tmp_path / "c" / "notes.txt").write_text("mine")
    assert steps(tmp_path / "c") == [4]
    Checkpointer(tmp_path / "c").close()
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["4", MARK, "notes.txt"]


# -------------------------------------------------------------------------------------------------- wrong directory


def test_a_foreign_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos" / "2024").mkdir(parents=True)
    for call in (Checkpointer, lambda d: restore(d, like(make_state(0)))):
        with pytest.raises(
            ValueError, match=r"photos is not a checkpoint directory of jaxllm.*'2024'.*another run_dir"
        ):
            call(tmp_path / "photos")
    assert (tmp_path / "photos" / "2024").is_dir()


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(ValueError, match=r"f is a file"):
        Checkpointer(tmp_path / "f")


def test_load_params_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a run directory: it has no checkpoints/"):
        load_params(tmp_path)
    Checkpointer(tmp_path / CHECKPOINTS).close()
    with pytest.raises(ValueError, match=r"has no checkpoint yet"):
        load_params(tmp_path)
    save_all(tmp_path / CHECKPOINTS, 4, 8)
    with pytest.raises(ValueError, match=r"no checkpoint of step 5; it has those of \[4, 8\]"):
        load_params(tmp_path, 5)
    flip(largest(tmp_path / CHECKPOINTS / "8"))
    with pytest.raises(ValueError, match=r"is damaged.*take another step of \[4, 8\]"):
        load_params(tmp_path, 8)


def test_another_model_names_the_first_path_that_differs(tmp_path: Path) -> None:
    save_all(tmp_path / "c", 1)
    wide = r"params/embed/tokens to be float32\[8, 32\], found float32\[8, 16\]"
    with pytest.raises(ValueError, match=r"does not fit.*opt_state/1/0/mu/embed/tokens to be float32\[8, 32\]"):
        restore(tmp_path / "c", like(make_state(0, width=32)))
    narrow = make_state(0).replace(params=make_state(0, width=32).params)
    with pytest.raises(ValueError, match=wide):
        restore(tmp_path / "c", like(narrow))
    more = make_state(0).replace(extra={"skipped": jnp.int32(0), "scale": jnp.float32(1)})
    with pytest.raises(ValueError, match=r"expected extra/scale to be float32\[\], found absent"):
        restore(tmp_path / "c", like(more))


# -------------------------------------------------------------------------------------------------------- disk full


@pytest.fixture
def small_disk(tmp_path: Path):
    """A real file system of 8 MiB, where mounting is permitted."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def big_state(step: int, mib: float) -> TrainState:
    return TrainState(jnp.int32(step), {"w": jax.random.normal(jax.random.key(step), (int(mib * 2**18),))}, (), {})


def test_too_small_a_disk_is_an_error_before_anything_is_written(small_disk: Path) -> None:
    with Checkpointer(small_disk / "c") as saver:
        saver.save(big_state(1, 3))
        with pytest.raises(OSError, match=r"step 2 .*takes 6.0 MiB, [45]\.\d MiB are free.*\[1\]\) are untouched"):
            saver.save(big_state(2, 6))
    assert sorted(p.name for p in (small_disk / "c").iterdir()) == ["1", MARK]


# After the first failed write Orbax closes its event loop; tensorstore then cannot deliver the other failures to it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_disk_full_while_saving(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program takes the space after the check; the error comes at the next wait, the old checkpoint stays."""
    want = big_state(1, 2)
    with Checkpointer(small_disk / "c") as saver:
        saver.save(want)
        saver.wait()
        monkeypatch.setattr(folder, "_HEADROOM", 0.0)
        saver.save(big_state(2, 7))
        with pytest.raises(OSError, match=r"step 2 could not be written to .*7.0 MiB.*\[1\]\) are untouched"):
            saver.wait()
        assert sorted(p.name for p in (small_disk / "c").iterdir()) == ["1", MARK]
        saver.save(big_state(3, 2))
    state, _ = restore(small_disk / "c", like(want)) or pytest.fail("nothing restored")
    assert int(state.step) == 3


def test_the_check_counts_1_1_times_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with Checkpointer(tmp_path / "c") as saver:
        for free, fits in [(int(1.09 * 2**20), False), (int(1.11 * 2**20) + 8, True)]:
            monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
            if fits:
                saver.save(big_state(2, 1))
            else:
                with pytest.raises(OSError, match=r"The state takes 1.0 MiB, 1.1 MiB are free there"):
                    saver.save(big_state(2, 1))
    assert steps(tmp_path / "c") == [2]


@pytest.mark.parametrize("function", ["seal", "unseal"])
def test_a_failure_after_orbax_is_an_error_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    save_all(tmp_path / "c", 1, keep=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    saver = Checkpointer(tmp_path / "c", keep=1)
    monkeypatch.setattr(manifest, function, full)
    saver.save(make_state(2))
    with pytest.raises(OSError, match=r"step 2 could not be written.*No space left on device"):
        saver.save(make_state(3))
    monkeypatch.undo()
    saver.close()
    assert 1 in steps(tmp_path / "c")
    state, _ = restore(tmp_path / "c", like(make_state(0))) or pytest.fail("nothing restored")
    assert int(state.step) == (1 if function == "seal" else 2)


def test_an_error_in_the_loop_is_not_hidden_by_one_of_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "seal", full)
    with pytest.raises(ZeroDivisionError), Checkpointer(tmp_path / "c") as saver:
        saver.save(make_state(2))
        raise ZeroDivisionError
    assert "step 2 could not be written" in caplog.text


# ------------------------------------------------------------------------------------------------------------ speed


def test_saving_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed = manifest.seal

    def slow(*args: object, **kwargs: object) -> None:
        time.sleep(1.0)
        sealed(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(manifest, "seal", slow)
    with Checkpointer(tmp_path / "c") as saver:
        start = time.perf_counter()
        saver.save(make_state(1))
        assert time.perf_counter() - start < 0.9
        assert steps(tmp_path / "c") == []
    assert steps(tmp_path / "c") == [1]


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_all(Path("c"), 1)
    assert steps("c") == [1]
    assert os.path.isdir(tmp_path / "c" / "1")


# -------------------------------------------------------------------------------------------------- several processes


def run_two(directory: Path) -> list[tuple[dict, str]]:
    """(what it saw, its log) of two processes of 4 devices each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    child = Path(__file__).with_name("checkpoint_child.py")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(child.parents[2])}
    running = [
        subprocess.Popen(
            [sys.executable, child, str(i), port, directory],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    return [(json.loads(out.splitlines()[-1]), log) for out, log in ended]


def test_two_processes_save_one_checkpoint_and_one_decides(tmp_path: Path) -> None:
    (first, log), (second, other_log) = run_two(tmp_path)
    assert first == second
    assert first["none"] and first["newest"] and first["steps"] == [10, 20]
    assert first["previous"] == {"rows": [1, 2]}
    assert "step 20 is passed over" in log and "passed over" not in other_log
    assert "OSError: the checkpoint of step 30 could not" in first["no_room"]
    assert "No space left on device" in first["no_seal"]
    assert "ValueError" in first["foreign"] and "not a checkpoint directory" in first["foreign"]

    w = jax.ShapeDtypeStruct((16, 8), jnp.float32)  # here: one process, one device
    b = jax.ShapeDtypeStruct((3,), jnp.float32)
    target = TrainState(jax.ShapeDtypeStruct((), jnp.int32), {"w": w, "b": b}, (), {})
    state, meta = restore(tmp_path / "c", target) or pytest.fail("nothing restored")
    want = np.float32(10) + 100 * np.arange(16, dtype=np.float32)[:, None] + np.arange(8, dtype=np.float32)
    assert int(state.step) == 10 and meta == {"rows": [1, 2]}
    np.testing.assert_array_equal(np.asarray(state.params["w"]), want)
