"""MegaFlow: distributed pretraining of flow language models.

Words used everywhere in this package, one meaning each:

    t = 0 is noise, t = 1 is data; times are real times unless a name ends in ``_clock``
    code          the matrix C (V, d_c) whose rows carry the tokens; the state lives in its d_c dimensions
    state y       t C[token] + (1 - t) n, shape (B, L, d_c)
    belief        the exact posterior of a token given its own noisy state, under the unigram prior
    denoiser      psi_{t,t}: the network's posterior of every token given all noisy states
    flow map      X_{s,t}: carries a state from time s to time t; psi_{s,t} is its mean denoiser
    clock         the law that training times are drawn from, and the grid that samplers step on
    trunk         the transformer between the input embedding and the head
    hidden        the trunk's output (B, L, d); logits are never a (B, L, V) tensor, only chunks of it
    bound         the variational upper bound of -log p(text), nats per token or bits per character
    place         a sample's position in the global order of the run, the same on any number of processes
"""

__version__ = "0.1.0"
