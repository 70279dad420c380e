"""The folders of the checkout are one package once installed; each pitfall of that has a test."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("recsys_moe", "kernels", "pipelines", "serving", "conf")


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_is_a_package(folder: str) -> None:
    assert (ROOT / folder / "__init__.py").is_file()


def test_kernels_refuse_their_bare_name() -> None:
    # With the checkout on the path, `import kernels` finds the folder: two names would be two modules.
    done = run(sys.executable, "-c", "import kernels", cwd=ROOT, PYTHONSAFEPATH="")
    assert done.returncode == 1
    assert "recsys_moe.kernels" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("safe_path", ["1", ""])
def test_the_package_imports_from_the_checkout_whatever_the_path(safe_path: str) -> None:
    program = (
        "import sys, recsys_moe.kernels, recsys_moe.pipelines, recsys_moe.serving, recsys_moe.conf;"
        "print('kernels' in sys.modules)"
    )
    done = run(sys.executable, "-c", program, cwd=ROOT, PYTHONSAFEPATH=safe_path)
    assert done.stdout.strip() == "False", done.stderr


def test_transformers_imports_beside_the_checkout() -> None:
    # It looks for the Hugging Face package `kernels`, which the checkout's folder must not be taken for.
    program = "import transformers; from transformers import PreTrainedModel; print('ok')"
    done = run(sys.executable, "-c", program, cwd=ROOT, PYTHONSAFEPATH="1")
    assert done.stdout.strip() == "ok", done.stderr


def test_the_module_leaves_the_checkout_out_of_the_path() -> None:
    # `bench` loads transformers, which would meet the bare name there.
    see = "import runpy, sys; sys.path.insert(0, {!r}); sys.argv = ['recsys_moe', '--help']\n"
    see += "try: runpy.run_module('recsys_moe', run_name='__main__')\nexcept SystemExit: import transformers.activations"
    done = run(sys.executable, "-c", see.format(str(ROOT)), cwd=ROOT, PYTHONSAFEPATH="1")
    assert done.returncode == 0, done.stderr


def test_tests_are_flat() -> None:
    # tests/kernels/__init__.py would become a top-level `kernels`.
    assert not [p for p in (ROOT / "tests").rglob("*.py") if p.parent != ROOT / "tests"]
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_the_pin_list_leaves_the_cuda_build_of_fbgemm_out() -> None:
    pins = [line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
    assert "torchrec" in pins
    assert not [name for name in pins if name.startswith(("fbgemm", "torch=="))]
    assert "torch" not in pins


@pytest.fixture(scope="module")
def other_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout, installed into an environment that sees the dependencies but not the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: building leaves a build/ folder behind.
    source = folder / "source"
    source.mkdir()
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        run("cp", "-r", ROOT / name, source)
    done = run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source)
    assert done.returncode == 0, done.stderr
    wheel = next(folder.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert "recsys_moe/kernels/__init__.py" in names
    assert "recsys_moe/kernels/cpu.cpp" in names
    assert "recsys_moe/conf/schema/census_full.yaml" in names
    assert not [n for n in names if n.split("/")[0] in ("kernels", "pipelines", "serving", "conf", "tests")]
    environment = folder / "env"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    site = next((environment / "lib").glob("python*/site-packages"))
    dependencies = next(p for p in sys.path if p.endswith("site-packages"))
    # A plain line adds the folder without running its .pth files, so the editable checkout stays out of sight.
    (site / "dependencies.pth").write_text(dependencies + "\n")
    python = environment / "bin" / "python"
    done = run(sys.executable, "-m", "pip", f"--python={python}", "install", "-q", "--no-deps", "--ignore-installed", wheel)
    assert done.returncode == 0, done.stderr
    return environment


def test_the_wheel_works_from_another_directory(other_environment: Path, tmp_path: Path) -> None:
    program = "import recsys_moe, recsys_moe.kernels, recsys_moe.conf; print(recsys_moe.kernels.__file__)"
    done = run(other_environment / "bin" / "python", "-c", program, cwd=tmp_path)
    assert str(other_environment) in done.stdout, done.stderr
    command = other_environment / "bin" / "recsys-moe"
    assert run(command, "--help", cwd=tmp_path).returncode == 0
    done = run(command, "data", "synth", "feed", "--rows", "1000", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "feed" / "logs" / "part-00000.parquet").exists()
    done = run(command, "train", "data=nothing", cwd=tmp_path)
    assert done.returncode == 2
    assert "data 'nothing' is unknown" in done.stderr
