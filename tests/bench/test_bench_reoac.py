"""The speed measurement runs, prints its table and counts compilations; no timing is judged."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from bench import TraceCounter, processor, take_turns
from bench.reoac_rollout import main
from bench.reoac_scenes import TINY


def check(groups: tuple[str, ...], target: Path, table: str) -> None:
    result = json.loads(target.read_text())
    assert {"command", "machine", "sizes", "rows"} <= set(result)
    for row in result["rows"]:
        assert row["name"] in table
        assert row["ratio"] > 0 and row["work"] > 0 and row["floor"] > 0
        assert row["traces"][0] > 0 and row["traces"][1] == 0, f"{row['name']} compiled again"
    assert {re.split("[ /,]", row["name"])[0] for row in result["rows"]} == set(groups)


@pytest.mark.parametrize(
    "groups",
    [
        ("features", "score", "decode"),
        pytest.param(("rollout", "update", "episodes"), marks=pytest.mark.slow),
    ],
)
def test_groups_print_their_rows(
    groups: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "speed.json"
    main(["--repeats", "1", "--only", ",".join(groups), "--json", str(target)], TINY)
    check(groups, target, capsys.readouterr().out)


def test_an_unknown_group_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--only", "nothing"])
    assert refused.value.code == 2
    assert "rollout" in capsys.readouterr().err


def test_a_second_shape_is_counted() -> None:
    counter = TraceCounter()
    double = counter.jit(lambda x: 2 * x)
    sizes = iter([2, 2, 3])
    timings = take_turns({"double": lambda: double(jnp.ones(next(sizes)))}, 2, counter)
    assert timings.traces == (1, 1)
    assert len(timings.seconds["double"]) == 2


def test_ratios_are_taken_round_by_round() -> None:
    timings = take_turns({"a": lambda: jnp.zeros(()), "b": lambda: jnp.ones(())}, 3)
    pairs = zip(timings.seconds["a"], timings.seconds["b"], strict=True)
    assert timings.ratio("a", "b") == sorted(a / b for a, b in pairs)[1]


def test_the_processor_is_named(tmp_path: Path) -> None:
    source = tmp_path / "cpuinfo"
    core = "model name\t: Some CPU: 2\nflags\t\t: fpu avx512_bf16 amx_bf16\n"
    source.write_text(f"processor\t: 0\n{core}\nprocessor\t: 1\n{core}")
    assert processor(str(source)) == {
        "cpu": "Some CPU: 2",
        "cpu_bfloat16": ["amx_bf16", "avx512_bf16"],
    }
    assert processor(str(tmp_path / "none"))["cpu_bfloat16"] is None
