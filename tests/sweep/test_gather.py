"""What the runs of a sweep have come to, as plain data."""

from megaflow.sweep import gather


def test_likelihoods_of_other_tokens_have_other_names():
    """A flow of answers and a baseline of whole rows share what is of answers."""
    samples = {"1": {"judge_bits_per_char": 2.5, "entropy": 3.0, "seconds": 1.0}, "autoregressive": {"judge_bits_per_char": 1.5}}
    of_answers = {"likelihood": {"nats_per_token": 0.1, "bits_per_char": 0.2, "given": "source"}, "samples": samples}
    whole = {"likelihood": {"nats_per_token": 1.3, "continuation": {"given": "source", "nats_per_token": 0.8}}}
    half = {"likelihood": {"nats_per_token": 1.3, "continuation": {"given": "first half", "nats_per_token": 0.8}}}
    drawn = {"samples.1.judge_bits_per_char": 2.5, "samples.1.entropy": 3.0, "samples.autoregressive.judge_bits_per_char": 1.5}
    assert gather.measured(of_answers) == {"given.source.nats_per_token": 0.1, "given.source.bits_per_char": 0.2} | drawn
    assert gather.measured(whole) == {"likelihood.nats_per_token": 1.3, "given.source.nats_per_token": 0.8}
    assert gather.measured(half) == {"likelihood.nats_per_token": 1.3, "given.first_half.nats_per_token": 0.8}
    assert gather.measured({"likelihood": {"nats_per_token": None, "kind": "none"}}) == {} == gather.measured({})


def test_what_a_seed_shares_is_said_as_far_as_it_does():
    content = {"set": {"train.steps": 10}, "budget": {}, "overrides": {"model.layers": {"1": {"model.layers": 1}}}}
    assert (
        gather.note_of(content) == "All points have train.steps=10. A seed has the same order of samples, noise and times at every choice."
    )
    content |= {"set": {}, "overrides": {"batch": {"4": {"train.global_batch": 4, "model.layers": 1}}}}
    same = "a seed has the same order of samples, noise and times at every choice."
    assert gather.note_of(content) == f"At equal train.global_batch {same}"
