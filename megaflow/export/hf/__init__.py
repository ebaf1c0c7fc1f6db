"""A converted model that plain transformers opens too: `AutoModel.from_pretrained(OUT, trust_remote_code=True)`, without megaflow.

write                 what lies in the folder besides, and whether transformers computes the same
fields                what config.json says, and the fixed tensors beside the weights
card                  the model card
modeling_megaflow*    the network as transformers has it, copied into the folder as it is: what all kinds share, and a file of its kind
"""

from megaflow.export.hf.write import compare, fixed, opened, quiet, write

__all__ = ["compare", "fixed", "opened", "quiet", "write"]
