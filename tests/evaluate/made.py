"""Evaluations as evaluation.json holds them, of numbers drawn from a seed: for pages and tables, which measure nothing."""

import math
from typing import Any

import numpy as np

ROWS, TOKENS, JUDGE = 40, 16, "5ed0" * 16


def summary(rng: np.random.Generator) -> dict[str, Any]:
    nats = float(rng.uniform(3.0, 6.0))
    return {
        "perplexity": math.exp(nats), "perplexity_standard_error": float(rng.uniform(0.5, 9.0)), "nats_per_token": nats,
        "nats_per_token_standard_error": 0.03, "nats_per_char": nats / 3, "nats_per_char_standard_error": 0.01,
        "entropy": float(rng.uniform(2.0, 3.0)), "entropy_standard_error": 0.02, "texts": 24, "tokens": int(rng.integers(300, 2000)),
        "characters": 900, "truncated": 1, "whole": {"perplexity": math.exp(nats + 0.1), "nats_per_token": nats + 0.1, "tokens": 800},
    }  # fmt: skip


def judged(rng: np.random.Generator, path: str, name: str, entropy: float | None = None) -> dict[str, Any]:
    return {
        "judge_bits_per_char": float(rng.uniform(1.5, 5.0)), "judge_standard_error": 0.08,
        "entropy": float(rng.uniform(3.0, 3.4)) if entropy is None else entropy, "entropy_standard_error": 0.02,
        "reverse_bits_per_char": float(rng.uniform(2.5, 4.0)), "distinct": 24, "count": 24,
        "texts": [f"{name} says {word}" for word in ("this", "that", "<i>what</i>", "no more")], "judges": {path: summary(rng)},
    }  # fmt: skip


def repeated(rng: np.random.Generator) -> dict[str, Any]:
    names = ("distinct_1", "distinct_2", "distinct_3", "repetition_4", "divergence_1", "divergence_2")
    return (
        {"texts": 24}
        | {name: float(rng.uniform()) for name in names}
        | {"copied": {length: float(rng.uniform()) for length in ("8", "16", "32")}}
    )


def likelihood(rng: np.random.Generator, exact: bool) -> dict[str, Any]:
    nats = rng.normal(4.0, 0.5, ROWS) * TOKENS
    mean = float(nats.sum()) / ROWS / TOKENS
    found: dict[str, Any] = {
        "kind": "exact" if exact else "bound", "nats_per_token": mean, "standard_error_nats": 0.0 if exact else 0.021,
        "tokens": ROWS * TOKENS, "unigram_nats_per_token": 5.2, "bits_per_char": mean / 2, "bits_per_byte": mean / 2.1,
        "perplexity_per_token": math.exp(mean), "rows": {"nats": nats.tolist(), "errors": [0.0] * ROWS, "tokens": [TOKENS] * ROWS},
    }  # fmt: skip
    if not exact:
        network = rng.uniform(0.1, 0.4, 16)
        found["parts"] = {
            "axis": "log-SNR", "edges": np.linspace(-4.0, 6.0, 17).tolist(), "nats": network.tolist(), "errors": [0.03] * 16,
            "unigram": (network + 0.05).tolist(), "before": 0.001, "after": 0.002, "rest": 0.0,
        }  # fmt: skip
        along = nats + rng.normal(0.1, 0.05, ROWS)
        mean = float(along.sum()) / ROWS / TOKENS
        found["ode"] = {
            "kind": "ode", "nats_per_token": mean, "standard_error_nats": 0.017, "half_steps_difference_nats": -0.0123,
            "half_steps_error_nats": 0.004, "tokens": ROWS * TOKENS, "unigram_nats_per_token": 5.2, "bits_per_char": mean / 2,
            "bits_per_byte": mean / 2.1, "perplexity_per_token": math.exp(mean), "steps": 64, "probes": 2,
            "rows": {"nats": along.tolist(), "errors": [0.0] * ROWS, "tokens": [TOKENS] * ROWS},
        }  # fmt: skip
    return found


