"""The judge: a proper law, equal to Kneser-Ney written by hand, that knows real text from shuffled text."""

import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from megaflow.errors import UserError
from megaflow.evaluate import judge as judging

WORDS = "the and of that he she it was said lord king house came down river light day night people unto stone".split()


def sentences(seed: int, count: int) -> str:
    """Text with structure to learn: sentences of common words, some capitals and points."""
    rng = random.Random(seed)
    return " ".join(" ".join(rng.choices(WORDS, k=rng.randint(4, 9))).capitalize() + "." for _ in range(count))


@pytest.fixture(scope="module")
def judge() -> judging.Judge:
    return judging.fit(sentences(0, 400))


def by_hand(texts: list[str], order: int, context: str, character: str) -> Fraction:
    """Interpolated Kneser-Ney in exact arithmetic over dictionaries, for characters of the training texts ('' is any other)."""
    alphabet = sorted(set("".join(texts))) + [""]
    grams = [(text[max(i - 20, 0) : i], text[i]) for text in texts for i in range(len(text))]
    context = context[-(order - 1) :] if order > 1 else ""

    def counted(k: int, top: bool) -> Counter:
        seen = [(before, before[len(before) - k + 1 :] + c) for before, c in grams if len(before) >= k - 1]
        if top:
            return Counter(gram for _, gram in seen)
        return Counter(gram for _, gram in {(before[: len(before) - k + 1][-1:], gram) for before, gram in seen})

    p = Fraction(1, len(alphabet))
    for k in range(1, len(context) + 2):
        counts = counted(k, top=k == len(context) + 1)
        history = context[len(context) - k + 1 :]
        after = [n for gram, n in counts.items() if gram[:-1] == history]
        if not after:
            continue
        once, twice = sum(n == 1 for n in counts.values()), sum(n == 2 for n in counts.values())
        discount = Fraction(once, once + 2 * twice) if once else Fraction(1, 2)
        here = counts[history + character] if character else 0
        p = (max(here - discount, Fraction(0)) + discount * len(after) * p) / sum(after)
    return p


@pytest.mark.parametrize("order", [1, 2, 3, 6])
@pytest.mark.parametrize("texts", [["abracadabra"], ["abab", "b", "cabba"], ["ab"]])
def test_equals_kneser_ney_written_with_dictionaries_and_fractions(texts, order):
    judge = judging.fit(texts, order)
    for context in ("", "a", "ab", "abra", "cadab", "zz", "zab", "racadab"):
        exact = [by_hand(texts, order, context, c) for c in sorted(set("".join(texts))) + [""]]
        assert sum(exact) == 1
        np.testing.assert_allclose(judging.distribution(judge, context), [float(p) for p in exact], rtol=1e-13)


def test_one_value_worked_out_on_paper():
    # "aab", order 1: counts a 2, b 1; D = 1 / (1 + 2) = 1/3; floor 1/3 over {a, b, other}
    # p(a) = (5/3 + 1/3 * 2 * 1/3) / 3 = 17/27, p(b) = (2/3 + 2/9) / 3 = 8/27, p(other) = 2/27
    np.testing.assert_allclose(judging.distribution(judging.fit("aab", order=1), ""), [17 / 27, 8 / 27, 2 / 27], rtol=1e-14)


def test_sums_to_one_in_every_context(judge):
    rng = random.Random(1)
    letters = [chr(c) for c in judge.alphabet] + ["é", "漢"]
    held_out = sentences(7, 50)
    contexts = ["".join(rng.choices(letters, k=rng.randint(0, 8))) for _ in range(300)]
    contexts += [held_out[i : i + rng.randint(0, 8)] for i in range(0, 1200, 4)]
    assert judging.sum_error(judge, contexts) < 1e-12
    assert min(judging.distribution(judge, context).min() for context in contexts) > 0


def test_the_bits_of_a_text_are_those_of_the_distributions(judge):
    text = sentences(3, 4) + " Zürich, 漢字"
    symbol = {chr(c): i for i, c in enumerate(judge.alphabet)}
    expected = [-math.log2(judging.distribution(judge, text[:i])[symbol.get(c, judge.symbols - 1)]) for i, c in enumerate(text)]
    np.testing.assert_allclose(judging.bits(judge, text), expected, rtol=1e-12, atol=1e-13)


