"""A token-level n-gram for the demo's model, from the training transcripts of the shipped corpus.

    python tests/make_lm.py lm.arpa

Interpolated Kneser-Ney (Chen & Goodman 1999) as back-off weights in ARPA's format."""

import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

from conftest import corpus_rows
from small_model import label_encoder, processor

DISCOUNT = 0.75


def count_ngrams(sentences, order):
    """[{n-gram: count} of length 1, 2, ... order]; of the shorter ones their kinds of left neighbours are counted, but
    where <s> stands first, which has none."""
    raw = [Counter() for _ in range(order + 1)]
    for sentence in sentences:
        words = ["<s>", *sentence, "</s>"]
        for length in range(1, order + 1):
            raw[length].update(tuple(words[start : start + length]) for start in range(len(words) - length + 1))
    counts = [
        Counter(longer[1:] for longer in raw[length + 1])
        + Counter({ngram: count for ngram, count in raw[length].items() if ngram[0] == "<s>"})
        for length in range(1, order)
    ]
    return [*counts, raw[order]]


def estimate(sentences, vocabulary, order):
    """({n-gram: its last word's probability after the others}, {n-gram: its back-off weight}) for words of
    `vocabulary`; the probabilities after any context sum to 1."""
    counts = count_ngrams(sentences, order)
    del counts[0][("<s>",)]
    # A word of the vocabulary that no sentence has is likelier than one outside of it.
    shares = dict.fromkeys([*vocabulary, "</s>"], 1.0) | {"<unk>": 0.1}
    counts[0].update({(word,): 0 for word in shares})
    probabilities, back_off = {}, {}
    for ngrams in counts:
        followers = defaultdict(list)
        for ngram, count in ngrams.items():
            followers[ngram[:-1]].append((ngram, count))
        for context, found in followers.items():
            total = sum(count for _, count in found)
            back_off[context] = DISCOUNT * sum(count > 0 for _, count in found) / total
            for ngram, count in found:
                lower = probabilities[ngram[1:]] if context else shares[ngram[0]] / sum(shares.values())
                probabilities[ngram] = max(count - DISCOUNT, 0) / total + back_off[context] * lower
    return probabilities, back_off


def write_arpa(path, probabilities, back_off):
    by_length = defaultdict(list)
    for ngram, probability in [(("<s>",), 1e-99), *probabilities.items()]:
        by_length[len(ngram)].append((ngram, probability))
    lines = ["\\data\\", *(f"ngram {length}={len(ngrams)}" for length, ngrams in by_length.items())]
    for length, ngrams in by_length.items():
        lines += ["", f"\\{length}-grams:"]
        for ngram, probability in ngrams:
            weight = [f"{math.log10(back_off.get(ngram, 1)):.6f}"] if length < len(by_length) else []
            lines.append("\t".join([f"{math.log10(probability):.6f}", " ".join(ngram), *weight]))
    Path(path).write_text("\n".join([*lines, "", "\\end\\", ""]), encoding="utf-8")


def make_lm(path, order=4, spell=str):
    """Write the n-gram of the small model's tokens, each as `spell(piece)` in the file."""
    tokenizer, encoder = processor().tokenizer, label_encoder()
    pieces = [spell(piece) for piece in tokenizer.convert_ids_to_tokens(range(encoder.vocab_size))]
    special = set(map(spell, tokenizer.all_special_tokens))
    texts = [text for row in corpus_rows("train").values() if (text := row["transcript"]).strip()]
    sentences = [[pieces[id] for id in ids] for ids in encoder(texts)]
    write_arpa(path, *estimate(sentences, [piece for piece in pieces if piece not in special], order))


if __name__ == "__main__":
    make_lm(sys.argv[1])
