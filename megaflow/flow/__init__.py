"""The mathematics of flow language models, as functions of tensors. Imports nothing else of MegaFlow.

    interpolant   the path from noise to data, its log-SNR and the convex update along it
    code          the matrix that carries tokens into the state's dimensions; frames and their leverage
    channel       what a token's own noisy state says about it: exact posterior (belief) and its mean embedding
    head          hidden states to everything a flow needs of the vocabulary, in chunks of tokens
    clock         laws of training times and grids of samplers
    flow_map      the semigroup identity and the rows of stage 2
    balance       one-step tokens as often as the unigram law says
    sampler       noise to text: ODE, stochastic, ancestral, flow map
    likelihood    the variational bound with its Monte-Carlo error

Equation numbers refer to the papers named in each docstring: VFM (Eijkelboom et al. 2024), VDM (Kingma et al. 2021),
FMM (Boffi et al. 2025), FMLM (arXiv 2602.16813), DFM (arXiv 2604.09784).
"""
