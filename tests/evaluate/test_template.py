"""What of a text is given: prompts and blanks, as tokens of a row."""

import pytest

from megaflow.config.schema import DataConfig
from megaflow.data.prepare import prepare
from megaflow.data.shards import read_manifest
from megaflow.data.tokenizer import decode, encode, load_tokenizer
from megaflow.errors import UserError
from megaflow.evaluate.template import of_blanks, of_prompt


@pytest.fixture
def described(shards):
    """(manifest, tokenizer) of a kind of data."""

    def of(kind: str):
        return read_manifest(shards(kind)), load_tokenizer(shards(kind))

    return of


@pytest.mark.parametrize("kind", ["coded", "documents", "char"])
def test_a_prompt_is_the_beginning_and_the_rest_is_written(described, kind):
    manifest, tokenizer = described(kind)
    found, tokens = of_prompt(manifest, tokenizer, "and god"), encode(tokenizer, "and god")
    assert found.ids.shape == found.given.shape == (1, manifest["length"]) and found.ends([0]) == [len(tokens)]
    assert found.ids[0, : len(tokens)].tolist() == tokens and found.given[0].tolist() == [
        place < len(tokens) for place in range(manifest["length"])
    ]
    assert found.shown is None and found.lengths is None


def test_a_prompt_is_normalized_as_the_text_was(described):
    manifest, tokenizer = described("char")
    found = of_prompt(manifest, tokenizer, "And GOD, said: ")
    assert decode(tokenizer, found.ids[0, : found.ends([0])[0]].tolist()) == "and god said "


def test_blanks_are_so_many_tokens_each(described):
    manifest, tokenizer = described("coded")
    found = of_blanks(manifest, tokenizer, "the ___ of ____", 3)
    first, second = encode(tokenizer, "the"), encode(tokenizer, " of")
    given = [True] * len(first) + [False] * 3 + [True] * len(second) + [False] * 3
    assert found.shown == len(given) and found.given[0, : len(given)].tolist() == given and not found.given[0, len(given) :].any()
    assert found.ids[0][found.given[0]].tolist() == first + second and found.lengths is None


def test_a_blank_keeps_the_space_where_words_do_not_begin_with_one(described):
    manifest, tokenizer = described("char")
    found = of_blanks(manifest, tokenizer, "the ___ of___", 2)
    assert decode(tokenizer, found.ids[0][found.given[0]].tolist()) == "the  of"


def test_a_document_with_blanks_ends_after_them(described):
    """Its end token is given, and shown no more."""
    manifest, tokenizer = described("documents")
    found = of_blanks(manifest, tokenizer, "the ___.", 4)
    assert found.lengths == [found.shown + 1] and found.given[0, found.shown]
    assert found.ids[0, found.shown] == manifest["tokenizer"]["end_id"]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda *of: of_prompt(*of, "a" * 400), "--prompt: it has .* tokens, and the run's rows have 16; give less of it"),
        (lambda *of: of_prompt(*of, ""), "--prompt: it has no token"),
        (lambda *of: of_blanks(*of, "no blank", 3), "--infill 'no blank': it has no blank; write ___"),
        (lambda *of: of_blanks(*of, "a ___", 0), "--blank: 0 is not a positive number"),
        (lambda *of: of_blanks(*of, "a ___ b ___", 9), "--infill: it has .* tokens, and the run's rows have 16"),
    ],
)
def test_what_cannot_be_given_is_refused(described, make, words):
    with pytest.raises(UserError, match=words):
        make(*described("coded"))


def test_a_letter_that_the_tokenizer_never_saw(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("abcabcabc abcabc " * 20)
    config = DataConfig(path=str(tmp_path / "data"), source=[str(file)], tokenizer="characters", length=4, workers=1)
    prepare(config)
    with pytest.raises(UserError, match="--prompt: the tokenizer has no token for 'z'"):
        of_prompt(read_manifest(config.path), load_tokenizer(config.path), "abz")
