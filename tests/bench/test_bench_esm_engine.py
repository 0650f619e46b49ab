"""The measurement of steering runs and prints its table; counts are judged, timings are not."""

import json

import jax
import jax.numpy as jnp
import pytest

from bench.esm_engine import key_value_share, main
from common.engines import jax_rows
from common.lm.cache import empty_cache
from common.lm.config import DecoderConfig
from common.lm.decoder import init_params


@pytest.mark.slow
def test_positions(tmp_path, capsys):
    """Counts at small sizes: never steered costs less than always."""
    target = tmp_path / "speed.json"
    sizes = ["--model", "small", "--segments", "2", "--segment", "5"]
    main(["--only", "positions", "--json", str(target), *sizes])
    rows, table = json.loads(target.read_text())["rows"], capsys.readouterr().out
    ratios = [row["ratio"] for row in rows]
    assert all(row["name"] in table for row in rows)
    assert ratios[0] < ratios[2] < ratios[4]
    assert all(blocks < whole for whole, blocks in zip(ratios[::2], ratios[1::2], strict=True))


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_rates(tmp_path, clock):
    target = tmp_path / "speed.json"
    sizes = ["--model", "small", "--slots", "2", "--segments", "2", "--segment", "4"]
    main(
        ["--only", "greedy,policy", "--repeats", "1", "--clock", clock, "--json", str(target)]
        + sizes
    )
    assert [row["ratio"] > 0 for row in json.loads(target.read_text())["rows"]] == [True, True]


@pytest.mark.parametrize("bad", [["--only", "none"], ["--repeats", "0"], ["--model", "m"]])
def test_bad_arguments_are_refused(bad):
    with pytest.raises(SystemExit):
        main(bad)


@pytest.mark.parametrize("above", [1, 3])
def test_rereads_cost_what_is_counted(above):
    """Of the blocks above a tool the compiled pass runs all, of the last its keys and values."""
    cfg = DecoderConfig("llama", 64, 128, 512, 5, 4, 2, 32, max_positions=64)
    params, slots, tokens = init_params(jax.random.key(0), cfg), 2, 32
    first = cfg.num_layers - 1 - above
    ids = jnp.zeros(slots, jnp.int32)
    args = (params, empty_cache(cfg, slots, 64), jnp.zeros((slots, tokens, 128)), ids, ids, ids)
    clean = jax_rows.empty_columns(cfg, slots, first)
    options = {"cfg": cfg, "first": first, "num_tokens": tokens}
    compiled = jax_rows.reread.lower(*args, clean, **options).compile()
    weights = 2 * 128 * 32 * (4 + 2) + 3 * 128 * 512
    run = compiled.cost_analysis()["flops"] / (2 * slots * tokens * weights)
    # Products alone are counted; attention over 64 columns and norms add a tenth.
    counted = above - 1 + key_value_share(cfg)
    assert counted <= run < counted * 1.1 + 0.1
