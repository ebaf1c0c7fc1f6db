"""Training: DeepSpeed's engine, one loop, and the stages that it runs.

stage_*        what differs between flow, autoregressive baseline and flow map: draws, loss, validation
engine         DeepSpeed from a config, and its steps
engine_state   logical weights, averages and moments out of it and into it again
checkpoint     verified checkpoints of logical tensors, read by any layout; boxes and tensor_file are their arithmetic and their bytes
checkpoint_writer  writing them from many processes, beside training
context        which tokens of a batch are given
map_objective  what rows of a flow map with s < t are trained by
surgery        two gradients into one in which the second takes nothing back of the first
run            the run directory: config, lock, metrics, resume
loop           the loop itself
"""