def test_real_text_is_judged_better_than_its_words_shuffled_and_those_than_its_characters_shuffled(judge):
    real = sentences(5, 60)
    rng = random.Random(0)
    letters, typos = list(real), list(real)
    rng.shuffle(letters)
    for i in rng.sample(range(len(typos)), len(typos) // 20):
        typos[i] = rng.choice(WORDS)[0]
    scores = [judging.bits_per_character(judge, [text]) for text in (real, "".join(typos), "".join(letters))]
    assert scores[0] + 0.2 < scores[1] and scores[1] + 0.5 < scores[2]


def test_a_higher_order_judges_held_out_text_better():
    train, held_out = sentences(0, 400), sentences(5, 60)
    scores = [judging.bits_per_character(judging.fit(train, order), [held_out]) for order in (1, 2, 3)]
    assert scores == sorted(scores, reverse=True)


def test_bits_per_character_weighs_characters_and_starts_every_text_afresh(judge):
    texts = ["the lord", "", "said"]
    total = sum(judging.bits(judge, text).sum() for text in texts)
    assert judging.bits_per_character(judge, texts) == pytest.approx(total / 12, rel=1e-12)
    assert judging.bits_per_character(judge, ["the lordsaid"]) != pytest.approx(total / 12, rel=1e-6)
    assert math.isnan(judging.bits_per_character(judge, ["", ""])) and math.isnan(judging.bits_per_character(judge, []))
    assert judging.bits(judge, "").shape == (0,)


def test_texts_do_not_run_into_each_other():
    apart = judging.fit(["aaaa", "bbbb"], order=2)
    together = judging.fit("aaaabbbb", order=2)
    assert judging.distribution(together, "a")[1] > judging.distribution(apart, "a")[1] > 0


def test_unseen_characters_share_one_symbol_and_stay_finite(judge):
    scores = judging.bits(judge, "the 漢字 \ud800")
    assert np.isfinite(scores).all()
    assert judging.bits(judge, "漢")[0] == judging.bits(judge, "字")[0] > judging.bits(judge, "q")[0] - 1e-12
    assert scores[4] > scores[:4].max()


def test_of_a_large_alphabet_the_most_frequent_characters_are_kept():
    common = "".join(chr(0x4E00 + i) for i in range(900)) * 3
    rare = "".join(chr(0x6000 + i) for i in range(400))
    judge = judging.fit(common + rare)
    assert judge.symbols == 1024
    assert set(chr(c) for c in judge.alphabet) >= set(common)
    assert judging.sum_error(judge, ["", common[:5], rare[-5:], "ab"]) < 1e-12
    assert judging.bits(judge, rare[-1])[0] == judging.bits(judge, "x")[0]


def test_turned_around_it_reads_real_text_as_one_that_learned_from_the_texts(judge):
    texts, real = [sentences(11, 20), "", sentences(12, 20)], [sentences(5, 30)]
    learned = judging.fit(texts, judge.order, judge.alphabet)
    assert judging.reverse(judge, texts, real) == judging.bits_per_character(learned, real)
    assert math.isnan(judging.reverse(judge, ["", ""], real))


def test_what_texts_leave_out_costs_them_though_the_judge_likes_them_better(judge):
    """One sentence again and again is likely text, but says little of what real text holds."""
    varied, real = [sentences(seed, 2) for seed in range(20, 40)], [sentences(5, 60)]
    same = [min(varied, key=lambda text: judging.bits(judge, text).mean())] * 20
    assert judging.bits_per_character(judge, same) < judging.bits_per_character(judge, varied)
    assert judging.reverse(judge, same, real) > judging.reverse(judge, varied, real) + 0.5


def test_turned_around_the_alphabet_stays_the_judge_s(judge):
    """Texts of few characters must not make all others one cheap class."""
    learned = judging.fit(["the the"], judge.order, judge.alphabet)
    assert learned.symbols == judge.symbols > judging.fit(["the the"]).symbols
    assert judging.sum_error(learned, ["", "t", "the t", "zz"]) < 1e-12
    assert judging.reverse(judge, ["the the"], ["lord"]) > judging.bits_per_character(judging.fit(["the the"]), ["lord"])


def test_saved_and_loaded_it_is_the_same_judge(judge, tmp_path):
    path = tmp_path / "judge"
    judging.save(judge, path)
    assert [p.name for p in tmp_path.iterdir()] == ["judge"]
    again, text = judging.load(path), sentences(9, 10)
    np.testing.assert_array_equal(judging.bits(again, text), judging.bits(judge, text))
    np.testing.assert_array_equal(judging.distribution(again, "the l"), judging.distribution(judge, "the l"))


def test_two_processes_may_save_it_at_once(judge, tmp_path, monkeypatch):
    path, savez = tmp_path / "judge", np.savez_compressed

    def interrupted(file, **arrays):
        with monkeypatch.context() as other:
            other.setattr("os.getpid", lambda: 1)
            other.setattr("numpy.savez_compressed", savez)
            judging.save(judge, path)
        savez(file, **arrays)

    monkeypatch.setattr("numpy.savez_compressed", interrupted)
    judging.save(judge, path)
    assert [p.name for p in tmp_path.iterdir()] == ["judge"] and judging.load(path).symbols == judge.symbols


def test_what_is_no_judge_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no judge at"):
        judging.load(tmp_path / "absent.npz")
    (tmp_path / "bad.npz").write_bytes(b"not an archive")
    with pytest.raises(UserError, match="is not a judge"):
        judging.load(tmp_path / "bad.npz")
    with pytest.raises(UserError, match="no text to learn from"):
        judging.fit([])


def test_token_entropy_is_the_mean_over_texts_of_the_entropy_within_a_text():
    assert judging.token_entropy([[3, 3, 3], [1, 2]]) == pytest.approx(math.log(2) / 2)
    assert judging.token_entropy([[1, 2, 3, 4], []]) == pytest.approx(math.log(4))
    assert judging.token_entropy(np.array([[5, 6], [7, 7]])) == pytest.approx(math.log(2) / 2)
    assert math.isnan(judging.token_entropy([]))
