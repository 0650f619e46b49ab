"""The measurement of the q* solvers runs and prints its table; no timing is judged."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench.plain_torch_qstar import bisect_alpha
from bench.qstar_decode import SMALL, models_of, torch_model
from bench.qstar_solvers import alpha_error, make_rows
from qstar.bench import BY_MODEL, BY_SIZE, main
from qstar.tilt import AlphaSettings, solve


@pytest.mark.parametrize(
    "groups",
    [
        ("original",),
        pytest.param(tuple(BY_SIZE), marks=pytest.mark.slow),
        pytest.param(tuple(BY_MODEL), marks=(pytest.mark.torch, pytest.mark.slow)),
    ],
)
def test_groups_print_their_rows(
    groups: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "speed.json"
    only = ["--only", ",".join(groups), "--model", "small", "--slots", "2"]
    main(["--repeats", "1", "--sizes", "3x300", "--json", str(target), *only])
    result, table = json.loads(target.read_text()), capsys.readouterr().out
    assert {row["name"].split()[0] for row in result["rows"]} == set(groups)
    for row in result["rows"]:
        assert row["name"] in table and row["ratio"] > 0
        assert row["traces"][1] == 0, f"{row['name']} compiled again"


@pytest.mark.parametrize(
    "bad", [["--only", "none"], ["--sizes", "8"], ["--sizes", "0x10"], ["--model", "m"]]
)
def test_bad_arguments_are_refused(bad: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(bad)
    assert refused.value.code == 2


def test_the_reported_error_is_one() -> None:
    theta, t = make_rows(4, 500)
    alpha = np.asarray(solve(theta, t, AlphaSettings())[0])
    assert alpha_error(alpha, theta, t) <= 1e-5
    assert alpha_error(alpha + 0.01, theta, t) >= 0.009


@pytest.mark.torch
def test_the_plain_loop_mixes_the_same_models() -> None:
    """Its bisection finds our alpha, and its models are the decoder's."""
    torch = pytest.importorskip("torch")
    theta, t = make_rows(4, 500)
    p_theta, p_t = (torch.softmax(torch.from_numpy(z), -1).clamp_min(1e-10) for z in (theta, t))
    wanted = np.asarray(solve(theta, t, AlphaSettings())[0])
    np.testing.assert_allclose(bisect_alpha(p_theta, p_t)[:, 0].numpy(), wanted, atol=1e-3)

    from common.lm import decoder

    params, ids = models_of(SMALL)[0], np.arange(12).reshape(2, 6)
    hidden = decoder.forward(params, SMALL, ids).hidden
    logits = np.asarray(decoder.head_logits(params, SMALL, hidden))
    with torch.no_grad():
        found = torch_model(SMALL, params)(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(found, logits, atol=1e-4)
