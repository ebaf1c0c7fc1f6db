"""Tiny judges: GPT-2 of two layers with random weights and a byte-level BPE, as save_pretrained writes them."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

END = "<|endoftext|>"
TEXT = ["In the beginning God created the heaven and the earth. And the earth was without form, and void; and darkness was upon the deep."]


def tokenizer(size: int = 290, begin: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE; with `begin` it puts <s> before every text, as Llama's does."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(iter(TEXT), trainers.BpeTrainer(vocab_size=size - 2, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens([AddedToken(END, special=True), AddedToken("<s>", special=True)])
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    if begin:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, bos_token="<s>")


def save_judge(folder: Path, positions: int = 32, begin: bool = False, size: int = 290, seed: int = 0, **model: object) -> Path:
    """A folder of a judge that reads `positions` tokens. Its logits are spread as those of a trained one."""
    torch.manual_seed(seed)
    words = tokenizer(size, begin)
    config = GPT2Config(vocab_size=len(words), n_positions=positions, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4)
    GPT2LMHeadModel(config).save_pretrained(folder, **model)
    words.save_pretrained(folder)
    return folder
