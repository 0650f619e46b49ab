"""Jobs of a suite, how failures are isolated, and the merged tables."""

import sys
from pathlib import Path
from typing import Any

import pytest
from absl import flags as absl_flags

from common import flags
from common.errors import UserError
from esm import main as esm_main
from esm import suite
from esm.suite import Job, make_jobs, merge_tables, sanitize
from esm.tables import read_csv, write_csv
from tests.e2e import commands


def _config(*datasets: dict[str, Any]) -> Any:
    config = flags.load_config("configs/esm_suite_tiny.py:tiny")
    with config.unlocked():
        config.suite.datasets = datasets
    return config


def test_jobs_of_the_config_files() -> None:
    for variant in ("", ":paper", ":tiny"):
        jobs = make_jobs(flags.load_config(f"configs/esm_suite_tiny.py{variant}"))
        assert len(jobs) >= 2
        assert all(job.overrides["task.dataset"] for job in jobs)


def test_jobs_that_are_not_well_formed() -> None:
    with pytest.raises(UserError, match="no name"):
        make_jobs(_config({"eval_split": "test"}))
    with pytest.raises(UserError, match="task.eval_splt; did you mean task.eval_split"):
        make_jobs(_config({"name": "gsm8k", "eval_splt": "test"}))
    with pytest.raises(UserError, match="listed twice"):
        make_jobs(_config({"name": "gsm8k"}, {"name": "GSM8K"}))
    with pytest.raises(UserError, match="suite.datasets is empty"):
        make_jobs(_config())


def test_names_of_runs() -> None:
    assert sanitize("HuggingFaceH4/MATH-500") == "huggingfaceh4_math_500"
    [job] = make_jobs(_config({"name": "arc-c", "online.k_scale": 0.2, "eval_split": "validation"}))
    assert job.run_name == "suite_tiny_arc_c"
    assert job.overrides == {
        "task.dataset": "arc-c",
        "online.k_scale": 0.2,
        "task.eval_split": "validation",
    }


def test_a_failed_job_leaves_the_others_alone(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    jobs = [Job(name, name, {}) for name in ("good", "bad", "also_good")]
    done = "import pathlib, sys; pathlib.Path(sys.argv[1]).touch()"
    commands_of = {
        job.run_name: [
            [sys.executable, "-c", done, str(tmp_path / f"{job.name}{stage}")]
            if job.name != "bad"
            else [sys.executable, "-c", "import sys; sys.exit('error: no such data')"]
            for stage in range(2)
        ]
        for job in jobs
    }
    outcomes = suite._run_jobs(jobs, commands_of, ("mine", "eval"), [None, None], tmp_path)
    assert [(o.job.name, o.status, o.stage) for o in outcomes] == [
        ("good", 0, "eval"),
        ("bad", 1, "mine"),
        ("also_good", 0, "eval"),
    ]
    assert outcomes[1].message == "error: no such data"
    assert (tmp_path / "also_good1").exists()


def test_tables_of_what_exists(tmp_path: Path) -> None:
    for name, accuracy in (("a", 0.5), ("b", 0.25)):
        where = tmp_path / f"suite_{name}" / "id" / "tables"
        row = {"dataset": "x", "split": "test", "T_max": 8, "Greedy-CoT": accuracy, "ESM": 1.0}
        write_csv(where / "main_results_single.csv", [row])
        write_csv(where / "diagnostics_T8.csv", [{"method": "greedy", "n": 4}])
    where = tmp_path / "suite_a" / "id" / "tables"
    write_csv(where / "ablation.csv", [{"variant": "no_memory", "T_max": 8, "acc": 0.5}])
    jobs = [Job(name, f"suite_{name}", {}) for name in ("a", "b", "missing")]
    merge_tables(tmp_path, "id", jobs, tmp_path / "merged")
    main = read_csv(tmp_path / "merged" / "suite_main_results.csv")
    assert [(row["dataset"], row["Greedy-CoT"]) for row in main] == [("a", "0.5"), ("b", "0.25")]
    [ablation] = read_csv(tmp_path / "merged" / "suite_ablation_long.csv")
    assert list(ablation) == ["dataset", "variant", "T_max", "acc"] and ablation["dataset"] == "a"
    assert len(read_csv(tmp_path / "merged" / "suite_diagnostics.csv")) == 2


@pytest.mark.slow
def test_the_suite_command_reports_a_failed_job(tmp_path: Path) -> None:
    later = "{'name':'problems','prompt_template':'problems_0shot'}"
    broken = "{'name':'svamp','data_root':'" + str(tmp_path / "nowhere") + "'}"
    done = commands.run(
        "--config=configs/esm_suite_tiny.py:tiny",
        "--stage=suite",
        f"--config.outputs.root_dir={tmp_path}",
        "--config.suite.id=one",
        f"--config.suite.datasets=({later},{broken})",
        module="esm.main",
    )
    assert done.returncode == 1, done.stderr[-2000:]
    assert "svamp" in done.stderr and "task.data_root" in done.stderr
    tables = tmp_path / "_suite" / "one" / "tables"
    [row] = read_csv(tables / "suite_main_results.csv")
    assert row["dataset"] == "problems"
    assert (tables / "suite_ablation_long.csv").is_file()


def test_old_spellings_of_the_command_line() -> None:
    words = ["esm.main", "eval", "--run-id=latest", "--config.online.alpha_mult=0.5"]
    words += ["--config.online.k=4", "--example-ids=0,6"]
    values = absl_flags.FlagValues()
    esm_main.define_own_flags(values)
    flags.parse(esm_main.translate([*words, "--config=configs/esm_debug.py"]), values)
    assert values["stage"].value == "eval" and values["run_id"].value == "latest"
    assert values["example_ids"].value == "0,6"
    config: Any = values["config"].value
    assert config.online.k_scale == 0.5 and config.online.k_retrieve == 4
