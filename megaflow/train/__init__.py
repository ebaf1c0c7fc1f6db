"""Training: DeepSpeed's engine, one loop, and the stages that it runs.

stage_*        what differs between flow, autoregressive baseline and flow map: draws, loss, validation
engine         DeepSpeed from a config; logical weights and moments out of it and into it again
checkpoint     atomic, verified checkpoints of logical parameters
run            the run directory: config, lock, metrics, resume
loop           the loop itself
"""
