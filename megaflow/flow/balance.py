"""Balance: the tokens of one-step text, as often as the law says.

The true flow map carries noise onto text, so that its tokens follow the unigram law pi. A trained one is not certain, and the most
likely token of an uncertain posterior is a common one: an argmax in every position says "the" twice as often as the text does, and most
of the vocabulary never. Of all ways to give n positions one of their candidates, such that token k is given n pi_k times, the likeliest is

    argmax_k ( log psi_k + b_k ),      b = argmin_b  sum_i max_k ( log psi_ik + b_k ) - n sum_k pi_k b_k

(the dual of an assignment, or of optimal transport to a discrete law: Peyre and Cuturi 2019, section 5.1). The gradient by b is what is
given less what is due. b belongs to the network: found once on noise of its own, it serves every noise, and a text stays an argmax
whose only randomness is the noise. A position's candidates are its few most likely tokens: a rare token is due somewhere, not anywhere.
"""

import torch
from torch import Tensor

CANDIDATES = 32
"""Most likely tokens of a position that it may take."""
ROUNDS = 100


def choose(logits: Tensor, ids: Tensor, offsets: Tensor) -> Tensor:
    """The tokens (n,) that positions take among their candidates (n, K). offsets: b (V,)."""
    return ids.gather(1, (logits + offsets[ids]).argmax(-1, keepdim=True))[:, 0]


def offsets(logits: Tensor, ids: Tensor, law: Tensor, rounds: int = ROUNDS) -> Tensor:
    """b (V,), zero for tokens that are nobody's candidate and of mean zero under the law of the others.

    logits, ids: (n, K) candidates; law: (V,). Steps go down the dual by the logarithm of due over given, ever smaller ones; half a
    token is added to both, so that what is hardly due is not chased.
    """
    due = law * len(ids)
    candidate = torch.zeros_like(law).index_fill_(0, ids.flatten(), 1.0)
    b = torch.zeros_like(law)
    for step in range(rounds):
        given = torch.bincount(choose(logits, ids, b), minlength=len(law)).to(law)
        b += candidate * ((due + 0.5) / (given + 0.5)).log() / (2.0 + step / 10.0)
    mean = (candidate * law * b).sum() / (candidate * law).sum()
    return candidate * (b - mean)
