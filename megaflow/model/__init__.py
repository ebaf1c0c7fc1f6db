"""Networks: the trunk that all of them share, and what each reads and writes.

attention      one adapter over flash-attn, torch SDPA and a plain form
trunk          pre-norm transformer blocks with rotary positions, optionally conditioned on time
text_dit       the flow network (and flow map): state in, hidden out, with its head
autoregressive the baseline: the same trunk, causal, tokens in
discrete       baselines of discrete diffusion; discrete_bound their bounds
parts          the fixed parts of a flow (code, prior, range) and the profile its clock is fitted to
bound          the likelihood bound of a network on rows of tokens; ode_bound that of its differential equation
build          networks from configs
"""
