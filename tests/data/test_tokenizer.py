"""Every kind of tokenizer: exact round trips, nothing added, nothing read out of the text, cut anywhere it is cut."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from megaflow.config.schema import DataConfig
from megaflow.data import tokenizer as tok
from megaflow.errors import UserError
from tests.data.texts import TEXT, TRAINING, WORDS


class TestRoundTrip:
    @pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2"])
    @given(text=TEXT)
    def test_byte_level_kinds_take_any_text(self, tokenizers, kind, text):
        ids = tok.encode(tokenizers[kind], text)
        assert tok.decode(tokenizers[kind], ids) == text
        assert tok.end_id(tokenizers[kind]) not in ids

    @pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2"])
    @given(text=TEXT)
    def test_every_token_stands_for_bytes(self, tokenizers, kind, text):
        said = tok.bytes_of_tokens(tokenizers[kind])
        assert b"".join(said[token] for token in tok.encode(tokenizers[kind], text)) == text.encode()
        assert len(said) == tok.vocabulary_size(tokenizers[kind]) and all(said)
        assert tok.bytes_of_tokens(tokenizers["bert"]) is None is tok.bytes_of_tokens(tok.characters_tokenizer("abc"))

    @given(text=TEXT)
    def test_characters_take_the_text_they_were_made_from(self, text):
        tokenizer = tok.characters_tokenizer(sorted(set(text)))
        ids = tok.encode(tokenizer, text)
        assert ids == [sorted(set(text)).index(character) for character in text]
        assert tok.decode(tokenizer, ids) == text

    def test_the_end_token_decodes_to_one_newline(self, tokenizers):
        for tokenizer in (tokenizers["bpe"], tokenizers["bytes"], tokenizers["gpt2"], tok.characters_tokenizer("abc")):
            a, b, end = tok.encode(tokenizer, "ab"), tok.encode(tokenizer, "c"), tok.end_id(tokenizer)
            assert tok.decode(tokenizer, np.array([*a, end, *b, end, end])) == "ab\nc\n\n"

    def test_saved_and_loaded_it_is_the_same(self, tokenizers, tmp_path):
        for tokenizer in tokenizers.values():
            tok.save_tokenizer(tokenizer, tmp_path)
            loaded = tok.load_tokenizer(tmp_path)
            assert tok.tokenizer_hash(loaded) == tok.tokenizer_hash(tokenizer)
            for text in ("the cats sat, <|end|> [SEP]", "<|endoftext|>"):
                assert tok.encode(loaded, text) == tok.encode(tokenizer, text)
        assert len({tok.tokenizer_hash(tokenizer) for tokenizer in tokenizers.values()}) == len(tokenizers)

    def test_saved_it_is_the_library_s_own_file(self, tokenizers, tmp_path):
        for tokenizer in tokenizers.values():
            tok.save_tokenizer(tokenizer, tmp_path)
            tokenizer.save(str(tmp_path / "own.json"))
            assert (tmp_path / tok.TOKENIZER_FILE).read_bytes() == (tmp_path / "own.json").read_bytes()

    def test_a_full_disk_is_an_error_of_the_system(self, tokenizers, full):
        with pytest.raises(OSError, match="No space left on device"):
            tok.save_tokenizer(tokenizers["bpe"], full)


class TestKinds:
    def test_letters_are_27_symbols_without_an_end(self):
        tokenizer = tok.given_tokenizer(DataConfig(tokenizer="characters", normalize="letters"))
        assert tok.vocabulary_size(tokenizer) == 27
        assert tok.end_id(tokenizer) is None
        assert tok.encode(tokenizer, " az") == [0, 1, 26]

    def test_bytes_are_utf8(self, tokenizers):
        text = "aé漢😀\x00\n"
        assert tok.encode(tokenizers["bytes"], text) == list(text.encode())
        assert (tok.vocabulary_size(tokenizers["bytes"]), tok.end_id(tokenizers["bytes"])) == (257, 256)

    def test_a_bpe_has_the_size_it_was_asked_for(self, tokenizers):
        assert (tok.vocabulary_size(tokenizers["bpe"]), tok.end_id(tokenizers["bpe"])) == (290, 289)
        assert len(tok.encode(tokenizers["bpe"], "the cat sat on the mat")) < 12
        assert tok.vocabulary_size(tok.train_bpe([], 257)) == 257

    def test_a_bpe_is_a_function_of_its_texts(self, tokenizers):
        assert tok.tokenizer_hash(tok.train_bpe(iter(TRAINING), 290)) == tok.tokenizer_hash(tokenizers["bpe"])
        assert tok.tokenizer_hash(tok.train_bpe(TRAINING[:2], 290)) != tok.tokenizer_hash(tokenizers["bpe"])

    def test_gpt2_reads_the_published_files(self, tokenizers):
        for text in TRAINING:
            assert tok.encode(tokenizers["gpt2"], text) == tok.encode(tokenizers["bpe"], text)
        assert tokenizers["gpt2"].id_to_token(tok.end_id(tokenizers["gpt2"])) == "<|endoftext|>"

    def test_bert_lower_cases_and_adds_nothing(self, tokenizers):
        assert tokenizers["bert"].encode("The CÁTS sat.").tokens == ["the", "cat", "##s", "sat", "."]
        assert tokenizers["bert"].encode("zebra [SEP]").tokens == ["[UNK]", "[UNK]", "[UNK]", "[UNK]"]
        assert tok.end_id(tokenizers["bert"]) == WORDS.index("[SEP]")
        assert tok.decode(tokenizers["bert"], tok.encode(tokenizers["bert"], "The CÁTS sat.")) == "the cats sat."

    def foreign(self, folder: Path, vocabulary: list[str]) -> str:
        tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(vocabulary)}, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing("a $A a", special_tokens=[("a", 1)])
        tokenizer.enable_truncation(2)
        tokenizer.enable_padding(length=9)
        tokenizer.save(str(folder / "mine.json"))
        return str(folder / "mine.json")

    def test_a_foreign_tokenizer_neither_adds_nor_cuts_nor_pads(self, tmp_path):
        tokenizer = tok.given_tokenizer(DataConfig(tokenizer=self.foreign(tmp_path, ["?", "a", "b", "</s>"])))
        assert tok.encode(tokenizer, "b a b c") == [2, 1, 2, 0]
        assert tokenizer.encode("b").ids == [2]
        assert (tok.vocabulary_size(tokenizer), tok.end_id(tokenizer)) == (4, 3)

    def test_a_foreign_tokenizer_without_an_end_token_gets_one(self, tmp_path):
        tokenizer = tok.given_tokenizer(DataConfig(tokenizer=self.foreign(tmp_path, ["?", "a", "b"])))
        assert (tok.vocabulary_size(tokenizer), tokenizer.id_to_token(tok.end_id(tokenizer))) == (4, tok.END)


class TestErrors:
    def test_unknown_characters_are_named(self):
        with pytest.raises(UserError, match="no token for 'x', 'y'"):
            tok.encode(tok.characters_tokenizer("ab"), "axby")

    def test_a_folder_without_a_tokenizer(self, tmp_path):
        with pytest.raises(UserError, match="no tokenizer.json"):
            tok.load_tokenizer(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(UserError, match="is damaged"):
            tok.load_tokenizer(tmp_path)

    def test_a_mistyped_name(self):
        with pytest.raises(UserError, match="data.tokenizer=caracters is neither .* did you mean characters?"):
            tok.given_tokenizer(DataConfig(tokenizer="caracters"))

    @pytest.mark.parametrize("kind, file", [("gpt2", "encoder.json and vocab.bpe"), ("bert", "vocab.txt")])
    def test_missing_vocabulary_files(self, tmp_path, kind, file):
        with pytest.raises(UserError, match=f"tokenizer_path is empty.*{file}"):
            tok.given_tokenizer(DataConfig(tokenizer=kind))
        with pytest.raises(UserError, match=f"lacks {file}"):
            tok.given_tokenizer(DataConfig(tokenizer=kind, tokenizer_path=str(tmp_path)))

    def test_a_folder_of_its_name_is_told(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "gpt2").mkdir()
        tok.save_tokenizer(tok.train_bpe(["and it came to pass"] * 3, 260), tmp_path / "gpt2")
        with pytest.raises(UserError, match=r"tokenizer_path is empty.*; \./gpt2 is the folder of that name here"):
            tok.given_tokenizer(DataConfig(tokenizer="gpt2"))
        assert tok.given_tokenizer(DataConfig(tokenizer="./gpt2")).get_vocab_size() == 260

    def test_wrong_vocabulary_files(self, tmp_path):
        (tmp_path / "encoder.json").write_text('{"a": 0}')
        (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
        (tmp_path / "vocab.txt").write_text("the\ncat")
        with pytest.raises(UserError, match="255 of the 256 bytes"):
            tok.given_tokenizer(DataConfig(tokenizer="gpt2", tokenizer_path=str(tmp_path)))
        with pytest.raises(UserError, match=r"no line \[UNK\]"):
            tok.given_tokenizer(DataConfig(tokenizer="bert", tokenizer_path=str(tmp_path)))
        (tmp_path / "encoder.json").write_text("[]")
        with pytest.raises(UserError, match="not GPT-2's vocabulary"):
            tok.given_tokenizer(DataConfig(tokenizer="gpt2", tokenizer_path=str(tmp_path)))

    def test_a_name_that_is_no_tokenizer(self, tmp_path):
        with pytest.raises(UserError, match="data.tokenizer=bqe is neither"):
            tok.given_tokenizer(DataConfig(tokenizer="bqe"))
        (tmp_path / "mine.json").write_text('{"not": "a tokenizer"}')
        with pytest.raises(UserError, match="is not a tokenizer.json"):
            tok.given_tokenizer(DataConfig(tokenizer=str(tmp_path / "mine.json")))


def test_a_folder_that_holds_a_tokenizer_is_one(tmp_path):
    tok.save_tokenizer(tok.train_bpe(["and it came to pass"] * 3, 260), tmp_path)
    found = [tok.given_tokenizer(DataConfig(tokenizer=str(path))) for path in (tmp_path, tmp_path / "tokenizer.json")]
    assert tok.tokenizer_hash(found[0]) == tok.tokenizer_hash(found[1])
