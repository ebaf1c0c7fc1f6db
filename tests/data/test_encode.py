"""Encoding in pieces and in processes gives what encoding the whole in one does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaflow.data import encode
from megaflow.data import tokenizer as tok
from tests.data.texts import TEXT


class TestPieces:
    @pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2", "bert"])
    @given(text=TEXT, size=st.integers(1, 9))
    def test_pieces_encode_to_what_the_whole_does(self, tokenizers, kind, text, size):
        cut = list(encode.pieces(text, "train", kind, size))
        assert "".join(piece.text for piece in cut) == text
        assert [piece.first for piece in cut] == [True] + [False] * (len(cut) - 1)
        assert [piece.last for piece in cut] == [False] * (len(cut) - 1) + [True]
        encoded = [tok.encode(tokenizers[kind], piece.text) for piece in cut]
        assert sum(encoded, []) == tok.encode(tokenizers[kind], text)

    def test_they_are_small_where_the_text_allows(self):
        text = "the cats sat. " * 100
        assert max(len(piece.text) for piece in encode.pieces(text, "train", "bpe", 50)) < 60
        assert max(len(piece.text) for piece in encode.pieces("x" * 999, "train", "bytes", 50)) == 50
        assert len(list(encode.pieces(text, "train", "file", 50))) == 1

    @given(text=st.text(alphabet="the cats ,.ab don't\n", max_size=60), size=st.integers(1, 9))
    def test_characters_of_pieces_add_up_to_the_decoding(self, tokenizers, text, size):
        bert = tokenizers["bert"]
        cut = [piece for piece in encode.pieces(text.lstrip(), "train", "bert", size)]
        counts = [tok.character_count(bert, tok.encode(bert, piece.text), piece.first) for piece in cut]
        assert sum(counts) == len(tok.decode(bert, tok.encode(bert, text)))

    def test_the_number_of_workers_does_not_matter(self, tokenizers, tmp_path, monkeypatch):
        monkeypatch.setattr(encode, "BATCH", 20)
        tok.save_tokenizer(tokenizers["bpe"], tmp_path)
        texts = [f"the {place} cats" * (place % 3) for place in range(40)]
        expected = [(text, tok.encode(tokenizers["bpe"], text), len(text)) for text in texts]
        for workers in (1, 2):
            stream = (piece for text in texts for piece in encode.pieces(text, "train", "bpe"))
            found = encode.encode_pieces(tmp_path, "bpe", stream, workers)
            assert [(piece.text, ids.tolist(), characters) for piece, ids, characters in found] == expected
