"""Nucleotides, k-mers, reading frames, groups, logistic regression and figures: each against what it must be."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, log_loss, matthews_corrcoef, precision_score, roc_auc_score

from artifacts.errors import RequestInvalid
from train.kmer_bert import kmer_tokenizer, kmer_vocabulary
from train.tasks.transcript_scores import TranscriptScores
from train.transcripts.groups import groups_of
from train.transcripts.kmers import KmerTokens, all_kmers
from train.transcripts.logistic_regression import fit
from train.transcripts.nucleotides import codes_of, reverse_complement, text_of, words_of
from train.transcripts.reading_frames import longest_frame, part_of
from train.transcripts.shuffling import dinucleotide_shuffle

SEQUENCES = st.text("ACGT", min_size=0, max_size=120)
STOPS = ("TAA", "TAG", "TGA")


@given(SEQUENCES, st.integers(1, 6))
@settings(deadline=None)
def test_kmers_are_as_many_as_they_should_be_and_give_the_sequence_back(sequence: str, k: int) -> None:
    words, names = words_of(codes_of(sequence), k), all_kmers(k)
    assert len(words) == max(len(sequence) - k + 1, 0)
    if len(words):
        assert names[words[0]] + "".join(names[word][-1] for word in words[1:]) == sequence


@given(SEQUENCES)
def test_case_and_u_make_no_difference_and_two_turns_none_either(sequence: str) -> None:
    codes = codes_of(sequence)
    for other in (sequence.lower(), sequence.replace("T", "U"), sequence.replace("T", "u")):
        assert np.array_equal(codes_of(other), codes)
    assert text_of(codes) == sequence
    assert np.array_equal(reverse_complement(reverse_complement(codes)), codes)


def test_a_vocabulary_has_every_kmer_once_and_stock_transformers_reads_it_alike() -> None:
    assert len(kmer_vocabulary(3)) == 69
    tokenizer = kmer_tokenizer(3)
    tokens = KmerTokens(tokenizer, 3)
    assert len(set(tokens.ids.tolist())) == 65
    sequence = "ATGNCGTUAacgu"
    words = [sequence[at : at + 3] for at in range(len(sequence) - 2)]
    assert tokens.encode(codes_of(sequence), 1).tolist() == tokenizer(" ".join(words)).input_ids
    assert tokens.encode(codes_of(sequence), 3).tolist() == tokenizer(" ".join(words[::3])).input_ids
    long = tokens.encode(codes_of("A" * 50), 1)
    cut = tokens.cut(long, 20)
    assert (len(long), len(cut), cut[-1]) == (50, 20, long[-1])
    assert np.array_equal(cut[:19], long[:19])


@pytest.mark.parametrize("k", [2, 4])
def test_a_tokenizer_of_other_kmers_is_refused(k: int) -> None:
    with pytest.raises(RequestInvalid, match=f"of the {4**k} {k}-mers") as caught:
        KmerTokens(kmer_tokenizer(3), k)
    assert caught.value.errors[0].pointer == "/base_model"


@pytest.mark.parametrize(
    ("sequence", "forward", "six"),
    [
        ("ATGAAATAA", "ATGAAATAA", None),
        ("CCATGAAAATGCCCTAGG", "ATGAAAATGCCCTAG", None),  # the outer of two
        ("ATGAAACC", "ATGAAA", None),  # no stop: to the last whole codon
        ("ATGTAAATGCCCTAA", "ATGCCCTAA", None),  # the longer one
        ("ATGCCCTAAATGGGGTAA", "ATGCCCTAA", None),  # as long: the first
        ("AATGCCCTAATGGGGTAG", "ATGGGGTAG", None),  # as long: frame by frame, so that of frame 0 is the first
        ("CCCGGG", None, None),
        ("AT", None, None),
        ("", None, None),
        ("ATGNNNTAA", "ATGNNNTAA", None),
        ("TTATTTCAT", None, "ATGAAATAA"),
        ("ATGTAACCTTATTTGGGCAT", "ATGTAA", "ATGCCCAAATAA"),
    ],
)
def test_the_longest_reading_frame(sequence: str, forward: str | None, six: str | None) -> None:
    codes = codes_of(sequence)
    for six_frames, wanted in ((False, forward), (True, six or forward)):
        found = longest_frame(codes, six_frames)
        assert (None if found is None else text_of(part_of(codes, found))) == wanted


@given(st.text("ACGTN", max_size=90))
@settings(deadline=None, max_examples=300)
def test_the_longest_reading_frame_is_that_of_a_search_codon_by_codon(sequence: str) -> None:
    lengths = [0]
    for start in range(len(sequence) - 2):
        if sequence[start : start + 3] == "ATG":
            at = start
            while at + 3 <= len(sequence):
                at += 3
                if sequence[at - 3 : at] in STOPS:
                    break
            lengths.append(at - start)
    found = longest_frame(codes_of(sequence))
    assert (0 if found is None else found.length) == max(lengths)


def pairs_of(text: str) -> Counter[str]:
    return Counter(text[place : place + 2] for place in range(len(text) - 1))


@given(st.text("ACGTN", max_size=200), st.integers(0, 9))
@settings(deadline=None)
def test_a_shuffle_keeps_both_ends_and_the_count_of_every_dinucleotide(sequence: str, seed: int) -> None:
    codes = codes_of(sequence)
    shuffled = text_of(dinucleotide_shuffle(codes, np.random.default_rng(seed)))
    assert text_of(codes) == sequence  # it is not changed in its place
    assert pairs_of(shuffled) == pairs_of(sequence)
    assert (shuffled[:1], shuffled[-1:]) == (sequence[:1], sequence[-1:])
    assert shuffled == text_of(dinucleotide_shuffle(codes, np.random.default_rng(seed)))


def test_every_order_with_the_same_dinucleotides_is_as_likely() -> None:
    sequence, count = "AACTAGCA", 3000
    orders = {"".join(order) for order in permutations(sequence)}
    possible = {order for order in orders if pairs_of(order) == pairs_of(sequence) and order[0] == sequence[0]}
    drawn = np.random.default_rng(0)
    found = Counter(text_of(dinucleotide_shuffle(codes_of(sequence), drawn)) for _ in range(count))
    assert found.keys() == possible
    assert len(possible) == 12
    expected = count / len(possible)
    statistic = sum((number - expected) ** 2 / expected for number in found.values())
    assert statistic < chi2.ppf(0.999, len(possible) - 1)


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=3), min_size=1, max_size=12), st.randoms())
def test_groups_join_what_shares_a_key_in_any_order(keys: list[list[str]], chance: object) -> None:
    found = groups_of(keys)
    together = [set(item) for item in keys]
    for _ in keys:  # joined until nothing changes
        for one in together:
            for other in together:
                if one & other:
                    one |= other
    assert found == [min(item) for item in together]
    order = list(range(len(keys)))
    chance.shuffle(order)  # type: ignore[attr-defined]
    assert groups_of([keys[place] for place in order]) == [found[place] for place in order]


@pytest.mark.parametrize("width", [1, 6])
def test_logistic_regression_is_that_of_scikit_learn(width: int) -> None:
    generator = np.random.default_rng(width)
    features = generator.normal(3, 5, (80, width))
    truth = (features @ np.ones(width) + generator.normal(0, 4, 80) > 3 * width).astype(np.int64)
    found = fit(features, truth)
    scaled = (features - features.mean(0)) / features.std(0)
    peer = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(scaled, truth)
    assert found.logits(features) == pytest.approx(peer.decision_function(scaled), abs=1e-4)
    apart = fit(np.array([[0.0, 1.0], [0.0, 1.0], [5.0, 1.0]]), np.array([0, 0, 1]))  # a column that says nothing
    assert np.isfinite(apart.logits(np.array([[1e6, 1.0]]))).all()


def test_figures_are_those_of_scikit_learn_also_of_a_resample_and_of_each_view() -> None:
    generator = np.random.default_rng(0)
    row = np.sort(generator.integers(0, 30, 80))
    view, truth = generator.integers(0, 2, 80), generator.integers(0, 2, 80)
    logit = np.round(generator.normal(0, 2, 80) + truth, 1)  # with ties
    scores = TranscriptScores(30, row, view, truth, logit)
    weights = np.stack([np.ones(30), generator.multinomial(30, np.full(30, 1 / 30)).astype(float)])
    found = scores.figures(weights)
    for number, weighting in enumerate(weights):
        for prefix, chosen in (("", view >= 0), ("full_", view == 0), ("partial_", view == 1)):
            right, said, each = truth[chosen], (logit > 0)[chosen], weighting[row][chosen]
            chance = 1 / (1 + np.exp(-logit[chosen]))
            wanted = {
                "loss": log_loss(right, chance, sample_weight=each),
                "accuracy": accuracy_score(right, said, sample_weight=each),
                "sensitivity": accuracy_score(right[right == 1], said[right == 1], sample_weight=each[right == 1]),
                "specificity": accuracy_score(right[right == 0], said[right == 0], sample_weight=each[right == 0]),
                "precision": precision_score(right, said, sample_weight=each),
                "f1": f1_score(right, said, sample_weight=each),
                "macro_f1": f1_score(right, said, sample_weight=each, average="macro"),
                "mcc": matthews_corrcoef(right, said, sample_weight=each),
                "auroc": roc_auc_score(right, logit[chosen], sample_weight=each),
            }
            for name, value in wanted.items():
                assert found[prefix + name][number] == pytest.approx(value, abs=1e-9), prefix + name
    assert TranscriptScores.of(scores.to_lists()).to_dict() == scores.to_dict()


def test_figures_of_one_class_and_of_one_view_are_defined() -> None:
    zeros, ones = np.zeros(3, np.int64), np.ones(3, np.int64)
    found = TranscriptScores(3, np.arange(3), zeros, ones, np.array([1.0, -1.0, 2.0])).to_dict()
    assert (found["auroc"], found["specificity"], found["mcc"]) == (0.5, 0.0, 0.0)
    assert not any(name.startswith(("full_", "partial_")) for name in found)