def solved(rng: np.random.Generator) -> dict[str, Any]:
    right = (rng.uniform(size=20) < 0.6).tolist()
    share = sum(right) / 20
    answers = [[f"{number}+1=", f"<{number}>"] for number in range(8)]
    return {
        "solved": sum(right), "count": 20, "share": share, "low": share - 0.11, "high": share + 0.12, "distinct": 19,
        "held_out": sum(right) - 1, "right": right, "answers": answers,
    }  # fmt: skip


def copied(name: str) -> dict[str, Any]:
    return {
        "text": 0, "tokens": 11, "copied": "<u>heart</u>", "generated": f"{name} by <u>heart</u>", "training_row": 1234,
        "training": "learned by <u>heart</u>, row",
    }  # fmt: skip


def evaluation(seed: int, kind: str = "flow", judge: str = "gpt2", mauve: bool = True) -> dict[str, Any]:
    """Of a flow of 1 and 4 steps, whose one-step texts are all the same, or of a baseline, with all that may be asked for."""
    rng, exact = np.random.default_rng(seed), kind == "autoregressive"
    names = ["autoregressive"] if exact else ["1", "4"]
    samples = {name: judged(rng, judge, f"{kind} {seed} {name}") for name in names}
    if not exact:
        samples["1"] |= {"distinct": 1, "entropy": 0.0, "texts": ["the the"] * 4}
    last = samples[names[-1]]
    cold = judged(rng, judge, "cold", last["entropy"] - 0.3)
    steps = None if exact else 4
    points = [
        {"steps": steps, "temperature": heat, "gamma": None, **{key: value for key, value in entry.items() if key != "texts"}}
        for heat, entry in ((0.7, cold), (1.0, last))
    ]
    matched = {
        "steps": steps, "gamma": None, "lowest_entropy": cold["entropy"], "highest_entropy": last["entropy"], "outside": None,
        "judge_bits_per_char": 2.345, "judges": {judge: {"nats_per_token": 4.5, "perplexity": 90.017}},
    }  # fmt: skip
    nowhere = matched | {"steps": 1, "outside": "above", "judge_bits_per_char": None, "judges": {judge: {"perplexity": None}}}
    fixed = np.random.default_rng(10**6)  # real text is the same of all runs
    real = {name: judged(fixed, judge, name) for name in ("data", "unigram")}
    found = {
        "step": 200 + seed, "weights": f"{seed:064x}", "shards": "abcd" * 16, "kind": kind,
        "likelihood": likelihood(rng, exact), "texts": {},
        "settings": {
            "steps": [1, 4], "samples": 24, "rows": ROWS, "draws": 2, "seed": 0, "temperature": 1.0, "judges": {judge: JUDGE},
            "frontier": {"temperatures": [0.7, 1.0], "gammas": [], "entropy": None}, "verify": "sums:digits=2",
        },
        "judge": {"order": 6}, "reference": real, "samples": samples, "even": {}, "unbalanced": {},
        "cooled": {names[-1]: [{"temperature": 0.7, **{key: value for key, value in cold.items() if key != "texts"}}]},
        "judges": {
            judge: {
                "sha256": JUDGE, "kind": "gpt2", "parameters": 124_439_808, "vocab_size": 50_257, "context": 1024, "prepended": None,
                "first_token_scored": False, "end": "<|endoftext|>",
            }
        },
        "frontier": {"entropy": 3.1, "points": points, "matched": [matched] if exact else [matched, nowhere]},
        "repetition": {"data": repeated(fixed)} | {name: repeated(rng) for name in names},
        "verify": {"task": "sums:digits=2", "samples": {name: solved(rng) for name in names}},
        "nearest": {name: [copied(f"{kind} {seed} {name}")] for name in names[-1:]},
    }  # fmt: skip
    if mauve:
        found["settings"]["mauve"] = judge
        found["mauve"] = {
            "judge": judge, "real": {"mauve": 0.9876, "over_seeds": 0.0123, "texts": [24, 24], "clusters": 2},
            "samples": {name: {"mauve": float(rng.uniform()), "over_seeds": 0.0045, "texts": [24, 23], "clusters": 2} for name in names},
        }  # fmt: skip
    return found
