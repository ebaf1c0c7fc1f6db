"""Texts that tokenizers find hard."""

from hypothesis import strategies as st

TRAINING = ["the cat sat on the mat", "the dog's bowl is on the mat, isn't it", "12 cats\n\n  and 12 dogs <|end|>"] * 3
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "sat", ",", ".", "a", "##b", "don", "'", "t"]
# words, runs of spaces, newlines, digits, accents, emoji, and the spelling of the special tokens
TEXT = (
    st.text(alphabet=st.sampled_from("thecats 12'.,\n\t  éß漢😀"), max_size=60)
    | st.text(max_size=30)
    | st.sampled_from(["a<|end|>b", "[SEP] <|endoftext|>"])
)
