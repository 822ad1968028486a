"""Tables of MoE records show what the records hold."""

from __future__ import annotations

from vllm_ext import results, results_moe


def test_every_kind_has_a_table_in_the_readme() -> None:
    assert results_moe.KINDS.items() <= results.KINDS.items()


def test_models_are_compared_with_the_first() -> None:
    first = {"label": "moe8", "num_experts": 8, "parameters": 690e6, "ppl": [{"ppl": 20.5}]}
    ppl = {"ppl": 22.25, "nll_more": 0.0819, "nll_more_low": 0.07, "nll_more_high": 0.09}
    kl = [{"mean": 0.125, "low": 0.1, "high": 0.15}]
    second = {"label": "moe4", "num_experts": 4, "parameters": 370e6, "ppl": [ppl], "kl": kl}
    record = {"settings": {"model": "moe8"}, "results": [first, second]}
    title, table = results_moe.KINDS["moe compare"]
    assert "moe8" in title(record)
    rows = table(record).splitlines()
    assert rows[2] == "| `moe8` | 8 | 690 M | 20.500 | – | – |"
    assert rows[3] == "| `moe4` | 4 | 370 M | 22.250 | +0.0819 (+0.0700–+0.0900) | 0.1250 (0.1000–0.1500) |"


def test_routers_reports_and_training_have_their_numbers() -> None:
    routers = {"results": [{"experts": 64, "top_k": 8, "tokens": 16, "seconds": {"kern": 2.5e-6, "kern_torch": 3e-5}}]}
    assert "| 8 of 64 | 16 | 2.5 | 30.0 |" in results_moe.routers_table(routers)
    layers = [{"imbalance": 1.25}, {"imbalance": 4.0}]
    found = {"srp": {"16": {"f1": 0.612, "scale": 1.5}}, "tokens": 9, "requests": 2, "layers": layers, "model": "m"}
    text = results_moe.report_table({"results": found})
    assert "| 16 | 61.2% | 1.50 |" in text
    assert "1.25 to 4.00" in text
    settings = {"experts": 8, "top_k": 2, "steps": 400, "batch": 16, "window": 1024}
    run = {"settings": settings, "seconds": 88.4, "held_out_loss_before": 2.9, "held_out_loss": 2.75}
    assert "| 2 of 8 | 400 | 16384 | 88 | 2.9000 | 2.7500 |" in results_moe.upcycle_table({"results": run})


def test_tiles_that_are_shipped_stand_beside_vllms() -> None:
    row = {"shape": "olmoe-1b-7b", "tokens": 1024, "tuned_s": 4.1e-4, "sonic_s": 3.5e-4, "floor_s": 2.8e-4}
    rows = [row | {"measured": "rounds", "served": True, "tuned_four_s": 4e-4, "sonic_four_s": 3.6e-4}]
    rows += [row | {"tokens": 64, "sonic_s": 4.4e-4, "measured": "search", "served": False}]
    title, table = results_moe.KINDS["sweep of tiles, shipped rows"]
    record = {"results": rows, "note": "How it was measured."}
    lines = table(record).splitlines()
    assert "from 64 tokens" in title(record)
    assert lines[2] == "| olmoe-1b-7b | 1024 | 410.0 | 350.0 | 1.17x | 1.11x | 280.0 | 80% | rounds | `sonic_moe` |"
    assert lines[3] == "| olmoe-1b-7b | 64 | 410.0 | 440.0 | 0.93x | – | 280.0 | 64% | search | vLLM |"
    assert lines[-1] == "How it was measured."
