"""The doctor sees what is there and what jax does not use."""

import jax

from jaxllm import doctor


def test_findings(tmp_path):
    findings = {finding.name: finding for finding in doctor.examine(dev=tmp_path, where=tmp_path)}
    assert findings["jax"].value == jax.__version__
    assert f"{jax.device_count()} x cpu (cpu)" in findings["devices"].value
    assert "GiB free" in findings["disk"].value
    assert {"[tpu]", "[cuda]", "compilation cache"} <= findings.keys()
    assert all(finding.cure for finding in findings.values() if finding.state != "ok")


def test_devices_that_jax_does_not_use(tmp_path):
    (tmp_path / "nvidia0").touch()
    (tmp_path / "nvidiactl").touch()
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "0").touch()
    unseen = {finding.name: finding for finding in doctor.unseen(tmp_path, "cpu")}
    assert unseen.keys() == {"NVIDIA GPU", "TPU"}
    assert "jaxllm[cuda]" in unseen["NVIDIA GPU"].cure
    assert doctor.unseen(tmp_path, "cpu")[0].state == "problem"
    assert [finding.name for finding in doctor.unseen(tmp_path, "gpu")] == ["TPU"]


def test_cache_size(tmp_path):
    (tmp_path / "entry").write_bytes(b"x" * 2**20)
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        value = next(f.value for f in doctor.examine(dev=tmp_path, where=tmp_path) if f.name == "compilation cache")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert value == f"{tmp_path}: 1 files, 1.0 MiB"


def test_command_prints(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("[x]", "none", "problem", "pip install y[z]")])
    assert doctor.doctor_command() == 1
    assert "pip install y[z]" in capsys.readouterr().out
