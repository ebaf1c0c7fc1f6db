"""The mathematics of flow language models, as functions of tensors. Imports nothing else of MegaFlow.

    choice        choices by name, with options: what the tables of the others are called by
    interpolant   paths from noise to data, log-SNR, and every update along them
    prior         laws of the noise: Gaussian, vertices, Dirichlet
    code          the matrix that carries tokens into the state's dimensions: fixed frames, and those that are trained
    semantic      vectors of tokens by what they stand beside
    channel       what a token's own noisy state says about it: exact posterior (belief) and its mean embedding
    head          hidden states to everything a flow needs of the vocabulary, in chunks of tokens
    losses        what of it has a gradient
    clock         laws of training times and grids of samplers, as two arrays
    profile       what a model is measured to score at each log-SNR
    laws          where clocks come from
    context       which tokens of a row are given
    objective     losses of stage 1, as weights by time
    weighting     weights of a token's loss
    flow_map      the semigroup identity and the rows of stage 2
    tangent       its identities with derivatives
    discrete      masked and uniform diffusion, the baselines
    balance       one-step tokens as often as the unigram law says
    sampler       noise to text: ODE, stochastic, ancestral, flow map
    likelihood    the variational bound with its Monte-Carlo error
    ode_likelihood  that of the flow as a differential equation

Equation numbers refer to the papers named in each docstring: VFM (Eijkelboom et al. 2024), VDM (Kingma et al. 2021),
FMM (Boffi et al. 2025), FMLM (arXiv 2602.16813), DFM (arXiv 2604.09784).
"""
